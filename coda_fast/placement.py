"""Where the cells of a feature map of a convolutional stem lie in the picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coda_fast import _arguments
from coda_fast._autocast import without_autocast
from coda_fast._geometry import Geometry, pair

LARGEST_FIELD = 1 << 31  # rows or columns of a receptive field: a file that claims more is damaged or hostile


def _two(value, name, check, *limits):
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"placement.{name}: expected two numbers, got {_arguments.short(value)}")
    return tuple(check(v, f"placement.{name}", *limits) for v in value)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the cells of a feature map lie in a picture.

    Cell (i, j) has its centre, the middle of its receptive field, at ``first + (i, j) * stride``, in pixels
    whose centres have whole numbers as coordinates. Each pair is (vertical, horizontal).

    Args:
        stride: rows and columns of pixels from the centre of a cell to that of the next one.
        first: row and column of the centre of cell (0, 0); it may lie outside of the picture.
        field: rows and columns of the receptive field, or None if it is not known. What a cell learns from
            statistics of the whole picture (squeeze-and-excitation, group norms) does not count.
        assumed: whether the centres are assumed, not derived: the cells are taken to divide the picture
            evenly.

    Raises:
        ValueError: a value is of the wrong kind.

    >>> PIXELS.then((3, 3), (2, 2), (1, 1), (1, 1)).then((3, 3), (2, 2), (1, 1), (1, 1))
    Placement(stride=(4.0, 4.0), first=(0.0, 0.0), field=(7, 7), assumed=False)
    """

    stride: tuple[float, float]
    first: tuple[float, float]
    field: tuple[int, int] | None
    assumed: bool

    def __post_init__(self) -> None:
        stride = _two(self.stride, "stride", _arguments.number)
        first = _two(self.first, "first", _arguments.number)
        if min(stride) <= 0:
            raise ValueError(f"placement.stride: expected two positive numbers, got {stride}")
        field = self.field
        if field is not None:
            field = _two(field, "field", _arguments.positive_integer, LARGEST_FIELD)
        if not isinstance(self.assumed, bool):
            raise ValueError(
                f"placement.assumed: expected true or false, got {_arguments.short(self.assumed)}"
            )
        for name, value in (("stride", stride), ("first", first), ("field", field)):
            object.__setattr__(self, name, value)

    def then(
        self,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Placement:
        """The placement of the output of a convolution, or of a DAU layer, of features placed like this.

        Args:
            kernel, stride, dilation: pairs of ints, at least 1.
            padding: rows and columns that are added on each side.

        Raises:
            TypeError, ValueError: an argument is not such a pair.
        """
        window = Geometry.make(kernel, stride, padding, dilation)
        before = (window.padding[2], window.padding[0])  # rows above, columns to the left
        strides, starts, extents = [], [], []
        for axis in (0, 1):
            reach = window.dilation[axis] * (window.kernel[axis] - 1)
            strides.append(self.stride[axis] * window.stride[axis])
            starts.append(self.first[axis] + (reach / 2 - before[axis]) * self.stride[axis])
            if self.field is not None:
                extents.append(self.field[axis] + math.ceil(reach * self.stride[axis]))
        field = (extents[0], extents[1]) if extents else None
        return Placement((strides[0], strides[1]), (starts[0], starts[1]), field, self.assumed)

    def interpolate(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Maps of cells [..., h, w] as maps of pixels [..., H, W], for the eye and for ranking pixels: linear
        interpolation between the centres, constant beyond the outermost ones, times h w / (H W), so that
        values are per pixel.

        A constant map stays constant. The sum is about that of the cells, but not exactly, because a cell at
        the border may stand for fewer or more pixels than others: see ``spread``. Arguments, result and
        errors are those of ``spread``.
        """
        rows, columns = self._weights(maps, size)
        share = maps.shape[-2] * maps.shape[-1] / (rows.shape[0] * columns.shape[0])
        with without_autocast(maps.device.type):
            return rows.to(maps) @ maps @ columns.T.to(maps) * share

    def spread(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Maps of cells [..., h, w] as maps of pixels [..., H, W], with the same sums.

        The value of each cell is shared among the pixels around its centre, in proportion to the weights of
        linear interpolation between the centres, which is constant beyond the outermost ones. A cell that has
        no pixel near its centre gives all of its value to the nearest pixel. At the border a cell may have
        fewer or more pixels than elsewhere, which get more or less of it: see ``interpolate``.

        Args:
            maps: floating point, float32 or wider.
            size: H and W, positive ints.

        Returns:
            A tensor with the dtype and device of ``maps``, differentiable.

        Raises:
            TypeError: ``maps`` is not floating point, or ``size`` not a pair of ints.
            ValueError: ``maps`` has fewer than two dimensions or no cells, or a side is not positive.
        """
        weights = self._weights(maps, size)
        centres = zip(weights, self.stride, self.first, strict=True)
        rows, columns = (_shares(each, step, start).to(maps) for each, step, start in centres)
        with without_autocast(maps.device.type):
            return rows @ maps @ columns.T

    def _weights(self, maps, size):
        """[H, h] and [W, w], float64: the weights of interpolation; those of each pixel sum to 1."""
        if not maps.dtype.is_floating_point:
            raise TypeError(f"maps: expected floating point, got {maps.dtype}")
        if maps.dim() < 2 or 0 in maps.shape[-2:]:
            raise ValueError(f"maps: expected [..., h, w] with cells, got shape {list(maps.shape)}")
        axes = zip(maps.shape[-2:], pair(size, "size"), self.stride, self.first, strict=True)
        return [_interpolation(*axis) for axis in axes]

    def box(self, row: int, column: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The pixels of a picture that the receptive field of a cell covers.

        Args:
            row, column: the cell.
            size: height and width of the picture.

        Returns:
            Top, left, bottom and right, the last two exclusive: whole pixels within the picture, at least
            one. If the receptive field is not known, the cell is as large as the stride.

        Raises:
            TypeError, ValueError: ``size`` is not a pair of positive ints.
        """
        found = []
        for index, side, step, start, extent in zip(
            (row, column), pair(size, "size"), self.stride, self.first, self.field or self.stride, strict=True
        ):
            before = start + index * step - (extent - 1) / 2
            # an edge between two pixels must not include either of them by an error of rounding
            low, high = math.floor(round(before, 6)), math.ceil(round(before + extent, 6))
            low = min(max(low, 0), side - 1)
            found.append((low, max(min(high, side), low + 1)))
        return found[0][0], found[1][0], found[0][1], found[1][1]

    def config(self) -> dict:
        """The placement as JSON values."""
        return {
            "stride": list(self.stride),
            "first": list(self.first),
            "field": self.field and list(self.field),
            "assumed": self.assumed,
        }

    @classmethod
    def of(cls, value: Mapping) -> Placement:
        """A placement from a result of ``config``, which may come from an untrusted file; ValueError if it is
        anything else.
        """
        known = sorted(field.name for field in dataclasses.fields(cls))
        if not isinstance(value, Mapping) or set(value) != set(known):
            got = list(value) if isinstance(value, Mapping) else value
            raise ValueError(f"placement: expected {', '.join(known)}, got {_arguments.short(got)}")
        return cls(**value)


PIXELS = Placement((1.0, 1.0), (0.0, 0.0), (1, 1), False)  # of the picture itself


def placement_of(module: nn.Module, channels: int, height: int, width: int) -> Placement:
    """Where the cells of the feature map that a module makes of a picture lie.

    The module is called once, in evaluation mode, with tensors that have shapes but no numbers. The pixels
    that each cell sees follow from the operations that it calls: convolutions, pooling, padding and slicing
    shift or enlarge them, sums and concatenations unite them, and operations on single elements, norms and
    permutations keep them. Factors that are the same in the whole picture, such as the gates of
    squeeze-and-excitation, and statistics of norms do not count. Anything else (attention, interpolation,
    transposed convolutions) loses the geometry; then the cells are assumed to divide the picture evenly.

    Args:
        module: maps pictures [N, channels, height, width] to features [N, C, h, w], on any device. It must
            not keep a tensor that it makes in the call, because that has no numbers.
        channels, height, width: of the picture.

    Raises:
        ValueError: the features are no such tensor.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else None
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    tracer, modes = _Tracer(), {each: each.training for each in module.modules()}
    try:
        module.eval()
        # inference mode, because linear layers and norms would arrive in pieces otherwise
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), tracer:
            images = torch.empty(1, channels, height, width, device=device, dtype=dtype)
            tracer.record(images, (_Axis(-2, 1, 0, 0), _Axis(-1, 1, 0, 0)))
            features = module(images)
    finally:
        for each, training in modes.items():
            each.training = training
    if not isinstance(features, torch.Tensor):
        raise ValueError(f"stem: expected features [N, C, H, W], got {type(features).__name__}")
    if features.dim() != 4 or features.shape[0] != 1 or 0 in features.shape:
        raise ValueError(f"stem: expected features [N, C, H, W], got shape {list(features.shape)} for N = 1")
    axes, sides = tracer.axes(features), tuple(zip((height, width), features.shape[-2:], strict=True))
    if axes and [axis.dim for axis in axes] != [-2, -1]:
        where = [4 + axis.dim for axis in axes]
        raise ValueError(f"stem: expected features [N, C, H, W], got rows and columns in dimensions {where}")
    if axes and all(axis.agrees(*side) for axis, side in zip(axes, sides, strict=True)):
        rows, columns = axes
        return Placement(
            (rows.stride, columns.stride), (rows.middle, columns.middle), (rows.extent, columns.extent), False
        )
    stride = tuple(pixels / cells for pixels, cells in sides)
    return Placement(stride, tuple((s - 1) / 2 for s in stride), None, True)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Cell i of dimension ``dim``, counted from the last one, sees pixels ``low + stride * i`` to ``high +
    stride * i``.
    """

    dim: int
    stride: int
    low: int
    high: int

    middle = property(lambda self: (self.low + self.high) / 2)
    extent = property(lambda self: self.high - self.low + 1)

    def agrees(self, pixels: int, cells: int) -> bool:
        """Whether the centres lie in the picture, or no further outside than a field."""
        last = self.middle + self.stride * (cells - 1)
        return self.middle >= -self.extent and last <= pixels - 1 + self.extent

    def shifted(self, cells: int, step: int = 1) -> _Axis:
        """Of every ``step``-th cell, the first of which was number ``cells``."""
        shift = cells * self.stride
        return dataclasses.replace(
            self, low=self.low + shift, high=self.high + shift, stride=self.stride * step
        )

    def enlarged(self, reach: int) -> _Axis:
        """Of windows over this cell and the ``reach`` cells after it."""
        return dataclasses.replace(self, high=self.high + reach * self.stride)


_Axes = tuple[_Axis, _Axis]  # rows and columns

# Names of operators of torch, without the underscore of those that work in place. Most operators on single
# elements have a tag; these have none, in some release.
_ELEMENTWISE = {"copy", "_to_copy", "fill", "zero", "hardswish", "leaky_relu", "_prelu_kernel", "masked_fill"}
_CONVOLUTIONS = {"convolution", "cudnn_convolution", "mkldnn_convolution"}
_POOLS = {"max_pool2d_with_indices", "mkldnn_max_pool2d", "avg_pool2d"}
_PADS = {"constant_pad_nd", "reflection_pad2d", "replication_pad2d"}
_VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "repeat", "alias", "detach", "lift_fresh"}
# operators over or along the dimensions that their arguments name
_ALONG = {"split", "split_with_sizes", "unbind", "select", "index_select", "flip", "roll", "cumsum", "glu"}
_ALONG |= {"mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "var", "std", "var_mean"}
_ALONG |= {"_softmax", "_log_softmax", "logsumexp", "linalg_vector_norm"}


class _Tracer(TorchDispatchMode):
    """Follows where the cells of every tensor that depends on the picture lie."""

    def __init__(self):
        super().__init__()
        # by id: the axes, or None if they are lost; a tensor that is not here does not depend on the picture
        self._axes: dict[int, _Axes | None] = {}
        self._seen: list[torch.Tensor] = []  # alive, so that no other tensor gets the same id
        self._written: set[int] = set()  # storages into which a view wrote something

    def axes(self, tensor: torch.Tensor) -> _Axes | None:
        return self._axes.get(id(tensor))

    def record(self, tensor: torch.Tensor, axes: _Axes | None) -> None:
        self._axes[id(tensor)] = axes
        self._seen.append(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        inplace, name = name.endswith("_"), name.rstrip("_")
        if func.namespace == "aten" and name != "linear" and "norm" not in name:
            with self:  # an operator that is composed of others
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        outputs = func(*args, **kwargs)
        sources = [t for t in _tensors((args, kwargs)) if self._depends(t)]
        if sources and not name.endswith("_like") and not name.startswith("new_"):
            given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for output in _tensors(outputs):
                axes = self._followed(func, name, inplace, given, sources, output)
                if inplace:
                    self._write(output, axes, others=len(sources) > 1)
                self.record(output, axes)
        return outputs

    def _depends(self, tensor):
        written = bool(self._written) and tensor.untyped_storage()._cdata in self._written
        return id(tensor) in self._axes or written

    def _write(self, tensor, axes, others):
        """Lose the axes of all tensors that share memory with one whose cells now see other pixels."""
        if axes != self._axes.get(id(tensor), ()) or (axes is None and others):
            storage = tensor.untyped_storage()._cdata
            self._written.add(storage)
            for other in self._seen:
                if other.untyped_storage()._cdata == storage:
                    self._axes[id(other)] = None

    def _followed(self, func, name, inplace, given, sources, output):
        """The axes of a result of an operator with these arguments; None: they are lost."""
        if func.namespace != "aten":
            return None
        plain = getattr(getattr(torch.ops.aten, name, None), func._overloadname, func)
        if torch.Tag.pointwise in plain.tags or name in _ELEMENTWISE or name == "cat":
            return self._united(sources, output)
        if name == "stack":  # adds a dimension, which must come before the rows and columns
            axes = self._united(sources, output)
            dim = given["dim"] - output.dim() * (given["dim"] >= 0)
            return axes if dim < min(_dims(axes), default=0) else None
        source = given.get("self", given.get("input"))
        axes = self.axes(source) if isinstance(source, torch.Tensor) else None
        if axes is None or inplace:  # the shape of the source may be another one already
            return None
        if name in _CONVOLUTIONS | _POOLS:
            return _of_windows(given, axes)
        if name in _PADS:
            pads = given.get("pad", given.get("padding"))  # before and after the last dimension come first
            before = {-1 - place: count for place, count in enumerate(pads[::2])}
            return tuple(a.shifted(-before.get(a.dim, 0)) for a in axes)
        if name == "slice":
            return _of_slice(given, source, axes)
        if name in ("permute", "transpose"):
            order = list(range(-source.dim(), 0))
            if name == "permute":
                order = [order[d] for d in given["dims"]]
            else:
                first, second = given["dim0"], given["dim1"]
                order[first], order[second] = order[second], order[first]
            return tuple(dataclasses.replace(a, dim=order.index(a.dim) - len(order)) for a in axes)
        if name in _ALONG:
            dims = given.get("dim", given.get("dims"))
            dims = [d - source.dim() * (d >= 0) for d in ([dims] if isinstance(dims, int) else dims or [])]
            if not dims or set(dims) & set(_dims(axes)):
                return None
            kept = output.dim() == source.dim() or max(dims) < min(_dims(axes))
        elif name in _VIEWS:  # that change nothing from the rows or columns on
            first = min(_dims(axes))
            kept = output.shape[first:] == source.shape[first:]
        else:
            kept = "norm" in name or (name == "linear" and max(_dims(axes)) < -1)
        return axes if kept and _spans(axes, output, source) else None

    def _united(self, sources, output):
        """The union of what the cells of these tensors see, without those that are the same everywhere."""
        known = [a for t in sources if (a := self.axes(t)) and _spans(a, t, output)]
        if not known:
            return None
        found, dims = known[0], _dims(known[0])
        for tensor in sources:
            axes = self.axes(tensor)
            if _same_everywhere(tensor, dims) and not _same_everywhere(output, dims):
                continue
            if (
                axes is None
                or not _spans(axes, tensor, output)
                or any((a.dim, a.stride) != (b.dim, b.stride) for a, b in zip(axes, found, strict=True))
            ):
                return None
            found = tuple(
                dataclasses.replace(a, low=min(a.low, b.low), high=max(a.high, b.high))
                for a, b in zip(axes, found, strict=True)
            )
        return found


def _dims(axes):
    return [axis.dim for axis in axes or ()]


def _same_everywhere(tensor, dims):
    """Whether a tensor has one value for all rows and columns, the dimensions ``dims``."""
    return all(tensor.dim() < -d or tensor.shape[d] == 1 or tensor.stride(d) == 0 for d in dims)


def _spans(axes, first, second):
    """Whether two tensors have as many rows and columns, in the dimensions of ``axes``."""
    return all(
        min(first.dim(), second.dim()) >= -a.dim and first.shape[a.dim] == second.shape[a.dim] for a in axes
    )


def _of_windows(given, axes):
    """The axes after a convolution or pooling."""
    kernel = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
    kernel, stride, padding, dilation = (
        list(v) * 2 if len(v) == 1 else list(v)
        for v in (kernel, given["stride"] or kernel, given["padding"], given.get("dilation", [1]))
    )
    if given.get("transposed") or len(kernel) != 2 or sorted(_dims(axes)) != [-2, -1]:
        return None
    return tuple(
        a.enlarged(dilation[a.dim] * (kernel[a.dim] - 1)).shifted(-padding[a.dim], stride[a.dim])
        for a in axes
    )


def _of_slice(given, source, axes):
    """The axes of a slice of ``source``."""
    dim = given["dim"] - source.dim() * (given["dim"] >= 0)
    kept = range(source.shape[dim])[given["start"] : given["end"] : given["step"]]
    return tuple(a.shifted(kept.start, kept.step) if a.dim == dim else a for a in axes)


def _tensors(tree) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _interpolation(cells, pixels, step, start):
    """[pixels, cells], float64: the weights of linear interpolation between the centres of cells."""
    position = ((torch.arange(pixels, dtype=torch.float64) - start) / step).clamp(0, cells - 1)
    distance = position[:, None] - torch.arange(cells, dtype=torch.float64)
    return (1 - distance.abs()).clamp(min=0)


def _shares(weights, step, start):
    """[pixels, cells], float64: the part of each cell's value that each pixel gets; columns sum to 1."""
    pixels, cells = weights.shape
    shares = weights.clone()
    alone = shares.sum(0) < 1e-9  # no pixel lies between the centres next to it, up to rounding
    numbers = torch.arange(cells, dtype=torch.float64)
    nearest = (start + step * numbers).round().clamp(0, pixels - 1).long()
    shares[:, alone] = (torch.arange(pixels)[:, None] == nearest[alone]).double()
    return shares / shares.sum(0)
