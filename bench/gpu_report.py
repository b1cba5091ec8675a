"""Everything that the README may claim about a GPU, measured on one, in one command (``make gpu-report``), within nine minutes.

    python bench/gpu_report.py                       rows into bench/results, the rest into bench/results/report
    python bench/gpu_report.py --output FOLDER       all of it into FOLDER
    python bench/gpu_report.py --stages layers networks --minutes 20 --tune

Stages, in order, each leaving its results on disk as it goes, so that a run that is cut off loses only the last one:

    tests            the kernels' tests on the GPU, many processes at once         tests.json
    layers           every layer beside its peers, then beside the compiled ones    <device>.jsonl
    networks         whole networks and the yardsticks                              <device>.jsonl
    configurations   every tile, number of warps and stages that the package uses   configurations.json
    tune             with --tune: proposes rows of the configuration table          tuned.json

If all tests and configurations pass, sm_XX.json says so: put into kernels/coda_kernels/tables/, it makes backend="auto" pick the kernels.
Needs no network and no installation beyond torch, Triton, NumPy, pytest and pytest-benchmark. ``--device cpu`` rehearses it anywhere:
the same stages, tests under Triton's interpreter. Exit status 1 if a test failed or was not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402

from bench import results, tables, verify  # noqa: E402
from bench.verify import Verdict  # noqa: E402

# Shares of the time; what a stage does not need is left to those after it
STAGES = {"tests": 0.28, "layers": 0.36, "networks": 0.18, "configurations": 0.18}
SHIPPED = "test_shipped_tile or test_warps_and_stages"
# Files that need nothing else than pytest; hypothesis is not among what a report may need
TESTS = ("tests/test_golden.py", "tests/kernels/test_layer.py", "tests/kernels/test_operators.py", "tests/kernels/test_gpu.py")


@dataclasses.dataclass
class Report:
    """A run of the stages. ``quick``: one small part of each, for a rehearsal."""

    output: Path
    rows: Path
    device: str
    finish: float  # time.monotonic()
    quick: bool = False
    jobs: int = os.cpu_count() or 1

    def __post_init__(self):
        self.name = results.device_name(torch.device(self.device))
        self.commit = results.commit()  # before the rows that it writes make the tree look changed

    # -- stages ----

    def tests(self, until: float) -> Verdict:
        small = verify.collect(*TESTS, "-m", "not slow", "-k", "golden and layer_1" if self.quick else f"not ({SHIPPED})")
        verdict = self._shards(small, until)
        if not self.quick:  # tensors beyond 2^31 elements, compute-sanitizer: one at a time
            verdict += self._shards(verify.collect("tests/kernels/test_gpu.py", "-m", "slow", "-k", f"not ({SHIPPED})"), until, jobs=1)
        return self._keep(verdict, "tests.json")

    def configurations(self, until: float) -> Verdict:
        tests = verify.collect("tests/kernels/test_gpu.py", "-k", SHIPPED)
        return self._keep(self._shards(tests[:4] if self.quick else tests, until), "configurations.json")

    def layers(self, until: float) -> Verdict:
        """Without torch.compile first: the compiled peers take most of the time, and what is cut off should be theirs."""
        eager = self._bench("bench/bench_layers.py", until, "-k", "S9 and not compiled" if self.quick else "not compiled")
        return eager + self._bench(
            "bench/bench_layers.py", until, "-k", "S9 and forward_+_backward" if self.quick else "forward_+_backward"
        )

    def networks(self, until: float) -> Verdict:
        eager = self._bench("bench/bench_networks.py", until, "-k", "inference and coda_fast" if self.quick else "not compiled")
        return eager if self.quick else eager + self._bench("bench/bench_networks.py", until, "-k", "training_step")

    def tune(self, until: float) -> Verdict:
        command = [sys.executable, "bench/tune.py", "--output", str(self.output / "tuned.json"), "--dtype", "bfloat16"]
        self._run([*command, "--budget-seconds", f"{max(0.0, until - time.monotonic()):.0f}"], until + 30)
        return Verdict()

    # -- how ----

    def _shards(self, tests, until, jobs=None):
        with tempfile.TemporaryDirectory() as folder:
            return verify.shards(tests, jobs or self.jobs, until, Path(folder))

    def _keep(self, verdict, name):
        verdict.write(self.output / name)
        return verdict

    def _bench(self, file, until, *options):
        left = until - time.monotonic()
        if left < 5:
            say("no time left")
            return Verdict(unfinished=1)
        tests = self.output / "tests.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "--benchmark", "--device", self.device]
        command += ["--rows", str(self.rows), "--until", f"{time.time() + 0.8 * left:.0f}", *options]
        command += ["--verdict", str(tests)] if tests.exists() else []
        command += ["--seconds", "0.1"] if self.quick else ["--seconds", "0.5"]
        return self._run(command, until)

    def _run(self, command, until):
        """A process, killed at ``until``; what it wrote stays."""
        environment = {**verify.environment(self.output / "unused"), "CODA_FAST_BENCH_ATEN": "1", "CODA_FAST_COMMIT": self.commit}
        with open(self.output / "log.txt", "a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=max(1.0, until - time.monotonic())
                )
            except subprocess.TimeoutExpired:
                say(f"cut off: {' '.join(command[2:5])}")
                return Verdict(unfinished=1)
        if done.returncode:
            say(f"status {done.returncode}: {' '.join(command[1:5])}; see {self.output / 'log.txt'}")
            return Verdict(failures=(f"{' '.join(command[1:5])}: status {done.returncode}",))
        return Verdict()

    # -- the end ----

    def verified(self) -> dict | None:
        """The entry of the table that makes "auto" pick the kernels, if everything passed here."""
        files = [self.output / name for name in ("tests.json", "configurations.json")]
        if self.device != "cuda" or self.quick or not all(f.exists() and Verdict.load(f).passed for f in files):
            return None
        keys = ("device", "driver", "triton", "torch", "commit", "date")
        return {key: value for key, value in results.environment(torch.device(self.device)).items() if key in keys}

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
    for name in ("tests.json", "configurations.json", "tuned.json", "log.txt"):  # of an earlier report
        (output / name).unlink(missing_ok=True)
    finish = start + 60 * options.minutes - 5
    report = Report(output.resolve(), rows.resolve(), options.device, finish, options.quick, options.jobs)
    stages = {stage: STAGES[stage] for stage in options.stages}
    if options.tune:
        stages["tune"] = 0.2
    found = run(report, stages)
    path = results.path_of(report.name, report.rows)
    if path.exists():
        print(tables.everything(results.read(path)))
    for stage, verdict in found.items():
        print(f"{stage}: {verdict if verdict != Verdict() else 'done'}")
        for failure in verdict.failures:
            print(f"  {failure}")
    if table := report.propose_table():
        print(f"all passed: {table} may go into kernels/coda_kernels/tables/")
    print(f"{time.monotonic() - start:.0f} s; rows: {path}; the rest: {output}")
    return int(any(v.failures or v.unfinished for v in found.values()))


if __name__ == "__main__":
    sys.exit(main())
