"""Every kind of data, made by the tests; augmentation against plain loops; corrupt images; the number of
samples.
"""

import collections
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support_train import NET, ONE, picture, recipe, run, tree

from coda_fast import train
from coda_fast.data import DataError, Preprocessing
from coda_fast.data.sources import Arrays, Item, Process, decode_all, to_float
from coda_fast.train import TrainingError, augmentation, loop, setup
from coda_fast.train.augmentation import Augmentation, augment
from coda_fast.train.data import open_data
from coda_fast.train.recipes import Data


@pytest.fixture
def folder(tmp_path):
    tree(tmp_path / "set" / "train", {"ant": 9, "bee": 7, "cat": 8})
    tree(tmp_path / "set" / "val", {"ant": 3, "bee": 4, "cat": 4}, 100)
    return tmp_path / "set"


def spec(folder, **more):
    return Data(kind="folder", path=str(folder), **{"resize": 24, "size": 16, "workers": 0, **more})


# -- augmentation
# ------------------------------------------------------------------------------------------------------------


def test_augmentation_against_plain_loops():
    images = torch.randint(256, (12, 3, 6, 5), dtype=torch.uint8)
    found = augment(images, Data(kind="digits", pad=2, flip=True), torch.Generator().manual_seed(5), ONE)
    generator = torch.Generator().manual_seed(5)
    offsets = torch.randint(5, (12, 2), generator=generator).tolist()
    flips = (torch.rand(12, generator=generator) < 0.5).tolist()
    assert 0 < sum(flips) < 12
    for i, ((top, left), flip) in enumerate(zip(offsets, flips, strict=True)):
        padded = np.zeros((3, 10, 9), np.uint8)
        padded[:, 2:8, 2:7] = images[i].numpy()
        crop = padded[:, top : top + 6, left : left + 5]
        assert np.array_equal(found[i].numpy(), crop[:, :, ::-1] if flip else crop)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_take_slices_of_one_batch(world):
    """The slices of all processes of a step, put together, are the batch of a single process."""
    data = Arrays(torch.randint(256, (50, 1, 4, 4), dtype=torch.uint8), torch.arange(50))
    wanted = Data(kind="digits", pad=1, flip=True)
    whole = list(data.training(3, 1, 0, 12, ONE))
    assert len(whole) == 4
    for step, batch in enumerate(whole):
        parts = [list(data.training(3, 1, 0, 12, Process(rank, world)))[step] for rank in range(world)]
        assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
        seen = [
            augment(p.images, wanted, torch.Generator().manual_seed(9), Process(r, world))
            for r, p in enumerate(parts)
        ]
        assert torch.equal(
            torch.cat(seen), augment(batch.images, wanted, torch.Generator().manual_seed(9), ONE)
        )


def test_an_epoch_is_a_permutation_and_no_two_are_alike():
    data = Arrays(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), torch.arange(60))

    def labels(seed, epoch, start=0):
        return torch.cat([b.labels for b in data.training(seed, epoch, start, 20, ONE)]).tolist()

    assert sorted(labels(0, 0)) == list(range(60))
    assert labels(0, 0) == labels(0, 0)
    assert len({tuple(labels(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert labels(0, 0, start=2) == labels(0, 0)[40:]


def test_to_float_divides_by_255():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(
        to_float(images, torch.float64).flatten(), torch.arange(256, dtype=torch.float64) / 255
    )


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_every_sample_once(world, folder):
    arrays = Arrays(torch.zeros(50, 1, 2, 2, dtype=torch.uint8), torch.arange(50))
    files = open_data(spec(folder), 3).val
    for source, count in ((arrays, 50), (files, 11)):
        seen = collections.Counter()
        for rank in range(world):
            for batch in source.evaluation(4, Process(rank, world)):
                seen.update(zip(batch.labels.tolist(), batch.images[:, 0, 0, 0].tolist(), strict=True))
        assert sum(seen.values()) == count
        assert max(seen.values()) == 1


# -- forms
# ------------------------------------------------------------------------------------------------------------


def test_digits():
    found = open_data(Data(kind="digits"), 1)
    assert (len(found.train), len(found.val), found.num_classes) == (1347, 450, 10)
    assert found.train.images.dtype == torch.uint8
    assert found.train.images.max() == 255


@pytest.mark.parametrize("grey", [False, True])
def test_npz_of_arrays(tmp_path, grey):
    shape = (7, 5, 6) if grey else (7, 5, 6, 3)
    images, labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.arange(7)
    np.savez(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:3],
        test_labels=labels[:3],
    )
    found = open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 1 if grey else 3)
    assert list(found.train.images.shape) == [7, 1 if grey else 3, 5, 6]
    assert (len(found.val), found.num_classes) == (3, 7)
    assert found.train.images[2, 0, 4, 1] == (images[2, 4, 1] if grey else images[2, 4, 1, 0])


def test_npz_of_medmnist(tmp_path):
    """Labels [N, 1] uint8, a class for each image."""
    images, labels = np.zeros((7, 5, 6), np.uint8), np.arange(7, dtype=np.uint8)[:, None]
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    found = open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 1)
    assert found.train.labels.tolist() == found.val.labels.tolist() == list(range(7))


def test_npz_of_jpegs(tmp_path):
    arrays, exact = {}, np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    for split, values in (("train", [10, 200, 90]), ("test", [50])):
        files = [picture(v, (8, 8)) for v in values]
        arrays |= {
            f"{split}_jpeg": np.frombuffer(b"".join(files), np.uint8),
            f"{split}_offset": np.cumsum([0, *map(len, files)]),
            f"{split}_label": np.arange(len(values)),
        }
    arrays |= {"train_lossless_idx": np.array([1]), "train_lossless_rgb": exact}
    np.savez(tmp_path / "j.npz", **arrays)
    found = open_data(Data(kind="cifar10", path=str(tmp_path / "j.npz")), 3)
    assert found.class_names[3] == "cat"  # the classes of CIFAR-10, named or not
    assert found.train.images.float().mean((1, 2, 3))[[0, 2]].tolist() == pytest.approx([10, 90], abs=1.5)
    assert np.array_equal(found.train.images[1].permute(1, 2, 0).numpy(), exact[0])
    arrays["train_offset"] = arrays["train_offset"] + 3
    np.savez(tmp_path / "j.npz", **arrays)
    with pytest.raises(TrainingError, match=r"expected train_jpeg, train_offset and train_label that fit"):
        open_data(Data(kind="cifar10", path=str(tmp_path / "j.npz")), 3)


@pytest.fixture
def cifar(tmp_path):
    """The binary version, small: a label, then 1024 red, green and blue values, row by row."""
    generator, everything = np.random.default_rng(0), []
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = generator.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
        everything.append(records)
    (tmp_path / "batches.meta.txt").write_text(
        "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    )
    return tmp_path, everything


def test_cifar10_in_the_binary_version(cifar):
    folder, records = cifar
    found = open_data(Data(kind="cifar10", path=str(folder)), 3)
    assert (len(found.train), len(found.val)) == (20, 4)
    assert found.class_names[3] == "cat"
    assert found.train.labels[5] == records[1][1, 0]
    assert found.train.images[5, 1, 2, 3] == records[1][1, 1 + 1024 + 2 * 32 + 3]  # green, row 2, column 3
    assert found.val.images[3, 2, 31, 31] == records[5][3, 3072]


def test_cifar10_truncated_or_pickled(cifar, tmp_path):
    folder, _ = cifar
    (folder / "data_batch_3.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(TrainingError, match="expected records of 3073 bytes, got 52168 bytes: truncated"):
        open_data(Data(kind="cifar10", path=str(folder)), 3)
    python = tmp_path / "python"
    python.mkdir()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (python / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TrainingError, match=r"could run any code; expected the binary version"):
        open_data(Data(kind="cifar10", path=str(python)), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tree_of_folders(folder, workers):
    found = open_data(spec(folder, workers=workers), 3)
    assert (found.class_names, len(found.train), len(found.val)) == (["ant", "bee", "cat"], 24, 11)
    batches = list(found.val.evaluation(4, ONE))
    assert [len(b.labels) for b in batches] == [4, 4, 3]
    assert torch.cat([b.labels for b in batches]).tolist() == [0] * 3 + [1] * 4 + [2] * 4
    brightness = torch.cat([b.images for b in batches]).float().mean((1, 2, 3)).tolist()
    assert brightness == pytest.approx([100 + 4 * i for i in range(11)], abs=1.5)
    assert batches[0].images.shape == (4, 3, 16, 16)
    assert batches[0].images.dtype == torch.uint8


def test_workers_and_processes_do_not_change_what_is_decoded(folder):
    """Random crops and RandAugment depend on (seed, epoch, image) only."""
    wanted = {"randaugment": {"n": 2, "m": 10}, "scale": (0.3, 1.0)}

    def images(workers, rank=0, world=1, epoch=0):
        found = open_data(spec(folder, workers=workers, **wanted), 3).train
        return torch.cat([b.images for b in found.training(7, epoch, 0, 8, Process(rank, world))])

    whole = images(0)
    assert torch.equal(whole, images(2))
    halves = [images(0, rank, 2).unflatten(0, (3, 4)) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves, 1).flatten(0, 1))
    assert not torch.equal(whole, images(0, epoch=1))


def test_decoding_leaves_the_global_generators_alone(folder):
    import random

    before = np.random.get_state()[1].tolist(), random.getstate()
    list(open_data(spec(folder, randaugment={"n": 2, "m": 10}), 3).train.training(0, 0, 0, 8, ONE))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


def test_crops_have_the_size_that_is_asked(tmp_path):
    """A ramp from left to right tells where a crop was taken, and how wide it is: resize 20, crop 10: half
    of the shorter side.
    """
    ramp = np.broadcast_to(np.linspace(0, 240, 80, dtype=np.uint8)[None, :, None], (40, 80, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    preprocessing = Preprocessing(3, resize=20, crop=10)
    middle = preprocessing.pixels(tmp_path / "ramp.png")[0, 5].astype(float)
    assert middle.mean() == pytest.approx(120, abs=2)
    # 20 source pixels, centres of the first and last tenth
    assert middle[-1] - middle[0] == pytest.approx(240 / 80 * 20 * 0.9, abs=4)
    augmented = Augmentation(preprocessing)
    means = [augmented.pixels(tmp_path / "ramp.png", np.random.default_rng(i))[0].mean() for i in range(60)]
    assert 28 < min(means) < 55
    assert 185 < max(means) < 212


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid, value in (("n01", 20), ("n02", 120)):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(picture(value, (64, 64)))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    (root / "val" / "images").mkdir(parents=True)
    for i, value in enumerate((120, 20, 120)):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(picture(value, (64, 64)))
    rows = [f"val_{i}.JPEG\t{label}\t0\t0\t9\t9" for i, label in enumerate(("n02", "n01", "n02"))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    found = open_data(Data(kind="folder", path=str(root), in_memory=True, workers=0), 3)
    assert isinstance(found.train, Arrays)
    assert found.train.images.shape == (6, 3, 64, 64)
    assert found.val.labels.tolist() == [0, 1, 1]
    assert found.val.images.float().mean((1, 2, 3)).tolist() == pytest.approx([20, 120, 120], abs=1.5)


def test_the_first_classes_only(folder):
    found = open_data(spec(folder, classes=2), 3)
    assert (found.class_names, len(found.train), len(found.val)) == (["ant", "bee"], 16, 7)
    with pytest.raises(TrainingError, match="data.classes: expected at least 4 folders"):
        open_data(spec(folder, classes=4), 3)


def test_classes_of_validation_go_by_name(folder):
    """Some classes may be missing in the validation images; unknown ones are refused."""
    shutil.rmtree(folder / "val" / "ant")
    (folder / "val" / ".hidden").mkdir()
    (folder / "train" / ".hidden").mkdir()
    found = open_data(spec(folder), 3)
    assert (found.class_names, [label for _, label in found.val.files]) == (
        ["ant", "bee", "cat"],
        [1] * 4 + [2] * 4,
    )
    assert open_data(spec(folder, classes=2), 3).val.files == found.val.files[:4]
    (folder / "val" / "cat").rename(folder / "val" / "Cat")
    with pytest.raises(
        TrainingError,
        match=r"data.val_path: expected the classes of .*train in .*val, found others: \['Cat'\]",
    ):
        open_data(spec(folder), 3)


def test_annotations_of_other_classes_or_torn(folder):
    (folder / "val" / "val_annotations.txt").write_text("a.JPEG\tant\t0\nb.JPEG\tdog\t0\n")
    with pytest.raises(TrainingError, match=r"found others: \['dog'\]"):
        open_data(spec(folder), 3)
    (folder / "val" / "val_annotations.txt").write_text("a.JPEG\tant\t0\nb.JPEG")
    with pytest.raises(
        TrainingError,
        match="val_annotations.txt: expected the name of a file in images/, a tab and its class",
    ):
        open_data(spec(folder), 3)


def test_a_class_without_images_is_refused(folder):
    (folder / "train" / "bat").mkdir()
    with pytest.raises(
        TrainingError, match=r"expected images of every class in .*train, found none of \['bat'\]"
    ):
        open_data(spec(folder), 3)


def test_translation_is_a_share_of_the_side():
    """At full strength RandAugment translates by 45 % to either side, for images of any size."""
    (shift,) = (op for op in augmentation._randaugment(2, 30, 3).ops if op.name == "TranslateXRel")
    for width in (20, 200):
        found = np.asarray(shift(Image.new("RGB", (width, 8))))[4, :, 0]
        assert (found > 64).sum() == 0.45 * width


# -- damage
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0, 1, 5, 30])
def test_randaugment_of_any_strength(channels, strength):
    decoder = Augmentation(Preprocessing(channels, 24, 16), randaugment=(2, strength))
    items = [Item(str(i), picture(120), 0) for i in range(150)]
    _, _, valid, failures = decode_all(items, decoder, [np.random.default_rng(i) for i in range(150)])
    assert valid.all(), failures[:3]


def test_a_failure_of_augmentation_is_no_damaged_image(monkeypatch):
    def broken(*_):
        raise ArithmeticError("a bug")

    monkeypatch.setattr(augmentation, "_randaugment", lambda *_: broken)
    decoder = Augmentation(Preprocessing(3, 24, 16), randaugment=(2, 10))
    with pytest.raises(ArithmeticError):
        decode_all([Item("x", picture(120), 0)], decoder, [np.random.default_rng(0)])


@pytest.mark.parametrize(("scale", "least"), [(None, 48), ((0.25, 1.0), 48), ((0.04, 1.0), 80)])
def test_jpegs_are_read_no_smaller_than_crops_need(monkeypatch, scale, least):
    from PIL import JpegImagePlugin

    asked, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile,
        "draft",
        lambda self, mode, size: asked.append(size) or draft(self, mode, size),
    )
    Augmentation(Preprocessing(3, 24, 16), scale).pixels(picture(120, (400, 300)), np.random.default_rng(0))
    assert asked == [(least, least)]
    # to validate with, all of it is decoded, as elsewhere
    Preprocessing(3, 24, 16).pixels(picture(120, (400, 300)))
    assert asked == [(least, least)]


def test_more_processes_than_images_to_validate_with():
    few = Arrays(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    assert [sum(len(batch.labels) for batch in few.evaluation(4, Process(rank, 4))) for rank in range(4)] == [
        1,
        1,
        0,
        0,
    ]


def test_corrupt_images_are_skipped_counted_and_named(folder, tmp_path, capsys):
    damaged = folder / "train" / "bee" / "003.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (folder / "val" / "cat" / "001.JPEG").write_bytes(b"not an image")
    row = train.run(recipe(*NET, f"data.path={folder}"), tmp_path / "out")
    printed = capsys.readouterr().err
    assert row["val_images"] == 10
    assert row["unreadable"] == 2  # also that of the last validation
    assert "skipped" in printed
    assert str(damaged) in printed
    assert "001.JPEG" in printed


def test_an_image_that_cannot_be_read_weighs_nothing(folder, tmp_path, monkeypatch):
    """The loss that is minimised is the sum over the other images divided by the batch size; the one that is
    reported is their mean.
    """
    damaged = folder / "train" / "bee" / "003.JPEG"
    damaged.write_bytes(b"")
    (batch,) = open_data(spec(folder), 3).train.training(0, 0, 0, 24, ONE)
    assert batch.valid.sum() == 23
    assert batch.labels[~batch.valid].tolist() == [1]
    assert batch.failures[0][0] == str(damaged)
    step, by_hand, stepped_by = loop.Trainer.step, [], []

    def noting(self, batch):
        logits = self.setup.objective.model(batch.images.double() / 255)
        losses = F.binary_cross_entropy_with_logits(
            logits, F.one_hot(batch.labels, 3).double(), reduction="none"
        ).mean(1)
        by_hand.append(losses[batch.valid].sum().detach())
        backward = self.fabric.backward
        monkeypatch.setattr(
            self.fabric, "backward", lambda loss: stepped_by.append(loss.detach()) or backward(loss)
        )
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", noting)
    row = run(tmp_path / "out", *NET, f"data.path={folder}", "batch_size=24")
    assert float(stepped_by[0]) == pytest.approx(float(by_hand[0]) / 24, rel=1e-12)
    assert row["train_loss"] == pytest.approx(float(by_hand[0]) / 23, rel=1e-12)
    assert row["unreadable"] == 1


def test_the_loss_that_is_reported_is_of_images_that_were_read(tmp_path):
    """At a learning rate that moves no weight, a run with half of its images damaged reports the loss of one
    without these.
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "found no folder .*train"),
        (lambda p: (p / "train" / "a").mkdir(parents=True), "found no folder .*val"),
        (
            lambda p: [(p / s / "a").mkdir(parents=True) for s in ("train", "val")],
            "found no image in .*train",
        ),
        (lambda p: [(p / s).mkdir() for s in ("train", "val")], "found no folder of a class in .*train"),
    ],
)
def test_a_folder_without_images(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="folder", path=str(tmp_path)), 3)


def test_images_of_several_sizes_need_a_size(tmp_path):
    tree(tmp_path / "set" / "train", {"a": 2})
    tree(tmp_path / "set" / "train2", {"b": 1}, size=(20, 20))
    (tmp_path / "set" / "train2" / "b").rename(tmp_path / "set" / "train" / "b")
    tree(tmp_path / "set" / "val", {"a": 1, "b": 1})
    source = open_data(Data(kind="folder", path=str(tmp_path / "set"), workers=0), 3)
    message = (
        r"data: expected images of one size, or a size to crop them to \(data.size in a recipe, --size\), "
        r"got 20 x 20, 30 x 40"
    )
    for workers in (0, 2):
        source.train.workers = workers
        with pytest.raises(DataError, match=message) as caught:
            list(source.train.training(0, 0, 0, 3, ONE))
        assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="folder", path=str(tmp_path / "set"), workers=0, in_memory=True), 3)


def test_in_memory_takes_no_random_crops(folder):
    with pytest.raises(
        TrainingError, match=r"data.in_memory: expected false where data.resize is above data.size \(24, 16\)"
    ):
        open_data(spec(folder, in_memory=True), 3)
    assert len(open_data(spec(folder, in_memory=True, resize=16), 3).train) == 24
    with pytest.raises(TrainingError, match="data.size: expected the side of the crop"):
        open_data(spec(folder, size=None, resize=None, scale=(0.5, 1.0)), 3)


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


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "expected an .npz file with train_images .* got x"),
        (
            {"train_images": np.zeros((3, 4, 4, 3)), "train_labels": np.zeros(3)},
            r"got float64 \[3, 4, 4, 3\]",
        ),
        (
            {"train_images": np.zeros((3, 4, 4, 3), np.uint8), "train_labels": np.zeros(2)},
            r"as many labels, got .* and \[2\]",
        ),
    ],
)
def test_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_labels": np.array([0.0, 1.7, 2.0])},
            "expected labels of train that are integers from 0 on, got float64 from 0.0",
        ),
        (
            {"test_labels": np.array([0, -1, 2])},
            "expected labels of test that are integers from 0 on, got int64 from -1",
        ),
        ({"class_names": np.array(["a", "b"])}, "expected labels 0 to 1, got 0 to 2"),
        (
            {"test_images": np.zeros((3, 4, 5, 3), np.uint8)},
            r"images of one size, got \[4, 4\] to train with, \[4, 5\] to",
        ),
        ({"test_images": np.zeros((3, 4, 4, 2), np.uint8)}, "expected test_images of 1 or 3 channels, got 2"),
        (
            {"test_images": np.zeros((0, 4, 4, 3), np.uint8), "test_labels": np.zeros(0, int)},
            "expected labels of test .*, got none",
        ),
    ],
)
def test_npz_that_does_not_fit(tmp_path, changes, message):
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.arange(3)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "a.npz", **{**arrays, **changes})
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 3)


@pytest.mark.parametrize("change", [{"size": 8}, {"randaugment": {"n": 1}}, {"scale": (0.5, 1.0)}])
def test_what_decoding_does_is_refused_for_what_is_decoded(change):
    with pytest.raises(TrainingError, match=f"data.{next(iter(change))}: expected none for data.kind=digits"):
        open_data(Data(kind="digits", **change), 1)


def test_npz_truncated(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((9, 4, 4, 3), np.uint8))
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(TrainingError, match="not an .npz file that NumPy can read"):
        open_data(Data(kind="npz", path=str(tmp_path / "b.npz")), 3)


# -- folders and files of bad will
# ----------------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_are_those_of_torchvision_in_its_order(folder):
    """Hidden files excepted. A resumed run depends on the order. torchvision's own list follows links that
    lead back, again and again.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    for path in ("deep/er/x.PNG", "deep/a.jpg", "._0.jpeg", "notes.txt", "B.webp", "deep.png"):
        (folder / "train" / "bee" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / "bee" / path).touch()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "y.png").touch()
    (folder / "train" / "cat" / "linked").symlink_to(folder / "elsewhere", target_is_directory=True)
    index = {"ant": 0, "bee": 1, "cat": 2}
    expected = [
        entry for entry in make_dataset(str(folder / "train"), index, IMG_EXTENSIONS) if "._0" not in entry[0]
    ]
    assert open_data(spec(folder), 3).train.files == expected
    assert str(folder / "train" / "cat" / "linked" / "y.png") in [path for path, _ in expected]


def test_links_that_lead_back(folder):
    """With two such links there are 2^40 paths, more than can ever be listed."""
    count = len(open_data(spec(folder), 3).train.files)
    for name in ("again", "once_more"):
        (folder / "train" / "ant" / name).symlink_to(folder / "train" / "ant", target_is_directory=True)
        (folder / "train" / "ant" / f"up_{name}").symlink_to("..", target_is_directory=True)
    found = open_data(spec(folder), 3).train.files
    assert len([path for path, _ in found if "again" not in path and "once_more" not in path]) == count
    assert len(found) == 2 * count - 9  # and those of the other classes, by the links that lead up


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_file_is_skipped_and_never_waited_for(folder, workers):
    """A pipe would block a worker without end, a device has no end, and an image may have vanished when its
    turn comes, or be too large.
    """
    source = open_data(spec(folder, workers=workers), 3)
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
    """An image that vanishes between listing and reading is counted and named, and the run continues."""
    opened = setup.open_data

    def and_gone(*arguments):
        source = opened(*arguments)
        (folder / "train" / "cat" / "003.JPEG").unlink()
        return source

    monkeypatch.setattr(setup, "open_data", and_gone)
    row = run(tmp_path / "out", *NET, f"data.path={folder}")
    assert row["unreadable"] == 1


@pytest.mark.parametrize("name", ["../../train/ant/000.JPEG", "/etc/passwd", "sub/x.JPEG", "", ".."])
def test_annotations_name_files_of_their_folder(folder, name):
    (folder / "val" / "val_annotations.txt").write_text(f"{name}\tant\t0\n")
    with pytest.raises(TrainingError, match="val_annotations.txt: expected the name of a file in images/"):
        open_data(spec(folder), 3)


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
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.arange(3)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "a.npz", **{**arrays, **changes})
    with pytest.raises(TrainingError, match=message):
        open_data(Data(kind="npz", path=str(tmp_path / "a.npz")), 3)


def test_arrays_that_claim_more_than_there_is(tmp_path):
    """The header of an array claims more than the file holds; it is refused before anything is allocated."""
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
