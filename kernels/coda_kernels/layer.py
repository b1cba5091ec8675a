"""A layer as the kernels take it: packed parameters, sizes by name, and tiles that are tried in turn. It has
no autograd, does not check the caller's arguments and does not choose a dtype. ``coda_fast.backends.triton``
orders the launches.

Memory besides inputs and results, in numbers (see docs/kernels.md): the forward pass keeps [n, P] twice for
the backward pass, and both make a padded image [N, HP, WP, CP] and z [PP, R]. Nothing has size P n r or P n d
unless the contraction is requested.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import triton

from coda_kernels import config, interpreted, norms
from coda_kernels._projection import PADDING_BLOCK
from coda_kernels.compile import recorded_device
from coda_kernels.config import Device, Shape

Result = TypeVar("Result")


class Layer:
    """A layer's parameters in the kernels' layout, for images of one size, and the arguments that launches
    share.

    Args:
        image_size: height and width.
        reduce, weight, bias: B [r, C, kh, kw], A [n, r, C, kh, kw], b [n, C, kh, kw] or None.
        geometry: has ``kernel``, ``stride`` and ``dilation`` as (vertical, horizontal), and ``padding`` as
            left, right, top, bottom.
        norm: a name in ``norms.NORMS``.
        prepared: the parameters that ``prepare.run`` has packed; without it, ``prepare`` must run first.
    """

    def __init__(self, image_size, reduce, weight, bias, *, geometry, norm: str, eps: float, prepared=None):
        units, rank, channels = weight.shape[:3]
        self.geometry, self.norm, self.eps, self.rank = geometry, norms.named(norm), eps, rank
        bits = weight.element_size() * 8
        self.shape = s = _shape(
            channels, units, rank, geometry.kernel, geometry.stride, geometry.dilation, bias is not None, bits
        )
        self.dtype, self.torch_device = weight.dtype, weight.device
        self.device = recorded_device() or device_of(weight.device)
        self.precision = precision(weight.dtype, self.device)
        (height, width), (left, right, top, bottom) = image_size, geometry.padding
        self.padded_size = (height + top + bottom, width + left + right)
        self.out = geometry.output_size(height, width)
        self.bias_rows = s.units_padded if bias is not None else 0
        _check_offsets(s, (height, width), geometry.padding, self.out)
        self.last = channels_last(reduce, weight, bias)
        self.parameters = [
            None if p is None else p.detach() if self.last else p.detach().contiguous()
            for p in (reduce, weight, bias)
        ]
        self.prepared = weight.new_empty(s.prepared) if prepared is None else prepared
        generated = s.units_padded * s.R
        rows = self.prepared[: (generated + s.R + self.bias_rows) * s.K].view(-1, s.K)
        self.weight, self.rows = rows[:generated].view(s.units_padded, s.R, s.K), rows[generated:]
        self.reduce, self.bias = self.rows[: s.R], self.rows[s.R :] if bias is not None else None
        # powers of two, see ``_norm_factor._unit_scale``
        self.scale = self.prepared[rows.numel() :].view(torch.float32)

    def padded_image(self, image):
        """(the padded image [N, HP, WP, CP], the number of programs that have yet to fill it). It is the
        image itself, with no such programs, if that already has this form.
        """
        s, last = self.shape, image.permute(0, 2, 3, 1)
        whole = self.padded_size == tuple(last.shape[1:3]) and s.CP == s.channels
        if whole and last.is_contiguous() and last.data_ptr() % 16 == 0:
            return last, 0
        padded = image.new_empty(len(image), *self.padded_size, s.CP)
        return padded, cdiv(padded.numel(), PADDING_BLOCK.value)

    def pixels(self, image) -> int:
        """The number of output pixels of a batch of images."""
        return len(image) * self.out[0] * self.out[1]

    # -- arguments that several kernels share, by name

    def sizes(self) -> dict[str, int]:
        """The sizes of the output and of the padded image, and the stride."""
        names = ("OH", "OW", "HP", "WP", "SH", "SW")
        return dict(zip(names, (*self.out, *self.padded_size, *self.shape.stride), strict=True))

    def image_sizes(self, image) -> dict[str, int]:
        """The height and width of an image, and the padding above and to the left of it."""
        left, _, top, _ = self.geometry.padding
        return dict(H=image.shape[2], W=image.shape[3], top=top, left=left)

    def window(self) -> dict[str, int]:
        """The padded channels, kernel and dilation."""
        s = self.shape
        return dict(CP=s.CP, KH=s.kernel[0], KW=s.kernel[1], DH=s.dilation[0], DW=s.dilation[1])

    def or_dummy(self, tensor):
        """The tensor, or for None one of the right device and dtype, for an argument that is not read."""
        return self.weight if tensor is None else tensor

    def or_float(self, tensor):
        """As ``or_dummy``, in float32."""
        return self.scale if tensor is None else tensor

    # -- launching

    def on_device(self):
        """A context in which launches go to the device of the tensors instead of the current device."""
        return (
            torch.cuda.device(self.torch_device)
            if self.torch_device.type == "cuda"
            else contextlib.nullcontext()
        )

    def run(self, spec: config.KernelSpec, with_tile: Callable[[config.Tile], Result]) -> Result:
        """Call ``with_tile`` with the first tile that fits on the device; a tile that did not fit is not
        tried again.
        """
        key = (spec.name, self.shape, self.device)
        tiles = config.candidates(spec, self.shape, self.device)
        for index in range(min(_first_fitting.get(key, 0), len(tiles) - 1), len(tiles)):
            try:
                return with_tile(tiles[index])
            except triton.runtime.errors.OutOfResources as error:
                if index + 1 == len(tiles):
                    raise
                _first_fitting[key] = index + 1
                warnings.warn(
                    f"coda_kernels: {spec.row_key(self.shape)}: {error}; the next smaller tile is used",
                    RuntimeWarning,
                    stacklevel=2,
                )
        raise AssertionError("unreachable: the last tile returned or raised")


_first_fitting: dict = {}
_shape = functools.lru_cache(4096)(Shape)  # cached, so that its properties are computed once


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own costs the host five microseconds."""
    return -(-a // b)


def whole_blocks(pixels):
    """``pixels`` rounded up to whole blocks of 64, the longest."""
    return -(-pixels // 64) * 64


@functools.lru_cache(4096)
def _check_offsets(s, image_size, padding, out):
    """Raise a ValueError if a number that the kernels hold in 32 bits does not fit: an offset in a window, an
    offset from the first pixel of a tile of `fold` to a row of [dz | gs] that it reads, or the number of a
    pixel in its image.
    """
    (height, width), (left, right, top, bottom), (rows, columns), stride = image_size, padding, out, s.stride
    full_height, full_width = height + top + bottom, width + left + right
    extents = [d * (k - 1) + 1 for k, d in zip(s.kernel, s.dilation, strict=True)]
    window = extents[0] * full_width * s.CP
    # `fold` takes at most 256 pixels of a class at a time
    class_h, class_w = max(1, cdiv(height, stride[0])), max(1, cdiv(width, stride[1]))
    # the most that a tap adds
    down, right_or_left = (
        cdiv(max(e, p), t) + 1 for e, p, t in zip(extents, (top, left), stride, strict=True)
    )
    images = cdiv(256, class_h * class_w) * abs(rows * columns - class_h * class_w)
    lines = min(cdiv(256, class_w), class_h - 1) + min(down, max(rows, class_h) - 1)
    reach = (images + lines * max(columns, class_w) + min(right_or_left, columns) + 256) * (
        s.R + s.units_padded
    )
    sizes = {
        "a window": window + 4096,
        "an image": full_height * full_width + 256,
        "the reach of a tile": reach,
    }
    if large := [what for what, size in sizes.items() if size >= 1 << 31]:
        raise ValueError(
            f'backend="triton": {", ".join(large)} passes 2^31: images of {height} x {width}, padding '
            f"{padding}, {s}"
        )


def strides(prefix: str, image: torch.Tensor, channel: str = "channel") -> dict[str, int]:
    """The strides of an image [N, C, H, W], by the names of the kernels' arguments."""
    names = ("image", channel, "row", "column")
    return {f"{prefix}_{name}": stride for name, stride in zip(names, image.stride(), strict=True)}


def channels_last(*parameters):
    """Whether all parameters, [..., C, kh, kw] or None, lie in memory as [..., kh, kw, C]; otherwise the
    kernels take them contiguous.
    """
    return all(p is None or p.movedim(-3, -1).is_contiguous() for p in parameters)


def gradients_like(*parameters):
    """Uninitialised tensors for the gradients of parameters, in the layout in which parameters are read."""
    form = torch.preserve_format if channels_last(*parameters) else torch.contiguous_format
    return [None if p is None else torch.empty_like(p, memory_format=form) for p in parameters]


def as_image(last, memory_format):
    """[N, H, W, C] as [N, C, H, W] in a memory format; channels_last needs no copy."""
    return last.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


@functools.cache
def device_of(device: torch.device) -> Device:
    """A torch device for the configuration; the interpreter on a CPU uses that of a small Hopper GPU."""
    if device.type != "cuda":
        return Device(90, processors=4)
    properties = torch.cuda.get_device_properties(device)
    if not torch.version.hip and properties.major < 8:
        raise RuntimeError(
            "coda_kernels: expected a GPU of compute capability 8.0 or newer, got "
            f"{properties.major}.{properties.minor}"
        )
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def precision(dtype: torch.dtype, device: Device) -> str:
    """How float32 operands are multiplied, by ``torch.set_float32_matmul_precision``: "highest" means three
    TF32 products (error about 2^-21) on NVIDIA tensor cores, "high" and "medium" one; AMD GPUs and the
    interpreter use full float32.
    """
    if dtype != torch.float32 or device.amd or (interpreted() and recorded_device() is None):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
