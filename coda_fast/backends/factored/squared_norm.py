"""|w|^2 without w: as a quadratic form in z on a CPU, as a sum of squares on other devices."""

from __future__ import annotations

import functools

import torch

from coda_fast.backends.factored import matrices

# |w|^2 of a unit at a pixel is computed from w itself if it is less than this share of sum_k |z_k A_k|^2. The
# rounding error of the quadratic form is proportional to that sum, which is about |w|^2 if nothing cancels.
CANCELLED = 1 / 16
# Added to z_k^2 and |A_k|^2 in that sum, so that it exceeds what |w|^2 loses when products of small numbers
# underflow to 0
FLUSHED = 1e-27


class Gram:
    """|w|^2 as a quadratic form in z, whose matrix is A A^T.

    By symmetry it needs half of the products z_k z_l: those on and right of the diagonal blocks, which have a
    few rows each. Its rounding error is proportional to sum_k |z_k A_k|^2; where |w|^2 is small compared with
    that, it is computed from w itself, which is accurate there too.
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
        """The blocks, each as (first row, end row, start and end of its products); how often each product
        counts; the positions of the z_k^2.
        """
        size, start, blocks, times, diagonal = max(8, -(-r // 4)), 0, [], [], []
        for first in range(0, r, size):
            last, width = min(first + size, r), r - first
            blocks.append((first, last, start, start + (last - first) * width))
            # within a diagonal block, every product with k != l occurs twice
            times += ([1] * (last - first) + [2] * (r - last)) * (last - first)
            diagonal += range(start, blocks[-1][3], width + 1)
            start = blocks[-1][3]
        times += [2] * r + [1]  # b A^T, |b|^2
        return blocks, torch.tensor(times, dtype=dtype, device="cpu"), torch.tensor(diagonal, device="cpu")

    @classmethod
    def numbers(cls, r: int) -> int:
        """The number of products z_k z_l per pixel, including z and 1."""
        return len(cls._layout(r, torch.float32)[1])

    def square(
        self, z: torch.Tensor, q: torch.Tensor, u: torch.Tensor | None = None, dot: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Write |w|^2 for columns z into ``q`` [n, p]. Where it is computed from w, <w, u> in ``dot`` [n, p]
        is, too.
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
    """|w|^2 as |R z~|^2 with a triangular factor R of [A b]: never negative, and accurate where w nearly
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
        """Write |w|^2 for columns z into ``q`` [n, p]. Clamp ``dot`` to the Cauchy-Schwarz bound, which
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
    """By how much the computed length of a vector with ``terms`` entries may fall short: squares below the
    smallest normal number are flushed to 0.
    """
    return (terms * torch.finfo(dtype).tiny) ** 0.5


def norm_factor(rows: torch.Tensor) -> torch.Tensor:
    """R_o with ``|R_o v| = |rows_o^T v|`` for every v: [n, m, d] -> [n, min(m, d), m].

    float64 uses a QR. float32 uses a Cholesky factor of the float64 Gram matrix, which costs 1/6 to 2/3 of a
    QR in float32 and is no less accurate: its jitter of 1e-14, which permits rank-deficient rows, is the
    square of float32's own resolution of w. The jitter of each row is relative to its own length; one
    relative to the longest row would add to |w| where that row's number in z is 0.
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
    # The factorisation fails only for weights that are not finite. Like any layer, give NaN, which the user's
    # own checks can find.
    return (
        (factor * length.unsqueeze(1))
        .masked_fill((failed > 0)[:, None, None], float("nan"))
        .to(rows.dtype)
        .contiguous()
    )
