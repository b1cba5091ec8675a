"""A model of what each layer launches, computes and moves, and of the least time that an H100 needs for it,
for docs/kernels.md.

    python -m tools.launches        prints the tables ("make tables" puts them into docs/kernels.md)

Launches and bytes are recorded from the launchers. Every tensor of a launch counts once, because a second
read comes from the cache at best.
"""

from __future__ import annotations

import collections
import functools

import torch

from bench import cases
from coda_fast._geometry import Geometry
from coda_fast._spec import Gradients, Parameters, Spec
from coda_fast.backends import triton
from coda_kernels.compile import recording
from coda_kernels.config import Device

BATCH = {"S": 256, "L": 64}
FLOPS, BANDWIDTH = 790e12, 3.0e12  # sustained by an H100: cuBLAS in bfloat16, a copy
KERNELS = (
    "prepare",
    "contracted",
    "generated",
    "prepare_backward",
    "grad_z",
    "fold",
    "parameter_sums",
    "finish",
)


@functools.cache
def recorded(layer: str) -> dict[str, list]:
    """{"forward" and "backward": launches} of a layer at the batch size of the benchmark, channels last, in
    bfloat16.
    """
    case = cases.layers(BATCH)[layer]
    options = dict(dtype=torch.bfloat16, device="meta")
    geometry = Geometry.make((case.kernel, case.kernel), case.stride, (case.kernel - 1) // 2)
    image = torch.empty(case.batch, case.channels, case.size, case.size, **options).to(
        memory_format=torch.channels_last
    )
    window = (case.kernel, case.kernel, case.channels)
    parameters = Parameters(
        *(
            torch.empty(*s, *window, **options).movedim(-1, -3)
            for s in ((case.rank,), (case.units, case.rank), (case.units,))
        )
    )
    spec = Spec(geometry, "squash", 1e-6)
    with recording(Device(90, 132)) as forward:
        output, kept = triton.align(image, None, parameters, spec, keep="products")
    needs = Gradients(not layer.endswith("1"), False, True, True, True)
    with recording(Device(90, 132)) as backward:
        triton.align_backward(output, image, None, parameters, kept, spec, detach=False, needs=needs)
    return {"forward": forward, "backward": backward}


def row(layer: str) -> dict:
    """Products in GFLOP, bytes in MB, launches, and the floor in microseconds, of forward and backward."""
    case, found = cases.layers(BATCH)[layer], {}
    main = 2 * case.pixels * case.units * case.rank * case.depth
    products = {"forward": 1, "backward": 2 if layer.endswith("1") else 3}
    for mode, launches in recorded(layer).items():
        flops, moved = products[mode] * main, sum(launch.bytes for launch in launches)
        floor = 1e6 * max(flops / FLOPS, moved / BANDWIDTH)
        found[mode] = {"gflop": flops / 1e9, "mb": moved / 1e6, "launches": len(launches), "floor_us": floor}
    return found


def tables() -> str:
    """Both networks, layer by layer, and the bytes of each kernel in a training step."""
    lines = ["| | forward | | | | backward | | | |", "|---|---|---|---|---|---|---|---|---|"]
    lines.append("| layer | GFLOP | MB | launches | floor, us | GFLOP | MB | launches | floor, us |")
    totals, moved = {}, {}
    for layer in cases.layers(BATCH):
        found = row(layer)
        total = totals.setdefault(layer[0], collections.Counter())
        cells = []
        for mode, values in found.items():
            total.update({(mode, key): value for key, value in values.items()})
            cells += [
                f"{values['gflop']:.1f}",
                f"{values['mb']:.0f}",
                str(values["launches"]),
                f"{values['floor_us']:.0f}",
            ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
        per_kernel = moved.setdefault(layer[0], collections.defaultdict(lambda: [0, 0]))
        for launches in recorded(layer).values():
            for launch in launches:
                name = launch.kernel.rpartition(".")[2]
                per_kernel[name][0] += 1
                per_kernel[name][1] += launch.bytes
    for letter, total in totals.items():
        cells = []
        for mode in ("forward", "backward"):
            values = {key: total[mode, key] for key in ("gflop", "mb", "launches", "floor_us")}
            cells += [
                f"{values['gflop']:.0f}",
                f"{values['mb']:.0f}",
                str(values["launches"]),
                f"{values['floor_us']:.0f}",
            ]
        lines.append(f"| all of {letter} | {' | '.join(cells)} |")
    lines += ["", "| kernel | S: launches a step | MB | L: launches a step | MB |", "|---|---|---|---|---|"]
    for name in KERNELS:
        lines.append(
            f"| `{name}` | "
            + " | ".join(f"{moved[x][name][0]} | {moved[x][name][1] / 1e6:.0f}" for x in "SL")
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
