"""``pytest bench/ --benchmark`` measures. Without ``--benchmark`` every bench runs once on small inputs, as a
smoke test.
"""

import time
from pathlib import Path

import pytest
import torch

from bench import cases, guard, measure, providers, results, tables, verify
from bench.laboratory import Laboratory

collect_ignore_glob = [
    f"{path.name}" for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("bench_")
]


def pytest_addoption(parser):
    group = parser.getgroup("coda_fast benchmarks")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="measure (CPU: some minutes); else every bench runs once, small",
    )
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    group.addoption(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    group.addoption(
        "--rows",
        type=Path,
        default=results.LOCAL,
        help="folder for the rows, a file a device (bench/results/local)",
    )
    group.addoption(
        "--baseline",
        type=Path,
        default=results.FOLDER,
        help="folder of the rows to compare ratios with (bench/results)",
    )
    group.addoption(
        "--all",
        action="store_true",
        dest="everything",
        help="on a CPU, all modes of the layers, and scaling (ten minutes)",
    )
    group.addoption(
        "--batch",
        type=int,
        help="S-CoDA at this batch size alone, on a CPU (default: 16, the network at 64 and 1 too)",
    )
    group.addoption(
        "--seconds",
        type=float,
        help="how long to measure a group of providers (default: 1 on a GPU, 0.6 on a CPU)",
    )
    group.addoption(
        "--verdict",
        type=Path,
        help="result of the op's tests (tools/gpu_report.py); default: run some of them first",
    )
    group.addoption("--until", type=float, help="skip what has not begun by this time (seconds since 1970)")


def pytest_configure(config):
    # warnings of the kernels about a device matter to readers of the times
    config.addinivalue_line("filterwarnings", "default:::coda_kernels")
    if config.getoption("--benchmark"):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]
    else:
        config.option.benchmark_disable = True
    config.stash[STATE] = State(config)


class State:
    """What a session shares: the preset, the laboratory and the rows."""

    def __init__(self, config):
        self.measuring = config.getoption("--benchmark")
        kind = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError(
                "--device: expected a device that torch sees, got cuda, and torch sees none"
            )
        self.device = (
            torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        )
        memory = torch.cuda.get_device_properties(self.device).total_memory if kind == "cuda" else 0
        batch = config.getoption("--batch")
        if batch is not None and (batch < 1 or kind == "cuda"):
            raise pytest.UsageError(f"--batch: expected at least 1, on a CPU, got {batch} on {kind}")
        self.preset = cases.preset(
            ("gpu" if kind == "cuda" else "cpu") if self.measuring else "smoke",
            memory,
            batch,
            config.getoption("everything"),
        )
        self.dtype = config.getoption("--dtype") or self.preset.dtype
        seconds = config.getoption("--seconds") or {"cuda": 1.0, "cpu": 0.6}[kind]
        turns = measure.TURNS[kind] if self.measuring else (1, 1)
        torch.backends.cudnn.benchmark = kind == "cuda"  # cuDNN chooses its fastest convolution for the peers
        # the kernels follow the first setting and cuDNN the second; by default they differ
        if kind == "cuda" and self.dtype == "float32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.verdict_file, self._verdict = config.getoption("--verdict"), None
        apart = self.measuring and kind == "cpu"
        self.laboratory = Laboratory(
            self.device,
            self.dtype,
            seconds if self.measuring else 0.0,
            turns,
            lambda: self.verdict.good,
            apart,
        )
        self.until = config.getoption("--until")
        name = results.device_name(self.device)
        self.path = results.path_of(name, config.getoption("--rows"))
        self.baseline = results.read(results.path_of(name, config.getoption("--baseline")))
        self.rows, self.written = [], set()

    @property
    def verdict(self):
        if self._verdict is None:
            if self.verdict_file:
                self._verdict = verify.Verdict.load(self.verdict_file)
            elif self.measuring:
                self._verdict = verify.run(*(verify.GPU if self.device.type == "cuda" else verify.CPU))
            else:
                self._verdict = verify.Verdict()
        return self._verdict

    def names(self, case, mode):
        return providers.names(case, mode, self.device, self.preset.compiled_in(case, mode))


STATE = pytest.StashKey[State]()


def pytest_generate_tests(metafunc):
    """Parametrise a bench over case, mode and provider. Its module names its part of the preset and its
    modes.
    """
    if "provider" not in metafunc.fixturenames:
        return
    state = metafunc.config.stash[STATE]
    part, modes = metafunc.module.PART, metafunc.module.MODES
    found = []
    chosen = getattr(state.preset, part)
    if state.until and part == "layers":  # largest first: if time runs out, the small layers are left
        chosen = sorted(chosen, key=lambda case: -case.pixels * case.depth * case.units * case.rank)
    for case in chosen:
        label = f"{case.name}" if not getattr(case, "axis", "") else f"{case.axis}={getattr(case, case.axis)}"
        for mode in case.modes or modes:
            for provider in state.names(case, mode):
                identity = "-".join((label, mode, provider)).replace(", ", "+").replace(" ", "_")
                found.append(pytest.param(case, mode, provider, id=identity))
    metafunc.parametrize(("case", "mode", "provider"), found)


def pytest_collection_finish(session):
    """Run the op's own tests first: later, the memory that they need may be held by a group."""
    state = session.config.stash[STATE]
    if state.measuring and session.items and not session.config.option.collectonly:
        state.laboratory.begin()
        _ = state.verdict


class ReplayClock:
    """A clock that replays measurements. Providers are timed in turns, on a GPU by events; pytest-benchmark
    reads the samples here.
    """

    def __init__(self, samples):
        self.now, self.samples = 0.0, iter(samples)

    def __call__(self):
        return self.now

    def play(self):
        self.now += next(self.samples)


@pytest.fixture
def measured(request, case, mode, provider):
    """The measurements of this provider, taken in turns with all other selected providers of its group. Skips
    the bench if there are none.
    """
    state = request.config.stash[STATE]
    if state.until and time.time() > state.until and (case, mode) not in state.laboratory.groups:
        pytest.skip(verify.NO_TIME)
    selected = [
        i.callspec.params
        for i in request.session.items
        if hasattr(i, "callspec") and "provider" in i.callspec.params
    ]
    names = [p["provider"] for p in selected if (p["case"], p["mode"]) == (case, mode)]
    found = state.laboratory.measure(case, mode, names)
    if (case, mode) not in state.written and state.measuring:
        state.written.add((case, mode))
        rows = state.laboratory.rows(case, mode, found)
        if not state.rows and isinstance(case, cases.Layer):
            rows.append(state.laboratory.copy_row())
        state.rows += rows
        results.replace(state.path, rows)
    mine = found[provider]
    if mine.missing:
        pytest.skip(f"{provider}: {mine.missing}")
    clock = ReplayClock(1e-6 * sample for sample in mine.device_us)
    group = ", ".join([case.name, mode, *(f"{key} {value}" for key, value in case.shape.items())])
    request.node.add_marker(pytest.mark.benchmark(timer=clock, group=group))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(peak_bytes=mine.peak_bytes, error=mine.error)
    benchmark.pedantic(clock.play, rounds=len(mine.device_us))
    return found


def pytest_terminal_summary(terminalreporter, config):
    state = config.stash[STATE]
    if not (state.measuring and state.rows):
        return
    write = terminalreporter.write_line
    terminalreporter.section("coda_fast beside its peers")
    write(tables.everything(state.rows))
    write("")
    write(f"{state.verdict}")
    write(f"rows: {state.path}")
    terminalreporter.section("ratios beside the stored ones (advisory)")
    write(guard.report(state.rows, state.baseline))
