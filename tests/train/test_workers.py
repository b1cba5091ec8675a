"""Worker processes for decoding end when the program does, even if one was killed or hangs in a read."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support_train import NET, command, environment, stuck, tree

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in Linux' /proc"),
]


@pytest.fixture
def start(tmp_path):
    """start(*overrides) starts a run on a folder of images in another process."""
    tree(tmp_path / "set" / "train", {"ant": 20, "bee": 20, "cat": 20})
    for i in range(1000):  # long epochs, because each one starts new workers
        os.link(
            tmp_path / "set" / "train" / "ant" / "000.JPEG",
            tmp_path / "set" / "train" / "ant" / f"again{i}.JPEG",
        )
    tree(tmp_path / "set" / "val", {"ant": 2, "bee": 2, "cat": 2}, 100)
    started = []

    def run(*overrides, **more):
        options = (*NET, f"data.path={tmp_path / 'set'}", "data.workers=2", "model.ranks=[4, 4]", *overrides)
        process = subprocess.Popen(
            command(tmp_path / "out", *options),
            env=environment(**more),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # in shells, programs in the background ignore SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def children(process):
    return [
        int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def output_of(process, seconds=60):
    """The output of the process. If it does not end, the test fails with the stacks of its threads."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER prints the stacks
        for child in children(process):
            os.kill(child, signal.SIGKILL)
        pytest.fail(process.communicate()[1])


def wait(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_is_killed_ends_the_run(start, tmp_path):
    """A worker may be killed for lack of memory. The other one may wait for a lock that the dead one held."""
    process = start("checkpoint.every_steps=2")
    wait(lambda: list((tmp_path / "out" / "checkpoints").glob("epoch*.pt")), process)
    os.kill(children(process)[-1], signal.SIGKILL)
    printed = output_of(process)
    assert process.returncode == 2, printed
    assert (
        "coda-fast: data: a process that reads images ended with code -9, perhaps for want of memory"
        in printed
    )
    assert "the last good checkpoint is" in printed
    assert "Traceback" not in printed


def test_ctrl_c_while_a_file_cannot_be_read(start, tmp_path):
    """A worker that waits for storage does not prevent the program from ending."""
    (tmp_path / "set" / "train" / "bee" / "zzz.jpg").touch()
    process = start(**stuck(tmp_path / "site", "zzz.jpg"))
    wait(lambda: len(children(process)) == 2, process)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    printed = output_of(process)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
