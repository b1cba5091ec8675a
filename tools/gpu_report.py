"""Everything that the README may claim about a GPU, measured on one, in one command (``make gpu-report``),
within nine minutes.

    python -m tools.gpu_report
        rows into bench/results, the rest into bench/results/report
    python -m tools.gpu_report --output FOLDER       all of it into FOLDER
    python -m tools.gpu_report --data cifar10.npz --output FOLDER --pack RESULTS
        with the training; results as two files
    python -m tools.gpu_report --later FOLDER/later.json --output FOLDER
        the tests that had no time, in a second call

Stages, in order, each leaving its results on disk as it goes, so that a run that is cut off loses only the
last one:

    compile          the kernels of both networks, in many processes, for what comes after
    tests            golden values, layers, operators, many processes at once        tests.json
    configurations   the tile that is taken first of every kernel and layer           configurations.json
    large            more than 2^31 elements                                          large.json
    layers           every layer beside its peers, then beside the compiled one       <device>.jsonl
    networks         whole networks and the yardsticks                                <device>.jsonl
    train
        with --data: cifar10-s-fast, at most 3.5 minutes    training.json, the weights in half precision
    profile          with ncu: every kernel of a layer once                           ncu.csv
    tune             proposes rows of the configuration table                         tuned.json

A stage replaces its own results only. later.json names the tests that had no time, and those that are not for
nine minutes: tiles that are taken only where the first one does not fit, other numbers of warps and stages.
Once tests, configurations and large have all passed, in one call or several of one commit, sm_XX.json says so
and what was run: put into kernels/coda_kernels/tables/, it makes backend="auto" pick the kernels. Needs no
network and no installation beyond torch, Triton, NumPy, pytest and pytest-benchmark; training also Pillow,
PyYAML and safetensors. ``--device cpu`` rehearses it anywhere: the same stages, tests under Triton's
interpreter. Exit status 1 if something failed or was not run. What to do with the results: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import guard, results, tables, verify
from bench.verify import Verdict
from experiments import fast_training
from tools import warm

# Seconds of nine minutes; what a stage does not need is left to those after it
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
# What a stage writes, beside rows
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
MOST = 16 << 20  # bytes of a file that is packed
NEEDED = ("tests.json", "configurations.json", "large.json")  # by the mark
OPTIONAL = ("fallbacks.json", "warps.json")  # not needed, but a failure in them is one
TILES, WARPS, SANITIZER = "test_shipped_tile", "test_warps_and_stages", "test_sanitizer"
# Files that need nothing else than pytest; hypothesis is not among what a report may need. What says most
# comes first
TESTS = (
    "tests/test_golden.py",
    "tests/kernels/test_layer.py",
    "tests/kernels/test_operators.py",
    "tests/kernels/test_gpu.py",
)
LARGE = "tests/kernels/test_gpu.py"
# Beside the eager peers the one to beat; the others take minutes to compile ("pytest bench/ --benchmark" has
# them)
TO_BEAT = "not materialising_compiled and not checkpointed and not factored"


@dataclasses.dataclass
class Report:
    """A run of the stages. ``quick``: one small part of each, for a rehearsal."""

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
        """What a verdict is about."""
        return {
            **results.environment(torch.device(self.device)),
            "commit": self.commit,
            "tree": results.tree(),
        }

    @property
    def key(self) -> dict:
        """In what verdicts must agree to be put together."""
        return {key: self.stamp[key] for key in ("device", "torch", "triton", "tree")}

    # -- stages ----

    def compile(self, until: float) -> Verdict:
        """What was tested and trained then waits for no compiler: bfloat16 for all, float32 for what
        judges the training.
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
        """compute-sanitizer first: it takes longest, beside the others. Then what says most."""
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
        """The tile that each kernel of each layer takes first. The others are taken where that one does
        not fit, with a warning.
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
        """One at a time: they fill the device."""
        found, slow = self._collected(until)
        tests = [name for name in found if name in slow and name.startswith(LARGE) and SANITIZER not in name]
        return self._shards("large", tests[: 1 if self.quick else None], until, jobs=1)

    def later(self, until: float, listed: dict[str, list[str]], folder: Path) -> Verdict:
        """The tests of a later.json, and verdicts of them and of what ran before."""
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
        """Without torch.compile first: compiling takes most of the time, and what is cut off should be the
        compiled peer.
        """
        if self.quick:
            return self._bench("bench/bench_layers.py", until, f"S9 and not explanation and {TO_BEAT}")
        half = time.monotonic() + 0.5 * (until - time.monotonic())
        eager = self._bench("bench/bench_layers.py", half, "not compiled")
        return eager + self._bench("bench/bench_layers.py", until, f"forward_+_backward and {TO_BEAT}")

    def networks(self, until: float) -> Verdict:
        half = time.monotonic() + 0.5 * (until - time.monotonic())
        eager = self._bench(
            "bench/bench_networks.py", half, "inference and coda_fast" if self.quick else "not compiled"
        )
        return (
            eager
            if self.quick
            else eager + self._bench("bench/bench_networks.py", until, f"training_step and {TO_BEAT}")
        )

    def train(self, until: float) -> Verdict:
        """A process of its own; what it finds out is in training.json as it goes."""
        until = min(until, time.monotonic() + TRAINING)
        command = [
            sys.executable,
            "-m",
            "experiments.fast_training",
            "--output",
            str(self.output),
            "--device",
            self.device,
        ]
        command += [
            "--minutes",
            f"{max(1.0, until - time.monotonic() - 5) / 60:.3f}",
            *["--quick"] * self.quick,
        ]
        return self._run("train", [*command, *(["--data", str(self.data)] if self.data else [])], until)

    def profile(self, until: float) -> Verdict:
        """One report of ncu of each kernel in a training step of two layers."""
        if (ncu := shutil.which("ncu")) is None or self.device != "cuda":
            say("profile: no ncu here" if ncu is None else "profile: a CPU has nothing for ncu")
            return Verdict()
        command = [
            ncu,
            "--set",
            "detailed",
            "--page",
            "details",
            "--csv",
            "--log-file",
            str(self.output / "ncu.csv"),
        ]
        command += ["--kernel-name", f"regex:^({'|'.join(kernel_names())})$", "--launch-count", "40"]
        return self._run("profile", [*command, sys.executable, "-c", STEPS], until)

    def tune(self, until: float) -> Verdict:
        """The layers in which most time is spent first; with no time for all of them that is no failure."""
        left = until - time.monotonic() - 10  # it ends a measurement that it has begun
        if self.device != "cuda" or left <= 0:
            say("tune: " + (verify.NO_TIME if self.device == "cuda" else "a CPU has no tiles"))
            return Verdict()
        command = [
            sys.executable,
            "-m",
            "tools.tune",
            "--output",
            str(self.output / "tuned.json"),
            "--dtype",
            "bfloat16",
        ]
        return self._run("tune", [*command, "--layers", *TUNED, "--budget-seconds", f"{left:.0f}"], until)

    # -- how ----

    def _collected(self, until):
        """All tests that may be run, and which are slow; found out once."""
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
        """Tests for a call with --later."""
        self.left[name] = tests
        path = self.output / LATER
        path.write_text(json.dumps({"of": self.key, "tests": self.left}, indent=1) + "\n", encoding="utf-8")

    def _verdict(self):
        """The file that says whether speed-ups may be shown: of the stage "tests", or of the few that a
        benchmark runs itself.
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
        command = [
            *verify.command(file),
            "--benchmark",
            "--device",
            self.device,
            "--rows",
            str(self.rows),
            "-k",
            selection,
        ]
        command += ["--all"]  # a GPU has no less; a CPU, on which this is rehearsed, has
        command += [
            "--until",
            f"{time.time() + 0.8 * left:.0f}",
            "--verdict",
            str(verdict),
            "--seconds",
            "0.1" if self.quick else "0.25",
        ]
        return self._run(name, command, until)

    def _run(self, name, command, until):
        """A process, killed at ``until``; what it wrote stays. Its failures, and how much of it had no
        time.
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
        """No speed-up, after the fact, in rows of this call, where tests that ran after them have failed."""
        rows = [row for row in results.read(self.path) if row not in before and row.get("verified")]
        results.replace(self.path, [row | {"verified": False, "speedup": None} for row in rows])

    def verified(self) -> dict | None:
        """The entry of the table that makes "auto" pick the kernels, if everything that it needs has
        passed here.
        """
        try:
            verdicts = {name: Verdict.load(self.output / name, **self.key) for name in NEEDED}
        except (OSError, ValueError, TypeError):
            return None
        others = {}
        for name in OPTIONAL:
            try:
                others[name] = Verdict.load(self.output / name, **self.key)
            except (OSError, ValueError, TypeError):
                others[name] = Verdict()
        good = all(v.passed for v in verdicts.values()) and not any(v.failures for v in others.values())
        if self.device != "cuda" or self.quick or not good:
            return None
        mark = {
            key: self.stamp[key] for key in ("device", "driver", "triton", "torch", "commit", "tree", "date")
        }
        # which tiles have been run on it: of every kernel and layer the one that is taken first; of those for
        # devices on which that one does not fit (they are taken with a warning), as many as a call with
        # --later has found to pass
        mark["tiles"] = {
            "first": verdicts["configurations.json"].passes,
            "fallbacks": others["fallbacks.json"].passes,
        }
        mark["warps_and_stages"] = others["warps.json"].passes
        return mark | {"skipped": {name: v.skipped for name, v in verdicts.items() if v.skipped}}

    def propose_table(self) -> Path | None:
        """sm_XX.json: the table of the package with the mark "verified"."""
        if (mark := self.verified()) is None:
            return None
        from coda_kernels import config

        major, minor = torch.cuda.get_device_capability()
        path = self.output / f"sm_{major}{minor}.json"
        shipped = config.TABLES / path.name
        table = json.loads(shipped.read_text(encoding="utf-8")) if shipped.exists() else {"tiles": []}
        path.write_text(json.dumps({**table, "verified": mark}, indent=1) + "\n", encoding="utf-8")
        return path

    def pack(self) -> None:
        """All there is so far as two files, the weights and an archive of the rest: a machine that is only
        lent may give back few files of limited size.
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


# What ncu looks at: each layer's training step, once
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
    """Of tests of one tile each, in the order in which a kernel of a layer takes its tiles: those of the
    first one, and the others.
    """
    first = {}
    for test in tests:
        first.setdefault(re.sub(r"(\d+bit) .*", r"\1", test), test)
    return list(first.values()), [test for test in tests if test not in set(first.values())]


def run(report: Report, stages: dict[str, float]) -> dict[str, Verdict]:
    """The stages one after the other; a share is of the time that is left, so that a fast stage gives to
    the later ones.
    """
    found = {}
    for i, (stage, share) in enumerate(stages.items()):
        left, now = sum(list(stages.values())[i:]), time.monotonic()
        until = now + (report.finish - now) * share / left
        say(f"{stage}: until {until - now:.0f} s from now")
        try:
            found[stage] = getattr(report, stage)(until)
        except Exception as error:  # the stages after it may still say something
            found[stage] = Verdict(failures=(f"{type(error).__name__}: {error}",))
            if stage in VERDICTS:
                found[stage].write(report.output / FILES[stage][0], **report.stamp)
        report.pack()
        say(
            f"{stage}: {found[stage] if found[stage] != Verdict() else 'done'} "
            f"({time.monotonic() - now:.0f} s)"
        )
    return found


def read_later(path: Path, refuse) -> dict:
    """A later.json; ``refuse`` is called with what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["of"], dict) or not all(
            isinstance(tests, list) for tests in found["tests"].values()
        ):
            raise ValueError("another kind of file")
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return refuse(f"--later: {path}: expected a later.json of this report: {error}")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv=None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for everything, made if it is not there")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, help="default: all, the training only with --data"
    )
    parser.add_argument(
        "--data", type=Path, help="the images to train with, an .npz file (experiments/fast_training.py)"
    )
    parser.add_argument(
        "--pack", type=Path, help="folder for an archive of the results and the weights, two files"
    )
    parser.add_argument(
        "--later",
        type=Path,
        help="only the tests that this later.json names, beside the verdicts in its folder",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small part of each stage")
    parser.add_argument(
        "--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes for the tests"
    )
    options = parser.parse_args(argv)
    for name in ("minutes", "jobs"):
        if (value := getattr(options, name)) <= 0:
            parser.error(f"--{name}: expected a positive number, got {value}")
    if options.data and not options.data.is_file():
        parser.error(f"--data: no such file: {options.data}")
    if options.later and options.stages:
        parser.error("--later: expected no --stages beside it")
    listed = read_later(options.later, parser.error) if options.later else None
    if options.stages is None:  # made-up images are for rehearsals
        options.stages = [stage for stage in STAGES if stage != "train" or options.data or options.quick]
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-report: needs a CUDA device, torch sees none; --device cpu rehearses it", file=sys.stderr)
        return 2
    output = options.output or results.FOLDER / "report"
    rows = options.output or results.FOLDER
    output.mkdir(parents=True, exist_ok=True)
    stages = (
        {} if listed is not None else {stage: STAGES[stage] for stage in STAGES if stage in options.stages}
    )
    finish = start + 60 * options.minutes - 5
    places = dict(
        data=options.data and options.data.resolve(), packed=options.pack and options.pack.resolve()
    )
    report = Report(
        output.resolve(), rows.resolve(), options.device, finish, options.quick, options.jobs, **places
    )
    for name in (file for stage in stages for file in FILES.get(stage, ())):  # of an earlier report
        (output / name).unlink(missing_ok=True)
    (output / "op.json").unlink(missing_ok=True)
    before = results.read(report.path)
    if listed is None:
        found = run(report, stages)
    elif listed["of"] != report.key:
        print(
            f"gpu-report: --later: expected tests of {report.key}, got those of {listed['of']}",
            file=sys.stderr,
        )
        return 2
    else:
        found = {"later": report.later(finish, listed["tests"], options.later.resolve().parent)}
    if any(found[stage].failures for stage in found if stage in (*VERDICTS, "later")):
        report.doubt(before)
    after = results.read(report.path)
    if new := [row for row in after if row not in before]:
        print(tables.everything(after))
        print(f"\nratios beside those before (advisory)\n{guard.report(new, before)}\n")
    for stage, verdict in found.items():
        print(f"{stage}: {verdict if verdict != Verdict() else 'done'}")
        for failure in verdict.failures:
            print(f"  {failure}")
    if table := report.propose_table():
        print(f"all passed: {table} may go into kernels/coda_kernels/tables/")
    report.pack()
    print(f"{time.monotonic() - start:.0f} s; rows: {report.path}; the rest: {output}")
    return int(any(v.failures or v.unfinished for v in found.values()))


if __name__ == "__main__":
    sys.exit(main())
