"""Everything that the README may claim about a GPU, measured on one, in one command (``make gpu-report``), within nine minutes.

    python bench/gpu_report.py                       rows into bench/results, the rest into bench/results/report
    python bench/gpu_report.py --output FOLDER       all of it into FOLDER
    python bench/gpu_report.py --stages configurations large --minutes 9       more of it, in a second call

Stages, in order, each leaving its results on disk as it goes, so that a run that is cut off loses only the last one:

    tests            golden values, layers, operators, many processes at once        tests.json
    layers           every layer beside its peers, then beside the compiled one       <device>.jsonl
    networks         whole networks and the yardsticks                                <device>.jsonl
    configurations   every tile that the package ships                                configurations.json
                     then other numbers of warps and stages                           warps.json
    large            more than 2^31 elements, compute-sanitizer                       large.json
    tune             with --tune: proposes rows of the configuration table            tuned.json

A stage replaces its own results only. Once tests, configurations and large have all passed, in one call or several of one commit,
sm_XX.json says so: put into kernels/coda_kernels/tables/, it makes backend="auto" pick the kernels.
Needs no network and no installation beyond torch, Triton, NumPy, pytest and pytest-benchmark. ``--device cpu`` rehearses it anywhere:
the same stages, tests under Triton's interpreter. Exit status 1 if something failed or was not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402

from bench import guard, results, tables, verify  # noqa: E402
from bench.verify import Verdict  # noqa: E402

# Shares of the time; what a stage does not need is left to those after it
STAGES = {"tests": 0.22, "layers": 0.36, "networks": 0.17, "configurations": 0.17, "large": 0.08}
TUNING = 0.2
# What a stage writes, beside rows
FILES = {
    "tests": ("tests.json",),
    "configurations": ("configurations.json", "warps.json"),
    "large": ("large.json",),
    "tune": ("tuned.json",),
}
NEEDED = ("tests.json", "configurations.json", "large.json")  # by the mark
TILES, WARPS = "test_shipped_tile", "test_warps_and_stages"
# Files that need nothing else than pytest; hypothesis is not among what a report may need. What says most comes first
TESTS = ("tests/test_golden.py", "tests/kernels/test_layer.py", "tests/kernels/test_operators.py", "tests/kernels/test_gpu.py")
LARGE = "tests/kernels/test_gpu.py"
# Beside the eager peers the one to beat; the others take minutes to compile ("pytest bench/ --benchmark" has them)
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

    def __post_init__(self):
        self.name = results.device_name(torch.device(self.device))
        self.commit = results.commit()
        self.path = results.path_of(self.name, self.rows)

    @property
    def stamp(self) -> dict:
        """What a verdict is about."""
        return {**results.environment(torch.device(self.device)), "commit": self.commit, "tree": results.tree()}

    @property
    def key(self) -> dict:
        """In what verdicts must agree to be put together."""
        return {key: self.stamp[key] for key in ("device", "torch", "triton", "tree")}

    # -- stages ----

    def tests(self, until: float) -> Verdict:
        if self.quick:
            return self._tests("tests", until, *TESTS, "-m", "not slow", "-k", "golden and layer_1")
        fast = self._collect(until, *TESTS, "-m", "not slow", "-k", f"not ({TILES} or {WARPS})")
        published = self._collect(until, "tests/kernels/test_layer.py", "-m", "slow")
        first = [name for name in fast if "test_golden" in name or "test_layer.py" in name]
        return self._shards("tests", [*first, *published, *(name for name in fast if name not in set(first))], until)

    def configurations(self, until: float) -> Verdict:
        """The shipped tiles first: the mark needs only them."""
        tiles = self._collect(until, LARGE, "-k", TILES)
        verdict = self._shards("configurations", tiles[:2] if self.quick else tiles, until)
        return verdict + self._shards("warps", self._collect(until, LARGE, "-k", WARPS)[: 2 if self.quick else None], until)

    def large(self, until: float) -> Verdict:
        """One at a time: they fill the device."""
        return self._tests("large", until, LARGE, "-m", "slow", "-k", f"not ({TILES} or {WARPS})", jobs=1)

    def layers(self, until: float) -> Verdict:
        """Without torch.compile first: compiling takes most of the time, and what is cut off should be the compiled peer."""
        half = time.monotonic() + 0.5 * (until - time.monotonic())
        eager = self._bench("bench/bench_layers.py", half, "S9 and not compiled" if self.quick else "not compiled")
        return eager + self._bench("bench/bench_layers.py", until, f"forward_+_backward and {TO_BEAT}" + " and S9" * self.quick)

    def networks(self, until: float) -> Verdict:
        half = time.monotonic() + 0.5 * (until - time.monotonic())
        eager = self._bench("bench/bench_networks.py", half, "inference and coda_fast" if self.quick else "not compiled")
        return eager if self.quick else eager + self._bench("bench/bench_networks.py", until, f"training_step and {TO_BEAT}")

    def tune(self, until: float) -> Verdict:
        command = [sys.executable, "bench/tune.py", "--output", str(self.output / "tuned.json"), "--dtype", "bfloat16"]
        left = until - time.monotonic() - 30  # it ends a measurement that it has begun
        return self._run("tune", [*command, "--budget-seconds", f"{left:.0f}"], until) if left > 0 else Verdict(unfinished=1)

    # -- how ----

    def _tests(self, name, until, *selection, jobs=None):
        return self._shards(name, self._collect(until, *selection), until, jobs)

    @staticmethod
    def _collect(until, *selection):
        return verify.collect(*selection, timeout=max(1.0, until - time.monotonic()))

    def _shards(self, name, tests, until, jobs=None):
        verdict = verify.shards(tests, jobs or self.jobs, until, self.output / "logs" / name)
        verdict.write(self.output / f"{name}.json", **self.stamp)
        return verdict

    def _verdict(self):
        """The file that says whether speed-ups may be shown: of the stage "tests", or of the few that a benchmark runs itself."""
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
        command = [*verify.command(file), "--benchmark", "--device", self.device, "--rows", str(self.rows), "-k", selection]
        command += ["--until", f"{time.time() + 0.8 * left:.0f}", "--verdict", str(verdict), "--seconds", "0.1" if self.quick else "0.5"]
        return self._run(name, command, until)

    def _run(self, name, command, until):
        """A process, killed at ``until``; what it wrote stays. Its failures, and how much of it had no time."""
        folder = self.output / "logs"
        folder.mkdir(exist_ok=True)
        log = folder / f"{name}.jsonl"
        log.unlink(missing_ok=True)
        environment = {**verify.environment(log), "CODA_FAST_BENCH_ATEN": "1", "CODA_FAST_COMMIT": self.commit}
        with open(folder / f"{name}.txt", "w") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            (status,) = verify.wait([process], until)
        found = verify.read(log)
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
        """The entry of the table that makes "auto" pick the kernels, if everything that it needs has passed here."""
        try:
            verdicts = {name: Verdict.load(self.output / name, **self.key) for name in NEEDED}
        except (OSError, ValueError, TypeError):
            return None
        if self.device != "cuda" or self.quick or not all(v.passed for v in verdicts.values()):
            return None
        mark = {key: self.stamp[key] for key in ("device", "driver", "triton", "torch", "commit", "tree", "date")}
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


def run(report: Report, stages: dict[str, float]) -> dict[str, Verdict]:
    """The stages one after the other; a share is of the time that is left, so that a fast stage gives to the later ones."""
    found = {}
    for i, (stage, share) in enumerate(stages.items()):
        left, now = sum(list(stages.values())[i:]), time.monotonic()
        until = now + (report.finish - now) * share / left
        say(f"{stage}: until {until - now:.0f} s from now")
        try:
            found[stage] = getattr(report, stage)(until)
        except Exception as error:  # the stages after it may still say something
            found[stage] = Verdict(failures=(f"{type(error).__name__}: {error}",))
            if stage in FILES:
                found[stage].write(report.output / FILES[stage][0], **report.stamp)
        say(f"{stage}: {found[stage] if found[stage] != Verdict() else 'done'} ({time.monotonic() - now:.0f} s)")
    return found


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv=None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for everything, made if it is not there")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tune", action="store_true", help="then propose rows of the configuration table, in a fifth of the time")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small part of each stage")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes for the tests")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-report: needs a CUDA device, torch sees none; --device cpu rehearses it", file=sys.stderr)
        return 2
    output = options.output or results.FOLDER / "report"
    rows = options.output or results.FOLDER
    output.mkdir(parents=True, exist_ok=True)
    stages = {stage: STAGES[stage] for stage in options.stages} | ({"tune": TUNING} if options.tune else {})
    for name in (file for stage in stages for file in FILES.get(stage, ())):  # of an earlier report
        (output / name).unlink(missing_ok=True)
    finish = start + 60 * options.minutes - 5
    report = Report(output.resolve(), rows.resolve(), options.device, finish, options.quick, options.jobs)
    (output / "op.json").unlink(missing_ok=True)
    before = results.read(report.path)
    found = run(report, stages)
    if any(found[stage].failures for stage in found if stage in FILES):
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
    print(f"{time.monotonic() - start:.0f} s; rows: {report.path}; the rest: {output}")
    return int(any(v.failures or v.unfinished for v in found.values()))


if __name__ == "__main__":
    sys.exit(main())
