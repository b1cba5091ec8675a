"""Random layers at the limits of floating point: every number of every result against the definition in
float64.

A result is a sum of products, and where its terms cancel, its rounding error is proportional to the terms.
So each number has its own tolerance (``error_bounds.py``). No scale is shared by a whole tensor, behind which
one wrong number could hide: a pixel of 1e-30 next to a pixel of 1 must be right to its own seven digits.

    layer         y = F(x, x), and the gradients of x, B, A, b
    explanation   the gradient of x in explanation mode, G(x, v), for two v at once
    adjoint       G(x, v), and the gradients of <G(x, v), u> in x, v, B, A, b. The gradient in v is F(x, u),
                  with the weights of x applied to another u

Images, parameters, z and |w| are tried up to 1e18 and down to zero. Below 1e-18, |w| may be wrong by 1e-18,
because its square is too small for float32, so that it counts as 0. Everything else keeps its digits down to
the smallest normal number. A longer run:

    CODA_FAST_EXTREMES=600 pytest tests/test_extremes.py -s -k test_longer
        new layers for 600 seconds, and a table of what was tried
"""

import os
import time

import pytest
import torch
from extreme_layers import KINDS, ORDINARY, make
from support_extremes import PASSES, Tally, check, check_not_finite, generating, norm_as_on_a_gpu

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factored(dtype, kind):
    for seed in range(10):
        for generates in (True, False):
            with generating(generates):
                check(make(seed, kind, dtype), "factored")


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_factored_as_on_a_gpu(dtype, kind):
    with norm_as_on_a_gpu():
        for seed in range(10):
            check(make(seed, kind, dtype), "factored")


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels(dtype, kind):
    """One layer of each kind and one of its three passes, because Triton's interpreter is slow."""
    seed = KINDS.index(kind)
    check(make(seed, kind, dtype), "triton", PASSES[seed % 3 :][:1])


@pytest.mark.skipif(
    "CODA_FAST_EXTREMES" not in os.environ,
    reason="a longer run, for as many seconds as CODA_FAST_EXTREMES says",
)
def test_longer():
    """Layers that no other test tries. Prints for every backend, dtype and kind: the number of layers, the
    number of compared numbers, and the largest error as a share of its bound.
    """
    seconds, lost = float(os.environ["CODA_FAST_EXTREMES"]), []
    plan = [("factored", t) for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    plan += [("triton", t) for t in (torch.float32, torch.bfloat16, torch.float16)]
    totals = {(*which, kind): Tally() for which in plan for kind in KINDS}
    start, seed = time.monotonic(), 1000
    while time.monotonic() - start < seconds:
        for (backend, dtype, kind), total in totals.items():
            passes = PASSES if backend == "factored" else [PASSES[seed // 8 % 3]]
            for i in range(8 if backend == "factored" else 1):
                case = make(seed + i, kind, dtype)
                try:
                    with generating(i % 2 == 0):
                        total.add(check(case, backend, passes))
                except AssertionError as error:
                    lost.append(f"{backend}: {error}")
        seed += 8
    print(f"\n\n| | {' | '.join(f'{b}, {str(d)[6:]}' for b, d in plan)} |\n|---|{'---|' * len(plan)}")
    for kind in KINDS:
        cells = [totals[(*which, kind)] for which in plan]
        print(f"| {kind} | " + " | ".join(f"{c.layers}, {c.numbers}, {c.worst:.2f}" for c in cells) + " |")
    left_out = sum(t.left_out for t in totals.values())
    print(f"failed: {len(lost)}; truth beyond the dtype, not compared: {left_out}")
    assert not lost, "\n".join(lost[:20])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_not_finite(dtype):
    for seed in range(40):
        with generating(seed % 2 == 0):
            check_not_finite(make(seed, ORDINARY, dtype), "factored", seed, PASSES)


@pytest.mark.parametrize("seed", range(6))
def test_not_finite_in_kernels(seed):
    case = make(seed, ORDINARY, (torch.float32, torch.bfloat16)[seed % 2])
    check_not_finite(case, "triton", seed, PASSES[seed % 3 :][:1])
