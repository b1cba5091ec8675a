"""Several processes on this machine (gloo): the same curve as one, nothing counted twice, workers that die, two agents that meet."""

import socket
import subprocess

import pytest
from support_train import assert_same, command, end_of, environment, finished, losses, run

pytestmark = pytest.mark.slow
OPTIONS = ("precision=float64", "ema.decay=0.9", "data.flip=true", "data.pad=1", "checkpoint.every_steps=6", "checkpoint.keep=100")
BOUND = 1e-12  # float64: sums in another order, grown over 42 updates; measured 2e-15
STANDALONE = ("--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process that the others are compared with."""
    output = tmp_path_factory.mktemp("alone")
    run(output, *OPTIONS)
    return output


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same by two processes of torchrun, undisturbed."""
    output = tmp_path_factory.mktemp("pair")
    finished(command(output, *OPTIONS, launcher=STANDALONE))
    return output


def assert_same_curve(a, b):
    first, second = losses(a), losses(b)
    assert first.keys() == second.keys()
    assert len(first) >= 10
    for update, loss in first.items():
        assert second[update] == pytest.approx(loss, rel=1e-8), update  # the file has nine digits
    for row, other in zip(end_of(a)["history"], end_of(b)["history"], strict=True):
        for key in ("train_loss", "val_loss", "ema_val_loss"):
            assert other[key] == pytest.approx(row[key], rel=1e-12)
        for key in ("train_accuracy", "val_accuracy", "ema_val_accuracy", "val_images", "learning_rate"):
            assert other[key] == row[key]


def test_two_processes_are_as_one(alone, pair):
    assert_same_curve(alone, pair)
    assert_same(end_of(alone), end_of(pair), BOUND)


def test_fsdp2_is_ddp_is_one_process(alone, tmp_path):
    finished(command(tmp_path, *OPTIONS, "strategy=fsdp2", "micro_batch=16", launcher=STANDALONE))
    assert_same_curve(alone, tmp_path)
    assert_same(end_of(alone), end_of(tmp_path), BOUND)


def test_the_regulariser_draws_for_the_global_batch(tmp_path):
    """Its random classes, its penalty and its gradients do not depend on the number of processes, under DDP and FSDP2."""
    options = ("precision=float64", "loss.matrix_weight=0.5", "epochs=1")
    run(tmp_path / "one", *options)
    finished(command(tmp_path / "two", *options, launcher=STANDALONE))
    finished(command(tmp_path / "sharded", *options, "strategy=fsdp2", launcher=STANDALONE))
    assert_same(end_of(tmp_path / "one", 1), end_of(tmp_path / "two", 1), BOUND)
    assert_same(end_of(tmp_path / "one", 1), end_of(tmp_path / "sharded", 1), BOUND)


def test_a_run_of_two_goes_on_alone(alone, pair, tmp_path):
    """A checkpoint belongs to no number of processes: from the middle of an epoch of two, by one."""
    run(tmp_path, *OPTIONS, resume=str(pair / "checkpoints" / "epoch_0001_step_0000009.pt"))
    assert_same(end_of(alone), end_of(tmp_path), BOUND)


DYING = """
import os, signal, sys
from coda_fast.cli import main
from coda_fast.train import engine

step = engine.Run._step

def dying(self, batch):
    if self.updates == 32 and self.place.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

engine.Run._step = dying
main(["train", *sys.argv[1:]])
"""


def test_a_worker_that_is_killed_is_restarted_and_nothing_is_lost(pair, tmp_path):
    """SIGKILL in the middle of the second epoch; the agent starts both again; the weights are those of the undisturbed run, bit for bit."""
    (tmp_path / "dying.py").write_text(DYING)
    launcher = (*STANDALONE, "--max-restarts=1", "--monitor-interval=0.1")
    arguments = command(tmp_path / "out", *OPTIONS, launcher=launcher, program=(tmp_path / "dying.py",), options=("--resume", "auto"))
    printed = finished(arguments)
    assert "epoch_0001_step_0000009.pt: epoch 2, step 9" in printed  # update 30
    assert_same(end_of(pair), end_of(tmp_path / "out"))
    assert losses(pair) == losses(tmp_path / "out")


def test_two_agents_meet_and_train_together(alone, tmp_path):
    """Two agents of torchrun, as on two hosts, find each other on the loopback."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test")
    local = ("--local-addr=127.0.0.1",)
    agents = [
        subprocess.Popen(
            command(tmp_path, *OPTIONS, launcher=(*meeting, *local)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        printed = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)[-4000:]
    assert end_of(tmp_path)["world"] == 2
    assert_same(end_of(alone), end_of(tmp_path), BOUND)


def test_a_signal_to_one_of_two_stops_both(pair, tmp_path):
    (tmp_path / "signalled.py").write_text(DYING.replace("SIGKILL", "SIGUSR1").replace("RESTART_COUNT", "MAX_RESTARTS"))
    finished(command(tmp_path / "out", *OPTIONS, launcher=STANDALONE, program=(tmp_path / "signalled.py",)))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    newest = max((tmp_path / "out" / "checkpoints").glob("epoch*.pt"))
    assert newest.name == "epoch_0001_step_0000012.pt"  # the next metrics after update 32
    finished(command(tmp_path / "out", *OPTIONS, launcher=STANDALONE, options=("--quiet", "--resume", "auto")))
    assert_same(end_of(pair), end_of(tmp_path / "out"))


def test_an_odd_share_is_refused(tmp_path):
    printed = finished(command(tmp_path / "out", "devices=2", "batch_size=63"), code=2)
    assert "batch_size: expected a multiple of 2, the number of processes, got 63" in printed
    assert not (tmp_path / "out").exists()


def test_lightning_starts_the_processes_of_one_machine(alone, tmp_path):
    """devices=2 without torchrun: what a laptop with two GPUs does."""
    finished(command(tmp_path, *OPTIONS, "devices=2"))
    assert end_of(tmp_path)["world"] == 2
    assert_same(end_of(alone), end_of(tmp_path), BOUND)
