"""The DAU layer by library matrix products over small chunks of patches, on any device: its dynamic weight is
never there as a whole.

``w = A z + b`` is affine in ``z = B x``, so with ``z~ = [z; 1]`` and ``A~ = [A b]`` (design: the factored
form)

    <w_o, u> = sum_k z_k (A_ok . u) + b_o . u      one matrix product with n r rows, contracted with z
    |w_o|^2  = z~^T (A~_o A~_o^T) z~
        a quadratic form: one product of the Gram matrices with the numbers z_k z_l

and no ``w`` is needed, but for the few pixels and units where it nearly cancels (``_Gram``). That pays for
many pixels of many numbers: the Gram matrices are made once for all pixels, and the weights have d numbers
where the contraction has r. Elsewhere ``w`` itself is made, in the forward pass by ``_worth_generating``, in
the backward pass where d <= 2 r. Patches are gathered chunk by chunk so that every intermediate stays in
cache. For the backward pass the output, two numbers per unit and pixel (<w, u> and |w|^2) and, if there is
memory for it, the contraction A u are kept; the rest is computed again:

    du = gs (x) z~ . A~,
        dA~ = (gs (x) z~)^T u + (sum_p t z~ z~^T) A~,   dz = sum_o gs_o A_o u + t_o A_o A~_o^T z~
    gs = g s(q),   t = 2 g <w, u> s'(q)

Inside, pixels are columns, and a patch is laid out (C, kh, kw), as the parameters are: they are used where
they lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading

import torch

from coda_fast._spec import Gradients, Kept, Parameters, Spec

# Bytes of the largest intermediate of a chunk. CPU: docs/benchmark.md. Others: a guess.
CHUNK_BYTES = {"cpu": 2 << 20, "other": 256 << 20}
# ... but at least so many times the bytes of A, which every chunk reads; and twice as much where each adds to
# the gradient of A
CHUNK_PARAMETERS = 1
# What a thread keeps at most for intermediates of its next call
SCRATCH_BYTES = 8 << 20
# save_contraction="auto" keeps a contraction of at most so many bytes, of patches of at least so many
# numbers: each number of it saves as many multiplications, and costs to be written and read whatever they are
KEPT_BYTES = 256 << 20
KEPT_DEPTH = 256
# Products of at most so many multiplications take torch.mm
SMALL_PRODUCT = 1 << 22
# Pixel-units are computed from w itself where |w|^2 is less than this share of sum_k |z_k A_k|^2, of which it
# is about the whole where nothing cancels: the quadratic form is rounded in proportion to that sum.
CANCELLED = 1 / 16
# What is added to z_k^2 and |A_k|^2 in that sum, so that it exceeds what |w|^2 has lost where products of
# small numbers became 0
FLUSHED = 1e-27


def align(
    input: torch.Tensor, applied: torch.Tensor | None, parameters: Parameters, spec: Spec, *, keep: str
) -> tuple[torch.Tensor, Kept]:
    """See ``coda_fast.backends.Backend``, like all that follow."""
    return _Layer.make(input, parameters, spec).align(input, applied, keep)


def align_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    applied: torch.Tensor | None,
    parameters: Parameters,
    kept: Kept,
    spec: Spec,
    *,
    detach: bool,
    needs: Gradients,
) -> Gradients:
    layer = _Layer.make(input, parameters, spec)
    if not detach:
        return layer.align_backward(grad, input, applied, kept, needs)
    direct = layer.adjoint(input, grad, input if applied is None else applied, kept.square)
    return Gradients(input=direct) if applied is None else Gradients(applied=direct)


def adjoint(input: torch.Tensor, value: torch.Tensor, parameters: Parameters, spec: Spec) -> torch.Tensor:
    return _Layer.make(input, parameters, spec).adjoint(input, value, input)


def adjoints(
    values: torch.Tensor,
    input: torch.Tensor,
    applied: torch.Tensor | None,
    parameters: Parameters,
    kept: Kept,
    spec: Spec,
) -> torch.Tensor:
    layer = _Layer.make(input, parameters, spec)
    return layer.adjoints(input, values, input if applied is None else applied, kept.square)


def kept_shapes(input: torch.Tensor, parameters: Parameters, spec: Spec, *, keep: str) -> Kept:
    units, rank, *window = parameters.weight.shape
    height, width = spec.geometry.output_size(*input.shape[2:])
    return _kept_shapes(units, rank, math.prod(window), input.shape[0] * height * width, input.dtype, keep)


def gradients_like(parameters: Parameters) -> Parameters:
    like = lambda p: None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
    return Parameters(*map(like, parameters))


def _kept_shapes(units, rank, depth, pixels, dtype, keep):
    """The contraction A u is kept in float32 and float64 only; there are no prepared parameters."""
    columns = (units, pixels)
    contracted = (
        keep == "contraction" and dtype in (torch.float32, torch.float64) and not _generated(rank, depth)
    )
    return Kept(
        dot=columns if keep in ("products", "contraction") else (0,),
        square=columns if keep != "nothing" else (0,),
        contraction=(units * rank, pixels) if contracted else (0,),
        prepared=(0,),
    )


def worth_keeping(input: torch.Tensor, parameters: Parameters, spec: Spec) -> bool:
    """Whether ``save_contraction="auto"`` keeps the contraction of a layer."""
    units, rank, *window = parameters.weight.shape
    depth = math.prod(window)
    wide = input.dtype in (torch.float32, torch.float64)
    if input.device.type != "cpu" or not wide or _generated(rank, depth) or depth < KEPT_DEPTH:
        return False
    height, width = spec.geometry.output_size(*input.shape[2:])
    return input.shape[0] * height * width * units * rank * input.element_size() <= KEPT_BYTES


def _generated(rank, numbers):
    return numbers <= 2 * rank


# -- matrix products
# ------------------------------------------------------------------------------------------------------------


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``; ``a`` should be contiguous, ``b`` may be a transposed view.

    In float32 on a CPU by the matrix product of oneDNN, which torch uses for linear layers that it compiles,
    where this torch has it: there it takes 0.7 to 0.95 times as long as ``torch.mm``, but for small products,
    of which each costs some 20 us more.
    """
    large = a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() * b.shape[1] > SMALL_PRODUCT
    if large and torch.backends.mkldnn.enabled and _has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


@functools.cache
def _has_onednn_linear() -> bool:
    """Whether the operator is there and gives the product of a matrix with a transposed view; it is none
    that torch documents.
    """
    a, b = (torch.arange(n, dtype=torch.float32, device="cpu").view(-1, 3) for n in (6, 12))
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, b.t().contiguous().t(), None, "none", [], "")
        return found.tolist() == [[5, 14, 23, 32], [14, 50, 86, 122]]
    except (AttributeError, RuntimeError, TypeError):
        return False


def chunk_bytes(tensor) -> int:
    return CHUNK_BYTES["cpu" if tensor.device.type == "cpu" else "other"]


def _units_at_once() -> int:
    """Products of several units' matrices are shared out among threads by the unit; fewer than four at
    once take longer in any case.
    """
    threads = min(torch.get_num_threads(), 16)
    return threads * -(-4 // threads)


def _add(total, part):
    return part if total is None else total.add_(part)


class _Scratch:
    """One buffer for the large intermediates of all chunks: memory that is new costs as much as what is
    computed in it. On a CPU, whose allocator may give it back to the system after every call, a thread keeps
    it for its next call; meanwhile it belongs to this one alone, whatever a finaliser or a signal brings in
    between.
    """

    kept = threading.local()

    def __init__(self):
        self.buffer = self.kept.__dict__.pop("buffer", None)

    def __del__(self):
        if (
            self.buffer is not None
            and self.buffer.device.type == "cpu"
            and self.buffer.nbytes <= SCRATCH_BYTES
        ):
            self.kept.buffer = self.buffer

    def __call__(self, like, *shape):
        """An uninitialised tensor, whose predecessor is gone."""
        numbers = math.prod(shape)
        found = self.buffer
        if found is None or len(found) < numbers or found.dtype != like.dtype or found.device != like.device:
            with torch.inference_mode(False):  # it outlives the mode
                self.buffer = torch.empty(numbers, dtype=like.dtype, device=like.device)
        return self.buffer[:numbers].view(shape)


# -- the layer
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Layer:
    """A DAU layer as matrices. Shapes: p pixels of a chunk, d = C kh kw; ``columns`` are [*, p]."""

    reduce: torch.Tensor  # B, [r, d]
    generate: torch.Tensor  # A, [n, r, d]
    bias: torch.Tensor | None  # b, [n, d]
    spec: Spec

    @classmethod
    def make(cls, input, parameters, spec):
        compute = torch.float64 if input.dtype == torch.float64 else torch.float32
        reduce, weight, bias = parameters
        return cls(
            reduce.to(compute).flatten(1).contiguous(),
            weight.to(compute).flatten(2).contiguous(),
            None if bias is None else bias.to(compute).flatten(1).contiguous(),
            spec,
        )

    # -- the three passes
    # -------------------------------------------------------------------------------------------------------

    def align(self, input, applied, keep):
        """F(x, u) as [N, n, OH, OW], and what ``keep`` asks for."""
        windows = _Windows(input, self)
        applied_windows = windows if applied is None else _Windows(applied, self)
        shapes = _kept_shapes(*self.generate.shape, windows.pixels, input.dtype, keep)
        dot, square = (self.reduce.new_empty(len(self.generate), windows.pixels) for _ in range(2))
        contraction = None
        if shapes.contraction != (0,):
            contraction = self.reduce.new_empty(shapes.contraction)
        if contraction is None and self._worth_generating(windows.pixels):
            self._generate(windows, applied_windows, dot, square)
        else:
            self._contract(windows, applied_windows, dot, square, contraction)
        output = windows.rows_to_image(self._scale(square).mul_(dot), input)
        asked = (t if shape != (0,) else None for t, shape in zip((dot, square), shapes[:2], strict=True))
        return output, Kept(*asked, contraction)

    def _generate(self, windows, applied_windows, dot, square):
        """<w, u> and |w|^2 [n, P] of weights that are made, a chunk at a time."""
        scratch = _Scratch()
        for chunk in windows.chunks(*self._generated_chunks()):
            x = windows.gather(chunk).t().contiguous()
            u = x if applied_windows is windows else applied_windows.gather(chunk).t().contiguous()
            for units, w in self._weights(product(x, self.reduce.t()), scratch):
                torch.linalg.vector_norm(w, dim=2, out=square[units, chunk.columns])
                torch.sum(w.mul_(u), 2, out=dot[units, chunk.columns])
        square.square_()

    def _contract(self, windows, applied_windows, dot, square, contraction):
        """<w, u> and |w|^2 [n, P] without w, and A u [n r, P] if there is a tensor for it."""
        n, r, d = self.generate.shape
        norm = self._norm(_Scratch())
        together = applied_windows is windows and self.bias is not None  # b u and B x in one product
        heads = torch.cat((self.bias, self.reduce)) if together else self.reduce
        for chunk in windows.chunks(self._numbers(), self.generate.numel()):
            x = windows.gather(chunk)
            u = x if applied_windows is windows else applied_windows.gather(chunk)
            found = product(heads, x)
            z, part = found[-r:], dot[:, chunk.columns]
            products = product(self.generate.view(n * r, d), u)
            if contraction is not None:
                contraction[:, chunk.columns] = products
            torch.sum(products.view(n, r, -1).mul_(z), 1, out=part)
            if self.bias is not None:
                part += found[:n] if together else product(self.bias, u)
            norm.square(z, square[:, chunk.columns], u, part)

    def align_backward(self, grad, input, applied, kept, needs):
        """Gradients of F. With ``applied=None`` (u = x) du is part of dx and returned
        there.
        """
        need_x, need_u, need_reduce, need_weight, need_bias = needs
        contraction = kept.contraction
        shared = applied is None
        need_u = need_x if shared else need_u
        need_generate = need_weight or need_bias
        windows = _Windows(input, self)
        applied_windows = windows if shared else _Windows(applied, self)
        n, r, d = self.generate.shape
        v = windows.image_to_rows(grad)
        gs, t = self._grad_factors(v, kept.dot, kept.square)
        dx = windows.new_canvas() if need_x else None
        du = dx if shared else applied_windows.new_canvas() if need_u else None
        form = (_Generated if self.generated else _Contracted)(
            self, need_u, need_x or need_reduce, need_generate
        )
        # b and B: with one u for both, their few rows make one product
        heads, d_heads = [self.bias] if self.has_bias_rows else [], None
        heads = torch.cat([*heads, self.reduce]) if shared and form.need_z else heads[0] if heads else None
        d_reduce = torch.zeros_like(self.reduce) if need_reduce and not shared else None
        for chunk in windows.chunks(self._numbers(), self.generate.numel(), 1 + need_generate):
            x = windows.gather(chunk)
            u = x if shared else applied_windows.gather(chunk)
            z, part = product(self.reduce, x), gs[:, chunk.columns].contiguous()
            known = None if contraction is None else contraction.view(n, r, -1)[:, :, chunk.columns]
            dz, patch = form.backward(u, z, v[:, chunk.columns], part, t[:, chunk.columns], known)
            rows = [part] if self.has_bias_rows else []
            rows += [dz] if shared and form.need_z else []
            rows = torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None
            if rows is not None and (need_generate or (need_reduce and shared)):
                d_heads = _add(d_heads, product(rows, u.t()))
            if need_u:
                patch = patch if rows is None else patch.addmm_(rows.t(), heads)
                applied_windows.scatter_add(du, chunk, patch)
            if need_reduce and not shared:
                d_reduce.addmm_(dz, x.t())
            if need_x and not shared:
                windows.scatter_add(dx, chunk, dz.t() @ self.reduce)
        if d_heads is None and heads is not None:  # no pixels, or nobody asked
            d_heads = torch.zeros_like(heads)
        d_reduce = d_heads[-r:].clone() if need_reduce and shared else d_reduce
        d_weight, d_bias = (
            form.parameters(d_heads[:n] if self.has_bias_rows else None) if need_generate else (None, None)
        )
        of_parameters = (d_reduce, d_weight if need_weight else None, d_bias if need_bias else None)
        return Gradients(
            windows.canvas_to_image(dx, input) if need_x else None,
            applied_windows.canvas_to_image(du, applied) if need_u and not shared else None,
            *(None if g is None else self._like_parameter(g, input) for g in of_parameters),
        )

    def adjoint(self, input, value, like, square=None):
        """G(x, v) as [N, C, H, W], in dtype and format of ``like``; ``square`` saves the norms where they
        are known.
        """
        windows = _Windows(input, self)
        canvas = windows.new_canvas()
        v = windows.image_to_rows(value)
        gs = None if square is None else self._scale(square).mul_(v)
        _, r, d = self.generate.shape
        generates = self._worth_generating(windows.pixels) if square is None else d <= r
        scratch = _Scratch()
        norm = self._norm(scratch) if square is None and not generates else None
        for chunk in windows.chunks(
            *(self._generated_chunks() if generates else (self._numbers(), self.generate.numel()))
        ):
            x = windows.gather(chunk)
            if generates:
                patch = None
                for units, w in self._weights(product(x.t().contiguous(), self.reduce.t()), scratch):
                    scale = self._scale(torch.linalg.vector_norm(w, dim=2).square_()) if gs is None else None
                    part = scale.mul_(v[units, chunk.columns]) if gs is None else gs[units, chunk.columns]
                    patch = _add(patch, w.mul_(part.unsqueeze(2)).sum(0))
            else:
                z = product(self.reduce, x)
                scale = self._scale(norm.square(z, z.new_empty(len(v), z.shape[1]))) if gs is None else None
                part = scale.mul_(v[:, chunk.columns]) if gs is None else gs[:, chunk.columns]
                patch = self._direct(part, z, scratch)
                patch = patch if self.bias is None else patch.addmm_(part.t(), self.bias)
            windows.scatter_add(canvas, chunk, patch)
        return windows.canvas_to_image(canvas, like)

    def adjoints(self, input, values, like, square=None):
        """G(x, v_k) as [K, N, C, H, W]. Of more than one v the weights themselves are made, a chunk at a
        time: n r d products a pixel for all of them and n d for each, where ``adjoint`` takes n r d for each.
        """
        if len(values) == 1:
            return self.adjoint(input, values[0], like, square)[None]
        n, _, d = self.generate.shape
        windows = _Windows(input, self)
        canvases = torch.stack([windows.new_canvas() for _ in values])
        v = torch.stack([windows.image_to_rows(value) for value in values])  # [K, n, P]
        by_rank = self._by_rank()
        for chunk in windows.chunks(max(n * d, len(values) * d), self.generate.numel()):
            z = product(self.reduce, windows.gather(chunk))
            w = self._weights_of_all(z, by_rank)
            q = (
                torch.linalg.vector_norm(w, dim=2).square_().t()
                if square is None
                else square[:, chunk.columns]
            )
            # else bmm copies pixel by pixel
            gs = (self._scale(q) * v[:, :, chunk.columns]).permute(2, 0, 1).contiguous()
            windows.scatter_add(canvases, chunk, torch.bmm(gs, w).transpose(0, 1))
        return torch.stack([windows.canvas_to_image(canvas, like) for canvas in canvases])

    # -- their pieces
    # --------------------------------------------------------------------------------------------------------

    @property
    def generated(self) -> bool:
        """Whether the weights are made in the backward pass: there are n d of them a pixel, where the
        contraction has n r numbers.
        """
        return _generated(*self.generate.shape[1:])

    def _worth_generating(self, pixels) -> bool:
        """Whether making the weights costs less than the contraction and the norm. Each takes a product of r
        d multiplications a unit and pixel. Besides, with w there are d numbers to be written, measured,
        multiplied and added up. Without, there are r of them, and the norm's r^2 / 2 multiplications by what
        is made once a pixel for all units (r^2 / 2 numbers) and once a unit for all pixels (r^2 d / 2
        multiplications). The factors are hundredths of a nanosecond, of two threads of a Zen 4
        (docs/benchmark.md); that of r holds that the contraction is written to new memory. Where d <= 2 r the
        answer is always yes, as ``generated`` says.
        """
        n, r, d = self.generate.shape
        if self.generate.device.type != "cpu":
            return _generated(r, d)
        return pixels == 0 or 30 * d < 70 * r + r * r * (1 + 17 / n + 2 * d / pixels)

    def _generated_chunks(self):
        """What ``_Windows.chunks`` wants to know where ``_weights`` follows: chunks of twice the bytes,
        though not of the parameters'.
        """
        n, r, d = self.generate.shape
        return max(1, min(n, _units_at_once()) * d // 2), n * r * d // 2

    @property
    def has_bias_rows(self) -> bool:
        """Whether b is a factor of its own, beside A: it is part of w where that is made."""
        return self.bias is not None and not self.generated

    def _like_parameter(self, gradient, input):
        """[..., d] -> [..., C, kh, kw], in the dtype of the input, and no view: automatic differentiation
        in forward mode refuses those.
        """
        shape = (*gradient.shape[:-1], input.shape[1], *self.spec.geometry.kernel)
        return torch.ops.aten._unsafe_view(gradient, shape).to(input.dtype)

    def _numbers(self):
        """Numbers a pixel of the largest intermediates; the norm's, which are read once, may be twice as
        many.
        """
        n, r, d = self.generate.shape
        return n * d if self.generated else max(n * r, d, _Gram.numbers(r) // 2)

    def _norm(self, scratch):
        """Looking at numbers, as ``_Gram`` does, is for a CPU: a GPU would have to wait for it."""
        if self.generate.device.type == "cpu":
            return _Gram(self.generate, self.bias, scratch)
        return _Triangle(self.generate, self.bias)

    def _weights(self, z, scratch):
        """w of rows z [p, r], a few units at a time: (which units, w [units, p, d])."""
        n, _, d = self.generate.shape
        count = (
            max(1, 2 * chunk_bytes(z) // (z.element_size() * d * max(1, len(z))) // _units_at_once())
            * _units_at_once()
        )
        for first in range(0, n, count):
            units = slice(first, first + count)
            generate = self.generate[units]
            w, z_of_each = scratch(z, len(generate), len(z), d), z.expand(len(generate), -1, -1)
            if self.bias is None:
                torch.bmm(z_of_each, generate, out=w)
            else:
                torch.baddbmm(self.bias[units].unsqueeze(1), z_of_each, generate, out=w)
            yield units, w

    def _by_rank(self):
        """A as [r, n d]."""
        return self.generate.transpose(0, 1).flatten(1)

    def _weights_of_all(self, z, by_rank):
        """w of columns z [r, p], of all units by pixel: [p, n, d]."""
        n, _, d = self.generate.shape
        w = product(z.t().contiguous(), by_rank).view(-1, n, d)
        return w if self.bias is None else w.add_(self.bias)

    def _direct(self, gs, z, scratch):
        """sum_o gs_o A_o^T z as rows [p, d]."""
        n, r, d = self.generate.shape
        gs = gs.t().contiguous()
        outer = torch.mul(gs.unsqueeze(2), z.t().contiguous().unsqueeze(1), out=scratch(z, len(gs), n, r))
        return product(outer.view(-1, n * r), self.generate.view(n * r, d))

    def _scale(self, square):
        """s(q)."""
        return self.spec.scale(square.sqrt(), square)

    def _grad_factors(self, grad, dot, square):
        """gs = g s(q) and t = 2 g <w, u> s'(q), with their limits (0) at q = 0."""
        length = square.sqrt()
        flushed = _flushed(self.generate.shape[1] + 1, square.dtype)
        ratio = torch.where(length > 0, dot / length.clamp_min(flushed), 0)  # bounded by 2 |u|
        gs = self.spec.scale(length, square).mul_(grad)
        return gs, self.spec.slope(grad * ratio, length, square)


class _Contracted:
    """Backward where nothing of the size of w is made."""

    def __init__(self, layer: _Layer, need_u, need_z, need_generate):
        self.layer, self.need_u, self.need_z, self.need_generate = layer, need_u, need_z, need_generate
        self.gram = self._gram() if need_z else None
        self.d_generate = self.moments = None
        self.scratch = _Scratch()

    def _gram(self):
        """A_o [A_o b_o]^T as [r, n (r + 1)]."""
        generate, bias = self.layer.generate, self.layer.bias
        n, r, _ = generate.shape
        transposed = generate.transpose(1, 2)
        gram = generate.new_empty(r, n, r + (bias is not None))
        gram[:, :, :r] = torch.bmm(generate, transposed).transpose(0, 1)
        if bias is not None:
            gram[:, :, r] = torch.bmm(bias.unsqueeze(1), transposed).squeeze(1).t()
        return gram.view(r, -1)

    def backward(self, u, z, v, gs, t, contraction):
        """dz [r, p] and sum_o gs_o A_o^T z as rows [p, d], None where not needed."""
        generate, bias = self.layer.generate, self.layer.bias
        n, r, d = generate.shape
        pixels = z.shape[1]
        extended = z if bias is None else torch.cat((z, z.new_ones(1, pixels)))
        dz = patch = None
        if self.need_z:
            contraction = (
                product(generate.view(n * r, d), u).view(n, r, -1) if contraction is None else contraction
            )
            dz = torch.mul(contraction, gs.unsqueeze(1), out=self.scratch(z, n, r, pixels)).sum(0)
        if self.need_z or self.need_generate:
            terms = torch.mul(t.unsqueeze(1), extended, out=self.scratch(z, n, len(extended), pixels)).view(
                -1, pixels
            )
            if self.need_z:
                dz += product(self.gram, terms)
            if self.need_generate:
                self.moments = _add(self.moments, product(terms, extended.t()))  # sum_p t z~ z~^T
        if self.need_generate:
            outer = torch.mul(gs.unsqueeze(1), z, out=self.scratch(z, n, r, pixels))
            self.d_generate = _add(self.d_generate, product(outer.view(n * r, pixels), u.t()))
        if self.need_u:
            patch = self.layer._direct(gs, z, self.scratch)
        return dz, patch

    def parameters(self, d_bias):
        """dA [n, r, d] and db [n, d]: what the chunks gave, and moments A~; ``d_bias`` is what b's own
        rows gave.
        """
        generate, bias = self.layer.generate, self.layer.bias
        n, r, d = generate.shape
        if self.moments is None:  # no pixels
            return torch.zeros_like(generate), d_bias
        moments = self.moments.view(n, -1, len(self.moments) // n)
        d_weight = self.d_generate.view(n, r, d).baddbmm_(moments[:, :r, :r], generate)
        if bias is None:
            return d_weight, None
        d_weight.addcmul_(moments[:, :r, r:], bias.unsqueeze(1))
        d_bias = d_bias.addcmul(moments[:, r, r:], bias)
        return d_weight, d_bias.add_(torch.bmm(moments[:, r:, :r], generate).squeeze(1))


class _Generated:
    """Backward where w is made."""

    def __init__(self, layer: _Layer, need_u, need_z, need_generate):
        self.layer, self.need_u, self.need_z, self.need_generate = layer, need_u, need_z, need_generate
        self.by_rank = layer._by_rank()
        self.d_generate = self.d_bias = None
        self.scratch = _Scratch()

    def backward(self, u, z, v, gs, t, contraction):
        """dz [r, p] and sum_o gs_o w_o as rows [p, d], None where not needed."""
        w = self.layer._weights_of_all(z, self.by_rank)
        u = u.t().contiguous().unsqueeze(1)
        # gs u + t w cancels: what is left must not be that the w of the forward pass was rounded otherwise
        if w.shape[2] == 1:
            gs, t = self.layer._grad_factors(v.t(), (w * u).sum(2), w.square().sum(2))
        else:
            gs, t = gs.t().contiguous(), t.t().contiguous()
        dz = patch = None
        if self.need_z or self.need_generate:
            dw = (
                torch.mul(w, t.unsqueeze(2), out=self.scratch(w, *w.shape))
                .addcmul_(gs.unsqueeze(2), u)
                .flatten(1)
            )
            if self.need_z:
                dz = product(dw, self.by_rank.t()).t().contiguous()
            if self.need_generate:
                self.d_generate = _add(self.d_generate, product(z, dw))
                self.d_bias = None if self.layer.bias is None else _add(self.d_bias, dw.sum(0))
        if self.need_u:
            patch = w.mul_(gs.unsqueeze(2)).sum(1)
        return dz, patch

    def parameters(self, d_bias):
        (n, r, d), bias = self.layer.generate.shape, self.layer.bias
        if self.d_generate is None:  # no pixels
            return torch.zeros_like(self.layer.generate), None if bias is None else torch.zeros_like(bias)
        return self.d_generate.view(r, n, d).transpose(
            0, 1
        ).contiguous(), None if bias is None else self.d_bias.view(n, d)


# -- norms
# ------------------------------------------------------------------------------------------------------------


class _Gram:
    """|w|^2 as a quadratic form in z, whose matrix is A A^T.

    By symmetry it needs half of the products z_k z_l: those on and right of the diagonal blocks of a few rows
    each. It is rounded in proportion to sum_k |z_k A_k|^2; pixel-units where |w|^2 is small beside that are
    computed from w itself, which is exact there too.
    """

    def __init__(self, generate, bias, scratch):
        self.generate, self.bias, self.scratch = generate, bias, scratch
        n, r, _ = generate.shape
        self.blocks, times, diagonal = self._layout(r, generate.dtype)
        transposed = generate.transpose(1, 2)
        found = [
            torch.bmm(generate[:, first:last], transposed[:, :, first:]).flatten(1)
            for first, last, _, _ in self.blocks
        ]
        if bias is not None:
            found += [
                torch.bmm(bias.unsqueeze(1), transposed).squeeze(1),
                torch.linalg.vecdot(bias, bias).unsqueeze(1),
            ]
        self.coefficients = torch.cat(found, 1).mul_(times[: self.numbers(r) - (r + 1) * (bias is None)])
        self.shares = self.coefficients.index_select(1, diagonal).add_(FLUSHED).mul_(CANCELLED)
        self.least = self.shares.sum(1, keepdim=True).mul_(FLUSHED)
        if bias is not None:
            self.least.add_(found[-1], alpha=CANCELLED)

    @staticmethod
    @functools.cache
    def _layout(r, dtype):
        """The blocks, as (first row, last row, where its products begin, end); how often each product
        counts; where those z_k^2 are.
        """
        size, start, blocks, times, diagonal = max(8, -(-r // 4)), 0, [], [], []
        for first in range(0, r, size):
            last, width = min(first + size, r), r - first
            blocks.append((first, last, start, start + (last - first) * width))
            # within a block every product is there twice
            times += ([1] * (last - first) + [2] * (r - last)) * (last - first)
            diagonal += range(start, blocks[-1][3], width + 1)
            start = blocks[-1][3]
        times += [2] * r + [1]  # b A^T, |b|^2
        return blocks, torch.tensor(times, dtype=dtype, device="cpu"), torch.tensor(diagonal, device="cpu")

    @classmethod
    def numbers(cls, r):
        """Products z_k z_l a pixel, with z and 1."""
        return len(cls._layout(r, torch.float32)[1])

    def square(self, z, q, u=None, dot=None):
        """|w|^2 of columns z into ``q`` [n, p]. Where it had to be computed from w, so is <w, u>, in
        ``dot`` [n, p].
        """
        r, pixels = z.shape
        terms = self.scratch(z, self.coefficients.shape[1], pixels)
        for first, last, start, stop in self.blocks:
            torch.mul(
                z[first:last].unsqueeze(1),
                z[first:],
                out=terms[start:stop].view(last - first, r - first, pixels),
            )
        if self.bias is not None:
            terms[-r - 1 : -1] = z
            terms[-1] = 1
        q.copy_(product(self.coefficients, terms))
        right = q > product(self.shares, z.square()).add_(self.least)  # False for NaN
        if not right.all():
            self._from_weights(~right, z, q, u, dot)
        return q

    def _from_weights(self, where, z, q, u, dot):
        for unit in where.any(1).nonzero().flatten().tolist():
            columns = where[unit].nonzero().flatten()
            w = self.generate[unit].t() @ z[:, columns]
            w = w if self.bias is None else w.add_(self.bias[unit].unsqueeze(1))
            q[unit, columns] = w.square().sum(0)
            if dot is not None:
                dot[unit, columns] = w.mul_(u[:, columns]).sum(0)


class _Triangle:
    """|w|^2 as |R z~|^2 with a triangular factor R of [A b]: never negative, and exact where w nearly
    cancels.
    """

    def __init__(self, generate, bias):
        self.bias = bias
        rows = generate if bias is None else torch.cat((generate, bias.unsqueeze(1)), 1)
        self.factor = norm_factor(rows)
        self.sizes = rows.shape[1:]

    def square(self, z, q, u=None, dot=None):
        """|w|^2 of columns z into ``q`` [n, p]. Puts ``dot`` within Cauchy and Schwarz's bound, which
        rounding exceeds where w cancels.
        """
        n, k, m = self.factor.shape
        z = z if self.bias is None else torch.cat((z, z.new_ones(1, z.shape[1])))
        length = torch.linalg.vector_norm(product(self.factor.view(n * k, m), z).view(n, k, -1), dim=1)
        if dot is not None:
            flushed = [_flushed(terms, z.dtype) for terms in self.sizes]
            bound = (length + flushed[0]) * (torch.linalg.vector_norm(u, dim=0) + flushed[1])
            dot.clamp_(-bound, bound)
        return q.copy_(length.square_())


def _flushed(terms, dtype):
    """How much shorter than it is a vector of so many numbers may seem: squares below the least number are
    0.
    """
    return (terms * torch.finfo(dtype).tiny) ** 0.5


def norm_factor(rows: torch.Tensor) -> torch.Tensor:
    """R_o with ``|R_o v| = |rows_o^T v|`` for every v: [n, m, d] -> [n, min(m, d), m].

    float64 takes a QR. float32 takes a Cholesky factor of the float64 Gram matrix, which costs 1/6 to 2/3 of
    a QR in float32 and is no less accurate: its jitter of 1e-14, which keeps rank-deficient rows legal, is
    the square of float32's own resolution of w. Each row has a jitter of its own length: one of the longest
    row would add to |w| where that row's number in z is 0.
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
    # only weights that are not finite get here; like any layer, answer with NaN, where the user's own check
    # looks for it
    return (
        (factor * length.unsqueeze(1))
        .masked_fill((failed > 0)[:, None, None], float("nan"))
        .to(rows.dtype)
        .contiguous()
    )


# -- patches
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Chunk:
    images: slice
    lines: slice
    columns: slice  # of the [..., P] matrices


class _Windows:
    """The windows of an image batch as columns of a matrix, gathered and scattered a chunk at a time."""

    def __init__(self, image, layer: _Layer):
        g = layer.spec.geometry
        self.geometry, self.compute = g, layer.reduce.dtype
        self.batch, self.channels, height, width = image.shape
        self.out = g.output_size(height, width)
        self.pixels = self.batch * self.out[0] * self.out[1]
        left, right, top, bottom = g.padding
        padded_height, padded_width = height + top + bottom, width + left + right
        if any(g.padding):  # one copy from any layout and dtype
            self.canvas = layer.reduce.new_zeros(self.batch, self.channels, padded_height, padded_width)
            self.canvas[:, :, top : top + height, left : left + width] = image
        else:
            self.canvas = image.to(self.compute).contiguous()
        plane = padded_height * padded_width
        taps = (g.dilation[0] * padded_width, g.dilation[1])
        steps = (self.channels * plane, g.stride[0] * padded_width, g.stride[1])
        self.windows = self.canvas.as_strided(
            (self.channels, *g.kernel, self.batch, *self.out), (plane, *taps, *steps)
        )

    def chunks(self, numbers_per_pixel, parameters, factor=1):
        """As few as the budget allows, of about one size: whole images where several fit, else lines of
        one image.
        """
        size = self.canvas.element_size()
        budget = (
            factor
            * max(chunk_bytes(self.canvas), CHUNK_PARAMETERS * parameters * size)
            // (numbers_per_pixel * size)
        )
        height, width = self.out
        images, lines = _even(self.batch, budget // (height * width)), _even(height, budget // width)
        for i in range(0, self.batch, images):
            stop = min(i + images, self.batch)
            for h in range(0, height, lines):
                end = min(h + lines, height)
                first = (i * height + h) * width
                count = (stop - i) * (end - h) * width
                yield _Chunk(slice(i, stop), slice(h, end), slice(first, first + count))

    def gather(self, chunk):
        """Patches as columns, [d, p]."""
        part = self.windows[:, :, :, chunk.images, chunk.lines]
        # reshape alone may give a view of overlapping rows
        return part.reshape(-1, chunk.columns.stop - chunk.columns.start).contiguous()

    def scatter_add(self, canvas, chunk, patches):
        """Patches [..., p, d] to a canvas [..., N, H, W, C], or several."""
        g, (*many, _, height, width, channels) = self.geometry, canvas.shape
        row = width * channels
        steps, taps = (
            (g.stride[0] * row, g.stride[1] * channels),
            (g.dilation[0] * row, g.dilation[1] * channels),
        )
        windows = canvas.as_strided(
            (*many, self.batch, *self.out, channels, *g.kernel),
            (*canvas.stride()[:-4], height * row, *steps, 1, *taps),
        )[..., chunk.images, chunk.lines, :, :, :, :]
        patches = patches.view(windows.shape)
        taps = lambda t: [tap for row in t.unbind(-2) for tap in row.unbind(-1)]
        # one after the other, on a GPU because no tap is dense: windows overlap
        torch._foreach_add_(taps(windows), taps(patches))

    def new_canvas(self):
        """Channels last: what is added to it comes pixel by pixel."""
        batch, channels, height, width = self.canvas.shape
        return self.canvas.new_zeros(batch, height, width, channels)

    def rows_to_image(self, rows, like):
        """[n, P] -> [N, n, OH, OW]"""
        image = torch.empty(
            self.batch,
            len(rows),
            *self.out,
            dtype=like.dtype,
            device=like.device,
            memory_format=format_of(like),
        )
        return image.copy_(rows.view(len(rows), self.batch, *self.out).transpose(0, 1))

    def image_to_rows(self, image):
        """[N, n, OH, OW] -> [n, P]"""
        return image.transpose(0, 1).to(self.compute).reshape(image.shape[1], -1)

    def canvas_to_image(self, canvas, like):
        left, _, top, _ = self.geometry.padding
        image = canvas[:, top : top + like.shape[2], left : left + like.shape[3]].permute(0, 3, 1, 2)
        return image.to(like.dtype).contiguous(memory_format=format_of(like))


def _even(count, most):
    """The size of equal parts of ``count``, of at most ``most`` (1 at least)."""
    parts = -(-count // max(1, min(count, most))) if count else 1
    return max(1, -(-count // parts))


def format_of(image):
    """A convolution's rule: channels_last in, channels_last out; anything else gives a contiguous result."""
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
