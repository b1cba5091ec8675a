"""|w|^2 without w: as a quadratic form in z on a CPU, as a sum of squares elsewhere."""

from __future__ import annotations

import functools

import torch

from coda_fast.backends.factored import matrices

# Pixel-units are computed from w itself where |w|^2 is less than this share of sum_k |z_k A_k|^2, of which it
# is about the whole where nothing cancels: the quadratic form is rounded in proportion to that sum.
CANCELLED = 1 / 16
# What is added to z_k^2 and |A_k|^2 in that sum, so that it exceeds what |w|^2 has lost where products of
# small numbers became 0
FLUSHED = 1e-27


class Gram:
    """|w|^2 as a quadratic form in z, whose matrix is A A^T.

    By symmetry it needs half of the products z_k z_l: those on and right of the diagonal blocks of a few rows
    each. It is rounded in proportion to sum_k |z_k A_k|^2; pixel-units where |w|^2 is small beside that are
    computed from w itself, which is exact there too.
    """

    def __init__(self, generate: torch.Tensor, bias: torch.Tensor | None, scratch: matrices.Scratch):
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
    def numbers(cls, r: int) -> int:
        """Products z_k z_l a pixel, with z and 1."""
        return len(cls._layout(r, torch.float32)[1])

    def square(
        self, z: torch.Tensor, q: torch.Tensor, u: torch.Tensor | None = None, dot: torch.Tensor | None = None
    ) -> torch.Tensor:
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
        q.copy_(matrices.product(self.coefficients, terms))
        right = q > matrices.product(self.shares, z.square()).add_(self.least)  # False for NaN
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


class Triangle:
    """|w|^2 as |R z~|^2 with a triangular factor R of [A b]: never negative, and exact where w nearly
    cancels.
    """

    def __init__(self, generate: torch.Tensor, bias: torch.Tensor | None):
        self.bias = bias
        rows = generate if bias is None else torch.cat((generate, bias.unsqueeze(1)), 1)
        self.factor = norm_factor(rows)
        self.sizes = rows.shape[1:]

    def square(
        self, z: torch.Tensor, q: torch.Tensor, u: torch.Tensor | None = None, dot: torch.Tensor | None = None
    ) -> torch.Tensor:
        """|w|^2 of columns z into ``q`` [n, p]. Puts ``dot`` within Cauchy and Schwarz's bound, which
        rounding exceeds where w cancels.
        """
        n, k, m = self.factor.shape
        z = z if self.bias is None else torch.cat((z, z.new_ones(1, z.shape[1])))
        length = torch.linalg.vector_norm(
            matrices.product(self.factor.view(n * k, m), z).view(n, k, -1), dim=1
        )
        if dot is not None:
            flushed = [flushed_length(terms, z.dtype) for terms in self.sizes]
            bound = (length + flushed[0]) * (torch.linalg.vector_norm(u, dim=0) + flushed[1])
            dot.clamp_(-bound, bound)
        return q.copy_(length.square_())


def flushed_length(terms: int, dtype: torch.dtype) -> float:
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
