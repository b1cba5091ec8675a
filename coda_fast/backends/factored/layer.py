"""The forward, backward and adjoint passes of a layer in factored form, over chunks of pixels."""

from __future__ import annotations

import dataclasses

import torch

from coda_fast._spec import KEEPS, Gradients, Kept, Parameters, Spec
from coda_fast.backends.factored import matrices
from coda_fast.backends.factored.backward import Contracted, Generated
from coda_fast.backends.factored.squared_norm import Gram, Triangle, flushed_length
from coda_fast.backends.factored.windows import Windows


@dataclasses.dataclass
class Layer:
    """A DAU layer as matrices. Shapes: p pixels in a chunk, P in all, d = C kh kw; ``columns`` are [*, p]."""

    reduce: torch.Tensor  # B, [r, d]
    generate: torch.Tensor  # A, [n, r, d]
    bias: torch.Tensor | None  # b, [n, d]
    spec: Spec

    @classmethod
    def make(cls, input: torch.Tensor, parameters: Parameters, spec: Spec) -> Layer:
        """The layer with its parameters in float32 or wider."""
        compute = torch.float64 if input.dtype == torch.float64 else torch.float32
        reduce, weight, bias = parameters
        return cls(
            reduce.to(compute).flatten(1).contiguous(),
            weight.to(compute).flatten(2).contiguous(),
            None if bias is None else bias.to(compute).flatten(1).contiguous(),
            spec,
        )

    # -- the three passes

    def align(
        self, input: torch.Tensor, applied: torch.Tensor | None, keep: str
    ) -> tuple[torch.Tensor, Kept]:
        """F(x, u) as [N, n, OH, OW], and what ``keep`` requests."""
        windows = Windows(input, self)
        applied_windows = windows if applied is None else Windows(applied, self)
        wanted, (n, r, d) = KEEPS[keep], self.generate.shape
        dot, square = (self.reduce.new_empty(n, windows.pixels) for _ in range(2))
        contraction = None
        if wanted.contraction and has_contraction(r, d, input.dtype):
            contraction = self.reduce.new_empty(n * r, windows.pixels)
        if contraction is None and self._worth_generating(windows.pixels):
            self._generate(windows, applied_windows, dot, square)
        else:
            self._contract(windows, applied_windows, dot, square, contraction)
        output = windows.rows_to_image(self._scale(square).mul_(dot), input)
        return output, Kept(dot if wanted.dot else None, square if wanted.square else None, contraction)

    def _generate(self, windows, applied_windows, dot, square):
        """Compute <w, u> and |w|^2 [n, P] from w, which is generated a chunk at a time."""
        scratch = matrices.Scratch()
        for chunk in windows.chunks(*self._generated_chunks()):
            x = windows.gather(chunk).t().contiguous()
            u = x if applied_windows is windows else applied_windows.gather(chunk).t().contiguous()
            for units, w in self._weights(matrices.product(x, self.reduce.t()), scratch):
                torch.linalg.vector_norm(w, dim=2, out=square[units, chunk.columns])
                torch.sum(w.mul_(u), 2, out=dot[units, chunk.columns])
        square.square_()

    def _contract(self, windows, applied_windows, dot, square, contraction):
        """Compute <w, u> and |w|^2 [n, P] without w, and A u [n r, P] if there is a tensor for it."""
        n, r, d = self.generate.shape
        norm = self._norm(matrices.Scratch())
        together = applied_windows is windows and self.bias is not None  # b u and B x in one product
        heads = torch.cat((self.bias, self.reduce)) if together else self.reduce
        for chunk in windows.chunks(self._numbers(), self.generate.numel()):
            x = windows.gather(chunk)
            u = x if applied_windows is windows else applied_windows.gather(chunk)
            found = matrices.product(heads, x)
            z, part = found[-r:], dot[:, chunk.columns]
            products = matrices.product(self.generate.view(n * r, d), u)
            if contraction is not None:
                contraction[:, chunk.columns] = products
            torch.sum(products.view(n, r, -1).mul_(z), 1, out=part)
            if self.bias is not None:
                part += found[:n] if together else matrices.product(self.bias, u)
            norm.square(z, square[:, chunk.columns], u, part)

    def align_backward(
        self,
        grad: torch.Tensor,
        input: torch.Tensor,
        applied: torch.Tensor | None,
        kept: Kept,
        needs: Gradients,
    ) -> Gradients:
        """The gradients of F. With ``applied=None`` (u = x), dx includes du."""
        need_x, need_u, need_reduce, need_weight, need_bias = needs
        contraction = kept.contraction
        shared = applied is None
        need_u = need_x if shared else need_u
        need_generate = need_weight or need_bias
        windows = Windows(input, self)
        applied_windows = windows if shared else Windows(applied, self)
        n, r, d = self.generate.shape
        v = windows.image_to_rows(grad)
        gs, t = self._grad_factors(v, kept.dot, kept.square)
        dx = windows.new_padded() if need_x else None
        du = dx if shared else applied_windows.new_padded() if need_u else None
        form = (Generated if self.generated else Contracted)(
            self, need_u, need_x or need_reduce, need_generate
        )
        # b and B have few rows; if u is x, one product computes both
        of_bias, of_reduce = self.has_bias_rows, shared and form.need_z
        heads = matrices.stacked([self.bias] * of_bias + [self.reduce] * of_reduce)
        d_heads = None if heads is None else torch.zeros_like(heads)
        d_reduce = torch.zeros_like(self.reduce) if need_reduce and not shared else None
        for chunk in windows.chunks(self._numbers(), self.generate.numel(), 1 + need_generate):
            x = windows.gather(chunk)
            u = x if shared else applied_windows.gather(chunk)
            z, part = matrices.product(self.reduce, x), gs[:, chunk.columns].contiguous()
            known = None if contraction is None else contraction.view(n, r, -1)[:, :, chunk.columns]
            dz, patch = form.backward(u, z, v[:, chunk.columns], part, t[:, chunk.columns], known)
            rows = matrices.stacked([part] * of_bias + [dz] * of_reduce)
            if d_heads is not None and rows is not None and (need_generate or (need_reduce and shared)):
                d_heads += matrices.product(rows, u.t())
            if patch is not None:
                patch = patch if rows is None else patch.addmm_(rows.t(), heads)
                applied_windows.scatter_add(du, chunk, patch)
            if dz is not None and not shared:
                if d_reduce is not None:
                    d_reduce.addmm_(dz, x.t())
                if need_x:
                    windows.scatter_add(dx, chunk, dz.t() @ self.reduce)
        if d_heads is not None and need_reduce and shared:
            d_reduce = d_heads[-r:].clone()
        d_weight = d_bias = None
        if need_generate:
            d_weight, d_bias = form.parameters(None if d_heads is None or not of_bias else d_heads[:n])
        of_parameters = (d_reduce, d_weight if need_weight else None, d_bias if need_bias else None)
        return Gradients(
            windows.crop(dx, input) if need_x else None,
            applied_windows.crop(du, applied) if need_u and not shared else None,
            *(None if g is None else self._like_parameter(g, input) for g in of_parameters),
        )

    def adjoint(
        self, input: torch.Tensor, value: torch.Tensor, like: torch.Tensor, square: torch.Tensor | None = None
    ) -> torch.Tensor:
        """G(x, v) as [N, C, H, W], in the dtype and memory format of ``like``. ``square`` is |w|^2 if it is
        known, which saves computing it.
        """
        windows = Windows(input, self)
        padded = windows.new_padded()
        v = windows.image_to_rows(value)
        known = None if square is None else self._scale(square).mul_(v)
        _, r, d = self.generate.shape
        generates = self._worth_generating(windows.pixels) if square is None else d <= r
        scratch = matrices.Scratch()
        norm: Gram | Triangle | None = None
        for chunk in windows.chunks(
            *(self._generated_chunks() if generates else (self._numbers(), self.generate.numel()))
        ):
            x = windows.gather(chunk)
            if generates:
                patch = None
                for units, w in self._weights(matrices.product(x.t().contiguous(), self.reduce.t()), scratch):
                    if known is not None:
                        gs = known[units, chunk.columns]
                    else:
                        scale = self._scale(torch.linalg.vector_norm(w, dim=2).square_())
                        gs = scale.mul_(v[units, chunk.columns])
                    patch = matrices.add(patch, w.mul_(gs.unsqueeze(2)).sum(0))
            else:
                z = matrices.product(self.reduce, x)
                if known is not None:
                    gs = known[:, chunk.columns]
                else:
                    norm = norm or self._norm(scratch)  # made once for all chunks
                    scale = self._scale(norm.square(z, z.new_empty(len(v), z.shape[1])))
                    gs = scale.mul_(v[:, chunk.columns])
                patch = self._direct(gs, z, scratch)
                patch = patch if self.bias is None else patch.addmm_(gs.t(), self.bias)
            windows.scatter_add(padded, chunk, patch)
        return windows.crop(padded, like)

    def adjoints(
        self,
        input: torch.Tensor,
        values: torch.Tensor,
        like: torch.Tensor,
        square: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """G(x, v_k) as [K, N, C, H, W]. For more than one v, w is materialised a chunk at a time: that takes
        n r d products per pixel for all v and n d for each, whereas ``adjoint`` takes n r d for each.
        """
        if len(values) == 1:
            return self.adjoint(input, values[0], like, square)[None]
        n, _, d = self.generate.shape
        windows = Windows(input, self)
        sums = torch.stack([windows.new_padded() for _ in values])
        v = torch.stack([windows.image_to_rows(value) for value in values])  # [K, n, P]
        by_rank = self._by_rank()
        for chunk in windows.chunks(max(n * d, len(values) * d), self.generate.numel()):
            z = matrices.product(self.reduce, windows.gather(chunk))
            w = self._weights_of_all(z, by_rank)
            q = (
                torch.linalg.vector_norm(w, dim=2).square_().t()
                if square is None
                else square[:, chunk.columns]
            )
            # contiguous, because bmm would otherwise copy pixel by pixel
            gs = (self._scale(q) * v[:, :, chunk.columns]).permute(2, 0, 1).contiguous()
            windows.scatter_add(sums, chunk, torch.bmm(gs, w).transpose(0, 1))
        return torch.stack([windows.crop(padded, like) for padded in sums])

    # -- their parts

    @property
    def generated(self) -> bool:
        """Whether the backward pass materialises w: it has n d numbers per pixel, the contraction n r."""
        return generates(*self.generate.shape[1:])

    def _worth_generating(self, pixels) -> bool:
        """Whether generating w is cheaper than the contracted form.

        Both forms take a product of r d multiplications for every unit and pixel. The generated form then
        processes the d numbers of w. The contracted form processes the r numbers of the contraction, and for
        the norm r^2 / 2 multiplications with coefficients that cost r^2 / 2 once for every pixel and r^2 d /
        2 once for every unit. The factors below are hundredths of a nanosecond, measured with two threads of
        a Zen 4 (docs/benchmark.md); that of r includes writing the contraction to new memory. If d <= 2 r,
        the answer is always yes, as in ``generated``.
        """
        n, r, d = self.generate.shape
        if self.generate.device.type != "cpu":
            return generates(r, d)
        return pixels == 0 or 30 * d < 70 * r + r * r * (1 + 17 / n + 2 * d / pixels)

    def _generated_chunks(self):
        """The arguments of ``Windows.chunks`` for the generated form: chunks of twice the bytes, but the same
        minimum from the parameters.
        """
        n, r, d = self.generate.shape
        return max(1, min(n, matrices.units_at_once()) * d // 2), n * r * d // 2

    @property
    def has_bias_rows(self) -> bool:
        """Whether b multiplies u separately from A; if w is generated, b is part of it."""
        return self.bias is not None and not self.generated

    def _like_parameter(self, gradient, input):
        """[..., d] -> [..., C, kh, kw], in the dtype of the input. Not as a view, which forward-mode autograd
        refuses.
        """
        shape = (*gradient.shape[:-1], input.shape[1], *self.spec.geometry.kernel)
        return torch.ops.aten._unsafe_view(gradient, shape).to(input.dtype)

    def _numbers(self):
        """How many numbers the largest intermediate has for every pixel. That of the norm is read only once,
        and may have twice as many.
        """
        n, r, d = self.generate.shape
        return n * d if self.generated else max(n * r, d, Gram.numbers(r) // 2)

    def _norm(self, scratch):
        """``Gram`` on a CPU, else ``Triangle``: ``Gram`` reads its results, which would stall a GPU."""
        if self.generate.device.type == "cpu":
            return Gram(self.generate, self.bias, scratch)
        return Triangle(self.generate, self.bias)

    def _weights(self, z, scratch):
        """w for rows z [p, r], a few units at a time: (slice of units, w [units, p, d])."""
        n, _, d = self.generate.shape
        at_once, numbers = matrices.units_at_once(), d * max(1, len(z))
        count = at_once * max(1, 2 * matrices.chunk_bytes(z) // (z.element_size() * numbers) // at_once)
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
        """w for columns z [r, p], of all units, by pixel: [p, n, d]."""
        n, _, d = self.generate.shape
        w = matrices.product(z.t().contiguous(), by_rank).view(-1, n, d)
        return w if self.bias is None else w.add_(self.bias)

    def _direct(self, gs, z, scratch):
        """sum_o gs_o A_o^T z as rows [p, d]."""
        n, r, d = self.generate.shape
        gs = gs.t().contiguous()
        outer = torch.mul(gs.unsqueeze(2), z.t().contiguous().unsqueeze(1), out=scratch(z, len(gs), n, r))
        return matrices.product(outer.view(-1, n * r), self.generate.view(n * r, d))

    def _scale(self, square):
        """s(q)."""
        return self.spec.scale(square.sqrt(), square)

    def _grad_factors(self, grad, dot, square):
        """gs = g s(q) and t = 2 g <w, u> s'(q); at q = 0 their limits, which are 0."""
        length = square.sqrt()
        flushed = flushed_length(self.generate.shape[1] + 1, square.dtype)
        ratio = torch.where(length > 0, dot / length.clamp_min(flushed), 0)  # bounded by 2 |u|
        gs = self.spec.scale(length, square).mul_(grad)
        return gs, self.spec.slope(grad * ratio, length, square)


def generates(rank: int, depth: int) -> bool:
    """Whether to generate w, because it has no more numbers than the contraction and the norm need."""
    return depth <= 2 * rank


def has_contraction(rank: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether there is a contraction A u that the forward pass could keep; in float32 and float64 only."""
    return dtype in (torch.float32, torch.float64) and not generates(rank, depth)
