"""The passes of a layer as launches: shapes in, tensors out. No autograd, no checks of the caller's
arguments, no choice of dtype.

Memory besides inputs and results (P pixels, n units, r ranks; numbers, see docs/kernels.md): forward keeps
[P, n] twice for backward, and both make a canvas [N, H', W', C'], z [P, r]; nothing of size P n r or P n d
unless the contraction is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings

import torch
import triton

from coda_kernels import backward_input, backward_weight, config, forward, interpreted, prepare
from coda_kernels.compile import launch, recorded_device
from coda_kernels.config import Device, Shape


@dataclasses.dataclass(frozen=True)
class Window:
    """Sliding window: kernel, stride, dilation as (vertical, horizontal); padding as left, right, top,
    bottom.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]


class Layer:
    """A layer's parameters, for inputs of one size. ``prepared``: what `align` has left of them in the
    kernels' layout; without it, `align` or `pack` comes before all others.
    """

    def __init__(
        self, image_size, reduce, weight, bias, window: Window, norm: str, eps: float, prepared=None
    ):
        units, rank, channels = weight.shape[:3]
        self.window, self.norm, self.eps, self.rank = window, norm, eps, rank
        self.bits = weight.element_size() * 8
        self.shape = s = _shape(
            channels, units, rank, window.kernel, window.stride, window.dilation, bias is not None, self.bits
        )
        self.device, self.dtype, self.torch_device = (
            recorded_device() or device_of(weight.device),
            weight.dtype,
            weight.device,
        )
        self.precision = precision(weight.dtype, self.device)
        (height, width), (left, right, top, bottom) = image_size, window.padding
        self.canvas_size = (height + top + bottom, width + left + right)
        extent = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilation, strict=True)]
        self.out = tuple(
            (size - e) // t + 1 for size, e, t in zip(self.canvas_size, extent, window.stride, strict=True)
        )
        self.NB = s.padded_units if bias is not None else 0
        _check_offsets(s, (height, width), window.padding, self.out)
        self.last = channels_last(reduce, weight, bias)
        self.parameters = [
            None if p is None else p.detach() if self.last else p.detach().contiguous()
            for p in (reduce, weight, bias)
        ]
        self.prepared = weight.new_empty(s.prepared) if prepared is None else prepared
        generated = s.padded_units * s.R
        rows = self.prepared[: (generated + s.R + self.NB) * s.K].view(-1, s.K)
        self.weight, self.rows = rows[:generated].view(s.padded_units, s.R, s.K), rows[generated:]
        self.reduce, self.bias = self.rows[: s.R], self.rows[s.R :] if bias is not None else None
        self.scale = self.prepared[rows.numel() :].view(torch.float32)  # powers of two, see `_unit_scale`

    # -- pieces
    # --------------------------------------------------------------------------------------------------------

    def _canvas(self, image):
        """(the zero-padded, channels-last tensor that windows are read from, [N, H', W', C'], how many
        programs have yet to fill it): the image itself where it is one already.
        """
        s, last = self.shape, image.detach().permute(0, 2, 3, 1)
        if (
            self.canvas_size == tuple(last.shape[1:3])
            and s.CP == s.channels
            and last.is_contiguous()
            and last.data_ptr() % 16 == 0
        ):
            return last, 0
        canvas = image.new_empty(len(image), *self.canvas_size, s.CP)
        return canvas, cdiv(canvas.numel(), prepare.CANVAS_BLOCK.value)

    def _prepare(self, x, u, canvas, canvases, z=False, lengths=False, parameters=False):
        """One launch for what a forward pass needs: z = B x [P, R]; <b_o, x> [P, n'] and |x_p|^2 [P] with
        ``lengths``; the norm factor, with ``parameters``, which are packed too; and the canvas of u. None for
        the rest. P is rounded up to whole blocks here and in all that the backward pass makes, so that its
        loops need no masks.
        """
        s, pixels, wide = self.shape, len(x) * self.out[0] * self.out[1], self.bits == 32
        reduce, weight, bias = self.parameters
        whole, ranks, units = whole_blocks(pixels), s.R if z else 0, self.NB if lengths else 0
        new = functools.partial(torch.empty, dtype=torch.float32, device=self.torch_device)
        z_rows = x.new_empty(whole, ranks) if z else None
        beta, length = (new(whole, units), new(whole)) if lengths else (None, None)
        factored, factor = parameters and not s.generated, None
        if factored:
            per_unit = (
                new
                if s.units == s.padded_units
                else functools.partial(torch.zeros, dtype=torch.float32, device=self.torch_device)
            )
            matrix = per_unit(s.padded_units, s.R, s.R, dtype=torch.float32 if wide else torch.float16)
            factor = (
                matrix,
                per_unit(s.padded_units, s.R),
                per_unit(s.padded_units),
                per_unit(s.padded_units),
            )
        norms, packs = (
            (s.units, (s.padded_units * s.R + s.R + self.NB) // prepare.PACK_ROWS.value)
            if parameters
            else (0, 0)
        )
        columns = max(16, ranks + units) if z or lengths else 0

        def run(tile):
            projects = cdiv(whole, tile["BM"]) * cdiv(columns, tile["BN"])
            launch(
                prepare.prepare,
                (norms + packs + canvases + projects,),
                x,
                u,
                reduce,
                weight,
                weight if bias is None else bias,
                self.prepared,
                *(factor or [self.scale] * 4),
                self.scale,
                canvas,
                x if z_rows is None else z_rows,
                *(self.scale if t is None else t for t in (beta, length)),
                norms,
                packs,
                canvases,
                *x.stride(),
                *u.stride(),
                *self._image(u),
                canvas.numel(),
                pixels,
                whole,
                *self._sizes(),
                self.rank,
                s.units,
                s.padded_units,
                s.K,
                C=s.channels,
                **self._geometry(),
                LAST=self.last,
                R=s.R,
                Z=z,
                BETA=units > 0,
                LENGTH=lengths,
                HAS_BIAS=s.bias,
                FACTOR=factored,
                WIDE=wide,
                PRECISION=self.precision,
                **tile.options,
            )

        self._launch("prepare", run)
        return z_rows, beta, length, factor

    # -- passes
    # --------------------------------------------------------------------------------------------------------

    def align(self, x, applied, memory_format, keep, norm_only=False):
        """F(x, u) [N, n, OH, OW]; what backward needs: <w, u> and |w|^2 as [n, P] float32, the contraction
        [P, n R], or None.
        """
        s, pixels = self.shape, len(x) * self.out[0] * self.out[1]
        with self.on_device():
            output = torch.empty(len(x), *self.out, s.units, dtype=self.dtype, device=self.torch_device)
            kept = functools.partial(torch.empty, device=self.torch_device)
            dot = kept(s.units, pixels) if keep in ("products", "contraction") else None
            square = kept(s.units, pixels) if keep != "nothing" else None
            save = keep == "contraction" and not s.generated  # the generated form has none
            contraction = kept(pixels, s.units * s.R, dtype=self.dtype) if save else None
            if not pixels:
                return _as_image(output, memory_format), dot, square, contraction
            x, u = x.detach(), (x if applied is None else applied).detach()
            canvas, canvases = self._canvas(u)
            z, beta, length, factor = self._prepare(
                x, u, canvas, canvases, z=True, lengths=applied is None, parameters=True
            )
            if applied is not None:
                _, beta, length, _ = self._prepare(u, u, canvas, 0, lengths=True)
            common = dict(
                **self._geometry(),
                K=s.K,
                R=s.R,
                SQUASH=self.norm == "squash",
                EPS=self.eps,
                PRECISION=self.precision,
            )
            kept = [self.scale if t is None else t for t in (dot, square)]
            sizes = (*self._sizes(), s.units, (square is not None) + (dot is not None), s.K, s.R)

            def generated(tile):
                launch(
                    forward.generated,
                    self._grid(pixels, tile),
                    canvas,
                    self.weight,
                    self._or_dummy(self.bias),
                    z,
                    length,
                    output,
                    *kept,
                    pixels,
                    *sizes,
                    HAS_BIAS=s.bias,
                    **common,
                    **tile.options,
                )

            def contracted(tile):
                launch(
                    forward.contracted,
                    self._grid(pixels, tile),
                    canvas,
                    self.weight,
                    z,
                    beta,
                    length,
                    *factor,
                    output,
                    *kept,
                    self._or_dummy(contraction),
                    pixels,
                    *sizes[:-2],
                    self.NB,
                    *sizes[-2:],
                    HAS_BIAS=s.bias,
                    **common,
                    KEEP_CONTRACTION=contraction is not None,
                    NORM_ONLY=norm_only,
                    **tile.options,
                )

            if s.generated:
                self._launch("generated", generated)
            else:
                self._launch("contracted" if contraction is None else "contracted_kept", contracted)
            return _as_image(output, memory_format), dot, square, contraction

    def pack(self, x):
        """The parameters in the kernels' layout, where no forward pass has left them."""
        self._prepare(x, x, x, 0, parameters=True)

    def canvas(self, image):
        """The zero-padded, channels-last tensor that windows are read from, [N, H', W', C']."""
        canvas, canvases = self._canvas(image.detach())
        if canvases:
            self._prepare(image.detach(), image.detach(), canvas, canvases)
        return canvas

    def prepare_backward(self, x, applied, grad, dot, square, ranks=0, full=False):
        """One launch for what a backward pass needs: z [P, R], gs [n, P], and [dz | gs], [P, ranks + NB], dz
        to come; with ``full`` also the canvas of u, the starts of its windows [P], t [n, P] times ``scale``,
        and over ``scale`` the Gram matrices [n, R, R] and A b [n, R].

        ``ranks`` is R where dz will be needed, else 0.
        """
        s, pixels = self.shape, square.shape[1]
        whole = whole_blocks(pixels)
        x, u = x.detach(), (x if applied is None else applied).detach()
        canvas, canvases = self._canvas(u) if full else (u, 0)
        z, gs, e = x.new_empty(whole, s.R), x.new_empty(s.units, whole), x.new_empty(whole, ranks + self.NB)
        t, starts = (
            torch.empty_like(gs) if full else None,
            x.new_empty(whole if full else 0, dtype=torch.int64),
        )
        gram, cross = (x.new_empty(s.units, s.R, s.R), x.new_empty(s.units, s.R)) if ranks else (None, None)
        grams = s.units * cdiv(s.R, prepare.GRAM_RANKS.value) ** 2 if ranks else 0
        factors = cdiv(whole, prepare.FACTOR_PIXELS.value) * (s.padded_units // 16)

        def run(tile):
            projects = cdiv(whole, tile["BM"]) * cdiv(s.R, tile["BN"])
            launch(
                prepare.prepare_backward,
                (projects + grams + canvases + factors,),
                x,
                u,
                self.parameters[0],
                self.weight,
                self._or_dummy(self.bias),
                self.scale,
                grad,
                square if dot is None else dot,
                square,
                gs,
                *(self._or_dummy(a) for a in (t, e, gram, cross)),
                canvas,
                z,
                starts,
                projects,
                grams,
                canvases,
                *x.stride(),
                *u.stride(),
                *grad.stride(),
                *self._image(u),
                canvas.numel(),
                pixels,
                whole,
                *self._sizes(),
                self.rank,
                s.units,
                s.padded_units,
                e.shape[1],
                ranks,
                int(full),
                s.K,
                C=s.channels,
                **self._geometry(),
                LAST=self.last,
                R=s.R,
                HAS_BIAS=s.bias,
                SQUASH=self.norm == "squash",
                EPS=self.eps,
                PRECISION=self.precision,
                **tile.options,
            )

        self._launch("prepare_backward", run)
        return canvas, z, starts, gs, t, gram, cross, e

    def grad_z(self, canvas, z, gs, t, gram, cross, e, contraction):
        """dz, into the first R columns of ``e``."""
        s, pixels, whole = self.shape, len(canvas) * self.out[0] * self.out[1], len(z)

        def run(tile):
            launch(
                backward_input.grad_z,
                (cdiv(whole, tile["BM"]) * (s.R // tile["BR"]),),
                canvas,
                self.weight,
                z,
                gs,
                t,
                gram,
                cross,
                self._or_dummy(contraction),
                e,
                pixels,
                whole,
                *self._sizes(),
                e.shape[1],
                s.units,
                s.K,
                s.R,
                **self._geometry(),
                K=s.K,
                R=s.R,
                HAS_BIAS=s.bias,
                KEPT=contraction is not None,
                PRECISION=self.precision,
                **tile.options,
            )

        self._launch("grad_z", run)

    def fold(self, like, z, gs, e, rows, memory_format):
        """An image like ``like``: the transposed convolution of ``e`` [P, E] with ``rows`` [E, K] and,
        with gs, of gs (x) z with A.
        """
        s, (left, _, top, _) = self.shape, self.window.padding
        batch, _, height, width = like.shape
        dx = torch.empty(batch, height, width, s.channels, dtype=self.dtype, device=self.torch_device)
        (stride_h, stride_w), taps = s.stride, s.taps
        pixels = batch * -(-height // stride_h) * -(-width // stride_w)

        def run(tile):
            launch(
                backward_input.fold,
                (
                    cdiv(pixels, tile["BM"]) * cdiv(s.CP, tile["BC"]),
                    min(stride_h, height),
                    min(stride_w, width),
                ),
                self.weight,
                rows,
                self._or_dummy(z),
                self._or_dummy(gs),
                e,
                dx,
                batch,
                height,
                width,
                *self.out,
                len(e),
                s.units,
                taps,
                len(rows),
                e.stride(0),
                C=s.channels,
                **self._geometry(),
                SH=stride_h,
                SW=stride_w,
                TOP=top,
                LEFT=left,
                K=s.K,
                R=s.R,
                DIRECT=gs is not None,
                PRECISION=self.precision,
                **tile.options,
            )

        if dx.numel():
            self._launch("fold", run)
        return _as_image(dx, memory_format)

    def sums(self, canvas, starts, z, gs, t, e, parameters=True, zeroth=True):
        """Sums over the pixels in parts, float32, views of one buffer: of gs z u^T [parts, n, R, K], t z z^T
        [parts, n, R, R], e u^T [parts, E, K], t z [parts, n, R] and t [parts, n]; [0] where not asked for.
        ``e``: [P, E], columns of a tensor.
        """
        s, pixels, rows = self.shape, len(starts), e.shape[1]
        shapes = [
            (s.units, s.R, s.K) if parameters else (0,),
            (s.units, s.R, s.R) if parameters else (0,),
            (rows, s.K),
        ]
        shapes += [(s.units, s.R), (s.units,)] if zeroth else [(0,), (0,)]
        lengths = [-(-math.prod(shape) // 16) * 16 for shape in shapes]

        def run(tile):
            columns, groups, lower = (
                cdiv(s.K, tile["BN"]),
                cdiv(s.units, tile["BO"]),
                min(64, tile["BO"] * tile["BR"]),
            )
            thin = cdiv(s.R, min(tile["BN"], s.R, 64))
            weights = groups * (s.R // tile["BR"]) * columns if parameters else 0
            moments = groups * (s.R // tile["BR"]) * thin if parameters else 0
            directs = cdiv(rows, lower) * cdiv(s.K, min(tile["BN"], 128))
            tiles = weights + moments + directs + (cdiv(s.units, lower) * thin if zeroth else 0)
            # a part's pixels are int32
            parts = max(config.splits(tiles, pixels, tile["BP"], self.device), cdiv(pixels, 1 << 30))
            chunk = cdiv(cdiv(pixels, parts), tile["BP"]) * tile["BP"]
            parts = cdiv(pixels, chunk)
            partial = torch.empty(parts, sum(lengths), device=self.torch_device)
            launch(
                backward_weight.parameter_sums,
                (tiles, parts),
                canvas,
                starts,
                z,
                *(self._or_dummy(a) for a in (gs, t)),
                e,
                *(part if part.numel() else partial for part in partial.split(lengths, 1)),
                partial.stride(0),
                weights,
                moments,
                directs,
                pixels,
                chunk,
                e.stride(0),
                rows,
                s.units,
                self.canvas_size[1],
                s.K,
                **self._geometry(),
                R=s.R,
                PRECISION=self.precision,
                **tile.options,
            )
            return partial

        parts = self._launch("sums", run).split(lengths, 1)
        return [
            part[:, : math.prod(shape)].unflatten(1, shape) if shape[0] else part[0]
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def grad_parameters(self, canvas_x, canvas_u, starts, z, gs, t, e, ranks, needs):
        """(dB, dA, db), None where not needed; ``e`` is [dz | gs] with ``ranks`` columns of dz."""
        s = self.shape
        needs = need_reduce, need_weight, need_bias = (*needs[:2], needs[2] and s.bias)
        shared, generation = canvas_x is canvas_u, need_weight or need_bias
        results = [
            g if need else None for g, need in zip(gradients_like(*self.parameters), needs, strict=True)
        ]
        first = 0 if need_reduce and shared else ranks
        last = ranks + s.units if need_bias else ranks
        sums, reduce = [None] * 5, None
        if generation:
            sums = self.sums(canvas_u, starts, z, gs, t, e[:, first:last], need_weight, s.bias)
            reduce, sums[2] = (
                (sums[2][:, :ranks], sums[2][:, ranks:]) if need_reduce and shared else (None, sums[2])
            )
        if need_reduce and reduce is None:
            reduce = self.sums(canvas_x, starts, z, None, None, e[:, :ranks], False, False)[2]
        block = 64 if s.R <= 64 else 32  # registers
        blocks = cdiv(s.K, block)
        weights = s.units * blocks if generation else 0
        part = next((a for a in sums if a is not None and a.dim() > 1), None)
        parts, s_part = (0, 0) if part is None else (len(part), part.stride(0))
        reduces, s_reduce = (0, 0) if reduce is None else (len(reduce), reduce.stride(0))
        programs = weights + (cdiv(s.R, 64) * blocks if need_reduce else 0)
        d_reduce, d_weight, d_bias = results
        # what is added to rounded products may be a product of rounded numbers
        precision = (
            "tf32" if self.bits == 16 and not self.device.amd and not interpreted() else self.precision
        )
        launch(
            backward_weight.finish,
            (programs,),
            *(self.scale if a is None else a for a in (sums[0], sums[1], sums[2], sums[3], sums[4], reduce)),
            self.weight,
            self._or_dummy(self.bias),
            self.scale,
            *(self._or_dummy(a) for a in (d_reduce, d_weight, d_bias)),
            weights,
            parts,
            s_part,
            reduces,
            s_reduce,
            self.rank,
            s.channels,
            s.taps,
            s.K,
            s.CP,
            R=s.R,
            LAST=self.last,
            HAS_BIAS=s.bias,
            WEIGHT=need_weight,
            BIAS=need_bias,
            PRECISION=precision,
            BK=block,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
        return d_reduce, d_weight, d_bias

    # -- launching
    # --------------------------------------------------------------------------------------------------------

    def _sizes(self):
        return (*self.out, *self.canvas_size, *self.shape.stride)

    def _image(self, image):
        """Height and width, and how much lies above and to the left of them in a canvas."""
        left, _, top, _ = self.window.padding
        return (*image.shape[2:], top, left)

    def _geometry(self):
        s = self.shape
        return dict(CP=s.CP, KH=s.kernel[0], KW=s.kernel[1], DH=s.dilation[0], DW=s.dilation[1])

    def _grid(self, pixels, tile):
        return (cdiv(pixels, tile["BM"]) * cdiv(self.shape.units, tile["BO"]),)

    def _or_dummy(self, tensor):
        """A pointer of the right device and dtype where a kernel does not read one."""
        return self.weight if tensor is None else tensor

    def on_device(self):
        """Context in which launches go to the device of the tensors, not to the current one."""
        return (
            torch.cuda.device(self.torch_device)
            if self.torch_device.type == "cuda"
            else contextlib.nullcontext()
        )

    def _launch(self, kernel, run):
        """Call ``run`` with the first tile that the device can hold; what did not fit once is not tried
        again.
        """
        key = (kernel, self.shape, self.device)
        tiles = config.candidates(kernel, self.shape, self.device)
        for index in range(min(_first_fitting.get(key, 0), len(tiles) - 1), len(tiles)):
            try:
                return run(tiles[index])
            except triton.runtime.errors.OutOfResources as error:
                if index + 1 == len(tiles):
                    raise
                _first_fitting[key] = index + 1
                warnings.warn(
                    f"coda_kernels: {config.row_key(kernel, self.shape)}: {error}; the next smaller tile is "
                    "used",
                    RuntimeWarning,
                    stacklevel=2,
                )
        raise AssertionError("unreachable: the last tile returned or raised")


_first_fitting: dict = {}
_shape = functools.lru_cache(4096)(Shape)  # what follows from one is computed once


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. (Triton's own costs the host five microseconds.)"""
    return -(-a // b)


def whole_blocks(pixels):
    """``pixels`` rounded up to whole blocks of the longest kind."""
    return -(-pixels // 64) * 64


@functools.lru_cache(4096)
def _check_offsets(s, image_size, padding, out):
    """ValueError where an offset that the kernels take in 32 bits does not fit: in a window, or from the
    first pixel of a tile of `fold` to a row of [dz | gs] that it reads; or the number of a pixel in its
    image.
    """
    (height, width), (left, right, top, bottom), (rows, columns), stride = image_size, padding, out, s.stride
    full_height, full_width = height + top + bottom, width + left + right
    extents = [d * (k - 1) + 1 for k, d in zip(s.kernel, s.dilation, strict=True)]
    window = extents[0] * full_width * s.CP
    # pixels that `fold` takes at a time, 256 at most
    class_h, class_w = max(1, cdiv(height, stride[0])), max(1, cdiv(width, stride[1]))
    # what a tap adds, at most
    down, right_or_left = (
        cdiv(max(e, p), t) + 1 for e, p, t in zip(extents, (top, left), stride, strict=True)
    )
    images = cdiv(256, class_h * class_w) * abs(rows * columns - class_h * class_w)
    lines = min(cdiv(256, class_w), class_h - 1) + min(down, max(rows, class_h) - 1)
    reach = (images + lines * max(columns, class_w) + min(right_or_left, columns) + 256) * (
        s.R + s.padded_units
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


def channels_last(*parameters):
    """Whether all of them, [.., C, kh, kw] or None, lie in memory as [.., kh, kw, C]; else they are taken
    contiguous.
    """
    return all(p is None or p.movedim(-3, -1).is_contiguous() for p in parameters)


def gradients_like(*parameters):
    """Tensors for the gradients of parameters, in the layout in which these are read."""
    form = torch.preserve_format if channels_last(*parameters) else torch.contiguous_format
    return [None if p is None else torch.empty_like(p, memory_format=form) for p in parameters]


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
        raise RuntimeError(
            "coda_kernels: expected a GPU of compute capability 8.0 or newer, got "
            f"{properties.major}.{properties.minor}"
        )
    if torch.version.hip:
        return Device(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def precision(dtype: torch.dtype, device: Device) -> str:
    """How float32 operands are multiplied, after ``torch.set_float32_matmul_precision``: "highest" is three
    TF32 products (about 2^-21) on NVIDIA tensor cores, "high" and "medium" one; AMD and the interpreter
    compute float32 as it is."""
    if dtype != torch.float32 or device.amd or (interpreted() and recorded_device() is None):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _settle_keys():
    """Triton 3.6's key of a compiled kernel depends on which functions had theirs before: asked for in one
    order here, every process finds in the cache what another one has compiled ahead.
    """
    for module in (prepare, forward, backward_input, backward_weight):
        for function in vars(module).values():
            getattr(function, "cache_key", None)


if not interpreted():
    _settle_keys()
