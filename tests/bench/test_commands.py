"""The benchmark as it is used: ``pytest bench/ --benchmark``, the tables, and the GPU report rehearsed on a
CPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import providers, results
from bench.verify import Verdict
from tools import gpu_mark, gpu_report, gpu_stages

ROOT = Path(__file__).resolve().parent.parent.parent
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
CPU = ["--device", "cpu"]
# The providers of a layer's forward pass
GROUP = [name for name, peer in providers.PEERS.items() if not peer.recomputes]
GROUP += [providers.CODA, providers.PRODUCT]


def start(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    # the inner pytest must not see the settings of the outer one
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**own, "PYTHONPATH": PATH, **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
        # processes in the background of a shell ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=600)
    return process.returncode, out + err


def bench(*arguments):
    return run("-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/bench_layers.py", *CPU, *arguments)


@pytest.fixture
def verdict(tmp_path):
    path = tmp_path / "verdict.json"
    Verdict(passes=1).write(path)
    return path


def test_benchmark(tmp_path, verdict):
    """A run writes the rows of all providers of the group and prints the tables and the comparison with
    stored ratios. pytest-benchmark's own results have the same medians.
    """
    saved = tmp_path / "saved.json"
    options = [
        "--benchmark",
        "--rows",
        tmp_path,
        "--seconds",
        "0.05",
        "--verdict",
        verdict,
        f"--benchmark-json={saved}",
    ]
    status, text = bench(*options, "--all", "-k", "S9 and forward and not backward")
    assert status == 0, text
    rows = {row["provider"]: row for row in results.read(next(tmp_path.glob("*.jsonl")))}
    assert rows.pop(providers.COPY)["p50_us"] > 0
    assert list(rows) == GROUP
    for row in rows.values():
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["peak_bytes"] or row["provider"] == providers.PRODUCT
    assert rows[providers.CODA]["error"] < 1e-5
    low, middle, high = rows[providers.CODA]["speedup"][providers.MATERIALISING]
    assert low <= middle <= high
    assert 0 < rows[providers.CODA]["ceiling"] < 1.5
    assert "| S9 " in text
    digits = 2 if middle < 10 else 1
    assert f"{middle:.{digits}f}x ({low:.{digits}f} to {high:.{digits}f})" in text
    assert "1 tests of the op ran here, all passed" in text
    assert "ratios beside the stored ones (advisory)" in text
    medians = {b["name"]: 1e6 * b["stats"]["median"] for b in json.loads(saved.read_text())["benchmarks"]}
    assert len(medians) == len(rows)
    for name, row in rows.items():
        median = next(m for key, m in medians.items() if key.endswith(f"forward-{name.replace(' ', '_')}]"))
        assert median == pytest.approx(row["p50_us"], rel=1e-3)


@pytest.mark.slow
def test_no_speedup_where_tests_fail(tmp_path, verdict):
    Verdict(passes=1, failures=("tests/test_golden.py::test_layer",)).write(verdict)
    status, text = bench(
        "--benchmark",
        "--rows",
        tmp_path,
        "--seconds",
        "0.05",
        "--verdict",
        verdict,
        "--all",
        "-k",
        "S9 and forward and not backward",
    )
    assert status == 0, text
    assert "1 FAILED: tests/test_golden.py::test_layer" in text
    assert "not shown" in text
    assert all(row["speedup"] is None for row in results.read(next(tmp_path.glob("*.jsonl"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "quantum"], "invalid choice: 'quantum'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--verdict", "nowhere.json", "--benchmark", "-k", "S9 and backward and coda"], "nowhere.json"),
        pytest.param(
            ["--device", "cuda"], "--device: expected a device that torch sees, got cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_bad_options(tmp_path, options, message):
    status, text = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/bench_layers.py", "--rows", tmp_path, *options
    )
    assert status != 0
    assert message in text
    assert not list(tmp_path.glob("*.jsonl"))


def test_tables_check():
    status, text = run("-m", "tools.documents", "--check")
    assert (status, text.strip()) == (0, "all tables and plots show the rows of bench/results")


# -- the GPU report
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_cut_off(tmp_path):
    """The report and its benchmark are killed once the layers have their first rows. The results of the first
    stage are there, the first group is complete, and later stages left nothing.
    """
    process = start(
        "-m",
        "tools.gpu_report",
        *CPU,
        "--quick",
        "--output",
        tmp_path,
        "--minutes",
        "9",
        "--jobs",
        "1",
        "--stages",
        "tests",
        "layers",
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:
        os.killpg(int(child), signal.SIGKILL)
    process.communicate()
    assert Verdict.load(tmp_path / "tests.json").passed
    rows = results.read(next(tmp_path.glob("*.jsonl")))
    first = [row["provider"] for row in rows if row["mode"] == "forward"]
    assert first == GROUP
    assert any(row["op"] == providers.COPY for row in rows)
    assert not (tmp_path / "configurations.json").exists()


@pytest.mark.slow
def test_interrupted_report_leaves_no_process(tmp_path):
    """Ctrl-C also ends the processes that the report started in their own sessions."""
    process = start(
        "-m",
        "tools.gpu_report",
        *CPU,
        "--output",
        tmp_path,
        "--minutes",
        "4",
        "--jobs",
        "2",
        "--stages",
        "tests",
    )
    children, deadline = [], time.monotonic() + 120
    while (
        len(children) < 2 and time.monotonic() < deadline
    ):  # first a process that collects tests, then one for each job
        time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(1)  # the parent may register its child a little later than this test sees it
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in err
    assert len(children) == 2
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_report_fails_in_time(tmp_path):
    """Without time, every stage says so, nothing hangs, and the exit status is a failure."""
    begin = time.monotonic()
    status, text = run(
        "-m",
        "tools.gpu_report",
        *CPU,
        "--quick",
        "--output",
        tmp_path,
        "--minutes",
        "0.01",
        "--stages",
        "layers",
        "networks",
    )
    assert status == 1, text
    assert text.count("no time left") >= 2
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes: expected a positive number, got 0.0"),
        (["--stages", "dance"], "invalid choice: 'dance'"),
        pytest.param(
            [],
            "needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_report_refuses(tmp_path, options, message):
    status, text = run("-m", "tools.gpu_report", "--output", tmp_path / "out", *options)
    assert status == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_stages_share_the_time(monkeypatch, tmp_path):
    """A stage that ends early leaves its time to the later ones. A stage that raises counts as failed, and
    the later ones run.
    """
    clock = [0.0]
    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: clock[0])
    limits = {}

    class Stages:
        finish = 100.0

        def pack(self):
            pass

        def tests(self, until):
            limits["tests"] = until
            clock[0] = 5.0
            return Verdict(passes=1)

        def layers(self, until):
            limits["layers"] = until
            clock[0] = until
            raise RuntimeError("lost the device")

        def networks(self, until):
            limits["networks"] = until
            return Verdict()

    found = gpu_report.run(Stages(), {"tests": 0.4, "layers": 0.3, "networks": 0.3})
    assert limits == {
        "tests": pytest.approx(40),
        "layers": pytest.approx(52.5),
        "networks": pytest.approx(100),
    }
    assert found["layers"].failures == ("RuntimeError: lost the device",)


def test_doubt_after_the_fact(monkeypatch, tmp_path):
    """Rows of this call lose their speed-ups if tests that ran after them failed. Older rows and those of
    peers stay as they are.
    """
    monkeypatch.setattr(results, "device_name", lambda device: "a GPU")
    environment = {"device": "a GPU", "driver": "9", "torch": "2", "triton": "3", "commit": "c", "date": "d"}
    common = {"op": "S1", "dtype": "bfloat16", "shape": {}, **environment}
    row = lambda mode, provider, speedup: common | {
        "mode": mode, "provider": provider, "speedup": speedup, "verified": True if speedup else None,
    }  # fmt: skip
    old = [row("forward", "coda_fast", {"x": [1, 2, 3]})]
    new = [row("explanation", "coda_fast", {"x": [1, 2, 3]}), row("explanation", "algebraic", None)]
    report = gpu_stages.Report(tmp_path, tmp_path, "cuda", 0.0)
    results.replace(report.path, [*old, *new])
    report.doubt(old)
    found = {(r["mode"], r["provider"]): (r["speedup"], r["verified"]) for r in results.read(report.path)}
    assert found == {
        ("forward", "coda_fast"): ({"x": [1, 2, 3]}, True),
        ("explanation", "coda_fast"): (None, False),
        ("explanation", "algebraic"): (None, None),
    }


@pytest.mark.parametrize(
    ("tests", "configurations", "tree", "marked"),
    [(1, 1, "", True), (1, 0, "", False), (0, 1, "", False), (1, 1, "another", False)],
)
def test_the_mark_needs_everything(monkeypatch, tmp_path, tests, configurations, tree, marked):
    """sm_XX.json says "verified" only if all tests of one tree have passed. It lists what was skipped, and
    keeps the tiles of the table.
    """
    monkeypatch.setattr(results, "device_name", lambda device: "a GPU")
    environment = {"device": "a GPU", "driver": "9", "torch": "2", "triton": "3", "python": "3", "date": "d"}
    monkeypatch.setattr(results, "environment", lambda device: environment)
    monkeypatch.setattr(results, "tree", lambda: "this tree")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    report = gpu_stages.Report(tmp_path, tmp_path, "cuda", 0.0)
    Verdict(passes=1, unfinished=1 - tests).write(tmp_path / "tests.json", **report.stamp)
    Verdict(passes=configurations).write(tmp_path / "configurations.json", **report.stamp)
    Verdict(passes=1, skipped=2).write(
        tmp_path / "large.json", **(report.stamp | {"tree": tree or "this tree"})
    )
    path = gpu_mark.propose_table(report)
    assert (path is not None) == marked
    if marked:
        mark = json.loads(path.read_text())["verified"]
        assert mark.pop("commit") == report.commit
        assert mark.pop("skipped") == {"large.json": 2}
        assert mark.pop("tiles") == {"first": 1, "fallbacks": 0}
        assert mark.pop("warps_and_stages") == 0
        assert mark == {
            "device": "a GPU",
            "driver": "9",
            "torch": "2",
            "triton": "3",
            "date": "d",
            "tree": "this tree",
        }
