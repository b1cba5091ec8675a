"""Features of frozen stems that are kept on disk: the same run as without them, never those of other weights
or pictures, whole or not at all, and what cannot be kept.
"""

import shutil

import numpy as np
import pytest
import torch
from support_hybrid import CNN, HYBRID, Interrupted, coloured_digits, folder_options, pictures
from support_train import assert_same, checkpoint_at, class_folders, command, finished, losses, recipe, run

import coda_fast
from coda_fast import HybridCoDANet
from coda_fast.data.sources import Process, seeded, to_float
from coda_fast.train import TrainingError, features
from coda_fast.train.augmentation import augment, draw_flips
from coda_fast.train.data import open_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def computed(monkeypatch):
    """The names of the splits whose features were computed, one after the other."""
    found, compute = [], features._compute

    def noting(path, *arguments):
        found.append(path.name.partition("-")[0])
        return compute(path, *arguments)

    monkeypatch.setattr(features, "_compute", noting)
    return found


@pytest.mark.parametrize(
    "more",
    [
        ("data.flip=true", "ema.decay=0.9", "micro_batch=16"),
        ("precision=float64", "data.flip=true", "loss.matrix_weight=0.5", "optimizer.clip=1"),
        ("precision=bfloat16", "channels_last=true", "log.maps=2"),
    ],
    ids=["float32", "float64", "bfloat16"],
)
def test_cached_features_give_the_same_run(tmp_path, data, more):
    """Up to the rounding of features to float16."""
    options = (*HYBRID, *data, "optimizer.name=sgd", "optimizer.lr=0.5", "schedule.kind=constant", *more)
    run(tmp_path / "plain", *options)
    run(tmp_path / "cached", *options, f"data.cache={tmp_path / 'cache'}")
    bound = 2e-3 if "precision=bfloat16" in more else 2e-5
    first, second = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    assert first.keys() == second.keys()
    assert all(second[update] == pytest.approx(loss, rel=bound) for update, loss in first.items())
    rows = [checkpoint_at(tmp_path / name)["history"] for name in ("plain", "cached")]
    for row, other in zip(*rows, strict=True):
        assert row.keys() == other.keys()
        assert other["val_loss"] == pytest.approx(row["val_loss"], rel=bound)
        assert other["val_images"] == row["val_images"] == 64
    assert_same(*(checkpoint_at(tmp_path / name) for name in ("plain", "cached")), 20 * bound)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("process", [Process(0, 1), Process(1, 2)])
def test_features_of_batches(tmp_path, data, flip, process, monkeypatch):
    """Each batch holds the features of the images that would be drawn, flipped as they would be."""
    options = recipe(*HYBRID, *data, f"data.flip={flip}", f"data.cache={tmp_path / 'cache'}")
    run(tmp_path / "out", *HYBRID, *data, f"data.flip={flip}", f"data.cache={tmp_path / 'cache'}", "epochs=1")
    stem = coda_fast.load(tmp_path / "out" / "model.safetensors").stem
    source = open_data(options.data, 3, torch.device("cpu"), lambda items, *_, **__: items)
    (path,) = (tmp_path / "cache").glob("train-*.npy")
    stored = np.load(path)
    assert stored.shape == (1 + flip, 160, 4, 8, 8)
    assert stored.dtype == np.float16
    kept = features.Features(stored, {}, source.train)
    assert len(kept) == 160
    flipped = 0
    for step, (batch, images) in enumerate(
        zip(kept.training(3, 1, 2, 32, process), source.train.training(3, 1, 2, 32, process), strict=True), 2
    ):
        generator = torch.Generator().manual_seed(seeded(3, 1, step))
        inputs = to_float(augment(images.images, options.data, generator, process), torch.float32)
        expected = stem(inputs)
        torch.testing.assert_close(batch.images.float(), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.labels, images.labels)
        assert batch.valid is None
        flipped += not torch.equal(inputs, to_float(images.images, torch.float32))
        again = torch.Generator().manual_seed(seeded(3, 1, step))
        if flip:
            draw_flips(32, again)
        assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=again))
    assert bool(flipped) == flip
    for batch, images in zip(kept.evaluation(50), source.train.evaluation(50), strict=True):
        expected = stem(to_float(images.images, torch.float32))
        torch.testing.assert_close(batch.images.float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(kept.sample(3).images, source.train.sample(3).images)
    assert kept.facts() == source.train.facts()


def test_features_are_computed_once(tmp_path, data, computed):
    cache = f"data.cache={tmp_path / 'cache'}"
    run(tmp_path / "one", *HYBRID, *data, cache)
    assert computed == ["train", "val"]
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(before) == 4
    run(tmp_path / "two", *HYBRID, *data, cache)
    # what is above the stem, and the order of images, need no other features
    run(tmp_path / "three", *HYBRID, *data, cache, "model.ranks=[2, 2]", "batch_size=16", "epochs=1")
    assert computed == ["train", "val"]
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
    assert_same(checkpoint_at(tmp_path / "one"), checkpoint_at(tmp_path / "two"))


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ("seed=1", ["train", "val"]),  # other weights of the stem
        ("model.at=1", ["train", "val"]),
        ("data.flip=true", ["train"]),
        ("precision=bfloat16", ["train", "val"]),
        ("precision=float64", ["train", "val"]),
    ],
)
def test_features_of_other_stems_are_not_used(tmp_path, data, computed, change, splits):
    options = (*HYBRID, *data, f"data.cache={tmp_path / 'cache'}", "epochs=1")
    run(tmp_path / "one", *options)
    computed.clear()
    run(tmp_path / "two", *options, change)
    assert computed == splits


@pytest.mark.parametrize("change", ["picture", "label", "more", "size", "interpolation"])
def test_features_of_other_pictures_are_not_used(tmp_path, computed, change):
    pictures(tmp_path / "data", "train"), pictures(tmp_path / "data", "val", 2)
    cache = (f"data.cache={tmp_path / 'cache'}", "epochs=1")
    run(tmp_path / "one", *HYBRID, *folder_options(tmp_path / "data"), *cache)
    assert computed == ["train", "val"]
    computed.clear()
    options, train_folder = {}, tmp_path / "data" / "train"
    if change == "picture":
        shutil.copy(train_folder / "ant" / "001.png", train_folder / "ant" / "000.png")
    elif change == "label":
        (train_folder / "ant" / "005.png").rename(train_folder / "bee" / "006.png")
    elif change == "more":
        shutil.copy(train_folder / "ant" / "001.png", train_folder / "ant" / "006.png")
    elif change == "size":
        options = {"size": 10, "resize": 10}
    else:
        options = {"interpolation": "bicubic"}
    run(tmp_path / "two", *HYBRID, *folder_options(tmp_path / "data", **options), *cache)
    assert computed == (["train", "val"] if options else ["train"])


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing_that_is_used(tmp_path, data, monkeypatch, error, computed):
    images, calls = features._features, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return images(*arguments)

    options = (*HYBRID, *data, f"data.cache={tmp_path / 'cache'}", "epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(features, "_features", dying)
        with pytest.raises((Interrupted, KeyboardInterrupt, OSError, TrainingError)):
            run(tmp_path / "broken", *options)
    assert not list((tmp_path / "cache").iterdir())
    computed.clear()
    run(tmp_path / "again", *options)
    assert computed == ["train", "val"]


KILLED = """
import os, signal, sys
from coda_fast.cli import main
from coda_fast.train import features

features._features = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
main(["train", *sys.argv[1:]])
"""


def test_what_a_killed_run_leaves_is_deleted(tmp_path, data, computed):
    """It is as large as features, and nobody else would delete it."""
    (tmp_path / "killed.py").write_text(KILLED)
    cache = tmp_path / "cache"
    options = (*HYBRID, *data, f"data.cache={cache}", "epochs=1")
    finished(command(tmp_path / "killed", *options, program=(tmp_path / "killed.py",)), code=-9)
    assert sum(path.stat().st_size for path in cache.glob(".computing-*.npy")) > 160 * 4 * 64 * 2
    run(tmp_path / "out", *options)
    assert computed == ["train", "val"]
    names = sorted(path.name.partition("-")[0] + path.suffix for path in cache.iterdir())
    assert names == ["train.json", "train.npy", "val.json", "val.npy"]


def test_two_runs_compute_at_the_same_time(tmp_path, data, monkeypatch):
    """Another run that writes the same features meanwhile neither changes them nor ends this one."""
    images, calls = features._features, []
    options = (*HYBRID, *data, f"data.cache={tmp_path / 'cache'}", "epochs=1")
    run(tmp_path / "alone", *HYBRID, *data, f"data.cache={tmp_path / 'other'}", "epochs=1")

    def beside(*arguments):
        calls.append(1)
        if len(calls) == 3:  # the last batch of the images to train with
            run(tmp_path / "beside", *options)
        return images(*arguments)

    monkeypatch.setattr(features, "_features", beside)
    run(tmp_path / "out", *options)
    for name in ("out", "beside"):
        assert_same(checkpoint_at(tmp_path / "alone", 1), checkpoint_at(tmp_path / name, 1))


def test_a_damaged_file_of_features(tmp_path, data):
    options = (*HYBRID, *data, f"data.cache={tmp_path / 'cache'}", "epochs=1")
    run(tmp_path / "one", *options)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrainingError, match="^data.cache: expected features in .*, got a damaged file"):
        run(tmp_path / "two", *options)


def corrupt(folder):
    for name in ("train/ant/000", "train/bee/003", "val/cat/001"):
        (folder / f"{name}.JPEG").write_bytes(b"no picture")


def test_unreadable_pictures_weigh_nothing_with_a_cache(tmp_path):
    folder = class_folders(tmp_path / "data")
    corrupt(folder)
    options = (*HYBRID, *folder_options(folder), "model.out_channels=[4, 3]", "epochs=1", "precision=float64")
    for name, cache in (("plain", "null"), ("cached", tmp_path / "cache")):
        run(tmp_path / name, *options, f"data.cache={cache}")
    rows = [checkpoint_at(tmp_path / name, 1)["history"][0] for name in ("plain", "cached")]
    assert rows[0]["val_images"] == rows[1]["val_images"] == 10
    for key in ("train_loss", "val_loss", "train_accuracy"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-5)


def test_unreadable_pictures_are_counted_with_a_cache(tmp_path):
    folder = class_folders(tmp_path / "data")
    corrupt(folder)
    options = (*HYBRID, *folder_options(folder), "model.out_channels=[4, 3]", "epochs=1")
    options = (*options, f"data.cache={tmp_path / 'cache'}")
    for name in ("first", "from the cache"):
        assert run(tmp_path / name, *options)["unreadable"] == 3
    with pytest.raises(TrainingError, match="expected at most 1 images that cannot be read"):
        run(tmp_path / "out", *options, "data.max_corrupt=1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.pad=1", "data.pad: expected none beside data.cache, .* got 1"),
        ("data.scale=[0.5, 1]", "data.scale: expected none beside data.cache"),
        ("data.randaugment={n: 1}", "data.randaugment: expected none beside data.cache"),
        ("model.frozen=false", "data.cache: expected none unless a frozen stem .* with model.frozen=false"),
        ("data.kind=webdataset", "data.cache: expected none for data.kind=webdataset"),
    ],
)
def test_runs_that_cannot_keep_features(tmp_path, change, message):
    pictures(tmp_path / "data", "train"), pictures(tmp_path / "data", "val", 2)
    more = ("data.train_samples=8", "data.classes=2") if "webdataset" in change else ()
    with pytest.raises(TrainingError, match=f"^{message}") as refused:
        run(
            tmp_path / "out",
            *HYBRID,
            *folder_options(tmp_path / "data"),
            f"data.cache={tmp_path / 'c'}",
            change,
            *more,
        )
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "c").exists()


def test_random_crops_cannot_be_kept(tmp_path):
    pictures(tmp_path / "data", "train"), pictures(tmp_path / "data", "val", 2)
    options = (*HYBRID, *folder_options(tmp_path / "data", resize=11), "epochs=1", "precision=float64")
    with pytest.raises(
        TrainingError, match="^data.cache: expected none where data.resize is above data.size"
    ):
        run(tmp_path / "cached", *options, f"data.cache={tmp_path / 'cache'}")


def test_networks_without_a_stem_cannot_keep_features(tmp_path, data):
    message = "data.cache: expected none but for a HybridCoDANet with a stem, got a CoDANet"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path / "out", "model.name=coda_s_cifar10", *data, f"data.cache={tmp_path / 'cache'}")
    assert not (tmp_path / "cache").exists()


def test_conventional_networks_cannot_keep_features(tmp_path, data):
    with pytest.raises(TrainingError, match="^data.cache: expected none but for a HybridCoDANet .* CAMNet"):
        run(tmp_path / "out", *CNN, *data, "model.frozen=true", f"data.cache={tmp_path / 'cache'}")


def test_a_full_disk(tmp_path, data, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        TrainingError, match="^data.cache: expected .* GiB on the disk of .*cache, got"
    ) as refused:
        run(tmp_path / "out", *HYBRID, *data, f"data.cache={tmp_path / 'cache'}")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").iterdir())


def test_features_that_float16_cannot_hold(tmp_path, data):
    model = HybridCoDANet(
        "convolutions",
        [10],
        [2],
        [1],
        [1],
        at=0,
        temperature=1,
        stem_options=dict(widths=[4, 6], strides=[1, 2]),
    )
    torch.nn.init.constant_(model.stem.network[0][4].weight, 1e9)
    coda_fast.save(model, tmp_path / "large.safetensors")
    weights = f"model.stem_weights={tmp_path / 'large.safetensors'}"
    with pytest.raises(
        TrainingError, match="^data.cache: expected features that float16 can hold, got infinity"
    ):
        run(tmp_path / "out", *HYBRID, *data, f"data.cache={tmp_path / 'cache'}", weights)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_is_no_folder(tmp_path, data):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TrainingError, match="File exists: .*file"):
        run(tmp_path / "out", *HYBRID, *data, f"data.cache={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"
