"""Runs in one process: their files, one update by hand, and their messages."""

import csv
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support_train import (
    TINY,
    assert_same,
    checkpoint_at,
    command,
    environment,
    finished,
    losses,
    recipe,
    run,
)

import coda_fast
from coda_fast import checkpoints, cli, train
from coda_fast.train import TrainingError, list_recipes, load_recipe, loop
from coda_fast.train import checkpoints as train_checkpoints


def test_a_run_leaves_what_it_promises(tmp_path):
    row = run(
        tmp_path, "ema.decay=0.9", "log.maps=2", "log.tensorboard=true", "epochs=3", "checkpoint.keep=2"
    )
    assert row["epoch"] == 3
    assert row["updates"] == 3 * (1347 // 64)
    assert row["val_images"] == 450
    assert row["train_loss"] < losses(tmp_path)[4]
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "metrics.csv", "steps.csv", "curve.png"} <= names
    assert {n for n in names if n.endswith(".safetensors")} == {
        f"model{which}.safetensors" for which in ("", "_ema", "_best")
    }
    assert {f"maps/epoch_000{i}.png" for i in (1, 2, 3)} <= names
    assert {n for n in names if n.startswith("checkpoints/")} == {
        "checkpoints/best.pt",
        "checkpoints/epoch_0002_step_0000000.pt",
        "checkpoints/epoch_0003_step_0000000.pt",
    }
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3]
    # the result can be loaded like any model, and has the reported accuracy
    from coda_fast.demo import digits

    data = digits()
    best_row = max(rows, key=lambda r: float(r["ema_val_accuracy"]))
    reported = {
        "model": row["val_accuracy"],
        "model_ema": row["ema_val_accuracy"],
        "model_best": float(best_row["ema_val_accuracy"]),
    }
    for name, accuracy in reported.items():
        model = coda_fast.load(tmp_path / f"{name}.safetensors")
        images = (data.test_images * 255).round() / 255
        with torch.no_grad():
            right = (model(images).argmax(1) == data.test_labels).double().mean()
        assert float(right) == pytest.approx(accuracy, abs=1e-8)  # rounded as in metrics.csv
        stored = checkpoints.read_metadata(tmp_path / f"{name}.safetensors")
        assert stored["recipe"]["epochs"] == 3
        assert stored["epoch"] == (int(best_row["epoch"]) if name == "model_best" else 3)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["history"][-1]["epoch"] == int(best_row["epoch"])
    events = sorted((tmp_path / "tensorboard").iterdir())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events[0])).Reload()
    assert {"step/loss", "epoch/val_accuracy"} <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Images("maps")] == [21, 42, 63]


def test_the_moving_average_is_one(tmp_path, monkeypatch):
    seen = []
    step = loop.Trainer.step

    def noting(self, batch):
        found = step(self, batch)
        seen.append(self.setup.objective.model.layers[0].weight.detach().clone())
        return found

    monkeypatch.setattr(loop.Trainer, "step", noting)
    run(tmp_path, "ema.decay=0.75", "epochs=1", "precision=float64")
    average = seen[1]  # timm copies the weights at its first two calls
    for weight in seen[2:]:
        average = 0.75 * average + 0.25 * weight
    torch.testing.assert_close(
        checkpoint_at(tmp_path, 1)["ema"]["model.layers.0.weight"], average, rtol=1e-12, atol=1e-12
    )


def test_one_update_by_hand(tmp_path, monkeypatch):
    """The first batch, its loss and Adam's first step, written out."""
    losses_seen, models = [], []
    step = loop.Trainer.step

    def weights(trainer):
        parameters = trainer.setup.objective.model.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in parameters}

    def noting(self, batch):
        if not models:
            models.append(
                {name: p.detach().clone() for name, p in self.setup.objective.model.named_parameters()}
            )
        found = step(self, batch)
        losses_seen.append(float(found[0] / found[2]))
        models.append(weights(self))
        return found

    monkeypatch.setattr(loop.Trainer, "step", noting)
    # micro-batches of 10 from 60: the mean over six equal parts is the mean over all
    run(
        tmp_path,
        "epochs=1",
        "precision=float64",
        "batch_size=60",
        "micro_batch=10",
        "schedule.kind=constant",
        "optimizer.lr=0.01",
    )
    from coda_fast.demo import digits

    data = digits()
    index = torch.from_numpy(np.random.default_rng((0, 0, 0)).permutation(1347)[:60])
    images = (data.train_images[index] * 255).round().double() / 255
    config = {"out_channels": [4, 10], "ranks": [4, 4], "kernel_sizes": [3, 3], "strides": [2, 1]}
    model = coda_fast.create_model("coda_xs_digits", **config, dtype=torch.float64, backend="reference")
    model.load_state_dict(models[0])
    targets = torch.zeros(60, 10, dtype=torch.float64)
    targets[torch.arange(60), data.train_labels[index]] = 1
    p = model(images).sigmoid()
    loss = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert losses_seen[0] == pytest.approx(float(loss.detach()), rel=1e-12)
    loss.backward()
    for name, parameter in model.named_parameters():
        g = parameter.grad
        after = models[0][name] - 0.01 * g / (g.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(models[1][name], after, rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """The message names the last good checkpoint, which is intact and older than the NaN."""
    step = loop.Trainer.step

    def poisoned(self, batch):
        if self.state.updates == 30:
            with torch.no_grad():
                self.setup.objective.model.layers[0].weight.fill_(float("nan"))
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", poisoned)
    message = (
        r"got nan in epoch 2 between steps 8 and 12 .*not finite: \d+ of \d+ weights, first layers\.0\..* "
        r"the last good .* is "
    )
    message += r".*epoch_0001_step_0000008.pt"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, "checkpoint.every_steps=29")
    state = checkpoint_at(tmp_path, 1, 8)
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_a_loss_that_is_not_finite_beside_weights_that_are(tmp_path, monkeypatch):
    """If weights are so large that |w|^2 overflows float32, the message names the largest weight."""
    step = loop.Trainer.step

    def poisoned(self, batch):
        layers = self.setup.objective.model.layers
        with torch.no_grad():
            layers[1].bias[0] = 1e25
        found = step(self, batch)
        with torch.no_grad():  # undo the updates
            for parameter in layers.parameters():
                parameter.nan_to_num_(0.5, 0.5, 0.5)
            layers[1].bias[0] = 1e25
        return found

    monkeypatch.setattr(loop.Trainer, "step", poisoned)
    with pytest.raises(TrainingError, match=r"got nan .*the largest weight is 1\.0e\+25, in layers\.1\.bias"):
        run(tmp_path)


def test_weights_that_are_not_finite_are_not_kept(tmp_path, monkeypatch):
    """The update after the last checked loss can still make the weights infinite or NaN."""
    step = loop.Trainer.step

    def poisoned(self, batch):
        found = step(self, batch)
        if self.state.updates == 41:
            with torch.no_grad():
                self.setup.objective.model.layers[1].bias[0, 0, 0, 0] = float("inf")
        return found

    monkeypatch.setattr(loop.Trainer, "step", poisoned)
    with pytest.raises(
        TrainingError,
        match=r"expected finite numbers, got others in model.layers.1.bias; the last good .*epoch_0001",
    ):
        run(tmp_path)
    assert not (tmp_path / "checkpoints" / "epoch_0002_step_0000000.pt").exists()


@pytest.mark.parametrize(
    ("where", "name", "stands_at"),
    [
        ("logger", "_open_steps", 1),
        ("logger", "step", 1),
        ("train", "link_best", 2),
        ("logger", "_write_metrics", 2),
        ("logger", "maps", 2),
        ("plot", "save_figure", 2),
        ("checkpoints", "save", 2),
    ],
)
def test_a_full_disk_beside_the_checkpoints(tmp_path, monkeypatch, where, name, stands_at):
    """A full disk while curves, pictures or links are written ends the run with one line that names the last
    good checkpoint, from which it can be resumed.
    """
    from coda_fast import plot
    from coda_fast.train.logger import Logger

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    options = ("log.maps=1", "schedule.kind=constant")
    run(tmp_path, *options, "epochs=1")
    (tmp_path / "curve.png").unlink()
    owner = {"logger": Logger, "plot": plot, "checkpoints": checkpoints, "train": train_checkpoints}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(
            TrainingError,
            match=rf"No space left on device; the last good .* is .*epoch_000{stands_at}_step_0000000.pt",
        ):
            run(tmp_path, *options, resume="auto")
    assert run(tmp_path, *options, resume="auto")["epoch"] == 2
    assert (tmp_path / "curve.png").exists()


def test_a_full_disk(tmp_path):
    """A limit on the size of files has the same effect on a writer as a full disk. The previous checkpoint
    stays and is named.
    """
    run(tmp_path, "epochs=1", "schedule.kind=constant")
    kept = (tmp_path / "checkpoints" / "epoch_0001_step_0000000.pt").read_bytes()
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(kept) // 2}, {len(kept) // 2}));"
        "from coda_fast.cli import main; main(['train', *sys.argv[1:]])"
    )
    options = ("--quiet", "--resume", "auto")
    arguments = command(
        tmp_path, "epochs=2", "schedule.kind=constant", program=("-c", program), options=options
    )
    printed = finished(arguments, code=2)
    assert "cannot write the checkpoint" in printed
    assert "File too large" in printed
    assert "the last good checkpoint is" in printed
    assert "epoch_0001_step_0000000.pt" in printed
    assert [p.name for p in (tmp_path / "checkpoints").glob("epoch*")] == ["epoch_0001_step_0000000.pt"]
    assert (tmp_path / "checkpoints" / "epoch_0001_step_0000000.pt").read_bytes() == kept
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="output: expected a folder at .*file.run, got a file: .*file$"):
        run(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("batch_size=5000",), "batch_size: expected at most 1347, the training images, got 5000"),
        (("model.name=resnet",), "model: expected one of coda_s_cifar10, .*got 'resnet'"),
        (("model.backend=fast",), "backend.*'fast'"),
        (("model.out_channels=[4, 9]",), "model.out_channels: expected 10 classes at the end"),
        (("model.ranks=[1]",), "ranks: expected 2 entries"),
        (
            ("optimizer.name=adamm",),
            r"optimizer.name: expected one of timm.optim.list_optimizers\(\) \(adam\w*, .*\), got 'adamm'",
        ),
        (("data.kind=cifar10",), "data.path: expected where the images are, got none"),
        (("data.kind=npz", "data.path=/nowhere/x.npz"), "no such file or folder: /nowhere/x.npz"),
        (("model.name=coda_s_cifar10",), "the model takes 3 channels, the images have 1"),
        (
            ("optimizer.name=adafactorbv",),
            "optimizer.name: expected another one, 'adafactorbv' holds what torch cannot keep",
        ),
        (
            ("optimizer.name=adahessian",),
            "optimizer.name: expected another one, 'adahessian' needs second derivatives",
        ),
        (
            ("optimizer.name=sgd", "optimizer.betas=[0.9, 0.99]"),
            r"optimizer.betas: expected none for 'sgd', got \[0.9, 0.99\]",
        ),
        (
            ("optimizer.name=adan", "optimizer.betas=[0.9, 0.99]"),
            r"optimizer.betas: expected as many as \(0.98, 0.92, 0.99\) for 'adan'",
        ),
        (
            ("optimizer.betas=[0.9, 0.99, 0.9]",),
            r"optimizer.betas: expected as many as \(0.9, 0.999\) for 'adam'",
        ),
        (
            ("schedule.warmup=1.999",),
            "schedule.warmup: expected less than the 42 steps of the run, got 42 of them",
        ),
        (
            ("loss.matrix_weight=1", "loss.matrix_classes=11"),
            "loss.matrix_classes: expected at most the 10 classes, got 11",
        ),
    ],
)
def test_what_cannot_start_says_so_and_writes_nothing(tmp_path, overrides, message):
    with pytest.raises(TrainingError, match=message):
        run(tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(
        TrainingError, match="accelerator: expected a CUDA GPU for accelerator=cuda, found none"
    ):
        run(tmp_path / "out", "accelerator=cuda")


def test_betas_are_for_every_optimizer_that_has_them(tmp_path):
    run(tmp_path / "a", "epochs=1", "optimizer.name=lamb")
    run(tmp_path / "b", "epochs=1", "optimizer.name=lamb", "optimizer.betas=[0.1, 0.1]")
    assert losses(tmp_path / "a")[4] != losses(tmp_path / "b")[4]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", "gr\u00fcn".encode("latin-1")])
def test_a_foreign_curve_is_not_written_over(tmp_path, content):
    (tmp_path / "steps.csv").write_bytes(content)
    with pytest.raises(
        TrainingError, match="steps.csv: expected the steps of a run, found another file; move it away"
    ):
        run(tmp_path)
    assert (tmp_path / "steps.csv").read_bytes() == content


def test_what_nccl_says_is_not_lost(tmp_path, monkeypatch):
    def failing(self, batch):
        raise torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage\nLast error:\nDuplicate GPU detected"
        )

    monkeypatch.setattr(loop.Trainer, "step", failing)
    with pytest.raises(
        TrainingError,
        match="processes: .*Last error: Duplicate GPU detected.*no checkpoint was written before",
    ):
        run(tmp_path)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_leaves_the_environment_as_it_was(tmp_path, monkeypatch, strategy):
    """Otherwise the next run of this program, or of a process it starts, would wait at this run's port."""
    monkeypatch.setenv("NODE_RANK", "0")  # what was set before stays
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    found, step = [], loop.Trainer.step

    def looking(self, batch):
        found.append({name: os.environ.get(name) for name in names})
        if len(found) == 3:
            raise TrainingError("stopped here")
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", looking)
    before = {name: os.environ.get(name) for name in names}
    with pytest.raises(TrainingError, match="stopped here"):
        run(tmp_path, f"strategy={strategy}")
    assert found[0] != before  # Lightning has set some of them
    assert {name: os.environ.get(name) for name in names} == before
    assert not torch.distributed.is_initialized()


def test_a_process_that_this_run_does_not_have(tmp_path, monkeypatch):
    """A program with two runs, of which the second has two processes, is started again from its beginning."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TrainingError, match="^LOCAL_RANK: expected a number below .*, 1, got 1; give"):
        run(tmp_path / "out", "strategy=ddp")
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_no_lost_process(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        printed = finished(command(tmp_path, "strategy=ddp"), 2, MASTER_ADDR="localhost", MASTER_PORT=port)
    assert "coda-fast: processes: cannot begin to talk to each other: " in printed
    assert "Traceback" not in printed


def test_the_command_line(tmp_path, capsys):
    from coda_fast import cli

    def code(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *map(str, arguments)])
        return stop.value.code or 0

    assert code() == 0
    assert set(list_recipes()) <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert code("digits-s", "optimizer.lr=1e-3", "--show") == 0
    assert "lr: 0.001" in capsys.readouterr().out
    assert code("digits-s", "optimiser.lr=1e-3") == 2
    assert "unknown key 'optimiser.lr'; near to it: optimizer.lr" in capsys.readouterr().err
    assert code("digits-s", *TINY, "epochs=1", "--output", tmp_path / "run") == 0
    printed = capsys.readouterr()
    assert "model.safetensors" in printed.out
    assert "best" in printed.out
    assert "img" in printed.err  # the progress bar


def test_accuracy_of_rows_is_json(tmp_path):
    json.dumps(run(tmp_path, "epochs=1"), allow_nan=False)


def test_training_loads_only_when_asked():
    code = (
        "import sys, coda_fast.cli; sys.exit(any(m in sys.modules for m in ('lightning', 'timm', "
        "'pydantic', 'yaml', 'tensorboard')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_a_recipe_runs_no_commands(tmp_path):
    options = (
        "data.kind=webdataset",
        "data.val_path=x.tar",
        "data.classes=10",
        "data.train_samples=9",
        "data.size=8",
        "data.resize=8",
    )
    with pytest.raises(TrainingError, match="a recipe must not run commands"):
        run(tmp_path / "out", *options, f"data.path=pipe:touch {tmp_path}/ran")
    assert not list(tmp_path.iterdir())


def test_validation_images_that_cannot_be_read_are_no_accuracy(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(4):
                path = tmp_path / "set" / split / name / f"{i}.png"
                Image.new("L", (8, 8), 20 * i).save(path) if split == "train" else path.write_bytes(b"torn")
    options = (
        "data.kind=folder",
        f"data.path={tmp_path / 'set'}",
        "data.workers=0",
        "batch_size=4",
        "model.out_channels=[4, 2]",
    )
    with pytest.raises(TrainingError, match="expected validation images, could read none of them"):
        run(tmp_path / "out", *options)


def test_small_micro_batches_are_said(tmp_path, capsys):
    train.run(recipe("epochs=1", "batch_size=62", "micro_batch=30"), tmp_path)
    assert "micro_batch: 30 does not divide the 62 images of a process, 2 does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.rank=2000000000",), "model: .*expected"),
        (("model.ranks=[2000000000, 4]",), "model: .*: expected what fits into the .* GiB of this machine"),
        (("model.kernel_sizes=[2000000001, 3]",), "model: expected|model: .*kernel"),
        (
            ("model.out_channels=[2000000000, 10]",),
            "model: .*: expected what fits into the .* GiB of this machine",
        ),
        (
            ("model.out_channels=[1000000, 10]", "model.ranks=[10000, 4]"),
            "model: .*expected what fits into the .* GiB of this machine",
        ),
        (("devices=1000",), "devices: expected at most .* processes on this machine's processors, got 1000"),
        (("data.kind=npz", "data.path=x.npz"), "data.path: no such file"),
    ],
    ids=str,
)
def test_what_this_machine_cannot_hold_is_refused_before_it_is_made(tmp_path, overrides, message):
    kept = [
        change for change in TINY if not (change.startswith("model.ranks") and "model.rank=" in overrides[0])
    ]
    with pytest.raises(TrainingError, match=message) as refused:
        train.run(load_recipe("digits-s", [*kept, *overrides]), tmp_path / "out", progress=False)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_labels_that_make_a_model_too_large(tmp_path):
    """The largest label determines the number of classes."""
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 2**40])
    np.savez(
        tmp_path / "d.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    options = ("data.kind=npz", f"data.path={tmp_path / 'd.npz'}", "batch_size=2")
    with pytest.raises(TrainingError, match="model: .*expected"):
        train.run(load_recipe("digits-s", [*options, "accelerator=cpu"]), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_batches_that_this_machine_cannot_hold(tmp_path, monkeypatch):
    from coda_fast import safety

    monkeypatch.setattr(safety, "machine_memory", lambda device="cpu": 1 << 19)
    with pytest.raises(TrainingError, match="batch_size, micro_batch: activations: expected what fits into"):
        run(tmp_path / "out", "batch_size=1024")
    run(tmp_path / "out", "batch_size=1024", "micro_batch=64", "epochs=1")


# -- a run and what it reads
# ----------------------------------------------------------------------------------------------------------


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command_line(*arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *map(str, arguments)])
    return stop.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe.yaml", "link.yaml"])
def test_a_run_never_writes_over_its_recipe(tmp_path, capsys, name):
    """The folder of a run gets a recipe.yaml with all values. It may replace an equal recipe, but not one
    that would be lost.
    """
    (tmp_path / "recipe.yaml").write_text("# mine\n" + recipe("epochs=1").to_yaml())
    if name != "recipe.yaml":
        os.link(tmp_path / "recipe.yaml", tmp_path / name)
    before = contents(tmp_path)
    code, error = command_line(tmp_path / name, "--output", tmp_path, capsys=capsys)
    assert code == 2
    assert "output: expected another file than those that are read, got" in error
    assert contents(tmp_path) == before
    for path in before:
        path.unlink()
    (tmp_path / "recipe.yaml").write_text(recipe("epochs=1").to_yaml())
    code, error = command_line(tmp_path / "recipe.yaml", "--output", tmp_path, "--quiet", capsys=capsys)
    assert code == 0, error
    assert (
        command_line(
            tmp_path / "recipe.yaml", "--output", tmp_path, "--quiet", "--resume", "auto", capsys=capsys
        )[0]
        == 0
    )


def test_a_run_never_goes_into_its_data(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            Image.new("L", (8, 8), 99).save(tmp_path / "set" / split / label / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "set" / "train", target_is_directory=True)
    before = contents(tmp_path)
    data = (
        "data.kind=folder",
        f"data.path={tmp_path / 'set'}",
        "data.workers=0",
        "batch_size=2",
        "model.out_channels=[4, 2]",
        "epochs=1",
    )
    for output in ("set/train", "set/train/run", "set/val/x/y", "link", "link/run", "set/train/../val"):
        with pytest.raises(
            TrainingError, match="output: expected a folder outside of .*set/(train|val), which is read, got"
        ):
            run(tmp_path / output, *data)
    assert contents(tmp_path) == before
    run(tmp_path / "set" / "run", *data)  # a folder next to them is accepted


def test_a_run_never_writes_over_its_arrays(tmp_path):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4)
    np.savez(
        tmp_path / "d.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    os.link(tmp_path / "d.npz", tmp_path / "metrics.csv")
    before = contents(tmp_path)
    with pytest.raises(
        TrainingError,
        match="output: expected another file than those that are read, got .*metrics.csv, which is .*d.npz",
    ):
        run(
            tmp_path,
            "data.kind=npz",
            f"data.path={tmp_path / 'd.npz'}",
            "batch_size=2",
            "model.out_channels=[4, 4]",
        )
    assert contents(tmp_path) == before


def test_a_new_run_never_writes_over_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights of months")
    with pytest.raises(TrainingError, match="holds the model of another run, model.safetensors"):
        run(tmp_path, "epochs=1")
    assert contents(tmp_path) == {tmp_path / "model.safetensors": b"weights of months"}


@pytest.mark.parametrize("name", ["../../up", "/abs", "..", "", "a/b"])
def test_a_recipe_does_not_choose_where_it_writes(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, error = command_line("digits-s", f"name='{name}'", capsys=capsys)
    assert code == 2
    assert f"name: expected a recipe with a name for its folder, or --output, got {name!r}" in error
    assert not list(tmp_path.iterdir())


# -- a full disk
# ------------------------------------------------------------------------------------------------------------


def test_the_run_goes_on_without_tensorboard(tmp_path, capsys, monkeypatch):
    """If TensorBoard's thread finds the disk full, the run prints one line and no traceback, and ends with
    the same weights.
    """
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    options = ("log.tensorboard=true", "log.maps=1", "log.every=2")
    train.run(recipe(*options), tmp_path / "whole", progress=True)
    capsys.readouterr()
    written, unheard = [0], []
    monkeypatch.setattr(threading, "excepthook", hook := unheard.append)

    def full(self, data):
        written[0] += 1
        if written[0] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, data)

    plain = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", full)
    train.run(recipe(*options), tmp_path / "full", progress=True)
    said = capsys.readouterr().err
    assert said.count("cannot be written: No space left on device; the run goes on without it") == 1
    assert unheard == []
    assert threading.excepthook == hook
    assert_same(checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "full"))
    assert {p.name for p in (tmp_path / "full").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("what", ["steps", "maps", "model.safetensors", "epoch_0002", "curve"])
def test_a_full_disk_keeps_what_was_trained(tmp_path, monkeypatch, what):
    """Whichever file does not fit on the disk, the last checkpoint is named and unchanged, and no file is
    half-written.
    """
    plain, good = checkpoints.os.replace, []

    def replace(source, target):
        if (what in Path(target).name or what in Path(target).parent.name) and (what != "maps" or good):
            raise OSError(errno.ENOSPC, "No space left on device")
        if Path(target).name.startswith("epoch_") and target.suffix == ".pt":
            good.append((Path(target), Path(source).read_bytes()))
        plain(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", replace)
    with pytest.raises(TrainingError, match="No space left on device"):
        run(tmp_path, "log.maps=1", "checkpoint.keep=9")
    for path, content in good:
        assert path.read_bytes() == content
        train_checkpoints.read(path)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".writing-")]
    assert len(good) == {"steps": 0, "maps": 1, "epoch_0002": 1, "model.safetensors": 2, "curve": 2}[what]
    monkeypatch.undo()
    assert run(tmp_path, "log.maps=1", "checkpoint.keep=9", resume="auto")["epoch"] == 2
