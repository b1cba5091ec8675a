"""Results of a layer, compared number by number with the definition in float64, for ``test_extremes.py``."""

import contextlib
import dataclasses
import math
from unittest import mock

import torch
from error_bounds import ErrorBounds, Precision
from extreme_layers import spoil

from coda_fast.backends.factored import layer as factored_layer
from coda_fast.backends.factored import squared_norm
from coda_fast.functional import dau_conv2d, dau_conv2d_transpose

NAMES = ("x", "v", "B", "A", "b")
PASSES = ("layer", "explanation", "adjoint")


def results(case, backend, tensors, which):
    """Names and tensors that a pass of the layer gives for ``tensors`` (x, u, v, B, A, b).

    layer: y and the gradients of x, B, A, b. explanation: y and the gradients of x in explanation mode, for
    two v at once. adjoint: G(x, v), and the gradients of <G(x, v), u> in x, v, B, A, b.
    """
    x, u, v, *parameters = (None if t is None else t.detach().requires_grad_() for t in tensors)
    named = [(n, t) for n, t in zip(NAMES, (x, v, *parameters), strict=True) if t is not None]
    options = dict(case.options, backend=backend)
    if which == "explanation":
        y = dau_conv2d(x, *(p if p is None else p.detach() for p in parameters), **options, detach=True)
        (both,) = torch.autograd.grad(
            y, x, torch.stack((v.detach(), v.detach().flip(1))), is_grads_batched=True
        )
        return [("y", y), ("explanation", both[0]), ("explanation of another", both[1])]
    if which == "layer":
        named = [pair for pair in named if pair[0] != "v"]
        output, upstream = ("y", dau_conv2d(x, *parameters, **options)), v
    else:
        output, upstream = ("G", dau_conv2d_transpose(x, v, *parameters, **options)), u
    gradients = torch.autograd.grad(output[1], [t for _, t in named], upstream.detach())
    return [output, *zip([n for n, _ in named], gradients, strict=True)]


def tolerances(case, which, precision):
    """The error bound of each result of a pass, by name."""
    if which == "layer":
        bounds = ErrorBounds(case, case.x, case.x, case.v, precision)
        return dict(y=bounds.y, x=bounds.through_z + bounds.direct, B=bounds.B, A=bounds.A, b=bounds.b)
    if which == "explanation":
        first, second = (ErrorBounds(case, case.x, case.x, v, precision) for v in (case.v, case.v.flip(1)))
        return {"y": first.y, "explanation": first.direct, "explanation of another": second.direct}
    bounds = ErrorBounds(case, case.x, case.u, case.v, precision)
    return dict(G=bounds.direct, x=bounds.through_z, v=bounds.y, B=bounds.B, A=bounds.A, b=bounds.b)


@dataclasses.dataclass
class Tally:
    """Counts of what was compared, and the largest error as a share of its bound."""

    layers: int = 0
    numbers: int = 0
    left_out: int = 0  # the truth is beyond the largest number of the dtype
    worst: float = 0.0

    def add(self, other):
        self.layers += other.layers
        self.numbers += other.numbers
        self.left_out += other.left_out
        self.worst = max(self.worst, other.worst)


def check(case, backend, passes=PASSES):
    """Assert that every number of every result is within its bound; the message names the worst number."""
    dtype = case.x.dtype
    precision, info = Precision.of(backend, dtype), torch.finfo(dtype)
    tensors = (case.x, case.u, case.v, *case.parameters)
    exact = tuple(None if t is None else t.double() for t in tensors)
    tally = Tally(layers=1)
    for which in passes:
        allowed = tolerances(case, which, precision)
        truths = results(case, "reference", exact, which)
        for (name, ours), (_, truth) in zip(results(case, backend, tensors, which), truths, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == truth.shape
            ours, truth, bound = ours.detach().double(), truth.detach(), allowed[name]
            assert bound.shape == truth.shape, (name, bound.shape, truth.shape)
            assert torch.isfinite(bound).all()
            bound = bound + info.eps * (truth.abs() + bound) + info.tiny * info.eps  # the last rounding
            known = truth.abs() + bound < info.max / 1e3
            tally.numbers += int(known.sum())
            tally.left_out += int((~known).sum())
            share = torch.where(known, (ours - truth).abs() / bound, 0).nan_to_num(nan=math.inf)
            if share.numel():
                where = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
                tally.worst = max(tally.worst, float(share.max()))
                assert tally.worst <= 1, (
                    f"{case}; {which}, {name} at {where}: {ours[where]:.9g}, expected {truth[where]:.9g} "
                    f"within {bound[where]:.1e}"
                )
    return tally


def check_not_finite(case, backend, seed, passes):
    """With one NaN or infinity in the tensors: assert that results are not finite exactly where those of the
    definition are not, and that the finite ones are bit for bit those without it.
    """
    tensors, told = spoil(case, seed)
    exact = [None if t is None else t.double() for t in tensors]
    for which in passes:
        clean = results(case, backend, (case.x, case.u, case.v, *case.parameters), which)
        spoilt, truth = results(case, backend, tensors, which), results(case, "reference", exact, which)
        for (name, ours), (_, expected), (_, before) in zip(spoilt, truth, clean, strict=True):
            finite = expected.isfinite()
            assert torch.equal(ours.isfinite(), finite), (
                f"{case}; {told}: {which}, {name}: {ours}, expected {expected}"
            )
            assert torch.equal(ours[finite], before[finite]), (
                f"{case}; {told}: {which}, {name}: {ours}, without it {before}"
            )


# -- the two ways of the factored backend
# ------------------------------------------------------------------------------------------------------------


def generating(generates):
    """A context in which the factored backend computes the output from w itself (True), or by contraction
    and norm (False), whichever it would choose otherwise.
    """
    return mock.patch.object(factored_layer.Layer, "_worth_generating", return_value=generates)


@contextlib.contextmanager
def norm_as_on_a_gpu():
    """A context in which the factored backend computes |w| from a triangular factor, as on a GPU. On a CPU
    it looks at numbers to choose another norm; on a GPU that would wait for the device.
    """
    triangle = lambda self, scratch: squared_norm.Triangle(self.generate, self.bias)
    with generating(False), mock.patch.object(factored_layer.Layer, "_norm", triangle):
        yield
