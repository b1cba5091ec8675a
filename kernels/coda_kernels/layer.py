"""The passes of a layer as launches: shapes in, tensors out. No autograd, no checks of the caller's arguments, no choice of dtype.

Memory besides inputs and results (P pixels, n units, r ranks; numbers, see docs/kernels.md): forward keeps [P, n] twice for backward,
and both make a canvas [N, H', W', C'], z [P, r]; nothing of size P n r or P n d unless the contraction is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings

import torch
import triton

from coda_kernels import backward_input, backward_weight, config, forward, interpreted, norm_factor, project
from coda_kernels.config import Device, Shape


@dataclasses.dataclass(frozen=True)
class Window:
    """Sliding window: kernel, stride, dilation as (vertical, horizontal); padding as left, right, top, bottom."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]


class Layer:
    """A layer's parameters packed for the kernels, for inputs of one size."""

    def __init__(self, image_size, reduce, weight, bias, window: Window, norm: str, eps: float):
        units, rank, channels = weight.shape[:3]
        self.window, self.norm, self.eps = window, norm, eps
        self.bits = weight.element_size() * 8
        self.shape = Shape(channels, units, rank, window.kernel, window.stride, window.dilation, bias is not None, self.bits)
        self.device, self.dtype, self.torch_device = device_of(weight.device), weight.dtype, weight.device
        self.precision = precision(weight.dtype, self.device)
        (height, width), (left, right, top, bottom) = image_size, window.padding
        self.canvas_size = (height + top + bottom, width + left + right)
        extent = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilation, strict=True)]
        self.out = tuple((size - e) // s + 1 for size, e, s in zip(self.canvas_size, extent, window.stride, strict=True))
        self.padded_units = -(-units // 16) * 16  # whole blocks of the largest kind, so that the kernels read without masks
        self.weight = self._pack(weight, self.padded_units, self.shape.R)  # [n', R, K]
        parts = [self._pack(reduce.unsqueeze(0), 1, self.shape.R)[0]]
        if bias is not None:
            parts.append(self._pack(bias.unsqueeze(0), 1, self.padded_units)[0])
        self.rows = torch.cat(parts)  # [R + NB, K]: B and b, a small convolution one way and its transpose the other
        self.NB = len(self.rows) - self.shape.R
        self.reduce, self.bias = self.rows[: self.shape.R], self.rows[self.shape.R :] if bias is not None else None

    def _pack(self, tensor, count, rows):
        """[m, rows, C, kh, kw] -> [count, rows', K], patches as (kh, kw, C'), zeros where padded."""
        s = self.shape
        last = tensor.detach().permute(0, 1, 3, 4, 2)
        if (count, rows, s.CP, s.K) == (*tensor.shape[:2], s.channels, s.taps * s.channels):
            return last.contiguous().view(count, rows, s.K)
        packed = tensor.new_zeros(count, rows, s.K)
        inner = packed[: len(tensor), : tensor.shape[1], : s.taps * s.CP].unflatten(2, (*s.kernel, s.CP))
        inner[..., : s.channels] = last
        return packed

    # -- pieces -----------------------------------------------------------------------------------------------------------------

    def canvas(self, image):
        """The zero-padded, channels-last copy that windows are read from, [N, H', W', C']; the image itself where it is one already."""
        s, (left, _, top, _) = self.shape, self.window.padding
        last = image.detach().permute(0, 2, 3, 1)
        if self.canvas_size == tuple(last.shape[1:3]) and s.CP == s.channels and last.is_contiguous() and last.data_ptr() % 16 == 0:
            return last
        canvas = image.new_zeros(len(image), *self.canvas_size, s.CP)
        canvas[:, top : top + last.shape[1], left : left + last.shape[2], : s.channels] = last
        return canvas

    def project(self, canvas, reduce=True, bias=False, starts=False):
        """z [P, R], beta [P, n'] (float32), |x_p|^2 [P] and the starts of the windows [P]; what is not asked for is empty.

        P is rounded up to whole blocks here and in all that the backward pass makes, so that its loops need no masks.
        """
        s, pixels = self.shape, len(canvas) * self.out[0] * self.out[1]
        whole = whole_blocks(pixels)
        ranks, units = s.R if reduce else 0, self.NB if bias else 0
        z = canvas.new_empty(whole, ranks)
        beta = canvas.new_empty(whole, units, dtype=torch.float32)
        length = canvas.new_empty(whole if bias else 0, dtype=torch.float32)
        start = canvas.new_empty(whole if starts else 0, dtype=torch.int64)
        rows = self.rows[0 if reduce else s.R :][: ranks + units] if ranks + units else self.rows[:16]  # for the length alone: any

        def launch(tile):
            project.project[(triton.cdiv(whole, tile["BM"]) * triton.cdiv(len(rows), tile["BN"]),)](
                canvas, rows, z, beta, length, start, pixels, whole, *self._sizes(), s.K, **self._geometry(), K=s.K, R=ranks, NB=units,
                ROWS=len(rows), LENGTH=bias, STARTS=starts, PRECISION=self.precision, **tile.options(),
            )  # fmt: skip

        self._launch("project", launch)
        return z, beta, length, start

    def _factor(self):
        s = self.shape
        new = functools.partial(torch.empty if s.units == self.padded_units else torch.zeros, device=self.torch_device)
        factor = new(self.padded_units, s.R, s.R, dtype=torch.float16 if self.bits == 16 else torch.float32)
        shift, rest, scale = new(self.padded_units, s.R), new(self.padded_units), new(self.padded_units)

        def launch(tile):
            norm_factor.norm_factor[(s.units,)](
                self.weight, self._or_dummy(self.bias), factor, shift, rest, scale, K=s.K, R=s.R, HAS_BIAS=s.bias,
                WIDE=self.bits == 32, **tile.options(),
            )  # fmt: skip

        self._launch("norm_factor", launch)
        return factor, shift, rest, scale

    @functools.cached_property
    def scale(self):
        """A power of two for every unit, [n], at least the largest entry of A_o A_o^T and of A_o b_o."""
        with self.on_device():
            lengths = torch.linalg.vector_norm(self.weight[: self.shape.units], dim=2, dtype=torch.float32)
            longest = other = lengths.amax(1)
            if self.bias is not None:
                other = torch.maximum(longest, torch.linalg.vector_norm(self.bias[: self.shape.units], dim=1, dtype=torch.float32))
            return torch.exp2(torch.ceil(torch.log2((longest * other).clamp(2.0**-100, 2.0**100))))

    def _gram(self):
        """A_o A_o^T [n, R, R] and A_o b_o [n, R], over ``scale``."""
        s = self.shape
        gram, cross = self.weight.new_empty(s.units, s.R, s.R), self.weight.new_empty(s.units, s.R)

        def launch(tile):
            norm_factor.gram[(s.units * (s.R // tile["BR"]) ** 2,)](
                self.weight, self._or_dummy(self.bias), self.scale, gram, cross, K=s.K, R=s.R, HAS_BIAS=s.bias, PRECISION=self.precision,
                **tile.options(),
            )  # fmt: skip

        self._launch("gram", launch)
        return gram, cross

    # -- passes -----------------------------------------------------------------------------------------------------------------

    def align(self, canvas, applied, memory_format, keep, norm_only=False):
        """F(x, u) [N, n, OH, OW]; what backward needs: <w, u> and |w|^2 as [n, P] float32, the contraction [P, n R], or None; and z."""
        s, pixels = self.shape, len(canvas) * self.out[0] * self.out[1]
        with self.on_device():
            output = torch.empty(len(canvas), *self.out, s.units, dtype=self.dtype, device=self.torch_device)
            kept = functools.partial(torch.empty, device=self.torch_device)
            dot = kept(s.units, pixels) if keep in ("products", "contraction") else None
            square = kept(s.units, pixels) if keep != "nothing" else None
            save = keep == "contraction" and not s.generated  # the generated form has none
            contraction = kept(pixels, s.units * s.R, dtype=self.dtype) if save else None
            if not pixels:
                return _as_image(output, memory_format), dot, square, contraction, None
            if applied is None:
                z, beta, length, _ = self.project(canvas, bias=True)
            else:
                z, _, _, _ = self.project(canvas)
                _, beta, length, _ = self.project(applied, reduce=False, bias=True)
            u = canvas if applied is None else applied
            common = dict(
                **self._geometry(), K=s.K, R=s.R, N_UNITS=s.units, SQUASH=self.norm == "squash", EPS=self.eps,
                KEEP_DOT=dot is not None, KEEP_SQUARE=square is not None, PRECISION=self.precision,
            )  # fmt: skip
            kept = [self._or_dummy(t) for t in (dot, square)]

            def generated(tile):
                forward.generated[self._grid(pixels, tile)](
                    u, self.weight, self._or_dummy(self.bias), z, length, output, *kept, pixels, *self._sizes(), s.K, s.R,
                    HAS_BIAS=s.bias, **common, **tile.options(),
                )  # fmt: skip

            def contracted(tile):
                forward.contracted[self._grid(pixels, tile)](
                    u, self.weight, z, beta, length, *factor, output, *kept, self._or_dummy(contraction), pixels, *self._sizes(),
                    s.K, s.R, NB=self.NB, **common, KEEP_CONTRACTION=contraction is not None, NORM_ONLY=norm_only, **tile.options(),
                )  # fmt: skip

            if s.generated:
                self._launch("generated", generated)
            else:
                factor = self._factor()
                self._launch("contracted" if contraction is None else "contracted_kept", contracted)
            return _as_image(output, memory_format), dot, square, contraction, z

    def grad_factors(self, grad, dot, square, ranks=0):
        """gs and t, [n, P] in the dtype of the layer (t times ``scale``, None without ``dot``), and [dz | gs], [P, ranks + NB], dz to come.

        ``ranks`` is R where dz will be needed, else 0.
        """
        s, pixels = self.shape, square.shape[1]
        whole = whole_blocks(pixels)
        gs = torch.empty(s.units, whole, dtype=self.dtype, device=self.torch_device)
        t = None if dot is None else torch.empty_like(gs)
        e = gs.new_empty(whole, ranks + self.NB)

        def launch(tile):
            backward_input.grad_factors[(triton.cdiv(whole, tile["BP"]), self.padded_units // tile["BO"])](
                grad, self._or_dummy(dot), square, square if t is None else self.scale, gs, self._or_dummy(t), e, pixels, whole,
                *self.out, *grad.stride(), N_UNITS=s.units, E=e.shape[1], NB=self.NB, SQUASH=self.norm == "squash", EPS=self.eps,
                T=t is not None, **tile.options(),
            )  # fmt: skip

        self._launch("grad_factors", launch)
        return gs, t, e

    def grad_z(self, applied, z, gs, t, e, contraction):
        """dz, into the first R columns of ``e``."""
        s, pixels, whole = self.shape, len(applied) * self.out[0] * self.out[1], len(z)
        gram, cross = self._gram()

        def launch(tile):
            backward_input.grad_z[(triton.cdiv(whole, tile["BM"]) * (s.R // tile["BR"]),)](
                applied, self.weight, z, gs, t, gram, cross, self._or_dummy(contraction), e, pixels, whole, *self._sizes(), s.units, s.K,
                s.R, **self._geometry(), K=s.K, R=s.R, E=e.shape[1], N_UNITS=s.units, HAS_BIAS=s.bias, KEPT=contraction is not None,
                PRECISION=self.precision, **tile.options(),
            )  # fmt: skip

        self._launch("grad_z", launch)

    def fold(self, like, z, gs, e, rows, memory_format):
        """An image like ``like``: the transposed convolution of ``e`` [P, E] with ``rows`` [E, K] and, with gs, of gs (x) z with A."""
        s, (left, _, top, _) = self.shape, self.window.padding
        batch, _, height, width = like.shape
        dx = torch.empty(batch, height, width, s.channels, dtype=self.dtype, device=self.torch_device)
        classes = s.stride[0] * s.stride[1]
        pixels = batch * -(-height // s.stride[0]) * -(-width // s.stride[1])

        def launch(tile):
            backward_input.fold[(triton.cdiv(pixels, tile["BM"]) * triton.cdiv(s.CP, tile["BC"]), classes)](
                self.weight, rows, self._or_dummy(z), self._or_dummy(gs), e, dx, batch, height, width, *self.out, len(e), s.units,
                s.taps, len(rows), C=s.channels, **self._geometry(), TOP=top, LEFT=left, K=s.K, R=s.R, E=e.stride(0),
                DIRECT=gs is not None, PRECISION=self.precision, **tile.options(),
            )  # fmt: skip

        if dx.numel():
            self._launch("fold", launch)
        return _as_image(dx, memory_format)

    def outer_sum(self, image, starts, rows, scale=None):
        """``sum_p row_p (x) u_p`` in float32: [n, R, K] with row (o, k) = scale_o z_k from rows = z [P, R] and scale [n, P], else [m, K]
        from rows [m, P], either dimension first in memory. ``image``: the canvas and where its windows start, or z [P, R] (K is R then).
        """
        s, geometry, width, depth = self.shape, self._geometry(), self.canvas_size[1], self.shape.K
        if image.dim() == 2:
            width, depth, geometry = 1, image.shape[1], dict(CP=image.shape[1], KH=1, KW=1, DH=1, DW=1)
        pixels, scaled = len(starts), scale is not None
        count = s.units * s.R if scaled else len(rows)
        pixels_first = scaled or rows.stride(0) == 1
        stride = rows.stride(0) if scaled else rows.stride(1 if pixels_first else 0)

        def launch(tile):
            tiles = triton.cdiv(s.units, tile["BO"]) * (s.R // tile["BR"]) if scaled else triton.cdiv(count, tile["BR"])
            tiles *= triton.cdiv(depth, tile["BN"])
            parts = config.splits(tiles, pixels, tile["BP"], self.device)
            chunk = triton.cdiv(triton.cdiv(pixels, parts), tile["BP"]) * tile["BP"]
            parts = triton.cdiv(pixels, chunk)
            partial = torch.empty(parts, count, depth, device=self.torch_device)
            backward_weight.outer_sum[(tiles, parts)](
                image, starts, rows, self._or_dummy(scale), partial, pixels, chunk, stride, width,
                **{key: geometry[key] for key in ("CP", "KH", "KW", "DH", "DW")}, K=depth, ROWS=count, R=s.R, SCALED=scaled,
                PIXELS_FIRST=pixels_first, PRECISION=self.precision, **tile.options(),
            )  # fmt: skip
            return partial[0] if parts == 1 else partial.sum(0)

        total = self._launch("outer_scaled" if scaled else "outer_plain", launch)
        return total.view(s.units, s.R, depth) if scaled else total

    def grad_parameters(self, canvas_u, starts, z, gs, t, need_weight=True, need_bias=True):
        """(dA, db), packed as the parameters are, float32: ``gs (x) [z; 1] (x) u + (sum_p t [z; 1] [z; 1]^T) [A b]``; None: not needed."""
        s = self.shape
        rows = torch.arange(len(z), device=self.torch_device) * s.R
        weight, inverse = self.weight[: s.units].float(), 1 / self.scale.unsqueeze(1)
        first = self.outer_sum(z, rows, t) * inverse if s.bias else None  # sum_p t z, [n, R]
        bias = self.bias[: s.units].float() if s.bias else None
        d_weight = d_bias = None
        if need_weight:
            moments = self.outer_sum(z, rows, z, t) * inverse.unsqueeze(1)
            d_weight = torch.baddbmm(self.outer_sum(canvas_u, starts, z, gs), moments, weight)
            if s.bias:
                d_weight += first.unsqueeze(2) * bias.unsqueeze(1)
        if need_bias and s.bias:
            d_bias = self.outer_sum(canvas_u, starts, gs)
            d_bias += torch.bmm(first.unsqueeze(1), weight).squeeze(1)
            d_bias += t.sum(1, dtype=torch.float32).unsqueeze(1) * inverse * bias
        return d_weight, d_bias

    def unpack(self, packed, rows):
        """[m, rows', K] -> [m, rows, C, kh, kw] in the dtype of the parameters, contiguous: the inverse of packing."""
        s = self.shape
        inner = packed[:, :rows, : s.taps * s.CP].unflatten(2, (*s.kernel, s.CP))[..., : s.channels]
        return inner.permute(0, 1, 4, 2, 3).to(self.dtype, memory_format=torch.contiguous_format, copy=True)

    # -- launching --------------------------------------------------------------------------------------------------------------

    def _sizes(self):
        return (*self.out, *self.canvas_size)

    def _geometry(self):
        s = self.shape
        return dict(
            CP=s.CP, KH=s.kernel[0], KW=s.kernel[1], SH=s.stride[0], SW=s.stride[1], DH=s.dilation[0], DW=s.dilation[1]
        )  # fmt: skip

    def _grid(self, pixels, tile):
        return (triton.cdiv(pixels, tile["BM"]) * triton.cdiv(self.shape.units, tile["BO"]),)

    def _or_dummy(self, tensor):
        """A pointer of the right device and dtype where a kernel does not read one."""
        return self.weight if tensor is None else tensor

    def on_device(self):
        """Context in which launches go to the device of the tensors, not to the current one."""
        return torch.cuda.device(self.torch_device) if self.torch_device.type == "cuda" else contextlib.nullcontext()

    def _launch(self, kernel, launch):
        """Run ``launch`` with the first tile that the device can hold; what did not fit once is not tried again."""
        key = (config.row_key(kernel, self.shape), self.device)
        tiles = config.candidates(kernel, self.shape, self.device)
        for index in range(min(_first_fitting.get(key, 0), len(tiles) - 1), len(tiles)):
            try:
                return launch(tiles[index])
            except triton.runtime.errors.OutOfResources as error:
                if index + 1 == len(tiles):
                    raise
                _first_fitting[key] = index + 1
                warnings.warn(f"coda_kernels: {key[0]}: {error}; the next smaller tile is used", RuntimeWarning, stacklevel=2)
        raise AssertionError("unreachable: the last tile returned or raised")


_first_fitting: dict = {}


def whole_blocks(pixels):
    """``pixels`` rounded up to whole blocks of the longest kind."""
    return -(-pixels // 64) * 64


def _as_image(last, memory_format):
    """[N, H, W, C] as [N, C, H, W] in that format: for channels_last, as it is."""
    return last.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


@functools.cache
def device_of(device: torch.device) -> Device:
    """What configuration needs to know of a torch device; the interpreter on a CPU takes a small Hopper."""
    if device.type != "cuda":
        return Device(90, processors=4)
    properties = torch.cuda.get_device_properties(device)
    if not torch.version.hip and properties.major < 8:
        raise RuntimeError(f"coda_kernels: expected a GPU of compute capability 8.0 or newer, got {properties.major}.{properties.minor}")
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def precision(dtype: torch.dtype, device: Device) -> str:
    """How float32 operands are multiplied, after ``torch.set_float32_matmul_precision``: "highest" is three TF32 products (about 2^-21)
    on NVIDIA tensor cores, "high" and "medium" one; AMD and the interpreter compute float32 as it is."""
    if dtype != torch.float32 or device.amd or interpreted():
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
