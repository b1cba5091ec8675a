"""The time that a layer's forward and backward pass take on the host, measured without a GPU: everything
except the launch by the driver, which does nothing here.

    python -m tools.host_time        microseconds per launch and per layer, eager and compiled

Tensors are on the CPU and small, so that the time is that of Python, torch's dispatcher, autograd,
allocations and Triton's launcher up to the call of the driver. The numbers are medians, and depend on the
speed of the core.
"""

from __future__ import annotations

import os
import sys
import time

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from bench import results
from coda_fast import backends
from coda_fast.nn import DAUConv2d
from coda_kernels import compile as compiler

LAYERS = 9


def silence() -> None:
    """Make Triton compile for an H100 that is not present, and launch nothing."""
    driver.set_active(compiler._Absent(90))
    nothing = lambda *arguments, **options: None
    CompiledKernel._init_handles = nothing
    CompiledKernel.run = property(lambda self: nothing)
    CompiledKernel.function = 0
    CompiledKernel.launch_metadata = nothing
    backends._triton_unavailable = lambda kind: None


def median_us(function, repetitions=60) -> float:
    for _ in range(10):
        function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def measure() -> dict:
    """Microseconds of a bare launch, of a layer forward and forward + backward, and of nine layers like
    S-CoDA's, eager and compiled.
    """
    found = {}
    layer = (
        DAUConv2d(16, 16, 3, padding=1, rank=32, backend="triton")
        .bfloat16()
        .to(memory_format=torch.channels_last)
    )
    x = torch.randn(2, 16, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()

    def step(model, x):
        y = model(x)
        torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))

    def inference(model, x):
        with torch.no_grad():
            model(x)

    calls = []
    launch = compiler.launch
    from coda_kernels import contracted

    contracted.launch = lambda *a, **o: calls.append((a, o)) or launch(*a, **o)
    step(layer, x)
    contracted.launch = launch
    arguments, options = calls[0]
    found["launch"] = median_us(lambda: launch(*arguments, **options), 300)
    found["layer forward"] = median_us(lambda: inference(layer, x))
    found["layer forward + backward"] = median_us(lambda: step(layer, x))
    stack = torch.nn.Sequential(
        *(DAUConv2d(16, 16, 3, padding=1, rank=32, backend="triton") for _ in range(LAYERS))
    ).bfloat16()
    stack = stack.to(memory_format=torch.channels_last)
    found["9 layers, step"] = median_us(lambda: step(stack, x), 30)
    compiled = torch.compile(stack, fullgraph=True)
    found["9 layers, step, compiled"] = median_us(lambda: step(compiled, x), 30)
    return found


def main() -> int:
    torch.set_num_threads(1)
    silence()
    for key, value in measure().items():
        print(f"{key:30} {value:10.1f} us")
    print(
        f"{results.device_name(torch.device('cpu'))}, torch {torch.__version__}, Triton "
        f"{triton.__version__}; commit {results.commit()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
