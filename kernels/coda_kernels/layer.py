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

from coda_kernels import backward_input, backward_weight, config, forward, norm_factor, project
from coda_kernels.config import Device, Shape

KEEP = ("nothing", "norm", "products", "contraction")


@dataclasses.dataclass(frozen=True)
class Window:
    """Sliding window: kernel, stride, dilation as (vertical, horizontal); padding as left, right, top, bottom."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]


def keeps_contraction(shape: Shape) -> bool:
    """Whether forward has a contraction to keep: the generated form never computes it."""
    return not shape.generated


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
        self.reduce = self._pack(reduce.unsqueeze(0), self.shape.R)[0]  # [R, K]
        self.weight = self._pack(weight, self.shape.R)  # [n, R, K]
        self.bias = None if bias is None else self._pack(bias.unsqueeze(0), units)[0]  # [n, K]

    def _pack(self, tensor, rows):
        """[m, rows, C, kh, kw] -> [m, rows, K], patches as (kh, kw, C'), zeros where padded."""
        s = self.shape
        last = tensor.detach().permute(0, 1, 3, 4, 2)
        if (rows, s.CP, s.K) == (tensor.shape[1], s.channels, s.taps * s.channels):
            return last.contiguous().view(len(tensor), rows, s.K)
        packed = tensor.new_zeros(len(tensor), rows, s.K)
        inner = packed[:, : tensor.shape[1], : s.taps * s.CP].unflatten(2, (*s.kernel, s.CP))
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

    def project(self, canvas, reduce=True, bias=False):
        """z [P, R], beta [P, n] (float32) and |x_p|^2 [P] of the windows; what is not asked for is empty."""
        s, pixels = self.shape, len(canvas) * self.out[0] * self.out[1]
        bias_rows = s.units if bias and self.bias is not None else 0
        ranks = s.R if reduce else 0
        z = canvas.new_empty(pixels, ranks)
        beta = canvas.new_empty(pixels, bias_rows, dtype=torch.float32)
        length = canvas.new_empty(pixels if bias else 0, dtype=torch.float32)
        parts = ([self.reduce] if reduce else []) + ([self.bias] if bias_rows else [])
        if not parts:  # the length of the patches alone: one row of zeros carries it
            parts = [self.reduce[:0]]

        def launch(tile):
            rows = max(1, -(-(ranks + bias_rows) // tile["BN"])) * tile["BN"]
            matrix = torch.cat([*parts, canvas.new_zeros(rows - ranks - bias_rows, s.K)])
            project.project[(triton.cdiv(pixels, tile["BM"]) * (rows // tile["BN"]),)](
                canvas, matrix, z, beta, length, pixels, *self._sizes(), **self._geometry(), K=s.K, R=ranks, NB=bias_rows,
                LENGTH=bias, PRECISION=self.precision, **tile.options(),
            )  # fmt: skip

        self._launch("project", launch)
        return z, beta, length

    def _factor(self):
        s = self.shape
        new = functools.partial(torch.empty, device=self.torch_device)
        factor = new(s.units, s.R, s.R, dtype=torch.float16 if self.bits == 16 else torch.float32)
        shift, rest, scale = new(s.units, s.R), new(s.units), new(s.units)

        def launch(tile):
            norm_factor.norm_factor[(s.units,)](
                self.weight, self._or_dummy(self.bias), factor, shift, rest, scale, K=s.K, R=s.R, HAS_BIAS=s.bias,
                WIDE=self.bits == 32, **tile.options(),
            )  # fmt: skip

        self._launch("norm_factor", launch)
        return factor, shift, rest, scale

    def _gram(self):
        """A_o A_o^T [n, R, R] and A_o b_o [n, R]."""
        s = self.shape
        gram, cross = self.weight.new_empty(s.units, s.R, s.R), self.weight.new_empty(s.units, s.R)

        def launch(tile):
            norm_factor.gram[(s.units * (s.R // tile["BR"]) ** 2,)](
                self.weight, self._or_dummy(self.bias), gram, cross, K=s.K, R=s.R, HAS_BIAS=s.bias, PRECISION=self.precision,
                **tile.options(),
            )  # fmt: skip

        self._launch("gram", launch)
        return gram, cross

    # -- passes -----------------------------------------------------------------------------------------------------------------

    def align(self, canvas, applied, memory_format, keep, norm_only=False):
        """F(x, u) [N, n, OH, OW], and what backward needs: <w, u> and |w|^2 as [n, P] float32, the contraction [P, n R], or None."""
        s, pixels = self.shape, len(canvas) * self.out[0] * self.out[1]
        with self._on_device():
            output = torch.empty(len(canvas), s.units, *self.out, dtype=self.dtype, device=self.torch_device, memory_format=memory_format)
            kept = functools.partial(torch.empty, device=self.torch_device)
            dot = kept(s.units, pixels) if keep in ("products", "contraction") else None
            square = kept(s.units, pixels) if keep != "nothing" else None
            save = keep == "contraction" and keeps_contraction(s)
            contraction = kept(pixels, s.units * s.R, dtype=self.dtype) if save else None
            if not pixels:
                return output, dot, square, contraction
            if applied is None:
                z, beta, length = self.project(canvas, bias=True)
            else:
                z, _, _ = self.project(canvas)
                _, beta, length = self.project(applied, reduce=False, bias=True)
            u = canvas if applied is None else applied
            strides = (output.stride(0), output.stride(1), output.stride(3))
            common = dict(
                **self._geometry(), K=s.K, R=s.R, N_UNITS=s.units, HAS_BIAS=s.bias, SQUASH=self.norm == "squash", EPS=self.eps,
                KEEP_DOT=dot is not None, KEEP_SQUARE=square is not None, PRECISION=self.precision,
            )  # fmt: skip
            kept = [self._or_dummy(t) for t in (dot, square)]

            def generated(tile):
                forward.generated[self._grid(pixels, tile)](
                    u, self.weight, self._or_dummy(self.bias), z, length, output, *kept, pixels, *self._sizes(), *strides,
                    **common, **tile.options(),
                )  # fmt: skip

            def contracted(tile):
                forward.contracted[self._grid(pixels, tile)](
                    u, self.weight, z, beta, length, *factor, output, *kept, self._or_dummy(contraction), pixels, *self._sizes(),
                    *strides, **common, KEEP_CONTRACTION=contraction is not None, NORM_ONLY=norm_only, **tile.options(),
                )  # fmt: skip

            if s.generated:
                self._launch("generated", generated)
            else:
                factor = self._factor()
                self._launch("contracted", contracted)
        return output, dot, square, contraction

    def grad_factors(self, grad, dot, square):
        """gs and t [n, P] in the dtype of the layer; t is None without ``dot``."""
        gs = torch.empty(square.shape, dtype=self.dtype, device=self.torch_device)
        t = None if dot is None else torch.empty_like(gs)

        def launch(tile):
            backward_input.grad_factors[(triton.cdiv(gs.shape[1], tile["BP"]), gs.shape[0])](
                grad, self._or_dummy(dot), square, gs, self._or_dummy(t), gs.shape[1], *self.out, *grad.stride(),
                SQUASH=self.norm == "squash", EPS=self.eps, T=t is not None, **tile.options(),
            )  # fmt: skip

        self._launch("grad_factors", launch)
        return gs, t

    def grad_z(self, applied, z, gs, t, contraction):
        """dz [P, R]."""
        s, pixels = self.shape, len(z)
        gram, cross = self._gram()
        dz = torch.empty_like(z)

        def launch(tile):
            backward_input.grad_z[(triton.cdiv(pixels, tile["BM"]) * (s.R // tile["BR"]),)](
                applied, self.weight, z, gs, t, gram, cross, self._or_dummy(contraction), dz, pixels, *self._sizes(),
                **self._geometry(), K=s.K, R=s.R, N_UNITS=s.units, HAS_BIAS=s.bias, KEPT=contraction is not None,
                PRECISION=self.precision, **tile.options(),
            )  # fmt: skip

        self._launch("grad_z", launch)
        return dz

    def fold(self, like, z, gs, dz, memory_format):
        """An image like ``like``: the direct term where ``gs`` is given, and B^T dz where ``dz`` is."""
        s, (left, _, top, _) = self.shape, self.window.padding
        dx = torch.empty(like.shape, dtype=self.dtype, device=self.torch_device, memory_format=memory_format)
        batch, _, height, width = like.shape
        classes = s.stride[0] * s.stride[1]
        pixels = batch * -(-height // s.stride[0]) * -(-width // s.stride[1])

        def launch(tile):
            backward_input.fold[(triton.cdiv(pixels, tile["BM"]) * triton.cdiv(s.CP, tile["BC"]), classes)](
                self.weight, self._or_dummy(self.bias), self.reduce, self._or_dummy(z), self._or_dummy(gs), self._or_dummy(dz), dx,
                batch, height, width, *self.out, batch * self.out[0] * self.out[1], *dx.stride(), C=s.channels, **self._geometry(),
                TOP=top, LEFT=left, K=s.K, R=s.R, N_UNITS=s.units, HAS_BIAS=s.bias, DIRECT=gs is not None, REDUCED=dz is not None,
                PRECISION=self.precision, **tile.options(),
            )  # fmt: skip

        if dx.numel():
            self._launch("fold", launch)
        return dx

    def outer_sum(self, rows, scale=None, canvas=None):
        """``sum_p row_p (x) u_p`` in float32. rows: [P, R], or transposed [m, P]; scale: [n, P]; canvas None: u is ``rows`` itself.

        [n, R, K] where scaled, else [m, K]; K is R for a ``canvas`` of [P, R].
        """
        s, geometry, image, size = self.shape, self._geometry(), canvas, (*self.out, *self.canvas_size)
        depth, pixels = s.K, scale.shape[1] if scale is not None else rows.shape[1]
        if canvas.dim() == 2:  # z: a 1 x 1 window on an image of one pixel
            depth, size = canvas.shape[1], (1, 1, 1, 1)
            geometry = dict(CP=depth, KH=1, KW=1, SH=1, SW=1, DH=1, DW=1)
        count = s.units * s.R if scale is not None else rows.shape[0]
        strides = (rows.stride(1), rows.stride(0)) if scale is not None else rows.stride()
        kernel = "outer_plain" if scale is None else "outer_scaled"

        def launch(tile):
            tiles = triton.cdiv(count, tile["BR"]) if scale is None else triton.cdiv(s.units, tile["BO"]) * (s.R // tile["BR"])
            tiles *= triton.cdiv(depth, tile["BN"])
            parts = config.splits(tiles, pixels, tile["BP"], self.device)
            chunk = triton.cdiv(triton.cdiv(pixels, parts), tile["BP"]) * tile["BP"]
            parts = triton.cdiv(pixels, chunk)
            partial = torch.empty(parts, count, depth, device=self.torch_device)
            backward_weight.outer_sum[(tiles, parts)](
                image, rows, self._or_dummy(scale), partial, pixels, chunk, *strides, *size[:2], *size[2:], **geometry, K=depth,
                ROWS=count, R=s.R, SCALED=scale is not None, PRECISION=self.precision, **tile.options(),
            )  # fmt: skip
            return partial[0] if parts == 1 else partial.sum(0)

        return self._launch(kernel, launch)

    def grad_parameters(self, canvas_u, z, gs, t):
        """(dA, db), packed as the parameters are, float32: ``gs (x) [z; 1] (x) u + (sum_p t [z; 1] [z; 1]^T) [A b]``."""
        s = self.shape
        direct = self.outer_sum(z, gs, canvas_u).view(s.units, s.R, s.K)
        moments = self.outer_sum(z, t, z).view(s.units, s.R, s.R)
        weight = self.weight.float()
        d_weight = torch.baddbmm(direct, moments, weight)
        if not s.bias:
            return d_weight, None
        d_bias = self.outer_sum(gs, None, canvas_u)
        first = self.outer_sum(t, None, z)  # sum_p t z, [n, R]
        bias = self.bias.float()
        d_weight += first.unsqueeze(2) * bias.unsqueeze(1)
        d_bias += torch.bmm(first.unsqueeze(1), weight).squeeze(1) + t.sum(1, dtype=torch.float32).unsqueeze(1) * bias
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

    def _on_device(self):
        return torch.cuda.device(self.torch_device) if self.torch_device.type == "cuda" else contextlib.nullcontext()

    def _launch(self, kernel, launch):
        """Run ``launch`` with the first tile that the device can hold; what did not fit once is not tried again."""
        key = (config.row_key(kernel, self.shape), self.device)
        tiles = config.candidates(kernel, self.shape, self.device)
        for index in range(_first_fitting.get(key, 0), len(tiles)):
            try:
                return launch(tiles[index])
            except triton.runtime.errors.OutOfResources as error:
                if index + 1 == len(tiles):
                    raise
                _first_fitting[key] = index + 1
                warnings.warn(f"coda_kernels: {key[0]}: {error}; the next smaller tile is used", RuntimeWarning, stacklevel=2)
        raise AssertionError("unreachable: the last tile returned or raised")


_first_fitting: dict = {}


@functools.cache
def device_of(device: torch.device) -> Device:
    """What configuration needs to know of a torch device; the interpreter on a CPU takes a small Hopper."""
    if device.type != "cuda":
        return Device(90, processors=4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def precision(dtype: torch.dtype, device: Device) -> str:
    """How float32 operands are multiplied, after ``torch.set_float32_matmul_precision``: "highest" is three TF32 products (about 2^-21)
    on NVIDIA tensor cores, "high" and "medium" one; AMD and the interpreter compute float32 as it is."""
    if dtype != torch.float32 or device.amd or triton.knobs.runtime.interpret:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
