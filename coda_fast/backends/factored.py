"""The DAU layer without its dynamic weight: library matrix products over small chunks of patches, on any device.

``w = A z + b`` is affine in ``z``, so with ``z~ = [z; 1]`` and ``A~ = [A b]`` (design: the factored form)

    <w_o, u> = sum_k z~_k (A~_ok . u)          one matrix product with n (r + 1) columns, contracted with z~
    |w_o|^2  = |R_o z~|^2                      R_o^T R_o = A~_o A~_o^T: a small triangular factor, never negative

Patches are gathered chunk by chunk so that every intermediate stays in cache; only the output and two numbers per unit and pixel
(<w, u> and |w|^2) are kept for the backward pass, which recomputes the rest:

    du = gs (x) z~ . A~,   dA~ = (gs (x) z~)^T u + (sum_p t z~ z~^T) A~,   dz = sum_o gs_o A_o u + t_o A_o A~_o^T z~
    gs = g s(q),   t = 2 g <w, u> s'(q)

Inside, rows are pixels and a patch is laid out (kh, kw, C).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from coda_fast._geometry import Geometry

# Bytes of the largest intermediate of a chunk. CPU: measured on 2 cores with 32 MB of shared L3, the sum over the S-CoDA layers at 8 MiB
# is 0.90 of that at 4 MiB, and 1, 2 MiB take 1.5, 1.2 times as long as 4 MiB (a tool of commit a35febd). Others: a guess.
CHUNK_BYTES = {"cpu": 8 << 20, "other": 256 << 20}


def align(input, applied, reduction_weight, weight, bias, geometry: Geometry, norm: str, eps: float, keep: str):
    """``F(x, u)``, with what ``keep`` leaves for the backward pass; ``applied=None`` is u = x."""
    layer = _Layer.pack(input, reduction_weight, weight, bias, geometry, norm, eps)
    return (*layer.align(input, applied, keep), None, None)


def align_backward(
    grad, input, applied, reduction_weight, weight, bias, dot, square, contraction, prepared, geometry, norm, eps, detach, needs
):  # fmt: skip
    """Gradients of ``F`` (dx, du, dB, dA, db), ``None`` where not needed; with ``detach`` the direct term du alone, as dx where u = x."""
    # packed anew rather than kept: what waits for the backward pass is of the size of the activations
    layer = _Layer.pack(input, reduction_weight, weight, bias, geometry, norm, eps, factor=False)
    if not detach:
        return layer.align_backward(input, applied, grad, dot, square, len(reduction_weight), needs)
    direct = layer.adjoint(input, grad, input if applied is None else applied, square)
    return (direct, None, None, None, None) if applied is None else (None, direct, None, None, None)


def adjoint(input, value, reduction_weight, weight, bias, geometry: Geometry, norm: str, eps: float):
    """``G(x, v)``."""
    return _Layer.pack(input, reduction_weight, weight, bias, geometry, norm, eps).adjoint(input, value, input)


def adjoints(input, values, reduction_weight, weight, bias, geometry: Geometry, norm: str, eps: float, like=None, square=None):
    """``G(x, v)`` of several v of one x: [K, N, n, OH, OW] -> [K, N, C, H, W], in dtype and format of ``like`` (x)."""
    layer = _Layer.pack(input, reduction_weight, weight, bias, geometry, norm, eps, factor=square is None)
    return layer.adjoints(input, values, input if like is None else like, square)


def kept_shapes(input, weight, bias, pixels, geometry: Geometry, keep: str):
    """Shapes of what ``align`` keeps: <w, u>, |w|^2; the contraction and prepared parameters this backend never does."""
    rows = (pixels, weight.shape[0])
    return rows if keep in ("products", "contraction") else (0,), rows if keep != "nothing" else (0,), (0,), (0,)


def gradients_like(*parameters):
    """Tensors such as ``align_backward`` makes for the parameters."""
    return [None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]


@dataclasses.dataclass
class _Layer:
    """A DAU layer packed for matrix products. Shapes: P pixels, d = kh kw C, m = r + 1 (or r without bias)."""

    reduce: torch.Tensor  # B, [m, d]: with a bias, a last row of zeros
    one: torch.Tensor  # [0 .. 0 1] with a bias, zeros without, [m]: z~ = B x + one
    generate: torch.Tensor  # A~, [n, m, d]: the bias is its last row
    factor: torch.Tensor | None  # R~, [n, min(m, d), m]; the backward of align does without
    geometry: Geometry
    norm: str
    eps: float

    @classmethod
    def pack(cls, input, reduction_weight, weight, bias, geometry, norm, eps, factor=True):
        compute = torch.float64 if input.dtype == torch.float64 else torch.float32
        rows = weight if bias is None else torch.cat((weight, bias.unsqueeze(1)), 1)
        generate = rows.to(compute).permute(0, 1, 3, 4, 2).flatten(2).contiguous()
        reduce = reduction_weight.to(compute).permute(0, 2, 3, 1).flatten(1)
        one = reduce.new_zeros(generate.shape[1])
        if bias is not None:
            reduce = F.pad(reduce, (0, 0, 0, 1))
            one[-1] = 1
        return cls(reduce.contiguous(), one, generate, norm_factor(generate) if factor else None, geometry, norm, eps)

    # -- the three passes -------------------------------------------------------------------------------------------------------

    def align(self, input, applied, keep):
        """F(x, u) as [N, n, OH, OW]; <w, u> and |w|^2 as rows [P, n] where ``keep`` asks for them."""
        n, m, d = self.generate.shape
        windows = _Windows(input, self)
        applied_windows = windows if applied is None else _Windows(applied, self)
        output = windows.new_rows(n)
        square = windows.new_rows(n) if keep != "nothing" else None
        dot = windows.new_rows(n) if keep in ("products", "contraction") else None
        for chunk in windows.chunks(max(n * m, d)):
            x = windows.gather(chunk)
            u = x if applied is None else applied_windows.gather(chunk)
            z = self._reduce(x)
            q = self._square(z, out=None if square is None else square[chunk.rows])
            products = (u @ self.generate.view(n * m, d).t()).view(-1, n, m)
            part = torch.bmm(products, z.unsqueeze(2)).squeeze(2)
            # Cauchy-Schwarz; only rounding can violate it, and only where w nearly vanishes
            bound = (q.sqrt() + self._flushed(m)) * (torch.linalg.vector_norm(u, dim=1, keepdim=True) + self._flushed(d))
            part = torch.clamp(part, -bound, bound, out=None if dot is None else dot[chunk.rows])
            torch.mul(self._scale(q), part, out=output[chunk.rows])
        return windows.rows_to_image(output, input), dot, square

    def align_backward(self, input, applied, grad, dot, square, rank, needs):
        """Gradients of F: (dx, du, dB, dA, db). With ``applied=None`` (u = x) du is part of dx and returned there.

        ``needs`` follows the inputs (input, applied, reduction_weight, weight, bias).
        """
        need_x, need_u, need_reduce, need_weight, need_bias = needs
        shared = applied is None
        need_u = need_x if shared else need_u
        need_z, need_generate = need_x or need_reduce, need_weight or need_bias
        n, m, d = self.generate.shape
        flat = self.generate.view(n * m, d)
        windows = _Windows(input, self)
        applied_windows = windows if shared else _Windows(applied, self)
        grad_rows = windows.image_to_rows(grad)
        dx = windows.new_canvas() if need_x else None
        du = dx if shared else applied_windows.new_canvas() if need_u else None
        d_reduce = torch.zeros_like(self.reduce[:rank]) if need_reduce else None
        d_generate = torch.zeros_like(flat) if need_generate else None
        moments = flat.new_zeros(n * m, m) if need_generate else None  # sum_p t z~ z~^T
        gram = (self.generate @ self.generate.transpose(1, 2)).view(n * m, m) if need_z else None
        for chunk in windows.chunks(max(n * m, d)):
            x = windows.gather(chunk)
            u = x if shared else applied_windows.gather(chunk)
            z = self._reduce(x)
            gs, t = self._grad_factors(grad_rows[chunk.rows], dot[chunk.rows], square[chunk.rows])
            outer = gs.new_empty(len(z), n, m)  # one buffer for three operands in turn
            dz = patch = None
            if need_z:
                torch.mm(u, flat.t(), out=outer.view(-1, n * m))
                dz = torch.bmm(gs.unsqueeze(1), outer).squeeze(1)
            if need_z or need_generate:
                torch.mul(t.unsqueeze(2), z.unsqueeze(1), out=outer)
                if need_z:
                    dz.addmm_(outer.view(-1, n * m), gram)
                if need_generate:
                    moments.addmm_(outer.view(-1, n * m).t(), z)
            if need_u or need_generate:
                torch.mul(gs.unsqueeze(2), z.unsqueeze(1), out=outer)
                if need_u:
                    patch = outer.view(-1, n * m) @ flat
                    if not shared:
                        applied_windows.scatter_add(du, chunk, patch)
                if need_generate:
                    d_generate.addmm_(outer.view(-1, n * m).t(), u)
            if need_reduce:
                d_reduce.addmm_(dz[:, :rank].t(), x)
            if need_x:
                patch = torch.addmm(patch, dz, self.reduce) if shared else dz @ self.reduce
                windows.scatter_add(dx, chunk, patch)
        kernel = self.geometry.kernel
        channels, dtype = input.shape[1], input.dtype
        d_weight = d_bias = None
        if need_generate:
            d_rows = torch.baddbmm(d_generate.view(n, m, d), moments.view(n, m, m), self.generate)
            d_rows = d_rows.view(n, m, *kernel, channels).permute(0, 1, 4, 2, 3)
            d_weight = d_rows[:, :rank].to(dtype, memory_format=torch.contiguous_format, copy=True) if need_weight else None
            d_bias = d_rows[:, rank].to(dtype, memory_format=torch.contiguous_format, copy=True) if need_bias else None
        if need_reduce:
            d_reduce = d_reduce.view(rank, *kernel, channels).permute(0, 3, 1, 2)
            # a copy: .contiguous() keeps the strides of 1 x 1 kernels, which DDP compares with those of the parameter
            d_reduce = d_reduce.to(dtype, memory_format=torch.contiguous_format, copy=True)
        return (
            windows.canvas_to_image(dx, input) if need_x else None,
            applied_windows.canvas_to_image(du, applied) if need_u and not shared else None,
            d_reduce,
            d_weight,
            d_bias,
        )

    def adjoint(self, input, value, like, square=None):
        """G(x, v) as [N, C, H, W], in dtype and format of ``like``; ``square`` saves the norms where they are known."""
        n, m, d = self.generate.shape
        windows = _Windows(input, self)
        rows = windows.image_to_rows(value)
        canvas = windows.new_canvas()
        for chunk in windows.chunks(max(n * m, d)):
            z = self._reduce(windows.gather(chunk))
            q = self._square(z) if square is None else square[chunk.rows]
            gs = rows[chunk.rows] * self._scale(q)
            outer = (gs.unsqueeze(2) * z.unsqueeze(1)).reshape(-1, n * m)
            windows.scatter_add(canvas, chunk, outer @ self.generate.view(n * m, d))
        return windows.canvas_to_image(canvas, like)

    def adjoints(self, input, values, like, square=None):
        """G(x, v_k) as [K, N, C, H, W]. Of more than one v the weights themselves are made, a chunk at a time: n m d products a pixel for
        all of them and n d for each, where ``adjoint`` takes n m d for each.
        """
        if len(values) == 1:
            return self.adjoint(input, values[0], like, square)[None]
        n, m, d = self.generate.shape
        windows = _Windows(input, self)
        rows = torch.stack([windows.image_to_rows(value) for value in values], 1)  # [P, K, n]
        canvases = windows.canvas.new_zeros(len(values), *windows.canvas.shape)
        by_pixel = self.generate.transpose(0, 1).reshape(m, n * d)
        for chunk in windows.chunks(max(n * d, len(values) * d)):
            z = self._reduce(windows.gather(chunk))
            q = self._square(z) if square is None else square[chunk.rows]
            w = (z @ by_pixel).view(-1, n, d)
            patches = torch.bmm(rows[chunk.rows] * self._scale(q).unsqueeze(1), w)  # [P, K, d]
            windows.scatter_add(canvases, chunk, patches.transpose(0, 1))
        return torch.stack([windows.canvas_to_image(canvas, like) for canvas in canvases])

    # -- their pieces -----------------------------------------------------------------------------------------------------------

    def _reduce(self, x):
        """z~ = [B x; 1], [P, m]."""
        return F.linear(x, self.reduce, self.one)

    def _square(self, z, out=None):
        """q = |R z~|^2, [P, n]."""
        n, k, m = self.factor.shape
        length = torch.linalg.vector_norm((z @ self.factor.view(n * k, m).t()).view(-1, n, k), dim=2)
        return torch.square(length, out=out) if out is not None else length.square()

    def _scale(self, square):
        """s(q)."""
        length = square.sqrt()
        if self.norm == "squash":
            return length / (1 + square)
        return (1 / length.clamp_min(self.eps)).masked_fill(square.isinf(), float("nan"))  # as "squash", not 1 / infinity

    def _flushed(self, terms):
        """How much shorter than it is a vector of so many numbers may seem: squares below the least number are 0."""
        return (terms * torch.finfo(self.generate.dtype).tiny) ** 0.5

    def _grad_factors(self, grad, dot, square):
        """gs = g s(q) and t = 2 g <w, u> s'(q), with their limits (0) at q = 0."""
        length = square.sqrt()
        ratio = torch.where(length > 0, dot / length.clamp_min(self._flushed(self.generate.shape[1])), 0)  # bounded by 2 |u|
        gs = grad * self._scale(square)
        if self.norm == "squash":
            return gs, grad * ratio * ((1 - square) / (1 + square)) / (1 + square)
        return gs, torch.where(length > self.eps, -grad * ratio / square, 0)


def norm_factor(rows: torch.Tensor) -> torch.Tensor:
    """R_o with ``|R_o v| = |rows_o^T v|`` for every v: [n, m, d] -> [n, min(m, d), m].

    float64 takes a QR. float32 takes a Cholesky factor of the float64 Gram matrix, which on a CPU costs 1/6 to 2/3 of a QR in float32
    and is no less accurate: its jitter of 1e-14, which keeps rank-deficient rows legal, is the square of float32's own resolution of w.
    Each row has a jitter of its own length: one of the longest row would add to |w| where that row's number in z is 0.
    """
    n, m, d = rows.shape
    if m >= d:
        return rows.transpose(1, 2).contiguous()
    if rows.dtype == torch.float64:
        return torch.linalg.qr(rows.transpose(1, 2), mode="r").R.contiguous()
    wide = rows.double()
    gram = wide @ wide.transpose(1, 2)
    length = gram.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(length == 0, 1, 1 / length)
    gram *= inverse.unsqueeze(2) * inverse.unsqueeze(1)
    gram.diagonal(dim1=1, dim2=2).add_(1e-14 * m)
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    # only weights that are not finite get here; like any layer, answer with NaN, where the user's own check looks for it
    return (factor * length.unsqueeze(1)).masked_fill((failed > 0)[:, None, None], float("nan")).to(rows.dtype).contiguous()


@dataclasses.dataclass(frozen=True)
class _Chunk:
    images: slice
    lines: slice
    rows: slice  # of the [P, ...] matrices


class _Windows:
    """The windows of an image batch as rows of a matrix, gathered and scattered a chunk at a time."""

    def __init__(self, image, layer: _Layer):
        g = layer.geometry
        self.geometry = g
        self.compute = layer.generate.dtype
        self.batch, self.channels, height, width = image.shape
        self.out = g.output_size(height, width)
        self.canvas = F.pad(image.permute(0, 2, 3, 1).to(self.compute), (0, 0, *g.padding)).contiguous()
        self.windows = self._windows(self.canvas)

    def _windows(self, canvas):
        """[..., N, OH, OW, kh, kw, C], a view."""
        g, (*many, _, padded_height, padded_width, channels) = self.geometry, canvas.shape
        row, image = padded_width * channels, padded_height * padded_width * channels
        return canvas.as_strided(
            (*many, self.batch, *self.out, *g.kernel, channels),
            (*canvas.stride()[:-4], image, g.stride[0] * row, g.stride[1] * channels, g.dilation[0] * row, g.dilation[1] * channels, 1),
        )

    def chunks(self, numbers_per_row):
        """Whole images where several fit the budget, else lines of one image."""
        kind = "cpu" if self.canvas.device.type == "cpu" else "other"
        budget = max(1, CHUNK_BYTES[kind] // (numbers_per_row * self.canvas.element_size()))
        height, width = self.out
        images, lines = max(1, budget // (height * width)), min(height, max(1, budget // width))
        for i in range(0, self.batch, images):
            stop = min(i + images, self.batch)
            for h in range(0, height, lines):
                end = min(h + lines, height)
                first = (i * height + h) * width
                count = (stop - i) * (end - h) * width
                yield _Chunk(slice(i, stop), slice(h, end), slice(first, first + count))

    def gather(self, chunk):
        return self.windows[chunk.images, chunk.lines].reshape(chunk.rows.stop - chunk.rows.start, -1)

    def scatter_add(self, canvas, chunk, patches):
        """Patches [..., P, d] to a canvas [..., N, H, W, C], or several."""
        windows = self._windows(canvas)[..., chunk.images, chunk.lines, :, :, :, :]
        patches = patches.unflatten(-1, windows.shape[-3:]).unflatten(-4, windows.shape[-6:-3])
        for i in range(self.geometry.kernel[0]):
            for j in range(self.geometry.kernel[1]):  # for one tap, windows do not overlap
                windows[..., i, j, :] += patches[..., i, j, :]

    def new_canvas(self):
        return torch.zeros_like(self.canvas)

    def new_rows(self, columns):
        return self.canvas.new_empty(self.batch * self.out[0] * self.out[1], columns)

    def canvas_to_image(self, canvas, like):
        left, _, top, _ = self.geometry.padding
        image = canvas[:, top : top + like.shape[2], left : left + like.shape[3]].permute(0, 3, 1, 2)
        return image.to(like.dtype).contiguous(memory_format=format_of(like))

    def rows_to_image(self, rows, like):
        image = rows.view(self.batch, *self.out, rows.shape[1]).permute(0, 3, 1, 2)
        return image.to(like.dtype).contiguous(memory_format=format_of(like))

    def image_to_rows(self, image):
        return image.permute(0, 2, 3, 1).to(self.compute).reshape(-1, image.shape[1])


def format_of(image):
    """A convolution's rule: channels_last in, channels_last out; anything else gives a contiguous result."""
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
