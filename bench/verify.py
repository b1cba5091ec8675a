"""Whether the op's own tests pass on this machine. If not, no speed-up is shown."""

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

NO_TIME = "no time left"  # the reason for skipping a bench that did not begin in time
ROOT = Path(__file__).resolve().parent.parent
# Tests against the published implementation; on a GPU also of the kernels against the definition, on the
# layers of published networks
CPU = ("tests/test_golden.py", "-k", "not triton")
GPU = ("tests/test_golden.py", "tests/kernels/test_layer.py", "-k", "golden or test_layers_of")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a test run. ``good``: at least one test passed and none failed. ``passed``: in addition,
    all collected tests ran.
    """

    passes: int = 0
    skipped: int = 0
    failures: tuple[str, ...] = ()
    unfinished: int = 0

    @property
    def good(self) -> bool:
        return self.passes > 0 and not self.failures

    @property
    def passed(self) -> bool:
        return self.good and not self.unfinished

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def __str__(self) -> str:
        parts = [f"{self.passes + len(self.failures)} tests of the op ran here"]
        parts += [
            f"{len(self.failures)} FAILED: "
            f"{', '.join(self.failures[:5])}{' ...' if len(self.failures) > 5 else ''}"
        ] * bool(self.failures)
        parts += ["all passed"] * self.passed
        parts += [f"{self.unfinished} did not come to an end"] * bool(self.unfinished) + [
            f"{self.skipped} skipped"
        ] * bool(self.skipped)
        return ", ".join(parts)

    def write(self, path: Path, **stamp) -> None:
        """Write the verdict. ``stamp``: what it is about (device, commit)."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(dataclasses.asdict(self) | {"of": stamp}) + "\n", encoding="utf-8")
        os.replace(scratch, path)

    @staticmethod
    def load(path: Path, **stamp) -> Verdict:
        """Read a verdict. Raises OSError; ValueError or TypeError if the file is not a verdict, or one about
        something else than ``stamp``.
        """
        found = json.loads(path.read_text(encoding="utf-8"))
        of = found.pop("of", {})
        if different := {key: of.get(key) for key, value in stamp.items() if of.get(key) != value}:
            raise ValueError(f"{path}: expected a verdict about {stamp}, got one about {different}")
        return Verdict(**{**found, "failures": tuple(found["failures"])})


def environment(log: Path) -> dict:
    """The environment of a process that runs tests: the tree can be imported without installation, and every
    test is logged.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    return {**os.environ, "PYTHONPATH": path, "CODA_FAST_TEST_LOG": str(log)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "bench.logged", "-p", "no:cacheprovider", *arguments]


def run(*arguments: str) -> Verdict:
    """Run tests in another process."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        done = subprocess.run(
            command(*arguments), cwd=ROOT, env=environment(log), capture_output=True, text=True, check=False
        )
        return read(log, done)


def shards(tests: list[str], count: int, until: float, folder: Path, root: Path = ROOT) -> Verdict:
    """Run these tests in ``count`` processes at once, because most of their time is spent compiling. They are
    killed at ``until`` (``time.monotonic``). Their output stays in ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("shard*"):
        old.unlink()
    parts = [part for i in range(count) if (part := tests[i::count])]
    running, logs = [], []
    try:
        for i, part in enumerate(parts):
            logs.append(folder / f"shard{i}.jsonl")
            names = folder / f"shard{i}.txt"  # too many names for a command line
            names.write_text("\n".join(part), encoding="utf-8")
            with open(folder / f"shard{i}.out", "w") as out:
                options = {
                    "cwd": root,
                    "env": environment(logs[-1]),
                    "stdout": out,
                    "stderr": subprocess.STDOUT,
                }
                running.append(subprocess.Popen(command(f"@{names}"), start_new_session=True, **options))
    except BaseException:
        end(running)
        raise
    found = Verdict()
    statuses = wait(running, until)
    for part, log, status in zip(parts, logs, statuses, strict=True):
        ended = read(log)
        left = max(ended.unfinished, len(part) - ended.passes - ended.skipped - len(ended.failures))
        broken = (f"{log.stem} ended with status {status}",) if status not in (None, 0, 1) else ()
        found += dataclasses.replace(ended, unfinished=left, failures=ended.failures + broken)
    return found


def outcomes(folder: Path) -> dict[str, dict]:
    """{test: {outcome, seconds, and possibly reason, properties}} of the tests that ``shards`` ran there."""
    lines = [line for log in sorted(folder.glob("shard*.jsonl")) for line in _lines(log)]
    found = {}
    for line in lines:
        if "test" in line and found.get(line["test"], {}).get("outcome") != "failed":
            found[line["test"]] = {
                key: line[key]
                for key in ("outcome", "seconds", "reason", "properties")
                if line.get(key) is not None
            }
    return found


def what_differs(reason: str | None, lines: int = 3) -> list[str]:
    """The lines of the error itself, from pytest's report of a failure."""
    found = [line[1:].strip() for line in (reason or "").splitlines() if line.startswith("E ")]
    return [line[:400] for line in (found or (reason or "").strip().splitlines()[-1:])[:lines]]


def wait(processes: list[subprocess.Popen], until: float) -> list[int | None]:
    """The exit statuses of the processes, None for those that had to be killed at ``until``. Each process
    must lead a session, so that everything it started (compute-sanitizer, compilers) ends with it, even if
    this process is interrupted.
    """
    statuses = []
    try:
        for process in processes:
            try:
                statuses.append(process.wait(max(0.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(None)
    finally:
        end(processes)
    return statuses


def end(processes: list[subprocess.Popen]) -> None:
    """Kill the processes that still run, each with its session."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def collect(*arguments: str, root: Path = ROOT, timeout: float | None = None) -> list[str]:
    """Names of the tests that a selection has. Raises RuntimeError with pytest's output if there are none, or
    subprocess.TimeoutExpired.
    """
    return collect_marked(*arguments, root=root, timeout=timeout)[0]


def collect_marked(
    *arguments: str, root: Path = ROOT, timeout: float | None = None
) -> tuple[list[str], set[str]]:
    """The names of the tests, and which of them are marked slow."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        done = subprocess.run(
            command("--collect-only", *arguments),
            cwd=root,
            env=environment(log),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        lines = _lines(log)
        names, slow = next(
            ((line["collected"], line["slow"]) for line in lines if "collected" in line), ([], [])
        )
        if not names or done.returncode:
            raise RuntimeError(
                f"expected tests from {' '.join(arguments)}, pytest said: "
                f"{(done.stdout + done.stderr)[-1000:]}"
            )
        return names, set(slow)


def read(log: Path, done: subprocess.CompletedProcess | None = None) -> Verdict:
    """The verdict on one process from its log. A process that ended before its first test counts as a
    failure.
    """
    lines = _lines(log)
    outcome = {}
    for line in lines:
        if "test" in line and outcome.get(line["test"]) != "failed":
            outcome[line["test"]] = line["outcome"]
    expected = next((line["collected"] for line in lines if "collected" in line), [])
    late = {
        line["test"]
        for line in lines
        if line.get("outcome") == "skipped" and NO_TIME in (line["reason"] or "")
    }
    outcome = {test: found for test, found in outcome.items() if test not in late}
    failures = [test for test, found in outcome.items() if found == "failed"]
    if done is not None and done.returncode not in (0, 1):
        failures.append(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    count = lambda kind: sum(found == kind for found in outcome.values())
    return Verdict(count("passed"), count("skipped"), tuple(failures), len(set(expected) - set(outcome)))


def _lines(log):
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
