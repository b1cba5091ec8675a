"""Runs that stop and are resumed: exactly, after signals, from the right checkpoint, each in its own folder;
and the best epoch.
"""

import errno
import os
import random
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from support_train import assert_same, checkpoint_at, command, environment, finished, losses, recipe, run

import coda_fast
from coda_fast import checkpoints, train
from coda_fast.train import STOPPED, TrainingError, agreement, engine, evaluation, loop, objective
from coda_fast.train.errors import Stopped


class Interrupted(Exception):
    """An exception that a test raises in the middle of an epoch."""


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(update) makes a run end before that update, as if its process were killed."""

    def install(update):
        step = loop.Trainer.step

        def dying(self, batch):
            if self.state.updates == update:
                raise Interrupted
            return step(self, batch)

        monkeypatch.setattr(loop.Trainer, "step", dying)

    yield install
    monkeypatch.undo()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.pad=1", "data.flip=true", "ema.decay=0.9", "optimizer.clip=1.0", "loss.matrix_weight=0.1"),
        # madgrad moves weights even if gradients are zero
        ("optimizer.name=madgrad", "optimizer.weight_decay=0.1"),
    ],
)
def test_going_on_in_the_middle_of_an_epoch_is_exact(tmp_path, interrupt, monkeypatch, options):
    options = (*options, "checkpoint.every_steps=10")
    step = loop.Trainer.step

    def drawing(self, batch):
        """A step that draws from the global random generators, as dropout does."""
        torch.rand(1), np.random.rand(), random.random()
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", drawing)
    run(tmp_path / "whole", *options)
    interrupt(36)
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", *options)
    monkeypatch.setattr(loop.Trainer, "step", drawing)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    run(tmp_path / "broken", *options, resume="auto")
    whole, broken = checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "broken")
    assert_same(whole, broken)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    for row, other in zip(whole["history"], broken["history"], strict=True):
        assert {k: v for k, v in row.items() if k != "images_per_second"} == {
            k: v for k, v in other.items() if k != "images_per_second"
        }
    for name in ("numpy", "python"):
        assert whole["rng"][0][name] == broken["rng"][0][name]
    assert torch.equal(whole["rng"][0]["torch"], broken["rng"][0]["torch"])


def test_auto_starts_where_there_is_nothing(tmp_path):
    run(tmp_path / "a", "epochs=1", resume="auto")
    run(tmp_path / "b", "epochs=1")
    assert_same(checkpoint_at(tmp_path / "a", 1), checkpoint_at(tmp_path / "b", 1))


def test_auto_takes_the_newest_that_can_be_read(tmp_path, capsys):
    run(tmp_path / "whole")
    run(tmp_path / "other")
    last = tmp_path / "other" / "checkpoints" / "epoch_0002_step_0000000.pt"
    last.write_bytes(last.read_bytes()[:1000])
    train.run(recipe(), tmp_path / "other", "auto")
    printed = capsys.readouterr().err
    assert "epoch_0002_step_0000000.pt: not a readable checkpoint (truncated" in printed
    assert "going on from" in printed
    assert "epoch_0001" in printed
    assert_same(checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "other"))


def test_more_epochs_and_another_place_are_allowed_but_not_another_run(tmp_path):
    constant = ("schedule.kind=constant", "ema.decay=0.9")
    run(tmp_path / "a", *constant, "epochs=1")
    run(tmp_path / "a", *constant, "epochs=2", "micro_batch=32", resume="auto")
    run(tmp_path / "b", *constant, "epochs=2")
    # micro-batches are rounded differently
    assert_same(checkpoint_at(tmp_path / "a"), checkpoint_at(tmp_path / "b"), 1e-3)
    with pytest.raises(TrainingError, match=r"other values of optimizer.lr \(was 0.003, now 0.5\)"):
        run(tmp_path / "a", *constant, "epochs=3", "optimizer.lr=0.5", resume="auto")
    with pytest.raises(TrainingError, match=r"ema.decay \(was 0.9, now 0.0\)"):
        run(tmp_path / "a", "schedule.kind=constant", "epochs=3", resume="auto")


def test_fewer_epochs_than_were_run_are_refused(tmp_path, interrupt):
    """Otherwise the last row of the history would not describe these weights."""
    options = ("schedule.kind=constant", "checkpoint.every_steps=5")
    interrupt(27)
    with pytest.raises(Interrupted):
        run(tmp_path, *options)
    with pytest.raises(
        TrainingError,
        match="epoch_0001_step_0000004.pt: epochs: expected at least 2, where the run stands, got 1",
    ):
        run(tmp_path, *options, "epochs=1", resume="auto")


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    run(tmp_path, "epochs=1")
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(
        TrainingError, match="holds a run already, up to epoch_0001_step_0000000.pt; --resume auto"
    ):
        run(tmp_path, "epochs=1")
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"", "not a readable checkpoint"),
        (b"PK\x03\x04 not really", "not a readable checkpoint"),
        (b"notes of mine\n", "not a readable checkpoint"),
        ({"state_dict": {}}, "expected a checkpoint of coda-fast train, got a file with 'state_dict'"),
        ([1, 2], "expected a checkpoint of coda-fast train, got list"),
        (
            {"format": "coda_fast.train", "version": "9"},
            "a checkpoint of coda-fast train 9 without bad, best, data",
        ),
        (print, "not a readable checkpoint"),  # a function, because unpickling must not run code
    ],
)
def test_a_foreign_checkpoint(tmp_path, content, message):
    path = tmp_path / "foreign.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(TrainingError, match=message) as refused:
        run(tmp_path / "out", resume=str(path))
    assert "weights_only" not in str(refused.value)  # the message does not suggest unpickling a foreign file
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "every", "stands_at"), [("SIGTERM", 4, 8), ("SIGUSR1", 4, 8), ("SIGTERM", 1000, 21)]
)
def test_a_signal_saves_and_stops(tmp_path, monkeypatch, name, every, stands_at):
    """A run stops at the next row of metrics after update 26. If that is the end of the epoch, it stops
    before the evaluation.
    """
    options = (f"log.every={every}", "ema.decay=0.9")
    # metrics depend only on the number of steps, not also on the time of a busy machine
    monkeypatch.setattr(agreement, "HEARTBEAT", 1e9)
    run(tmp_path / "whole", *options)
    step = loop.Trainer.step

    def signalled(self, batch):
        if self.state.updates == 26:
            os.kill(os.getpid(), getattr(signal, name))
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", signalled)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Stopped) as stop:
        run(tmp_path / "stopped", *options)
    assert signal.getsignal(getattr(signal, name)) == before
    assert stop.value.checkpoint.name == f"epoch_0001_step_{stands_at:07d}.pt"
    monkeypatch.undo()
    assert_goes_on(tmp_path, options)


def assert_goes_on(tmp_path, options):
    """Resume the stopped run, and assert that it ends like the uninterrupted one, weights and history."""
    run(tmp_path / "stopped", *options, resume="auto")
    whole, stopped = checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "stopped")
    assert_same(whole, stopped)
    for row, other in zip(whole["history"], stopped["history"], strict=True):
        assert {k: v for k, v in row.items() if k != "images_per_second"} == {
            k: v for k, v in other.items() if k != "images_per_second"
        }


def test_ctrl_c_names_what_is_kept(tmp_path, monkeypatch, capsys):
    step = loop.Trainer.step

    def interrupted(self, batch):
        if self.state.updates == 26:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(recipe(), tmp_path)
    assert (
        f"interrupted; the last good checkpoint is {tmp_path / 'checkpoints' / 'epoch_0001_step_0000000.pt'}"
        in capsys.readouterr().err
    )


def test_slow_steps_are_interrupted_soon(tmp_path, monkeypatch):
    """A signal takes effect after a slow step, and not only at the next row of the log, which may be minutes
    later.
    """
    step = loop.Trainer.step

    def slow(self, batch):
        if self.state.updates == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", slow)
    monkeypatch.setattr(agreement, "HEARTBEAT", 0.0)  # every step takes longer
    with pytest.raises(Stopped) as stop:
        run(tmp_path, "log.every=1000")
    assert stop.value.checkpoint.name == "epoch_0000_step_0000006.pt"


@pytest.mark.parametrize("at", [2, 5])
def test_a_signal_during_evaluation(tmp_path, monkeypatch, at):
    """The epoch is kept, and its evaluation is repeated. The signal comes at batch ``at`` of the 8 batches in
    two evaluations.
    """
    options = ("evaluation.batch_size=120", "ema.decay=0.9")
    run(tmp_path / "whole", *options)
    forward, seen = objective.Objective.forward, []

    def signalled(self, images, *more):
        if not self.training and len(images) in (120, 90):
            seen.append(len(images))
            if len(seen) == 2 * at:  # for the weights and for their average
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images, *more)

    monkeypatch.setattr(objective.Objective, "forward", signalled)
    with pytest.raises(Stopped) as stop:
        run(tmp_path / "stopped", *options)
    assert len(seen) == 2 * at
    assert stop.value.checkpoint.name == f"epoch_000{at // 4}_step_0000021.pt"
    monkeypatch.undo()
    assert_goes_on(tmp_path, options)


def test_a_checkpoint_before_an_evaluation_if_the_last_is_old(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 50))  # each call of the clock is 50 s later
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    run(tmp_path, "checkpoint.keep=9", "log.every=1000")
    names = {p.name for p in (tmp_path / "checkpoints").glob("epoch*")}
    assert "epoch_0001_step_0000000.pt" in names
    assert any("step_0000021" in name for name in names)


@pytest.mark.slow
def test_a_real_signal_to_a_real_process(tmp_path):
    """A signal from outside while the process trains ends it with exit code 75, and leaves a checkpoint."""
    process = subprocess.Popen(
        command(tmp_path, "epochs=2000"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        while (
            not (tmp_path / "steps.csv").exists()
            or len((tmp_path / "steps.csv").read_text().splitlines()) < 8
        ):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        printed = process.stderr.readline()
        process.send_signal(signal.SIGTERM)  # a second signal while the process ends
        printed += process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == STOPPED == 75
    assert "stopped by a signal; the run stands in" in printed
    newest = max((tmp_path / "checkpoints").glob("epoch*.pt"))
    assert str(newest) in printed
    assert torch.load(newest, weights_only=True)["updates"] >= 1


def test_a_run_without_any_evaluation_ends_all_the_same(tmp_path):
    options = ("schedule.kind=constant", "evaluation.every=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "show", lambda self: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run(tmp_path, *options, "epochs=4")
    run(tmp_path, *options, "epochs=1", resume="auto")
    assert (tmp_path / "curve.png").exists()
    assert not (tmp_path / "model_best.safetensors").exists()


def test_a_folder_with_nothing_but_the_best_is_not_written_over(falling, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    kept = tmp_path / "checkpoints" / "best.pt"
    shutil.copy(falling / "best.pt", kept)
    with pytest.raises(
        TrainingError, match="holds a run already, up to best.pt; --resume auto goes on with it"
    ):
        run(tmp_path, *FALLING)
    assert kept.read_bytes() == (falling / "best.pt").read_bytes()


def test_best_is_the_best(tmp_path):
    run(tmp_path, "epochs=4", "optimizer.lr=0.1", "schedule.kind=constant", "checkpoint.keep=4")
    rows = checkpoint_at(tmp_path, 4)["history"]
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    first = max(range(4), key=lambda i: rows[i]["val_accuracy"])
    assert best["epoch"] == first + 1
    shipped = coda_fast.load(tmp_path / "model_best.safetensors").state_dict()
    assert all(torch.equal(tensor, best["model"][f"model.{name}"]) for name, tensor in shipped.items())
    with pytest.raises(coda_fast.CheckpointError, match="take the model.safetensors of its run"):
        coda_fast.load(tmp_path / "checkpoints" / "best.pt")


FALLING = ("schedule.kind=constant", "checkpoint.keep=9", "epochs=4")


@pytest.fixture(scope="module")
def falling(tmp_path_factory):
    """A run of four epochs, all with checkpoints, whose accuracies make the second one the best."""
    output, evaluate = tmp_path_factory.mktemp("falling"), evaluation.evaluate

    def falling_from_the_second(setup, state, signals):
        return evaluate(setup, state, signals) | {"val_accuracy": 0.9 - 0.1 * abs(state.epoch - 1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluate", falling_from_the_second)
        run(output, *FALLING)
    return output / "checkpoints"


def test_the_best_goes_along_into_another_folder(falling, tmp_path):
    """best.pt is copied into another folder, also if no later epoch is better. If no checkpoint holds the
    best epoch, there is no best model.
    """
    last = falling / "epoch_0004_step_0000000.pt"
    run(tmp_path / "along", *FALLING, resume=str(last))
    assert checkpoints.read_metadata(tmp_path / "along" / "model_best.safetensors")["epoch"] == 2
    lonely = tmp_path / "lonely.pt"
    lonely.write_bytes(last.read_bytes())
    run(tmp_path / "out", *FALLING, resume=str(lonely))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "model_best.safetensors").exists()


def test_a_best_of_what_came_later_is_not_lost_and_not_passed_by(falling, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("epoch_0001_step_0000000.pt", "best.pt"):
        shutil.copy(falling / name, folder)
    with pytest.raises(
        TrainingError, match="holds checkpoints after epoch_0001_step_0000000.pt, up to best.pt"
    ):
        run(tmp_path / "run", *FALLING, resume=str(folder / "epoch_0001_step_0000000.pt"))
    run(tmp_path / "run", *FALLING, resume="auto")
    rows = checkpoint_at(tmp_path / "run", 4)["history"]
    assert rows[1]["val_accuracy"] == 0.9, "it resumes from the best checkpoint, not from the first"


def test_a_torn_best_is_made_anew(tmp_path):
    run(tmp_path, "epochs=1")
    (tmp_path / "model_best.safetensors").unlink()
    best = tmp_path / "checkpoints" / "best.pt"
    best.unlink()  # a link to the last checkpoint
    best.write_bytes(b"torn")
    run(tmp_path, "epochs=1", resume="auto")
    assert checkpoints.read_metadata(tmp_path / "model_best.safetensors")["epoch"] == 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_what_was_not_shown_before_the_end_is_shown_after_it(tmp_path, monkeypatch, epoch):
    """A run that is killed between the checkpoint of an epoch and its row and maps writes these when it is
    resumed.
    """

    def dying(self):
        if self.state.epoch == epoch:
            raise Interrupted
        show(self)

    show = loop.Trainer.show
    monkeypatch.setattr(loop.Trainer, "show", dying)
    with pytest.raises(Interrupted):
        run(tmp_path, "log.maps=1")
    monkeypatch.undo()
    run(tmp_path, "log.maps=1", resume="auto")
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"epoch_0001.png", "epoch_0002.png"}
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_going_back_does_not_lose_what_came_later(tmp_path):
    """An older checkpoint is resumed only in an empty folder, never in that of another run."""
    run(tmp_path / "a", "checkpoint.keep=9")
    older = tmp_path / "a" / "checkpoints" / "epoch_0001_step_0000000.pt"
    before = sorted(p.name for p in older.parent.iterdir())
    with pytest.raises(
        TrainingError, match="holds checkpoints after epoch_0001_step_0000000.pt, up to epoch_0002"
    ):
        run(tmp_path / "a", "checkpoint.keep=9", resume=str(older))
    assert sorted(p.name for p in older.parent.iterdir()) == before
    run(tmp_path / "b", "checkpoint.keep=9", "epochs=1")
    with pytest.raises(TrainingError, match="holds another run, up to epoch_0001"):
        run(tmp_path / "b", "checkpoint.keep=9", resume=str(older))
    assert run(tmp_path / "c", "checkpoint.keep=9", resume=str(older))["epoch"] == 2


def test_nothing_that_can_be_read_is_no_new_beginning(tmp_path):
    run(tmp_path, "epochs=1")
    for path in (tmp_path / "checkpoints").glob("epoch*.pt"):
        path.write_bytes(b"torn")
    with pytest.raises(
        TrainingError, match="none of the 1 checkpoints can be read; move them away to begin anew"
    ):
        run(tmp_path, "epochs=1", resume="auto")


def test_the_best_goes_on_where_the_others_are_torn(tmp_path, capsys):
    """With keep=1, best.pt is a separate file once a later epoch is worse."""
    options = ("epochs=3", "optimizer.lr=0.1", "schedule.kind=constant", "checkpoint.keep=1")
    run(tmp_path, *options)
    folder = tmp_path / "checkpoints"
    best = torch.load(folder / "best.pt", weights_only=True)["epoch"]
    last = folder / "epoch_0003_step_0000000.pt"
    last.unlink()  # best.pt may be a link to it
    last.write_bytes(b"torn")
    assert train.run(recipe(*options), tmp_path, "auto")["epoch"] == 3
    assert f"going on from {folder / 'best.pt'}: epoch {best + 1}" in capsys.readouterr().err


def test_what_a_run_writes_outlives_torn_checkpoints_of_later(tmp_path, monkeypatch):
    """With keep=1, a torn checkpoint of a later position does not count."""
    options = ("schedule.kind=constant", "checkpoint.keep=1")
    run(tmp_path, *options, "epochs=1")
    folder = tmp_path / "checkpoints"
    (folder / "epoch_0001_step_0000000.pt").rename(folder / "best.pt")
    (folder / "epoch_0002_step_0000000.pt").write_bytes(b"torn")
    step = loop.Trainer.step

    def signalled(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", signalled)
    with pytest.raises(Stopped) as stop:
        run(tmp_path, *options, "epochs=2", resume="auto")
    assert torch.load(stop.value.checkpoint, weights_only=True)["step"] == 1
    monkeypatch.undo()
    assert run(tmp_path, *options, "epochs=2", resume="auto")["epoch"] == 2
    assert {p.name for p in folder.iterdir()} == {"best.pt", "epoch_0002_step_0000000.pt"}


def test_the_best_is_named_after_a_death_before_that(tmp_path):
    """A run that dies between a checkpoint and the link to it creates the link when it is resumed."""
    options = ("schedule.kind=constant",)
    run(tmp_path, *options, "epochs=1")
    folder = tmp_path / "checkpoints"
    assert checkpoint_at(tmp_path, 1)["best"] is not None
    (folder / "best.pt").unlink()
    run(tmp_path, *options, "epochs=1", resume="auto")
    assert (folder / "best.pt").read_bytes() == (folder / "epoch_0001_step_0000000.pt").read_bytes()


def test_a_run_that_began_meanwhile_is_not_written_over(tmp_path, monkeypatch):
    """Both runs found an empty folder. The second was slower, and starts after the first has ended."""
    set_up, inside = engine.set_up, []

    def slow(*arguments):
        if not inside:
            inside.append(True)
            run(tmp_path / "out", "epochs=1")
        return set_up(*arguments)

    monkeypatch.setattr(engine, "set_up", slow)
    with pytest.raises(
        TrainingError, match="holds a run that began meanwhile; --resume auto goes on with it"
    ):
        run(tmp_path / "out", "epochs=1", resume="auto")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    train.run(recipe("epochs=1"), tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    if number != errno.ENOSYS:  # for this error some versions of filelock use another kind of lock
        assert "cannot be locked: see to it that no other run writes there" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    """The second run waits briefly, in case the first was just killed, and is then refused. The first is not
    affected.
    """
    run(tmp_path / "alone", "epochs=1")
    step, second = loop.Trainer.step, []
    impatient = (
        "import sys; from coda_fast import cli; from coda_fast.train import run_folder; "
        "run_folder.PATIENCE = 0.5; cli.main(sys.argv[1:])"
    )

    def intruded(self, batch):
        if self.state.updates == 3 and not second:
            arguments = command(
                tmp_path / "out", "epochs=1", program=("-c", impatient, "train"), options=("--resume", "auto")
            )
            second.append(finished(arguments, code=2))
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", intruded)
    run(tmp_path / "out", "epochs=1")
    assert "another process trains there" in second[0]
    assert "waiting up to 0 s for the run that holds" in second[0]
    assert_same(checkpoint_at(tmp_path / "alone", 1), checkpoint_at(tmp_path / "out", 1))
    monkeypatch.undo()
    run(tmp_path / "out", "epochs=1", resume="auto")  # the lock was released


def test_other_data_is_another_run(tmp_path):
    """Fewer images, other labels or other pixels are another run; the same data at another path are not."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (200, 8, 8), dtype=np.uint8), np.arange(200) % 10
    options = ("data.kind=npz", "model.image_size=null", "batch_size=20", "schedule.kind=constant")

    def write(name, train_images, train_labels):
        np.savez(
            tmp_path / name,
            train_images=train_images,
            train_labels=train_labels,
            test_images=images[:20],
            test_labels=labels[:20],
        )
        return f"data.path={tmp_path / name}"

    run(tmp_path / "out", *options, write("a.npz", images, labels), "epochs=1")
    others = {
        "train_images .was 200, now 100.": (images[:100], labels[:100]),
        "train_checksum .was": (images, labels[::-1]),
        "train_checksum": (255 - images, labels),
    }
    for what, changed in others.items():
        with pytest.raises(TrainingError, match=f"had other data: {what}"):
            run(tmp_path / "out", *options, write("b.npz", *changed), "epochs=2", resume="auto")
    assert (
        run(tmp_path / "out", *options, write("e.npz", images, labels), "epochs=2", resume="auto")["epoch"]
        == 2
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", 3),
        ("data", []),
        ("world", "x"),
        ("epoch", -1),
        ("epoch", 1.5),
        ("step", None),
        ("updates", []),
        ("model", None),
        ("ema", 3),
        ("optimizer", []),
        ("optimizer", {}),
        ("schedule", 1),
        ("schedule", {"step": 3}),
        ("rng", {}),
        ("history", 3),
        ("history", [3]),
        ("best", "x"),
        ("bad", 3),
        ("seconds", "x"),
        ("sums", 3),
        ("model", {"x": torch.zeros(3)}),
        ("rng", []),
        ("rng", [None]),
        ("rng", [{"torch": torch.zeros(3), "numpy": [], "python": [], "cuda": None}]),
    ],
    ids=str,
)
def test_a_checkpoint_of_bad_will(tmp_path, finished_run, key, value):
    """A malformed checkpoint is refused in one line, whichever value is wrong, and nothing is written into
    the folder.
    """
    state = torch.load(finished_run, weights_only=True) | {key: value}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(TrainingError) as refused:
        run(tmp_path / "out", resume=str(tmp_path / "c.pt"))
    assert "c.pt: " in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder / "checkpoints" / "epoch_0001_step_0000000.pt"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Its bytes are synchronised, then it gets its name, then the folder is synchronised: whenever the power
    fails, the name stands for a whole checkpoint.
    """
    done = []

    def recording(module, name):
        call = getattr(module, name)

        def record(first, *rest, **options):
            place = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            done.append((name, place))
            return call(first, *rest, **options)

        monkeypatch.setattr(module, name, record)

    recording(os, "fsync"), recording(os, "replace")
    run(tmp_path, "epochs=1")
    folder = tmp_path / "checkpoints"
    checkpoints_only = [(name, place) for name, place in done if os.path.dirname(place) == str(folder)]
    (_, file), (_, temporary) = checkpoints_only[:2]
    assert file == temporary
    assert [name for name, _ in checkpoints_only[:2]] == ["fsync", "replace"]
    assert done[done.index(("replace", temporary)) + 1] == ("fsync", str(folder))
