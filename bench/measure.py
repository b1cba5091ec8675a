"""Timing in turns, peak memory and error, measured the same way for every provider."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

BLOCK_SECONDS = {"cuda": 0.01, "cpu": 0.02}
TURNS = {"cuda": (5, 15), "cpu": (3, 15)}  # least, most
# the number of inputs of a provider that are captured; its intermediate results need far more memory than one
# more input would
GRAPHS = 4
# the share of a GPU's memory above which a call keeps the device busy for longer than the host needs to
# launch it
CAPTURED = 0.1


@dataclasses.dataclass
class Measurement:
    """The measurement of one provider. Sample i of each provider of a group was taken in the same turn, so
    that ratios can be formed turn by turn.
    """

    # on a GPU between events around replays, on a CPU the same as host_us
    device_us: list[float] = dataclasses.field(default_factory=list)
    host_us: list[float] = dataclasses.field(default_factory=list)  # until the work is finished
    peak_bytes: int | None = None
    error: float | None = None
    missing: str | None = None  # the reason if nothing was measured
    # the source of device_us: "graph" for replays of CUDA graphs, or "calls", which on a GPU may have waited
    # for the host
    timed: str = "calls"


@dataclasses.dataclass
class Runner:
    """A function and its rotating inputs."""

    inputs: list[tuple]
    function: Callable
    calls: int = 0
    captures_itself: bool = False  # as torch.compile does with mode="max-autotune"
    graphs: list | None = None  # see ``capture``

    def __call__(self):
        self.calls += 1
        return self.function(*self.inputs[(self.calls - 1) % len(self.inputs)])

    def replay(self):
        """Do the work of a call with as little work of the host as possible: replay the next graph, or call
        the function if there is none.
        """
        if self.graphs is None:
            return self()
        self.calls += 1
        self.graphs[self.calls % len(self.graphs)].replay()

    def capture(self) -> str | None:
        """A CUDA graph of ``function`` for each of ``inputs``. They share their memory: only one may run at a
        time, and their results must not be read.
        """
        try:
            self.graphs = capture(self.function, self.inputs[:GRAPHS])
        except Exception as error:
            torch.cuda.synchronize()  # raises if the device is lost, and not only the capture
            return reason(error)
        return None


def capture(function: Callable, inputs: list[tuple]) -> list[torch.cuda.CUDAGraph]:
    """A CUDA graph of ``function`` for each of ``inputs``. They share their memory: only one may run at a
    time, and what they write is not to be read.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate workspaces and kernels are compiled
        for _ in range(2):
            function(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graphs, pool = [], torch.cuda.graph_pool_handle()
    for arguments in inputs:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            function(*arguments)
    return graphs


def device_us(function: Callable, inputs: list[tuple], seconds: float = 0.1) -> tuple[float, str]:
    """(median microseconds on the device, "graph" or the reason why there is none), with the inputs in
    rotation.
    """
    runner, device = Runner(inputs, function), torch.device("cuda")
    runner()
    why = runner.capture()
    once = _replays(runner, 2, device)
    count = max(1, min(50, math.ceil(0.01 / max(once, 1e-7))))
    turns = max(3, min(15, int(seconds / max(count * once, 1e-7))))
    times = sorted(1e6 * _replays(runner, count, device) for _ in range(turns))
    return times[len(times) // 2], why or "graph"


def in_turn(
    runners: dict[str, Runner],
    device: torch.device,
    seconds: float,
    turns: tuple[int, int] | None = None,
    error: Callable[[str, object], float | None] = lambda name, results: None,
) -> dict[str, Measurement]:
    """Measure the runners in turns: each runs a block of calls after the other, for as many turns as fit in
    ``seconds``, so that a drift of the machine affects all of them. Compilation and warm-up come first and
    are not counted. ``error`` judges the results of the first call, on the first inputs. A runner that fails
    is removed from ``runners``, and its measurement says why.
    """
    found, repeats, total = {name: Measurement() for name in runners}, {}, 0.0
    for name in list(runners):
        empty(device)  # memory cached for others must not make this group run out of it
        with _survive(name, runners, found, device):
            # the first call, which is all the warm-up that a slow function needs
            watched = device.type == "cpu" and not runners[name].captures_itself
            results = None if watched else runners[name]()
            start = time.perf_counter()
            if watched:
                found[name].peak_bytes, results = peak_bytes(runners[name], device)
            # torch.compile records CUDA graphs in the second call; later calls replay them and allocate
            # nothing
            else:
                found[name].peak_bytes = peak_bytes(runners[name], device)[0]
            estimate = time.perf_counter() - start
            found[name].error = error(name, results)
            del results
            # a slow call on a CPU is a good estimate although its memory was watched; a fast one is timed
            # again
            if device.type == "cuda" or estimate < 1:
                estimate = _block(runners[name], 1, 1, device)[1]
            # the estimate decides the number of calls in a block
            for _ in range(2 if estimate < 3 * BLOCK_SECONDS[device.type] else 0):
                estimate = min(estimate, _block(runners[name], 1, 1, device)[1])
            if device.type == "cuda" and not runners[name].captures_itself:
                memory = torch.cuda.get_device_properties(device).total_memory
                if found[name].peak_bytes <= CAPTURED * memory and runners[name].capture() is None:
                    found[name].timed = "graph"
            replayed = _replays(runners[name], 2, device) if found[name].timed == "graph" else estimate
            repeats[name] = [
                max(1, min(100, math.ceil(BLOCK_SECONDS[device.type] / max(t, 1e-7))))
                for t in (replayed, estimate)
            ]
            # on a GPU a block runs twice, for the device's time and for the host's
            total += repeats[name][1] * estimate + (
                repeats[name][0] * replayed if device.type == "cuda" else 0
            )
    least, most = turns or TURNS[device.type]
    for _ in range(max(least, min(most, int(seconds / max(total, 1e-9)))) if repeats else 0):
        for name in list(runners):
            with _survive(name, runners, found, device):
                on_device, on_host = _block(runners[name], *repeats[name], device)
                found[name].device_us.append(1e6 * on_device)
                found[name].host_us.append(1e6 * on_host)
            if name not in runners:
                empty(device)  # after the error, whose frames held tensors, is deleted
    return found


@contextlib.contextmanager
def _survive(name, runners, found, device):
    """Run the code of a runner. If it fails, it is removed with its reason, and the others continue. Raises
    if the device itself is lost.
    """
    try:
        yield
    except Exception as error:
        found[name] = Measurement(missing=reason(error))
        del runners[name]
        if device.type == "cuda" and not isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.synchronize(device)


def empty(device: torch.device) -> None:
    """Return memory that is not in use to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _block(runner, replays, calls, device):
    """Seconds per call, on the device and until the host knows that all calls are done, from ``replays``
    replays and ``calls`` calls.
    """
    on_device = _replays(runner, replays, device) if device.type == "cuda" else None
    start = time.perf_counter()
    for _ in range(calls):
        runner()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - start) / calls
    return seconds if on_device is None else on_device, seconds


def _replays(runner, count, device):
    """Seconds on the device of one of ``count`` replays in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    head_start(device)
    start.record()
    for _ in range(count):
        runner.replay()
    end.record()
    torch.cuda.synchronize(device)
    return 1e-3 * start.elapsed_time(end) / count


_scratch = {}


def head_start(device: torch.device) -> None:
    """Queue about 0.2 ms of work before the timed work, so that the first launches of a block wait in the
    queue, and the device does not wait for them.
    """
    if device not in _scratch:
        _scratch[device] = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    _scratch[device].zero_()
    _scratch[device].zero_()


def reason(error: Exception) -> str:
    """The error in one line, for the tables."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


# -- memory
# ------------------------------------------------------------------------------------------------------------


def peak_bytes(function: Callable, device: torch.device) -> tuple[int, object]:
    """The most memory that torch's allocator held during a call, beyond what it held before (inputs and
    parameters), including the results. Memory that libraries allocate themselves on a CPU, such as packed
    weights of a convolution, is not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, results
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        results = function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        ((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e.get("name") == "[memory]")
    )
    held = most = 0
    for _, _, change in changes:
        held += change
        most = max(most, held)
    return most, results


# -- error
# ------------------------------------------------------------------------------------------------------------


def error(results: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest RMS error of a result, relative to the RMS of the truth, or infinity for NaN."""
    worst = 0.0
    for found, exact in zip(results, truth, strict=True):
        deviation = (
            found.detach().double() - exact
        ).square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-300)
        worst = max(worst, float(deviation) if torch.isfinite(deviation) else math.inf)
    return worst


# -- statistics
# ------------------------------------------------------------------------------------------------------------


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The quantiles at 20, 50 and 80 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def ratios(slow: Measurement, fast: Measurement) -> tuple[float, float, float]:
    """The quantiles at 20, 50 and 80 % of slow / fast, turn by turn."""
    return quantiles([a / b for a, b in zip(slow.device_us, fast.device_us, strict=True)])
