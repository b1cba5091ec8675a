"""The backward pass for a chunk of pixels, with and without materialising w."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from coda_fast.backends.factored import matrices

if TYPE_CHECKING:
    from coda_fast.backends.factored.layer import Layer

Results = tuple[torch.Tensor | None, torch.Tensor | None]


class Contracted:
    """The backward pass in the contracted form: nothing of the size of w is made."""

    def __init__(self, layer: Layer, need_u: bool, need_z: bool, need_generate: bool):
        self.layer, self.need_u, self.need_z, self.need_generate = layer, need_u, need_z, need_generate
        self.gram = self._gram() if need_z else None
        self.d_generate = self.moments = None
        self.scratch = matrices.Scratch()

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

    def backward(
        self,
        u: torch.Tensor,
        z: torch.Tensor,
        v: torch.Tensor,
        gs: torch.Tensor,
        t: torch.Tensor,
        contraction: torch.Tensor | None,
    ) -> Results:
        """dz [r, p] and sum_o gs_o A_o^T z as rows [p, d], None where not needed."""
        generate, bias = self.layer.generate, self.layer.bias
        n, r, d = generate.shape
        pixels = z.shape[1]
        extended = z if bias is None else torch.cat((z, z.new_ones(1, pixels)))
        dz = patch = None
        if self.need_z:
            contraction = (
                matrices.product(generate.view(n * r, d), u).view(n, r, -1)
                if contraction is None
                else contraction
            )
            dz = torch.mul(contraction, gs.unsqueeze(1), out=self.scratch(z, n, r, pixels)).sum(0)
        if self.need_z or self.need_generate:
            terms = torch.mul(t.unsqueeze(1), extended, out=self.scratch(z, n, len(extended), pixels)).view(
                -1, pixels
            )
            if self.need_z:
                dz += matrices.product(self.gram, terms)
            if self.need_generate:
                self.moments = matrices.add(
                    self.moments, matrices.product(terms, extended.t())
                )  # sum_p t z~ z~^T
        if self.need_generate:
            outer = torch.mul(gs.unsqueeze(1), z, out=self.scratch(z, n, r, pixels))
            self.d_generate = matrices.add(
                self.d_generate, matrices.product(outer.view(n * r, pixels), u.t())
            )
        if self.need_u:
            patch = self.layer._direct(gs, z, self.scratch)
        return dz, patch

    def parameters(self, d_bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dA [n, r, d] and db [n, d]: the sums over chunks, plus moments A~; ``d_bias`` is the sum from b's
        own rows.
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


class Generated:
    """The backward pass in the generated form: w is materialised."""

    def __init__(self, layer: Layer, need_u: bool, need_z: bool, need_generate: bool):
        self.layer, self.need_u, self.need_z, self.need_generate = layer, need_u, need_z, need_generate
        self.by_rank = layer._by_rank()
        self.d_generate = self.d_bias = None
        self.scratch = matrices.Scratch()

    def backward(
        self,
        u: torch.Tensor,
        z: torch.Tensor,
        v: torch.Tensor,
        gs: torch.Tensor,
        t: torch.Tensor,
        contraction: torch.Tensor | None,
    ) -> Results:
        """dz [r, p] and sum_o gs_o w_o as rows [p, d], None where not needed."""
        w = self.layer._weights_of_all(z, self.by_rank)
        u = u.t().contiguous().unsqueeze(1)
        # For d = 1, gs u + t w cancels. The remainder must not come from different rounding of w in the
        # forward pass, so gs and t are recomputed from this w.
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
                dz = matrices.product(dw, self.by_rank.t()).t().contiguous()
            if self.need_generate:
                self.d_generate = matrices.add(self.d_generate, matrices.product(z, dw))
                self.d_bias = None if self.layer.bias is None else matrices.add(self.d_bias, dw.sum(0))
        if self.need_u:
            patch = w.mul_(gs.unsqueeze(2)).sum(1)
        return dz, patch

    def parameters(self, d_bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dA [n, r, d] and db [n, d]: the sums over chunks."""
        (n, r, d), bias = self.layer.generate.shape, self.layer.bias
        if self.d_generate is None:  # no pixels
            return torch.zeros_like(self.layer.generate), None if bias is None else torch.zeros_like(bias)
        return self.d_generate.view(r, n, d).transpose(
            0, 1
        ).contiguous(), None if bias is None else self.d_bias.view(n, d)
