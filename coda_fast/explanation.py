"""Explanations: tensors that add up to logits, and that can be indexed, moved, saved and shown."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coda_fast import _files
from coda_fast._classes import as_classes, check_range, class_name
from coda_fast._geometry import integer
from coda_fast.placement import Placement
from coda_fast.safety import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "coda_fast.Explanation"
_SHOWN, _CLASSES = 4, 5  # the most images, and classes of each, that a notebook shows


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Why a network gave its logits: N images, K explained classes each, all tensors on the images' device.

    With ``layer=None`` (or 0), C = 6 for colour images: red, green, blue, then 1 - red, 1 - green, 1 - blue.
    With ``layer=l``, C, H and W are those of the input of layer l. With a stem they are those of the encoded
    features at the joint: the positive parts of all features, then the negative parts, unless features are
    never negative (``signed`` is False).

    What is exact: the contributions add up to the logit less its bias. In a network with a stem this holds
    from the features at the joint up. How the stem computes a feature from the image is not explained;
    ``pixel_map`` places its contribution around the centre of its receptive field, which only says where the
    feature is in the image.

    Attributes:
        logits: [N, classes], in the dtype of the network; the rest is in float32 or wider.
        target: explained classes, [N, K].
        dynamic_weight: ``[W(x)]_c / T``: the row of the global linear map that gives each logit, [N, K, C, H,
            W].
        contributions: ``dynamic_weight * activations``, in logits, [N, K, C, H, W].
        contribution_map: contributions summed over channels, [N, K, H, W]; with a stem or ``layer=l`` it is
            smaller than the image, ``pixel_map`` is not.
        completeness_error: ``|sum of contributions + logit bias - logit|``, in logits, [N, K]: rounding,
            below 1e-6 (float32), 1e-14 (float64) or 2e-2 (bfloat16) of the logit plus the sum of absolute
            contributions.
        layer: the DAU layer whose inputs are the terms of the decomposition: its index in a CoDANet, its name
            in other networks; 0: the encoded image.
        images: the explained images, [N, C, H, W]: the given tensor, without its graph.
        logit_bias: the constant in every logit, to which no pixel contributes.
        class_names: those of the network, or None.
        placement: where the entries of the map lie in the image; None: the map has the size of the image, or
            it is not known.
        stem: the conventional network up to the joint, in words; None: there is none.
        signed: whether the encoded image has two halves of channels.

    ``len(e)`` is N; ``e[i]``, ``e[1:3]``, ``e[[0, 2]]`` and iteration give explanations of these images. A
    notebook shows an explanation as a figure and a table.

    >>> import torch, coda_fast
    >>> e = coda_fast.create_model("coda_xs_digits").explain(torch.rand(5, 1, 8, 8), target=[[3, 7]] * 5)
    >>> e
    Explanation(5 images, 2 classes each, maps 8 x 8, layer 0, float32 on cpu, ...)
    >>> e[1:3].to(torch.float64)
    Explanation(2 images, 2 classes each, maps 8 x 8, layer 0, float64 on cpu, ...)
    """

    logits: torch.Tensor
    target: torch.Tensor
    dynamic_weight: torch.Tensor
    contributions: torch.Tensor
    contribution_map: torch.Tensor
    completeness_error: torch.Tensor
    layer: int | str
    images: torch.Tensor | None = None
    logit_bias: float = 0.0
    class_names: tuple[str, ...] | None = None
    placement: Placement | None = None
    stem: str | None = None
    signed: bool = True

    @property
    def pixel_map(self) -> torch.Tensor:
        """The contribution map in the size of the image, [N, K, H, W]: interpolated linearly between the
        places of its entries, in logits per pixel (``coda_fast.placement.Placement.interpolate``). It adds up
        to about the same; what adds up exactly is ``contribution_map``. Without a stem, and for the encoded
        image, the two are the same.

        Raises:
            ValueError: where the entries lie is not known.
        """
        if self.placement is not None and self.images is not None:
            return self.placement.interpolate(self.contribution_map, tuple(self.images.shape[2:]))
        if self.layer == 0 and (
            self.images is None or self.images.shape[2:] == self.contribution_map.shape[2:]
        ):
            return self.contribution_map
        raise ValueError(
            f"pixel_map: expected a map whose place in the image is known, got that of layer {self.layer}"
            + " without images" * (self.images is None)
        )

    @property
    def channel_contributions(self) -> torch.Tensor:
        """The contributions of each channel of the image or of the features at the joint, summed over pixels
        and over the two halves of a signed encoding, [N, K, C / 2]; of each channel of the input of a further
        layer, [N, K, C].
        """
        total = self.contributions.sum((-2, -1))
        if self.layer != 0 or not self.signed:
            return total
        first, second = total.chunk(2, -1)
        return first + second

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int | slice | Sequence | torch.Tensor) -> Explanation:
        """The explanation of some of the images. ``index`` is an int (which gives a batch of one), a slice,
        or several ints or N bools as a list, an array or a tensor.

        Raises:
            IndexError: there is no such image. TypeError: the index is anything else.
        """
        chosen = _chosen(index, len(self))
        return self._each(lambda tensor: tensor[chosen])

    def __iter__(self) -> Iterator[Explanation]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        n, k, height, width = self.contribution_map.shape
        dtype, device = str(self.contribution_map.dtype).removeprefix("torch."), self.contribution_map.device
        text = (
            f"{_count(n, 'image')}, {_count(k, 'class', 'classes')} each, maps {height} x {width}, layer "
            f"{self.layer}, {dtype} on {device}"
        )
        if self.completeness_error.numel() and device.type != "meta":
            text += f", completeness error up to {float(self.completeness_error.max()):.1e} logits"
        return f"Explanation({text})"

    def to(self, *args: Any, **kwargs: Any) -> Explanation:
        """The explanation on another device or in another floating-point dtype. Arguments are those of
        ``torch.Tensor.to``; classes stay integers.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point one, got {dtype}")

        def move(tensor):
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        return self._each(move)

    def name(self, index: int) -> str:
        """The name of a class."""
        return class_name(self.class_names, index)

    def plot(self) -> Figure:
        """A figure with a row for each image: its maps and the proof that they are complete. See
        ``coda_fast.plot.explanation_figure``.

        Raises:
            ValueError: the explanation has no images. ImportError: matplotlib is not installed.
        """
        from coda_fast import plot

        if self.images is None:
            raise ValueError(
                "plot: expected an explanation with its images, got one without; see "
                "coda_fast.plot.explanation_figure"
            )
        return plot.explanation_figure(self.images, self, self.logit_bias, self.class_names)

    def save(self, path: str | os.PathLike) -> None:
        """Write all of it, including images, to a safetensors file that ``load`` reads, whole or not at all.

        Raises:
            ImportError: safetensors is not installed.
        """
        safetensors = _files.require_safetensors()
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        names = None if self.class_names is None else list(self.class_names)
        layer = {"name": self.layer} if isinstance(self.layer, str) else self.layer
        placement = None if self.placement is None else self.placement.config()
        facts = json.dumps(
            {
                "layer": layer,
                "logit_bias": self.logit_bias,
                "class_names": names,
                "placement": placement,
                "stem": self.stem,
                "signed": self.signed,
            }
        )
        data = safetensors.torch.save(tensors, {"format": _FORMAT, "facts": facts})
        with _files.atomic_path(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> Explanation:
        """The explanation that ``save`` wrote, bit for bit.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is not an explanation, not a regular file
                (but a folder, a pipe, a device), or damaged.
            OSError: reading it is not permitted. ImportError: safetensors is not installed.
        """
        with _files.opened(path, device, "explanation") as file:
            header = file.metadata() or {}
            if (found := header.get("format")) != _FORMAT:
                raise ValueError(
                    f"{path}: expected an explanation (format {_FORMAT!r}), got format "
                    f"{printable(repr(found))[:100]}"
                )
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            try:  # before any tensor is read
                facts = _facts(json.loads(header.get("facts", "")))
                _check_shapes(shapes, facts)
                explanation = cls(**{name: file.get_tensor(name) for name in shapes}, **facts)
                explanation._check_values()
            except Exception as error:  # a damaged file can make safetensors and json raise anything
                reason = " ".join(printable(error).split())[:300]
                raise ValueError(
                    f"{path}: expected an explanation that was saved, got a damaged one: {reason}"
                ) from None
        return explanation

    def _check_values(self):
        if self.target.dtype != torch.int64 or not all(
            t.is_floating_point() for name, t in self._tensors().items() if name != "target"
        ):
            raise ValueError("expected integer classes and floating-point tensors")
        if self.target.device.type != "meta":
            check_range(self.target, self.logits.shape[1], "target")

    def _tensors(self):
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def _each(self, function):
        return dataclasses.replace(
            self, **{name: function(tensor) for name, tensor in self._tensors().items()}
        )

    def _repr_html_(self) -> str:
        """For notebooks: the first images with their maps, classes and completeness errors. If the figure
        cannot be drawn, its place says why; nothing is raised.
        """
        words = f"<p><code>{html.escape(printable(repr(self)))}</code></p>"
        if not len(self) or self.target.device.type == "meta":
            return f"<div>{words}</div>"
        shown, (count, classes) = self._first(_SHOWN, _CLASSES), self.target.shape
        rows = "".join(
            f"<tr><td>{i}</td><td>{html.escape(printable(e.name(int(c))))}</td>"
            f"<td>{float(e.logits[0, c].sigmoid()):.3f}</td>"
            f"<td>{float(e.logits[0, c]):.3f}</td><td>{float(e.completeness_error[0, k]):.1e}</td></tr>"
            for i, e in enumerate(shown)
            for k, c in enumerate(e.target[0])
        )
        head = "".join(
            f"<th>{title}</th>" for title in ("image", "class", "probability", "logit", "completeness error")
        )
        more = [_count(count - _SHOWN, "more image")] * (count > _SHOWN)
        more += [_count(classes - _CLASSES, "more class", "more classes") + " of each"] * (classes > _CLASSES)
        words = f"<p>and {', '.join(more)}</p>{words}" if more else words
        try:
            from coda_fast import plot

            picture = base64.b64encode(plot.render(shown.plot(), dpi=100)).decode()
            drawn = f'<img alt="images and contribution maps" src="data:image/png;base64,{picture}">'
        # a notebook cell that shows a result must not fail because its picture cannot be drawn
        except Exception as error:
            drawn = f"<p>no figure: {html.escape(printable(error))}</p>"
        return f"<div>{drawn}<table><tr>{head}</tr>{rows}</table>{words}</div>"

    def _first(self, images: int, classes: int) -> Explanation:
        """The first images, with the first classes of each."""
        changed = {name: getattr(self, name)[:images, :classes] for name in _OF_CLASSES}
        return dataclasses.replace(self[:images], **changed)


_OF_CLASSES = ("target", "dynamic_weight", "contributions", "contribution_map", "completeness_error")


def _chosen(index, count):
    """An index for tensors of ``count`` images that keeps their first dimension."""
    if isinstance(index, slice):
        rows = range(count)[index]
        return index if rows.step > 0 else list(rows)  # torch has no negative steps
    if not isinstance(index, torch.Tensor | np.ndarray | list | range):
        try:
            row = range(count)[integer(index)]  # its IndexError ends an iteration
        except TypeError:
            raise TypeError(
                f"index: expected an int, a slice, or a list of ints or of {count} bools, got {index!r}"
            ) from None
        return slice(row, row + 1)
    try:
        rows = torch.as_tensor(list(index) if isinstance(index, range) else index, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"index: expected an int, a slice, or a list of ints or of {count} bools, got {index!r}"
        ) from None
    if rows.dtype == torch.bool and rows.dim():
        if rows.shape != (count,):
            raise IndexError(
                f"index: expected {count} bools, one for each image, got shape {list(rows.shape)}"
            )
        return rows.nonzero()[:, 0].tolist()
    if not rows.numel():
        rows = rows.long()  # torch makes floats of an empty list
    rows = as_classes(rows, "index")
    if rows.dim() > 1:
        raise TypeError(f"index: expected one dimension, that of the images, got shape {list(rows.shape)}")
    rows = rows.reshape(-1).tolist()
    if wrong := [row for row in rows if not -count <= row < count]:
        raise IndexError(f"index: expected images from {-count} to {count - 1}, got {wrong[0]}")
    return rows


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _facts(facts):
    """The fields stored beside the tensors, checked; ValueError if they are wrong."""
    known = ("layer", "logit_bias", "class_names", "placement", "stem", "signed")
    if isinstance(facts, dict):  # of a release without stems
        facts = {"placement": None, "stem": None, "signed": True, **facts}
    if not isinstance(facts, dict) or set(facts) != set(known):
        raise ValueError(f"expected {', '.join(known)}, got {str(facts)[:100]}")
    layer, bias, names = facts["layer"], facts["logit_bias"], facts["class_names"]
    if not isinstance(facts["stem"], str | None) or not isinstance(facts["signed"], bool):
        got = str((facts["stem"], facts["signed"]))[:100]
        raise ValueError(f"expected a stem and whether its features have signs, got {got}")
    if facts["placement"] is not None:
        facts = facts | {"placement": Placement.of(facts["placement"])}
    if isinstance(layer, dict) and list(layer) == ["name"] and isinstance(layer["name"], str):
        facts = facts | {"layer": layer["name"]}
    elif integer(layer) < 0:
        layer = None
    if layer is None or not isinstance(bias, float):
        raise ValueError(f"expected a layer and a bias, got {str((facts['layer'], bias))[:100]}")
    if names is None:
        return facts
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected names of classes, got {str(names)[:100]}")
    return facts | {"class_names": tuple(names)}


def _check_shapes(shapes, facts):
    """Raise a ValueError unless these are the shapes of one explanation."""
    names = {field.name for field in dataclasses.fields(Explanation)} - set(facts)
    if odd := (set(shapes) | {"images"}) ^ names:
        raise ValueError(
            f"expected the tensors of an explanation, got others or none: {', '.join(sorted(odd))[:200]}"
        )
    weight, logits = shapes["dynamic_weight"], shapes["logits"]
    if len(weight) != 5 or len(logits) != 2:
        raise ValueError(
            f"expected dynamic_weight [N, K, C, H, W] and logits [N, classes], got {list(weight)} and "
            f"{list(logits)}"
        )
    n, k, _, height, width = weight
    expected = {
        "logits": (n, logits[1]),
        "target": (n, k),
        "contributions": weight,
        "contribution_map": (n, k, height, width),
        "completeness_error": (n, k),
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"expected {name} of shape {list(shape)}, got {list(shapes[name])}")
    images = shapes.get("images", (n, 0, 0, 0))
    if len(images) != 4 or images[0] != n:
        raise ValueError(f"expected images of shape [{n}, C, H, W], got {list(images)}")
    if facts["class_names"] is not None and len(facts["class_names"]) != logits[1]:
        raise ValueError(f"expected {logits[1]} names of classes, got {len(facts['class_names'])}")
