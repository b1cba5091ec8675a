"""Helpers for the kernel tests: the device, layers of the published networks, and one tolerance."""

import torch
from support import errors, random_layer, scale_held

from coda_fast.functional import dau_conv2d

# The device of every kernel test: a GPU if there is one, otherwise the CPU with Triton's interpreter, which
# tests/conftest.py enables
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Distinct layers of the published networks: C, n, r, k, stride
S_LAYERS = [
    (6, 16, 32, 3, 1),
    (16, 16, 32, 3, 1),
    (16, 32, 64, 3, 2),
    (32, 32, 64, 3, 1),
    (32, 64, 64, 3, 2),
    (64, 64, 64, 3, 1),
    (64, 10, 64, 1, 1),
]
L_LAYERS = [
    (6, 16, 64, 7, 3),
    (16, 32, 64, 3, 1),
    (32, 64, 128, 3, 2),
    (64, 64, 128, 3, 1),
    (64, 64, 256, 3, 2),
    (64, 100, 256, 3, 1),
]


def few_units(layer):
    """A layer with some of its units, which all go the same way, under the interpreter; with all of them on a
    GPU.
    """
    channels, units, rank, *rest = layer
    most = units if DEVICE.type == "cuda" else 20 if rank < 128 else 12
    return channels, min(units, most), rank, *rest


def assert_as_accurate(actual, eager, truth, terms=None, more=()):
    """The tolerance of the kernel tests: lists of results are compared with those of eager torch in the same
    dtype, both against float64. The RMS error of each result, and the largest error in any of them, may be at
    most twice eager's, plus one rounding. The largest error is taken over all results, because the error of
    one number is random.

    ``terms``: for each result the terms of the sum that may cancel (see ``errors``). ``more``: further pairs
    (eager, truth) for inputs close to these. In a result of few numbers eager's error is random too and may
    be nearly zero, so that the largest of them counts.
    """
    rounding = torch.finfo(actual[0].dtype).eps
    terms = terms or [()] * len(truth)
    ours, *theirs = (
        [errors(*r) for r in zip(*pair, terms, strict=True)]
        for pair in ((actual, truth), (eager, truth), *more)
    )
    largest = 2 * max(top for found in theirs for top, _ in found) + rounding
    for i, (top, rms) in enumerate(ours):
        allowed = 2 * max(found[i][1] for found in theirs) + rounding
        if top > largest or rms > allowed:
            difference = (actual[i].double().cpu() - truth[i].double().cpu()).abs()
            worst = tuple(map(int, torch.unravel_index(difference.argmax(), difference.shape)))
            raise AssertionError(
                f"result {i}: error max {top:.2e}, rms {rms:.2e}; allowed {largest:.2e}, {allowed:.2e}; "
                f"worst at {worst}"
            )


def layer_tensors(channels, units, rank, kernel, size, batch=1, bias=True, dtype=torch.float32):
    """[x, B, A, b] on the device with |w| of order one; kernel is an int or a pair, size a pair."""
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    tensors = [x, *random_layer(channels, units, rank, kernel, bias=bias)]
    return [None if t is None else t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def grads_of(function, tensors, grad):
    """[output, gradients of the tensors that require one]."""
    output = function(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, grad)]


def neighbours(tensors, number):
    """``number`` copies of the tensors, with every number changed by the error of one rounding: the same
    problem with other roundings.
    """
    # no test uses this seed, so that the changes are independent of the tensors
    generator = torch.Generator().manual_seed(31415926)

    def moved(t):
        factor = 1 + torch.finfo(t.dtype).eps / 2 * torch.randn(
            t.shape, generator=generator, dtype=torch.float64
        )
        return (t.detach().double() * factor.to(t.device)).to(t.dtype).requires_grad_(t.requires_grad)

    return [[None if t is None else moved(t) for t in tensors] for _ in range(number)]


def compare(tensors, function=dau_conv2d, **options):
    """Compare output and gradients of the fused kernels with those of eager torch in the same dtype and of
    the definition in float64.
    """
    dtype = tensors[0].dtype

    def results(backend, tensors):
        return grads_of(
            lambda *t: function(*t, **options, backend=backend), tensors, grad.to(tensors[0].dtype)
        )

    def expected(tensors):
        """Eager torch, the truth, and the two parts of the truth: the direct part, and the part that comes
        from the norm.
        """
        exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        truth = results("reference", exact)
        with scale_held():
            direct = results("reference", exact)
        return (
            results("reference", tensors),
            truth,
            direct,
            [a - b for a, b in zip(truth, direct, strict=True)],
        )

    with torch.no_grad():
        shape = function(*tensors, **options, backend="reference").shape
    grad = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    ours = results("triton", tensors)
    assert all(result.dtype == dtype for result in ours)
    here, near = expected(tensors), [expected(t) for t in neighbours(tensors, 4)]
    # Terms that may cancel: the two parts, and the terms of each part, whose size is estimated by the effect
    # of one rounding of the inputs
    terms = [
        [part[i] for part in here[2:]]
        + [
            (there[i] - part[i]) / torch.finfo(dtype).eps
            for n in near
            for there, part in zip(n[2:], here[2:], strict=True)
        ]
        for i in range(len(ours))
    ]
    assert_as_accurate(ours, *here[:2], terms, [n[:2] for n in near])
