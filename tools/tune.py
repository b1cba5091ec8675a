"""Propose rows of a configuration table for the present GPU: time the wanted tile of every kernel and layer,
and its neighbours.

    python -m tools.tune --output sm_90.json                                        both published networks
    python -m tools.tune --output part.json --layers S7 L8 --kernels fold grad_z --dtype bfloat16
    --budget-seconds 600

A kernel is timed in the launches of one training step of the layer, which are recorded from the step itself.
The search starts at the tile in use and moves to the fastest neighbour (`neighbours`) until none is faster by
1 %. A tile whose results differ from those of the tile in use by more than rounding is reported and left out.
The output has the format of the package's tables, which are never changed. To try it, put it into the folder
that CODA_FAST_TABLES names. Exit status 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from bench.results import ROOT
from coda_kernels import config
from coda_kernels.config import KernelSpec, Tile

DTYPES = ("bfloat16", "float16", "float32")
WARPS, STAGES = (4, 8), (2, 3, 4)
ACCUMULATORS = 128  # float32 registers of a thread for the accumulator; with more the compiler spills
LEAST_GAIN = 0.01


# -- which tiles there are
# ------------------------------------------------------------------------------------------------------------


def neighbours(
    spec: KernelSpec, shape: config.Shape, device: config.Device, tile: Tile | None = None
) -> tuple[Tile, ...]:
    """``tile`` (None: the wanted one), then the legal tiles one change away: one block halved or doubled, one
    halved and another doubled, other warps, other stages.
    """
    tile = tile or config.candidates(spec, shape, device)[0]
    blocks = dict(tile.blocks)
    moves = [{name: size * factor} for name, size in blocks.items() for factor in (0.5, 2)]
    moves += [{a: blocks[a] / 2, b: blocks[b] * 2} for a in blocks for b in blocks if a != b]
    found = [
        tile,
        *(dataclasses.replace(tile, warps=w) for w in WARPS),
        *(dataclasses.replace(tile, stages=s) for s in STAGES),
    ]
    found += [
        Tile.make(tile.warps, tile.stages, **{name: int(size) for name, size in (blocks | move).items()})
        for move in moves
    ]
    return tuple(dict.fromkeys(t for t in found if t == tile or legal(spec, shape, device, t)))


def legal(spec: KernelSpec, shape: config.Shape, device: config.Device, tile: Tile) -> bool:
    """Whether the kernel computes the right result with these blocks (it reads without masks), and they fit
    into the device.
    """
    return (
        spec.right(shape, tile)
        and spec.accumulators(shape, dict(tile.blocks)) <= ACCUMULATORS * tile.warps * 32
        and spec.fits(shape, device, tile)
    )


# -- what a kernel does in a training step
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Launch:
    """One launch of a kernel by the layer, which can be repeated with another tile, and the tensors that it
    writes.
    """

    run: Callable[[Tile], torch.Tensor | None]
    outputs: list[torch.Tensor]
    before: list[torch.Tensor]
    after: list[torch.Tensor]

    def error(self, tile: Tile) -> str | None:
        """The difference between the results of ``tile`` and those of the tile in use, if there is one. All
        tensors are restored.
        """
        now = [t.clone() for t in self.outputs]
        try:
            for tensor, value in zip(self.outputs, self.before, strict=True):
                tensor.copy_(value)
            with unwritten_is_nan():
                result = self.run(tile)
            # other tiles sum in another order
            found = self.outputs + ([] if result is None else [result.sum(0)])
            return next(filter(None, map(_difference, found, self.after)), None)
        finally:
            for tensor, value in zip(self.outputs, now, strict=True):
                tensor.copy_(value)


@dataclasses.dataclass
class Job:
    """A kernel of a layer: the tile in use, and all its launches in one training step."""

    spec: KernelSpec
    shape: config.Shape
    device: config.Device
    wanted: Tile
    launches: list[Launch] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> str:
        return self.spec.row_key(self.shape)

    def error(self, tile: Tile) -> str | None:
        return next(filter(None, (launch.error(tile) for launch in self.launches)), None)

    def run(self, tile: Tile) -> None:
        for launch in self.launches:
            launch.run(tile)


def record(layer: tuple, dtype: str, device: str | torch.device) -> dict[str, Job]:
    """Every kernel of forward and backward of a layer (C, n, r, k, stride, size, batch): {kernel: Job}."""
    from coda_fast.functional import dau_conv2d
    from coda_kernels.layer import Layer

    channels, units, rank, kernel, stride, size, batch = layer
    depth, options = channels * kernel**2, dict(device=device, dtype=getattr(torch, dtype))
    window = (channels, kernel, kernel)
    parameters = [
        torch.randn(rank, *window, **options) / depth**0.5,
        torch.randn(units, rank, *window, **options) / (rank * depth) ** 0.5,
        torch.randn(units, *window, **options) / depth**0.5,
    ]
    x = torch.randn(batch, channels, size, size, **options).to(memory_format=torch.channels_last)
    tensors = [t.requires_grad_() for t in (x, *parameters)]
    jobs, original = {}, Layer.run

    def launch_and_note(self, spec, run):
        tensors, used = _tensors_of(run), []
        before = [t.clone() for t in tensors]
        result = original(self, spec, lambda tile: used.append(tile) or run(tile))
        written = [i for i, tensor in enumerate(tensors) if not _same_bits(tensor, before[i])]
        after = [tensors[i].clone() for i in written] + ([] if result is None else [result.sum(0)])
        job = jobs.setdefault(spec.name, Job(spec, self.shape, self.device, used[-1]))
        job.launches.append(Launch(run, [tensors[i] for i in written], [before[i] for i in written], after))
        return result

    with mock.patch.object(Layer, "run", launch_and_note), unwritten_is_nan():
        y = dau_conv2d(*tensors, stride=stride, padding=(kernel - 1) // 2, backend="triton")
        torch.autograd.grad(y, tensors, torch.randn_like(y))
    return jobs


@contextlib.contextmanager
def unwritten_is_nan():
    """A context in which torch.empty is filled with NaN. This also distinguishes the tensors that a kernel
    writes from those that it reads.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _tensors_of(run):
    """The tensors in a launcher's closure, direct, in lists or as packed parameters of a layer, each once."""
    found = {}
    for cell in run.__closure__ or ():
        held = cell.cell_contents
        held = held.prepared if hasattr(held, "prepared") else held
        for value in held if isinstance(held, list | tuple) else (held,):
            if isinstance(value, torch.Tensor):
                found[id(value)] = value
    return list(found.values())


def _same_bits(a, b):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def _difference(found, expected):
    """A sentence if they differ by more than another order of summation and one rounding."""
    if not found.dtype.is_floating_point:
        return None if torch.equal(found, expected) else "other integers"
    if not torch.equal(found.isnan(), expected.isnan()):
        return f"NaN in {int(found.isnan().sum())} places, expected in {int(expected.isnan().sum())}"
    found, truth = found.float().nan_to_num(), expected.float().nan_to_num()
    bound = torch.finfo(expected.dtype).eps + 1e-4
    error = float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-30)) if truth.numel() else 0.0
    return None if error <= bound else f"error {error:.1e} of the largest result, allowed {bound:.1e}"


# -- search
# ------------------------------------------------------------------------------------------------------------


def search(
    job: Job, measure: Callable[[Tile], float], expired: Callable[[], bool] = lambda: False
) -> tuple[Tile, dict[Tile, float]]:
    """The fastest tile reached from the wanted one, and microseconds of all that were tried, infinity for
    those that are left out.
    """
    best, times = job.wanted, {job.wanted: measure(job.wanted)}
    while True:
        for tile in neighbours(job.spec, job.shape, job.device, best):
            if tile not in times and not expired():
                times[tile] = measure(tile)
        fastest = min(times, key=times.get)
        if not times[fastest] < (1 - LEAST_GAIN) * times[best]:
            return best, times
        best = fastest


def measurer(
    job: Job, timer: Callable[[Callable[[], None]], float], report: Callable[[str], None]
) -> Callable[[Tile], float]:
    """A function that returns microseconds of a tile after it was found to compute the same results. Unusable
    tiles are reported and infinite.
    """
    import triton

    refused = (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError)

    def measure(tile):
        try:
            error = job.error(tile)
        except refused as reason:
            error = f"{type(reason).__name__}: {reason}"
        if error:
            report(f"{job.key}: left out {describe(tile)}: {error}")
            return math.inf
        return timer(lambda: job.run(tile))

    return measure


def tune(job: Job, timer, report, expired) -> dict | None:
    """A row of the table. If the tile in use does not reproduce its own results, this is reported, and None
    is returned.
    """
    best, times = search(job, measurer(job, timer, report), expired)
    if math.isinf(times[job.wanted]):
        return None
    us, us_wanted = times[best], times[job.wanted]
    if best != job.wanted:  # measure both again in turn, because clocks drift during a search
        us_wanted, us = (timer(lambda tile=tile: job.run(tile)) for tile in (job.wanted, best))
        best, us = (best, us) if us < us_wanted else (job.wanted, us_wanted)
    report(
        f"{job.key}: {describe(best)} {us:.1f} us, wanted {describe(job.wanted)} {us_wanted:.1f} us, "
        f"{len(times)} tried"
    )
    return row(job.key, best, us, us_wanted)


def row(key: str, tile: Tile, us: float, us_wanted: float) -> dict:
    """A row in the format that ``config._table`` reads."""
    times = dict(us=round(us, 2), us_wanted=round(us_wanted, 2))
    return dict(key=key, blocks=dict(tile.blocks), warps=tile.warps, stages=tile.stages, **times)


def describe(tile: Tile) -> str:
    return " ".join(f"{name}{size}" for name, size in tile.blocks) + f" w{tile.warps} s{tile.stages}"


# -- the tool
# ------------------------------------------------------------------------------------------------------------


def document(rows: list[dict], device: str) -> dict:
    """A table: the device and date of the measurement, and the rows."""
    import triton

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": device,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "tiles": rows,
    }


def write(path: Path, table: dict) -> None:
    """Write the table atomically, with one row per line."""
    head = json.dumps(table | {"tiles": []})[: -len("]}")]
    text = head + "".join(f"\n{json.dumps(r)}," for r in table["tiles"])[:-1] + "\n]}\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def median_us(run: Callable[[], None]) -> float:
    import triton.testing

    return 1e3 * triton.testing.do_bench(run, return_mode="median")


def _arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a file that does not exist yet, outside the package's tables",
    )
    parser.add_argument("--layers", nargs="+", help="S1 to S9 and L1 to L9; default: all")
    parser.add_argument("--kernels", nargs="+", choices=sorted(config.kernel_specs()), help="default: all")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16", "float32"],
        help="16-bit types share their rows",
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="stop then, with what there is"
    )
    options = parser.parse_args(argv)
    path = options.output.resolve()
    if config.TABLES.resolve() in path.parents:
        parser.error(
            f"--output: expected a path outside {config.TABLES} (this tool proposes only), got "
            f"{options.output}"
        )
    if path.exists() or not path.parent.is_dir():
        parser.error(f"--output: expected a new file in a folder that exists, got {options.output}")
    return options


def main(argv=None) -> int:
    start, options = time.monotonic(), _arguments(argv)
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    from tools.aot import layers  # imported late, because it switches Triton's interpreter off

    known = layers()
    if unknown := set(options.layers or ()) - set(known):
        print(
            f"tune: --layers: expected some of {' '.join(known)}, got {' '.join(sorted(unknown))}",
            file=sys.stderr,
        )
        return 2
    rows, expired = {}, lambda: time.monotonic() - start > options.budget_seconds
    report = lambda text: print(text, file=sys.stderr, flush=True)
    for dtype in options.dtype:
        for name in options.layers or known:
            if expired():
                break
            report(f"-- {name} {dtype}")
            for kernel, job in record(known[name], dtype, "cuda").items():
                if job.key in rows or (options.kernels and kernel not in options.kernels) or expired():
                    continue
                if found := tune(job, median_us, report, expired):
                    rows[job.key] = found
            write(options.output, document(list(rows.values()), torch.cuda.get_device_name()))
    report(f"{'stopped by the budget; ' if expired() else ''}{len(rows)} rows in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
