"""Whether the op's own tests pass on this machine: no speed-up is shown where they do not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The values of the published implementation; on a GPU also the kernels against the definition on published layers
CPU = ("tests/test_golden.py", "-k", "not triton")
GPU = ("tests/test_golden.py", "tests/kernels/test_layer.py", "-k", "golden or test_layers_of")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a run of tests found. ``passed``: at least one ran, none failed, none that was collected is left."""

    passes: int = 0
    skipped: int = 0
    failures: tuple[str, ...] = ()
    unfinished: int = 0

    @property
    def passed(self) -> bool:
        return self.passes > 0 and not self.failures and not self.unfinished

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def __str__(self) -> str:
        parts = [f"{self.passes + len(self.failures)} tests of the op ran here"]
        parts += [f"{len(self.failures)} FAILED: {', '.join(self.failures[:5])}{' ...' if len(self.failures) > 5 else ''}"] * bool(
            self.failures
        )
        parts += ["all passed"] * self.passed
        parts += [f"{self.unfinished} did not come to an end"] * bool(self.unfinished) + [f"{self.skipped} skipped"] * bool(self.skipped)
        return ", ".join(parts)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Verdict:
        """OSError, ValueError, TypeError."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return Verdict(**{**found, "failures": tuple(found["failures"])})


def environment(log: Path) -> dict:
    """For a process that runs tests: the tree importable without installation, every test logged."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "CODA_FAST_TEST_LOG": str(log)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "bench.logged", "-p", "no:cacheprovider", *arguments]


def run(*arguments: str) -> Verdict:
    """Run tests in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        done = subprocess.run(command(*arguments), cwd=ROOT, env=environment(log), capture_output=True, text=True, check=False)
        return read(log, done)


def shards(tests: list[str], count: int, until: float, folder: Path, root: Path = ROOT) -> Verdict:
    """These tests in ``count`` processes at once (their time is mostly the compiler's), killed at ``until`` (``time.monotonic``)."""
    parts = [part for i in range(count) if (part := tests[i::count])]
    running, logs = [], []
    for i, part in enumerate(parts):
        logs.append(folder / f"shard{i}.jsonl")
        names = folder / f"shard{i}.txt"  # too many for a command line
        names.write_text("\n".join(part), encoding="utf-8")
        with open(folder / f"shard{i}.out", "w") as out:
            arguments = command(f"@{names}")
            running.append(
                subprocess.Popen(
                    arguments, cwd=root, env=environment(logs[-1]), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with compute-sanitizer, if it started one
            process.wait()
    found = Verdict()
    for part, log in zip(parts, logs, strict=True):
        ended = read(log)
        found += dataclasses.replace(
            ended, unfinished=max(ended.unfinished, len(part) - ended.passes - ended.skipped - len(ended.failures))
        )
    return found


def collect(*arguments: str, root: Path = ROOT) -> list[str]:
    """Names of the tests that a selection has. RuntimeError with pytest's own words if it finds none."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        done = subprocess.run(
            command("--collect-only", *arguments), cwd=root, env=environment(log), capture_output=True, text=True, check=False
        )
        lines = _lines(log)
        names = next((line["collected"] for line in lines if "collected" in line), [])
        if not names or done.returncode:
            raise RuntimeError(f"expected tests from {' '.join(arguments)}, pytest said: {(done.stdout + done.stderr)[-1000:]}")
        return names


def read(log: Path, done: subprocess.CompletedProcess | None = None) -> Verdict:
    """The log of one process; one that broke off before its first test counts as a failure."""
    lines = _lines(log)
    outcome = {}
    for line in lines:
        if "test" in line and outcome.get(line["test"]) != "failed":
            outcome[line["test"]] = line["outcome"]
    expected = next((line["collected"] for line in lines if "collected" in line), [])
    failures = [test for test, found in outcome.items() if found == "failed"]
    if done is not None and done.returncode not in (0, 1):
        failures.append(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    count = lambda kind: sum(found == kind for found in outcome.values())  # noqa: E731
    return Verdict(count("passed"), count("skipped"), tuple(failures), len(set(expected) - set(outcome)))


def _lines(log):
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
