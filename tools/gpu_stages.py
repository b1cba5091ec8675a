"""The stages of the report on a GPU (tools/gpu_report.py), and the files that they write."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import results, verify
from bench.verify import Verdict
from experiments import fast_training
from tools import warm

# Seconds of nine minutes; time that a stage does not need is left to the later ones
STAGES = {
    "compile": 25,
    "tests": 100,
    "configurations": 35,
    "large": 25,
    "layers": 65,
    "networks": 45,
    "train": 210,
    "profile": 20,
    "tune": 10,
}
TRAINING = 210.0  # seconds, at most
# The file that a stage writes in addition to rows
FILES = {
    "tests": ("tests.json",),
    "configurations": ("configurations.json",),
    "large": ("large.json",),
    "train": ("training.json", fast_training.WEIGHTS),
    "profile": ("ncu.csv",),
    "tune": ("tuned.json",),
}
VERDICTS = ("tests", "configurations", "large")
LATER, ARCHIVE = "later.json", "report.tar.gz"
MOST = 16 << 20  # largest size of a packed file in bytes
TILES, WARPS, SANITIZER = "test_shipped_tile", "test_warps_and_stages", "test_sanitizer"
# Test files that need only pytest: a report must not need hypothesis. The most informative ones come first
TESTS = (
    "tests/test_golden.py",
    "tests/kernels/test_layer.py",
    "tests/kernels/test_operators.py",
    "tests/kernels/test_gpu.py",
)
LARGE = "tests/kernels/test_gpu.py"
# The strongest compiled peer, in addition to the eager ones; the others take minutes to compile ("pytest
# bench/ --benchmark" measures them)
TO_BEAT = "not materialising_compiled and not checkpointed and not factored"


@dataclasses.dataclass
class Report:
    """A run of the stages. ``quick``: a small part of each stage, for a rehearsal."""

    output: Path
    rows: Path
    device: str
    finish: float  # time.monotonic()
    quick: bool = False
    jobs: int = 1
    data: Path | None = None
    packed: Path | None = None
    left: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    found: tuple[list[str], set[str]] | None = None

    def __post_init__(self):
        self.name = results.device_name(torch.device(self.device))
        self.commit = results.commit()
        self.path = results.path_of(self.name, self.rows)

    @property
    def stamp(self) -> dict:
        """The device, code and versions that a verdict is about."""
        return {
            **results.environment(torch.device(self.device)),
            "commit": self.commit,
            "tree": results.tree(),
        }

    @property
    def key(self) -> dict:
        """The values in which verdicts must agree to be combined."""
        return {key: self.stamp[key] for key in ("device", "torch", "triton", "tree")}

    # -- stages ----

    def compile(self, until: float) -> Verdict:
        """Compile the kernels, so that tests and training do not wait for the compiler: bfloat16 for
        everything, float32 for the evaluation of the training.
        """
        wanted = [
            ("coda_s_cifar10", "bfloat16"),
            ("coda_l_imagenet100", "bfloat16"),
            ("coda_s_cifar10", "float32"),
        ]
        wanted, passes = (wanted[:1], ("inference",)) if self.quick else (wanted, warm.PASSES)
        problems = warm.warm(wanted, self.device, self.jobs, passes)
        for problem in problems:
            say(problem)
        return Verdict(
            failures=tuple(f"compile: {problem}" for problem in problems if problem.startswith("failed"))
        )

    def tests(self, until: float) -> Verdict:
        """Run compute-sanitizer first, because it takes longest and runs in parallel to the others; then the
        most informative tests.
        """
        found, slow = self._collected(until)
        if self.quick:
            return self._shards(
                "tests", [name for name in found if "test_golden" in name and "layer_1" in name], until
            )
        layers = [name for name in found if "test_golden" in name or "test_layer.py" in name]
        rest = [name for name in found if name not in slow and not (TILES in name or WARPS in name)]
        first = [
            *(name for name in found if SANITIZER in name),
            *sorted(layers, key=lambda name: name in slow),
        ]
        return self._shards("tests", list(dict.fromkeys([*first, *rest])), until)

    def configurations(self, until: float) -> Verdict:
        """Test the first tile of each kernel of each layer. The other tiles are used, with a warning, where
        the first one does not fit.
        """
        found, _ = self._collected(until)
        first, others = first_tiles([name for name in found if TILES in name])
        warps = [name for name in found if WARPS in name]
        if self.quick:
            first, others, warps = first[:2], others[:2], warps[:2]
        self._later("fallbacks", others)
        self._later("warps", warps)
        return self._shards("configurations", first, until)

    def large(self, until: float) -> Verdict:
        """Run these tests one at a time, because they fill the memory of the device."""
        found, slow = self._collected(until)
        tests = [name for name in found if name in slow and name.startswith(LARGE) and SANITIZER not in name]
        return self._shards("large", tests[: 1 if self.quick else None], until, jobs=1)

    def later(self, until: float, listed: dict[str, list[str]], folder: Path) -> Verdict:
        """Run the tests of a later.json, and combine their verdicts with those of the earlier tests."""
        total = Verdict()
        for i, (name, tests) in enumerate(listed.items()):
            if not tests:
                continue
            before = Verdict()
            if name in VERDICTS:
                before = dataclasses.replace(Verdict.load(folder / f"{name}.json", **self.key), unfinished=0)
            now = time.monotonic()
            limit = (
                until
                if name == "large"
                else now + (until - now) * len(tests) / sum(map(len, list(listed.values())[i:]))
            )
            found = self._shards(name, tests, limit, 1 if name == "large" else None, before)
            say(f"{name}: {found}")
            total += found
        return total

    def layers(self, until: float) -> Verdict:
        """Measure without torch.compile first: compilation takes most of the time, so that a run that is cut
        off should lose the compiled peer.
        """
        if self.quick:
            return self._bench("bench/bench_layers.py", until, f"S9 and not explanation and {TO_BEAT}")
        half = time.monotonic() + 0.5 * (until - time.monotonic())
        eager = self._bench("bench/bench_layers.py", half, "not compiled")
        return eager + self._bench("bench/bench_layers.py", until, f"forward_+_backward and {TO_BEAT}")

    def networks(self, until: float) -> Verdict:
        """Measure as in ``layers``, with the compiled peer for a training step only."""
        if self.quick:
            return self._bench("bench/bench_networks.py", until, "inference and coda_fast")
        half = time.monotonic() + 0.5 * (until - time.monotonic())
        eager = self._bench("bench/bench_networks.py", half, "not compiled")
        return eager + self._bench("bench/bench_networks.py", until, f"training_step and {TO_BEAT}")

    def train(self, until: float) -> Verdict:
        """Train in another process, which writes its results to training.json as it goes."""
        until = min(until, time.monotonic() + TRAINING)
        minutes = max(1.0, until - time.monotonic() - 5) / 60
        command = [sys.executable, "-m", "experiments.fast_training", "--output", str(self.output)]
        command += ["--device", self.device, "--minutes", f"{minutes:.3f}", *["--quick"] * self.quick]
        return self._run("train", [*command, *(["--data", str(self.data)] if self.data else [])], until)

    def profile(self, until: float) -> Verdict:
        """A report of ncu for each kernel in a training step of two layers."""
        if (ncu := shutil.which("ncu")) is None or self.device != "cuda":
            say("profile: no ncu here" if ncu is None else "profile: a CPU has nothing for ncu")
            return Verdict()
        command = [ncu, "--set", "detailed", "--page", "details"]
        command += ["--csv", "--log-file", str(self.output / "ncu.csv")]
        command += ["--kernel-name", f"regex:^({'|'.join(kernel_names())})$", "--launch-count", "40"]
        return self._run("profile", [*command, sys.executable, "-c", STEPS], until)

    def tune(self, until: float) -> Verdict:
        """Tune the layers that take most of the time first. It is no failure if the time does not suffice for
        all of them.
        """
        left = until - time.monotonic() - 10  # a measurement that has begun is finished
        if self.device != "cuda" or left <= 0:
            say("tune: " + (verify.NO_TIME if self.device == "cuda" else "a CPU has no tiles"))
            return Verdict()
        command = [sys.executable, "-m", "tools.tune", "--output", str(self.output / "tuned.json")]
        command += ["--dtype", "bfloat16"]
        return self._run("tune", [*command, "--layers", *TUNED, "--budget-seconds", f"{left:.0f}"], until)

    # -- how ----

    def _collected(self, until):
        """All tests that may be run, and which of them are slow. They are collected once."""
        if self.found is None:
            self.found = verify.collect_marked(*TESTS, timeout=max(1.0, until - time.monotonic()))
        return self.found

    def _shards(self, name, tests, until, jobs=None, before=Verdict()):  # noqa: B008
        folder = self.output / "logs" / name
        verdict = before + verify.shards(tests, jobs or self.jobs, until, folder)
        verdict.write(self.output / f"{name}.json", **self.stamp)
        outcomes = verify.outcomes(folder)
        self._later(name, [test for test in tests if test not in outcomes])
        for test, found in outcomes.items():
            if found["outcome"] == "failed":
                say("\n  ".join([f"FAILED {test}", *verify.what_differs(found.get("reason"))]))
        return verdict

    def _later(self, name, tests):
        """Write the tests down for a call with --later."""
        self.left[name] = tests
        path = self.output / LATER
        path.write_text(json.dumps({"of": self.key, "tests": self.left}, indent=1) + "\n", encoding="utf-8")

    def _verdict(self):
        """The file that says whether speed-ups may be shown: that of the stage "tests", or of the few tests
        that a benchmark runs itself.
        """
        path = self.output / "tests.json"
        try:
            Verdict.load(path, **self.key)
        except (OSError, ValueError, TypeError):
            path = self.output / "op.json"
            if not path.exists():
                verify.run(*(verify.GPU if self.device == "cuda" else verify.CPU)).write(path, **self.stamp)
        return path

    def _bench(self, file, until, selection):
        verdict = self._verdict()
        left = until - time.monotonic()
        if left < 5:
            say(verify.NO_TIME)
            return Verdict(unfinished=1)
        name = f"{Path(file).stem}{' compiled' * (TO_BEAT in selection)}"
        # --all, because a rehearsal on a CPU would otherwise measure fewer providers than a GPU
        command = [*verify.command(file), "--benchmark", "--all", "--device", self.device]
        command += ["--rows", str(self.rows), "-k", selection, "--verdict", str(verdict)]
        command += ["--until", f"{time.time() + 0.8 * left:.0f}"]
        command += ["--seconds", "0.1" if self.quick else "0.25"]
        return self._run(name, command, until)

    def _run(self, name, command, until):
        """Run a process, which is killed at ``until``; the files that it wrote stay. Returns its failures,
        and how much of it had no time.
        """
        folder = self.output / "logs"
        folder.mkdir(exist_ok=True)
        say(f"{name}: {until - time.monotonic():.0f} s")
        log = folder / f"{name}.jsonl"
        log.unlink(missing_ok=True)
        environment = {
            **verify.environment(log),
            "CODA_FAST_BENCH_ATEN": "1",
            "CODA_FAST_COMMIT": self.commit,
        }
        with open(folder / f"{name}.txt", "w") as out:
            process = subprocess.Popen(
                command,
                cwd=results.ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            (status,) = verify.wait([process], until)
        found = verify.read(log)
        for line in (
            (folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
            if name == "train"
            else []
        ):
            say(line[:300])
        if status is None:
            say(f"cut off: {name}")
        elif status:
            say(f"status {status}: {name}; see {folder / f'{name}.txt'}")
        broken = (f"{name}: status {status}",) if status and not found.failures else ()
        return Verdict(failures=found.failures + broken, unfinished=found.unfinished + (status is None))

    # -- the end ----

    def doubt(self, before: list[dict]) -> None:
        """Remove the speed-ups from rows of this call if tests that ran after them have failed."""
        rows = [row for row in results.read(self.path) if row not in before and row.get("verified")]
        results.replace(self.path, [row | {"verified": False, "speedup": None} for row in rows])

    def pack(self) -> None:
        """Pack all results so far into two files, the weights and an archive of the rest, because a borrowed
        machine may return only a few files of limited size.
        """
        if self.packed is None:
            return
        files = {
            path.relative_to(self.output): path
            for path in self.output.rglob("*")
            if path.suffix != ".safetensors"
        }
        results.pack(files | {Path(self.path.name): self.path}, self.packed / ARCHIVE)
        if (weights := self.output / fast_training.WEIGHTS).exists():
            shutil.copyfile(weights, self.packed / weights.name)
        for path in self.packed.iterdir():
            if path.stat().st_size > MOST:
                say(f"{path}: expected at most {MOST} bytes, got {path.stat().st_size}")


# The program that ncu profiles: one training step of each layer
STEPS = """
import torch
from bench import cases, providers
found = cases.layers({"S": 256, "L": 64})
for name in ("S7", "L7"):
    device = torch.device("cuda")
    inputs, step = providers.setup(providers.CODA, found[name], cases.TRAINING, torch.bfloat16, device)
    step(*inputs[0])
    torch.cuda.synchronize()
"""
TUNED = ("S7", "L7", "L4", "L2", "S3", "S5", "S2", "L1", "S1")


def kernel_names() -> list[str]:
    """Every function of the package that Triton compiles."""
    import triton

    import coda_kernels

    modules = [
        importlib.import_module(f"coda_kernels.{found.name}")
        for found in pkgutil.iter_modules(coda_kernels.__path__)
    ]
    kinds = triton.runtime.JITFunction
    return sorted(
        {value.__name__ for module in modules for value in vars(module).values() if isinstance(value, kinds)}
    )


def first_tiles(tests: list[str]) -> tuple[list[str], list[str]]:
    """The tests of the first tile of each kernel and layer, and those of the other tiles. ``tests`` are in
    the order in which a kernel of a layer tries its tiles.
    """
    first = {}
    for test in tests:
        first.setdefault(re.sub(r"(\d+bit) .*", r"\1", test), test)
    return list(first.values()), [test for test in tests if test not in set(first.values())]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
