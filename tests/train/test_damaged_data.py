"""Corrupt images, and files and folders of others: damage is counted and named, never waited for."""

import os
import shutil

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from support_train import NET, ONE, class_folders, folder_data, recipe, run, save_npz, tree

from coda_fast import train
from coda_fast.train import TrainingError, loop, setup
from coda_fast.train.data import open_data
from coda_fast.train.recipes import Data


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "set")


def test_corrupt_images_are_skipped_counted_and_named(folder, tmp_path, capsys):
    damaged = folder / "train" / "bee" / "003.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (folder / "val" / "cat" / "001.JPEG").write_bytes(b"not an image")
    row = train.run(recipe(*NET, f"data.path={folder}"), tmp_path / "out")
    printed = capsys.readouterr().err
    assert row["val_images"] == 10
    assert row["unreadable"] == 2  # including the one of the last validation
    assert "skipped" in printed
    assert str(damaged) in printed
    assert "001.JPEG" in printed


def test_an_image_that_cannot_be_read_weighs_nothing(folder, tmp_path, monkeypatch):
    """The loss that is minimised is the sum over the readable images divided by the batch size. The loss that
    is reported is the mean over the readable images.
    """
    damaged = folder / "train" / "bee" / "003.JPEG"
    damaged.write_bytes(b"")
    (batch,) = open_data(folder_data(folder), 3).train.training(0, 0, 0, 24, ONE)
    assert batch.valid.sum() == 23
    assert batch.labels[~batch.valid].tolist() == [1]
    assert batch.failures[0][0] == str(damaged)
    step, by_hand, minimised = loop.Trainer.step, [], []

    def recording_step(self, batch):
        logits = self.setup.objective.model(batch.images.double() / 255)
        losses = F.binary_cross_entropy_with_logits(
            logits, F.one_hot(batch.labels, 3).double(), reduction="none"
        ).mean(1)
        by_hand.append(losses[batch.valid].sum().detach())
        backward = self.fabric.backward
        monkeypatch.setattr(
            self.fabric, "backward", lambda loss: minimised.append(loss.detach()) or backward(loss)
        )
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", recording_step)
    row = run(tmp_path / "out", *NET, f"data.path={folder}", "batch_size=24")
    assert float(minimised[0]) == pytest.approx(float(by_hand[0]) / 24, rel=1e-12)
    assert row["train_loss"] == pytest.approx(float(by_hand[0]) / 23, rel=1e-12)
    assert row["unreadable"] == 1


def test_the_loss_that_is_reported_is_of_images_that_were_read(tmp_path):
    """At a learning rate that changes no weight, a run with half of its images damaged reports the same loss
    as a run without these images.
    """
    found = {}
    for name, damaged in (("whole", 0), ("half", 8)):
        root = tmp_path / name
        tree(root / "train", {"ant": 4, "bee": 4})
        tree(root / "val", {"ant": 2, "bee": 2})
        for i in range(damaged):
            (root / "train" / ("ant", "bee")[i % 2] / f"z{i}.JPEG").write_bytes(b"torn")
        options = (
            f"data.path={root}",
            "data.kind=folder",
            "optimizer.lr=1e-30",
            f"batch_size={8 + damaged}",
            "model.out_channels=[4, 2]",
        )
        found[name] = run(
            tmp_path / f"{name}_run", *NET, *options, "data.resize=16", "schedule.kind=constant"
        )
    assert found["half"]["unreadable"] == 8
    assert found["half"]["train_loss"] == pytest.approx(found["whole"]["train_loss"], rel=1e-12)


def test_too_many_corrupt_images_stop_the_run(folder, tmp_path):
    for i in range(3):
        (folder / "train" / "ant" / f"00{i}.JPEG").write_bytes(b"")
    message = (
        r"at most 2 images that cannot be read \(data.max_corrupt\), got 3: .*00\d.JPEG.*; "
        r"no checkpoint was written before"
    )
    with pytest.raises(TrainingError, match=message):
        run(tmp_path / "out", *NET, f"data.path={folder}", "data.max_corrupt=2", "log.every=1")


def test_in_memory_with_a_batch_of_damage(tmp_path):
    """257 images, the last of them damaged: the second batch of 256 has none that can be read."""
    tree(tmp_path / "train", {"a": 1})
    tree(tmp_path / "val", {"a": 1})
    for i in range(1, 256):
        shutil.copy(tmp_path / "train" / "a" / "000.JPEG", tmp_path / "train" / "a" / f"{i:03d}.JPEG")
    (tmp_path / "train" / "a" / "256.JPEG").write_bytes(b"")
    found = open_data(Data(kind="folder", path=str(tmp_path), workers=0, in_memory=True), 3)
    assert (len(found.train), len(found.failures)) == (256, 1)
    (tmp_path / "val" / "a" / "000.JPEG").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"could read none of 1; .*000.JPEG: not an image"):
        open_data(Data(kind="folder", path=str(tmp_path), workers=0, in_memory=True), 3)


def test_npz_truncated(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((9, 4, 4, 3), np.uint8))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(TrainingError, match="not an .npz file that NumPy can read"):
        open_data(Data(kind="npz", path=str(tmp_path / "b.npz")), 3)


def test_links_that_lead_back(folder):
    """Links to a parent folder are followed once. With two of them there are 2^40 paths, too many to list."""
    count = len(open_data(folder_data(folder), 3).train.files)
    for name in ("again", "once_more"):
        (folder / "train" / "ant" / name).symlink_to(folder / "train" / "ant", target_is_directory=True)
        (folder / "train" / "ant" / f"up_{name}").symlink_to("..", target_is_directory=True)
    found = open_data(folder_data(folder), 3).train.files
    assert len([path for path, _ in found if "again" not in path and "once_more" not in path]) == count
    assert len(found) == 2 * count - 9  # the link to the parent folder leads to the other classes


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_file_is_skipped_and_never_waited_for(folder, workers):
    """A pipe would block a worker forever, and a device has no end. An image may be deleted between listing
    and reading, or be too large.
    """
    source = open_data(folder_data(folder, workers=workers), 3)
    victims = {
        name: folder / "train" / "bee" / f"00{i}.JPEG"
        for i, name in enumerate(("pipe", "device", "gone", "folder", "large", "program"))
    }
    for path in victims.values():
        path.unlink()
    os.mkfifo(victims["pipe"])
    victims["device"].symlink_to("/dev/zero")
    victims["folder"].mkdir()
    Image.new("L", (8, 8)).save(victims["large"], "BMP")
    data = bytearray(victims["large"].read_bytes())
    data[18:26] = (30_000).to_bytes(4, "little") * 2
    victims["large"].write_bytes(data)
    Image.new("RGB", (8, 8)).save(victims["program"], "EPS")
    failures = {name: reason for b in source.train.training(0, 0, 0, 8, ONE) for name, reason in b.failures}
    reasons = {
        "pipe": "got a pipe",
        "device": "got a device",
        "gone": "no such file",
        "folder": "got a folder",
        "large": "too large",
        "program": "not an",
    }
    assert failures.keys() == {str(path) for path in victims.values()}
    for name, reason in reasons.items():
        assert reason in failures[str(victims[name])]


def test_a_run_skips_what_vanishes(folder, tmp_path, monkeypatch):
    """An image that is deleted between listing and reading is counted and named, and the run continues."""
    opened = setup.open_data

    def open_and_delete_one(*arguments):
        source = opened(*arguments)
        (folder / "train" / "cat" / "003.JPEG").unlink()
        return source

    monkeypatch.setattr(setup, "open_data", open_and_delete_one)
    row = run(tmp_path / "out", *NET, f"data.path={folder}")
    assert row["unreadable"] == 1


@pytest.mark.parametrize("name", ["../../train/ant/000.JPEG", "/etc/passwd", "sub/x.JPEG", "", ".."])
def test_annotations_name_files_of_their_folder(folder, name):
    (folder / "val" / "val_annotations.txt").write_text(f"{name}\tant\t0\n")
    with pytest.raises(TrainingError, match="val_annotations.txt: expected the name of a file in images/"):
        open_data(folder_data(folder), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((3, 0, 4, 3), np.uint8)}, "expected train_images"),
        ({"train_images": np.zeros((), np.uint8)}, "expected train_images"),
        ({"train_labels": np.full(3, 1 + 1j)}, "expected labels of train that are integers"),
        ({"train_labels": np.full(3, 2**63, np.uint64)}, "expected labels of train that are integers"),
        ({"class_names": np.array("a")}, "expected labels 0 to 0, got"),
        ({"train_jpeg": np.zeros(5, np.uint8)}, "expected train_jpeg, train_offset and train_label that fit"),
    ],
)
def test_arrays_of_bad_will(tmp_path, changes, message):
    path = save_npz(tmp_path / "a.npz", changes)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="npz", path=str(path)), 3)


def test_arrays_that_claim_more_than_there_is(tmp_path):
    """An array whose header claims more than the file holds is refused before memory is allocated."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        text = (
            repr({"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32, 3)}).encode().ljust(117)
            + b"\n"
        )
        file.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(
        TrainingError, match="a.npz: not an .npz file .* claims 3072000000000128 bytes, the file holds 128"
    ):
        open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 3)


def test_binary_cifar_of_bad_will(tmp_path):
    records = np.zeros((4, 3073), np.uint8)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records.tofile(tmp_path / name)
    (tmp_path / "batches.meta.txt").write_bytes(b"a b \xff")
    with pytest.raises(TrainingError, match="batches.meta.txt: expected the names of 10 classes, got 3"):
        open_data(Data(kind="cifar10", path=str(tmp_path)), 3)
    (tmp_path / "batches.meta.txt").unlink()
    os.mkfifo(tmp_path / "data_batch_2.bin")
    with pytest.raises(TrainingError, match="got no file: .*data_batch_2.bin"):
        open_data(Data(kind="cifar10", path=str(tmp_path)), 3)
