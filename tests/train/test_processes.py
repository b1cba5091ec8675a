"""Several processes on this machine (gloo): they give the loss curve of one process, count nothing twice, are
restarted when one dies, and meet over two agents.
"""

import contextlib
import os
import re
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support_train import assert_same, checkpoint_at, command, environment, finished, losses, run
from torch.distributed import TCPStore

from coda_fast.train import TrainingError, rendezvous

pytestmark = pytest.mark.slow
OPTIONS = (
    "precision=float64",
    "ema.decay=0.9",
    "data.flip=true",
    "data.pad=1",
    "checkpoint.every_steps=6",
    "checkpoint.keep=100",
)
BOUND = 1e-12  # float64: sums in another order, over 42 updates; measured 2e-15
STANDALONE = ("--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process, with which the others are compared."""
    output = tmp_path_factory.mktemp("alone")
    run(output, *OPTIONS)
    return output


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run by two processes of torchrun, undisturbed."""
    output = tmp_path_factory.mktemp("pair")
    finished(command(output, *OPTIONS, launcher=STANDALONE))
    return output


def assert_same_curve(a, b):
    first, second = losses(a), losses(b)
    assert first.keys() == second.keys()
    assert len(first) >= 10
    for update, loss in first.items():
        assert second[update] == pytest.approx(loss, rel=1e-8), update  # the file has nine digits
    assert_same_epochs(a, b)


def assert_same_epochs(a, b):
    for row, other in zip(checkpoint_at(a)["history"], checkpoint_at(b)["history"], strict=True):
        for key in ("train_loss", "val_loss", "ema_val_loss"):
            assert other[key] == pytest.approx(row[key], rel=1e-12)
        for key in ("train_accuracy", "val_accuracy", "ema_val_accuracy", "val_images", "learning_rate"):
            assert other[key] == row[key]


def test_two_processes_are_as_one(alone, pair):
    assert_same_curve(alone, pair)
    assert_same(checkpoint_at(alone), checkpoint_at(pair), BOUND)


def test_fsdp2_is_ddp_is_one_process(alone, tmp_path):
    finished(command(tmp_path, *OPTIONS, "strategy=fsdp2", "micro_batch=16", launcher=STANDALONE))
    assert_same_curve(alone, tmp_path)
    assert_same(checkpoint_at(alone), checkpoint_at(tmp_path), BOUND)


COMPILED = """
import sys
import torch
from coda_fast.cli import main

plain = torch.nn.Module.compile
# graphs are made, and run without inductor's minutes
torch.nn.Module.compile = lambda self: plain(self, backend="aot_eager")
try:
    main(["train", *sys.argv[1:]])
finally:
    print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_the_large_recipes_ask_for(tmp_path, strategy):
    """All options of the large recipes together, except the compiler: two processes give the first epoch of
    one, within bfloat16.
    """
    options = (
        "precision=bfloat16",
        "channels_last=true",
        "ema.decay=0.9",
        "ema.warmup=true",
        "optimizer.clip=1",
        "epochs=1",
    )
    run(tmp_path / "one", *options)
    finished(command(tmp_path / "two", *options, f"strategy={strategy}", launcher=STANDALONE))
    rows = [checkpoint_at(tmp_path / name, 1)["history"][0] for name in ("one", "two")]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-3)
    assert rows[1]["val_images"] == rows[0]["val_images"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_compiled_network_of_two_processes(alone, tmp_path, strategy):
    (tmp_path / "compiled.py").write_text(COMPILED)
    options = (*OPTIONS, "compile=true", f"strategy={strategy}", "devices=2")
    printed = finished(command(tmp_path / "out", *options, program=(tmp_path / "compiled.py",)))
    assert int(re.findall(r"graphs: (\d+)", printed)[0]) > 0
    assert_same(checkpoint_at(alone), checkpoint_at(tmp_path / "out"), BOUND)


def test_the_regulariser_draws_for_the_global_batch(tmp_path):
    """Its random classes, penalty and gradients do not depend on the world size, with DDP and FSDP2."""
    options = ("precision=float64", "loss.matrix_weight=0.5", "epochs=1")
    run(tmp_path / "one", *options)
    finished(command(tmp_path / "two", *options, launcher=STANDALONE))
    finished(command(tmp_path / "sharded", *options, "strategy=fsdp2", launcher=STANDALONE))
    assert_same(checkpoint_at(tmp_path / "one", 1), checkpoint_at(tmp_path / "two", 1), BOUND)
    assert_same(checkpoint_at(tmp_path / "one", 1), checkpoint_at(tmp_path / "sharded", 1), BOUND)


def test_a_run_of_two_goes_on_alone(alone, pair, tmp_path):
    """A checkpoint of two processes in the middle of an epoch can be resumed by one."""
    run(tmp_path, *OPTIONS, resume=str(pair / "checkpoints" / "epoch_0001_step_0000009.pt"))
    assert_same(checkpoint_at(alone), checkpoint_at(tmp_path), BOUND)
    assert_same_epochs(alone, tmp_path)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_go_on_in_the_middle_of_an_epoch(pair, tmp_path, strategy):
    """A checkpoint of two processes is resumed by two: bit for bit, or, if the parameters are sharded, up to
    the order of sums.
    """
    start = ("--quiet", "--resume", str(pair / "checkpoints" / "epoch_0001_step_0000009.pt"))
    finished(command(tmp_path, *OPTIONS, f"strategy={strategy}", launcher=STANDALONE, options=start))
    assert_same(checkpoint_at(pair), checkpoint_at(tmp_path), BOUND if strategy == "fsdp2" else 0.0)


DYING = """
import os, pathlib, signal, sys
from coda_fast.cli import main
from coda_fast.train import loop

died = pathlib.Path(__file__).with_suffix(".died")  # once is enough, whichever rank it gets next

step = loop.Trainer.step

def dying(self, batch):
    if self.state.updates == 32 and self.setup.process.rank == 1 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

loop.Trainer.step = dying
main(["train", *sys.argv[1:]])
"""


def test_a_worker_that_is_killed_is_restarted_and_nothing_is_lost(pair, tmp_path):
    """After SIGKILL in the middle of the second epoch the agent restarts both workers; the weights are those
    of the undisturbed run, bit for bit.
    """
    (tmp_path / "dying.py").write_text(DYING)
    launcher = (*STANDALONE, "--max-restarts=1", "--monitor-interval=0.1")
    arguments = command(
        tmp_path / "out",
        *OPTIONS,
        launcher=launcher,
        program=(tmp_path / "dying.py",),
        options=("--resume", "auto"),
    )
    printed = finished(arguments)
    assert "epoch_0001_step_0000009.pt: epoch 2, step 9" in printed  # update 30
    assert_same(checkpoint_at(pair), checkpoint_at(tmp_path / "out"))
    assert losses(pair) == losses(tmp_path / "out")


def train_on_two_hosts(hosts, program, output, nodes="2"):
    """Run an agent of torchrun on each of ``hosts`` (prefix of commands, address, environment), and return
    their exit codes and what they printed.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    agents = []
    for i, (prefix, address, more) in enumerate(hosts):
        launcher = (
            f"--nnodes={nodes}",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={hosts[0][1]}:{port}",
            "--rdzv-id=test",
            f"--rdzv-conf=is_host={1 - i},last_call_timeout=8",
            f"--local-addr={address}",
            "--max-restarts=2",
            "--monitor-interval=0.1",
        )
        arguments = command(
            output, *OPTIONS, launcher=launcher, program=(program,), options=("--resume", "auto")
        )
        agents.append(
            subprocess.Popen(
                [*prefix, *arguments],
                env=environment(**more),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [agent.communicate(timeout=150)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], "\n".join(printed)


def test_two_agents_train_together_and_a_worker_is_killed(pair, tmp_path):
    """Two agents meet on the loopback interface, and again after SIGKILL to the worker of one. Each agent
    counts restarts for itself.
    """
    (tmp_path / "dying.py").write_text(DYING)
    codes, printed = train_on_two_hosts([((), "127.0.0.1", {})] * 2, tmp_path / "dying.py", tmp_path / "out")
    assert codes == [0, 0], printed[-4000:]
    assert "epoch_0001_step_0000009.pt: epoch 2, step 9" in printed
    assert checkpoint_at(tmp_path / "out")["world"] == 2
    assert_same(checkpoint_at(pair), checkpoint_at(tmp_path / "out"))


@pytest.fixture
def hosts():
    """Two hosts, each as (prefix of commands, address, environment): network namespaces that a virtual cable
    connects.
    """
    names = [f"coda-{os.getpid()}-{i}" for i in range(2)]

    def ip(*arguments, check=True):
        return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.133.7.{i + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            (("ip", "netns", "exec", name), f"10.133.7.{i + 1}", {"GLOO_SOCKET_IFNAME": "cable"})
            for i, name in enumerate(names)
        ]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need ip and its privileges: {error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                ip("netns", "delete", name, check=False)


def test_a_run_of_two_hosts_outlives_one(alone, tmp_path, hosts):
    """One of two hosts is lost in the second epoch, with its agent and its worker. With --nnodes=1:2 the
    other one continues alone.
    """
    lost = DYING.replace("self.setup.process.rank == 1", "'LOST' in os.environ").replace(
        "os.kill(os.getpid()", "os.kill(os.getppid(), 9), os.kill(os.getpid()"
    )
    (tmp_path / "lost.py").write_text(lost)
    hosts[1][2]["LOST"] = "1"
    codes, printed = train_on_two_hosts(hosts, tmp_path / "lost.py", tmp_path / "out", nodes="1:2")
    assert codes == [0, -9], printed[-4000:]
    assert "epoch_0001_step_0000009.pt: epoch 2, step 9" in printed
    assert [checkpoint_at(tmp_path / "out", *position)["world"] for position in ((1, 9), (2, 0))] == [2, 1]
    assert_same(checkpoint_at(alone), checkpoint_at(tmp_path / "out"), BOUND)
    assert_same_epochs(alone, tmp_path / "out")


def test_workers_agree_on_an_attempt():
    """Workers agree in whatever order they arrive, whatever earlier attempts left in the store, and however
    many workers those had.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = []

    def attempt(world, delays):
        def worker(rank):
            time.sleep(delays[rank])
            return rendezvous.agree_on_attempt(
                TCPStore("127.0.0.1", store.port, is_master=False), rank, world, patience=20
            )

        with ThreadPoolExecutor(world) as pool:
            found = set(pool.map(worker, range(world)))
        assert len(found) == 1
        names.extend(found)

    attempt(3, (0, 0.2, 0.4))
    attempt(3, (0.4, 0.2, 0))
    attempt(2, (0, 0.5))
    attempt(4, (0.3, 0, 0, 0.5))
    assert len(set(names)) == 4


def test_half_an_attempt_is_no_attempt():
    """If a worker dies before it agrees, the others wait until torchrun ends them, or for as long as
    ``patience``.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(
        TrainingError, match="expected 2 workers to meet within 1 s, worker 0 has not met the others"
    ):
        rendezvous.agree_on_attempt(store, 0, 2, patience=1)


def test_a_signal_to_one_of_two_stops_both(pair, tmp_path):
    (tmp_path / "signalled.py").write_text(DYING.replace("SIGKILL", "SIGUSR1"))
    finished(command(tmp_path / "out", *OPTIONS, launcher=STANDALONE, program=(tmp_path / "signalled.py",)))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    newest = max((tmp_path / "out" / "checkpoints").glob("epoch*.pt"))
    assert newest.name == "epoch_0001_step_0000012.pt"  # the next metrics after update 32
    finished(
        command(tmp_path / "out", *OPTIONS, launcher=STANDALONE, options=("--quiet", "--resume", "auto"))
    )
    assert_same(checkpoint_at(pair), checkpoint_at(tmp_path / "out"))


OTHER = """
import os, sys
from coda_fast.cli import main
from coda_fast.train import data

def fewer(*arguments, digits=data._digits):
    found = digits(*arguments)
    if os.environ["RANK"] == "1":
        found.train = data.Arrays(found.train.images[:640], found.train.labels[:640])
    return found

data._digits = fewer
main(["train", *sys.argv[1:]])
"""


def test_other_images_on_another_host_are_refused(tmp_path):
    """With another number of images a process would take another number of steps, and the others would wait
    for it forever.
    """
    (tmp_path / "other.py").write_text(OTHER)
    printed = finished(
        command(tmp_path / "out", launcher=STANDALONE, program=(tmp_path / "other.py",)), code=1
    )
    message = (
        "data: expected the same images in every process, got train_images (process 0 1347, process 1 640), "
        "train_checksum"
    )
    assert printed.count(f"coda-fast: {message}") == 2
    assert not (tmp_path / "out").exists()


FAILING = """
import sys
from coda_fast.cli import main
from coda_fast.train.loop import Trainer

step = Trainer.step

def failing(self, batch):
    if self.state.updates == 9 and self.setup.process.rank == 1:
        raise OSError(5, "Input/output error", "the disk of rank 1")
    return step(self, batch)

Trainer.step = failing
main(["train", *sys.argv[1:]])
"""


def test_who_fails_alone_says_why_and_the_others_no_more_than_that(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    options = ("checkpoint.every_steps=4",)
    printed = finished(
        command(tmp_path / "out", *options, program=(tmp_path / "failing.py",), launcher=STANDALONE), 1
    )
    reason = "[Errno 5] Input/output error: 'the disk of rank 1'; the last good checkpoint is"
    assert f"coda-fast: {reason}" in printed
    summary = printed[printed.index("Root Cause") :]
    assert reason in summary
    assert "rank      : 1 " in summary
    assert "[rank" not in printed, "the summary has no traceback of another rank"


def test_an_odd_share_is_refused(tmp_path):
    printed = finished(command(tmp_path / "out", "devices=2", "batch_size=63"), code=2)
    assert "batch_size: expected a multiple of 2, the number of processes, got 63" in printed
    assert not (tmp_path / "out").exists()


def test_lightning_starts_the_processes_of_one_machine(alone, tmp_path):
    """devices=2 without torchrun, as on a workstation with two GPUs."""
    finished(command(tmp_path, *OPTIONS, "devices=2"))
    assert checkpoint_at(tmp_path)["world"] == 2
    assert_same(checkpoint_at(alone), checkpoint_at(tmp_path), BOUND)
