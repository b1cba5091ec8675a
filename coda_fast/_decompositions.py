"""The operators in terms of standard ones, for programs that must run without this package: ONNX,
AOTInductor, ``run_decompositions``.

``torch.onnx.export(dynamo=True)`` finds them by itself, in torch's table of decompositions; everything else
asks for them with ``coda_fast.export.decompositions()``. Eager calls and torch.compile do not use them.

They compute the factored form (``coda_fast.backends.factored``) with convolutions, where ``z~ = [B x; 1]``
and ``A~ = [A b]``:

    <w_o, u> = sum_k z~_k (A~_ok * u)     one convolution with n m filters, contracted with z~
    |w_o|^2  = z~^T (A~_o A~_o^T) z~
        in float64: float32 would cancel where w nearly vanishes, and ONNX has no Cholesky or QR factor
    G(x, v)  = A~^T * (gs (x) z~)         one transposed convolution, gs = s(|w|^2) v

If a patch has no more numbers than z~ (d <= m), w itself is smaller and is materialised. In float64, |w|^2
is always computed from w itself, because there is no wider type to absorb the cancellation.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F

from coda_fast._geometry import format_of
from coda_fast._spec import KEEPS, Adjoint, Align, AlignBackward, rebuild


def align(call: Align) -> tuple[torch.Tensor, ...]:
    """``torch.ops.coda_fast.align``. It keeps <w, u> and |w|^2 alone; a backward pass works without the
    rest.
    """
    input, applied, wanted = call.input, call.applied, KEEPS[call.keep]
    layer = _Layer(input, call.parameters, call.spec)
    u = layer.x if applied is None else applied.to(layer.compute)
    z = layer.reduce()
    if layer.generates:
        w = layer.weights(z)
        square = w.square().sum(2)
        dot = (w * layer.convolve(u, layer.taps()).unsqueeze(1)).sum(2)
    else:
        square = layer.square(z)
        products = layer.convolve(u, layer.rows.flatten(0, 1)).unflatten(1, (layer.units, layer.terms))
        dot = (products * z.unsqueeze(1)).sum(2)
        # Cauchy-Schwarz: only rounding can violate it, and only where w nearly vanishes
        length = layer.convolve(
            u.square().sum(1, keepdim=True), torch.ones_like(layer.rows[:1, 0, :1])
        ).sqrt()
        bound = (square.sqrt() + layer.flushed(layer.terms)) * (length + layer.flushed(layer.patch.numel()))
        dot = torch.minimum(torch.maximum(dot, -bound), bound)
    output = (layer.scale(square) * dot).to(input.dtype).contiguous(memory_format=format_of(input))
    empty = lambda dtype: input.new_empty(0, dtype=dtype)
    kept_dot = _kept(dot) if wanted.dot else empty(layer.compute)
    kept_square = _kept(square) if wanted.square else empty(layer.compute)
    return output, kept_dot, kept_square, empty(input.dtype), empty(input.dtype)


def align_backward(call: AlignBackward) -> tuple[torch.Tensor, ...]:
    """``torch.ops.coda_fast.align_backward`` in explanation mode, which is the adjoint; in training it is not
    decomposed.
    """
    if not call.detach:
        return NotImplemented
    like, position = (call.input, 0) if call.applied is None else (call.applied, 1)
    found = [call.input.new_empty(0) for _ in call.needs]
    if call.needs[position]:
        direct = adjoint(Adjoint(call.input, call.grad, call.parameters, call.spec, call.backend))
        found[position] = direct.contiguous(memory_format=format_of(like))
    return tuple(found)


def adjoint(call: Adjoint) -> torch.Tensor:
    """``torch.ops.coda_fast.adjoint``."""
    input, value = call.input, call.value
    layer = _Layer(input, call.parameters, call.spec)
    z = layer.reduce()
    if layer.generates:
        w = layer.weights(z)
        gs = layer.scale(w.square().sum(2)) * value.to(layer.compute)
        image = layer.convolve_transposed((gs.unsqueeze(2) * w).sum(1), layer.taps())
    else:
        gs = layer.scale(layer.square(z)) * value.to(layer.compute)
        outer = (gs.unsqueeze(2) * z.unsqueeze(1)).flatten(1, 2)
        image = layer.convolve_transposed(outer, layer.rows.flatten(0, 1))
    return image.to(input.dtype).contiguous(memory_format=format_of(input))


def register(fakes: dict) -> None:
    """Put the decompositions into torch's table, where torch.onnx finds them. ``fakes``: the fake kernels, by
    operator.

    FakeTensorMode prefers a decomposition to the fake kernel, unless torch's "meta" table holds the fake
    kernel too.
    """
    for op, function in table().items():
        torch._decomp.register_decomposition(op)(function)
        torch._decomp.register_decomposition(op, type="meta")(fakes[op])


def announced(fake):
    """The fake kernel, which also tells Inductor, if it is loaded, to call our operators as they are.

    Otherwise Inductor treats an operator that has a decomposition in torch's table but no lowering as an
    oversight of torch's developers, and fails if the environment variable ``CI`` is set, as it is on
    continuous-integration services. Inductor traces the operators, and thus calls this function, before it
    lowers them; importing Inductor up front would cost seconds for users who do not compile.
    """

    @functools.wraps(fake)
    def run(*args):
        inductor = sys.modules.get("torch._inductor.lowering")
        if hasattr(inductor, "FALLBACK_ALLOW_LIST"):
            for op in table():
                inductor.FALLBACK_ALLOW_LIST.add(f"{op.namespace}::{op._opname}")
        return fake(*args)

    return run


def table() -> dict:
    """{operator: its decomposition}."""
    return {
        torch.ops.coda_fast.align.default: _on_call(Align, align),
        torch.ops.coda_fast.align_backward.default: _on_call(AlignBackward, align_backward),
        torch.ops.coda_fast.adjoint.default: _on_call(Adjoint, adjoint),
    }


def _on_call(kind, function):
    return lambda *args: function(rebuild(kind, args))


class _Layer:
    """A layer as convolution filters. n units, m terms in z~ (the rank, plus one for a bias), d = C kh kw
    numbers in a patch.
    """

    def __init__(self, input, parameters, spec):
        reduction_weight, weight, bias = parameters
        self.compute = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.x, self.spec, g = input.to(self.compute), spec, spec.geometry
        self.padding, self.stride, self.dilation = list(g.padding), list(g.stride), list(g.dilation)
        filters = reduction_weight.to(self.compute)
        rows = weight.to(self.compute)
        self.one = None
        if bias is not None:
            rows = torch.cat((rows, bias.to(self.compute).unsqueeze(1)), 1)
            filters = torch.cat((filters, torch.zeros_like(filters[:1])))
            self.one = torch.cat((filters.new_zeros(len(reduction_weight)), filters.new_ones(1)))
        self.filters, self.rows = filters, rows  # B~ [m, C, kh, kw], A~ [n, m, C, kh, kw]
        self.units, self.terms = rows.shape[:2]
        self.patch = rows.shape[2:]
        self.generates = self.patch.numel() <= self.terms

    def reduce(self):
        """z~, [N, m, OH, OW]."""
        return self.convolve(self.x, self.filters, self.one)

    def weights(self, z):
        """w, [N, n, d, OH, OW]."""
        filters = self.rows.flatten(2).transpose(1, 2).reshape(-1, self.terms, 1, 1)
        return F.conv2d(z, filters).unflatten(1, (self.units, self.patch.numel()))

    def square(self, z):
        """|w|^2, [N, n, OH, OW]."""
        if self.compute == torch.float64:
            return self.weights(z).square().sum(2)
        batch, _, height, width = z.shape
        rows = self.rows.flatten(2).double()
        gram = torch.bmm(rows, rows.transpose(1, 2)).flatten(0, 1)  # [n m, m]
        z = z.double().permute(0, 2, 3, 1).reshape(-1, self.terms)
        square = (torch.mm(z, gram.t()).unflatten(1, (self.units, self.terms)) * z.unsqueeze(1)).sum(2)
        return square.clamp_min(0).to(self.compute).view(batch, height, width, self.units).permute(0, 3, 1, 2)

    def scale(self, square):
        """s(|w|^2)."""
        return self.spec.scale(square.sqrt(), square)

    def flushed(self, terms):
        """By how much the computed length of a vector with ``terms`` entries may fall short: squares below
        the smallest normal number are flushed to 0.
        """
        return (terms * torch.finfo(self.compute).tiny) ** 0.5

    def taps(self):
        """Filters that each pick one number of a patch, [d, C, kh, kw]: they turn patches into channels."""
        d = self.patch.numel()
        return torch.eye(d, dtype=self.compute, device=self.x.device).view(d, *self.patch)

    def convolve(self, image, filters, bias=None):
        left, right, top, bottom = self.padding
        if (left, top) != (right, bottom):
            image, top, left = F.pad(image, self.padding), 0, 0
        return F.conv2d(image, filters, bias, self.stride, [top, left], self.dilation)

    def convolve_transposed(self, value, filters):
        """The transpose of ``convolve`` with respect to its image: [N, filters, OH, OW] -> [N, C, H, W]."""
        left, right, top, bottom = self.padding
        symmetric = (left, top) == (right, bottom)
        padding = [top, left] if symmetric else [0, 0]
        # up to stride - 1 pixels at the far edges may be in no window: ask for the most, then crop
        further = [s - 1 for s in self.stride]
        image = F.conv_transpose2d(value, filters, None, self.stride, padding, further, 1, self.dilation)
        if symmetric and further == [0, 0]:
            return image
        height, width = self.x.shape[2:]
        first = [0, 0] if symmetric else [top, left]
        return image[:, :, first[0] : first[0] + height, first[1] : first[1] + width]


def _kept(image):
    """[N, n, OH, OW] in the layout that backends keep: [n, P]."""
    return image.transpose(0, 1).flatten(1).contiguous()
