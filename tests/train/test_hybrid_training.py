"""Training hybrid networks: frozen and trained stems, their weights from the run of a conventional network,
features that are kept on disk, and runs of several processes.
"""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support_train import assert_same, checkpoint_at, class_folders, command, finished, losses, recipe, run

import coda_fast
from coda_fast import HybridCoDANet, registry, train
from coda_fast.data.sources import Process, seeded, to_float
from coda_fast.hybrid import CAMNet
from coda_fast.train import TrainingError, features, loop
from coda_fast.train.augmentation import augment, draw_flips
from coda_fast.train.data import open_data

OPTIONS = "{widths: [4, 6], strides: [1, 2]}"
HYBRID = (
    "model.name=coda_hybrid",
    "model.stem=convolutions",
    "model.stem_weights=fresh",
    "model.at=0",
    f"model.stem_options={OPTIONS}",
    "model.temperature=4",
    "batch_size=32",
)
NONE = tuple(f"model.{key}=null" for key in ("out_channels", "ranks", "kernel_sizes", "strides"))
CNN = (
    f"model.name={next(name for name, model in registry.models().items() if model.network is CAMNet)}",
    "model.stem=convolutions",
    f"model.stem_options={OPTIONS}",
    "model.temperature=16",
    "batch_size=32",
    *NONE,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options for digits in colours, 160 to train with and 64 to validate with."""
    from sklearn.datasets import load_digits

    digits, path = load_digits(), tmp_path_factory.mktemp("data") / "digits.npz"
    grey = (digits.images * 255 / 16).astype(np.uint8)[:224]
    images, labels = np.stack([grey, np.roll(grey, 1, 1), 255 - grey], -1), digits.target[:224]
    parts = {"train": slice(160), "test": slice(160, 224)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    np.savez(path, **arrays, **{f"{name}_labels": labels[part] for name, part in parts.items()})
    return ("data.kind=npz", f"data.path={path}")


def pictures(root, split, count=6, side=(14, 12)):
    """Write noise in two classes."""
    rng = np.random.default_rng(len(split))
    for name in ("ant", "bee"):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(buffer, "PNG")
            (folder / f"{number:03d}.png").write_bytes(buffer.getvalue())


def folder_options(path, **options):
    values = dict(kind="folder", path=path, resize=8, size=8, workers=0) | options
    return (
        *(f"data.{key}={value}" for key, value in values.items()),
        "model.out_channels=[4, 2]",
        "batch_size=4",
    )


class Interrupted(Exception):
    """An exception that a test raises in the middle of a run."""


def interrupted(output, update, *options):
    """Run until before an update, as if the process were killed then."""
    step = loop.Trainer.step

    def dying(self, batch):
        if self.state.updates == update:
            raise Interrupted
        return step(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "step", dying)
        with pytest.raises(Interrupted):
            run(output, *options)


def assert_resumes_exactly(folder, *options):
    """Assert that a run that is interrupted in its second epoch ends as an undisturbed one, bit for bit."""
    options = (*options, "checkpoint.every_steps=3")
    run(folder / "whole", *options)
    interrupted(folder / "broken", 8, *options)
    run(folder / "broken", *options, resume="auto")
    assert_ended_alike(folder / "whole", folder / "broken")


def assert_ended_alike(one, two):
    assert_same(checkpoint_at(one), checkpoint_at(two))
    assert losses(one) == losses(two)
    for row, other in zip(*(checkpoint_at(path)["history"] for path in (one, two)), strict=True):
        assert {k: v for k, v in row.items() if k != "images_per_second"} == {
            k: v for k, v in other.items() if k != "images_per_second"
        }


# -- stems that are frozen or trained
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_what_a_run_changes(tmp_path, data, frozen, capsys):
    """A frozen stem, with its statistics, stays bit for bit; a trained one changes in all of its tensors."""
    options = (*HYBRID, *data, f"model.frozen={frozen}", "ema.decay=0.9", "optimizer.weight_decay=0.1")
    train.run(recipe(*options, "epochs=1"), tmp_path)
    content = checkpoint_at(tmp_path, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seeded(0))
        start = coda_fast.create_model("coda_hybrid", num_classes=10, **recipe(*options).model.arguments())
    before = {f"model.{name}": tensor for name, tensor in start.state_dict().items()}
    for name, tensor in content["model"].items():
        stays = (frozen and ".stem." in name) or name.endswith((".mean", ".std"))
        assert torch.equal(tensor, before[name]) == stays, name
    assert any(".stem." in name for name in content["optimizer"]["state"]) != frozen
    model = coda_fast.load(tmp_path / "model.safetensors")
    assert (model.stem.frozen, model.stem_name) == (frozen, "convolutions, stage 0")
    trained, total = (sum(p.numel() for p in part.parameters()) for part in (model.layers, model))
    said = f"parameters: {trained if frozen else total:,} of {total:,} are trained"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ("model.frozen=false", "ema.decay=0.9"),
        ("data.pad=1", "data.flip=true", "loss.matrix_weight=0.1", "optimizer.clip=1"),
        ("data.flip=true", "data.cache=CACHE", "ema.decay=0.9"),
    ],
    ids=["trained", "frozen", "cached"],
)
def test_going_on_is_exact(tmp_path, data, more):
    more = [option.replace("CACHE", str(tmp_path / "cache")) for option in more]
    assert_resumes_exactly(tmp_path, *HYBRID, *data, *more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.stem=nothing", "model: stem: expected a model of timm or a registered stem"),
        ("model.stem=hf-hub:x/y", "model: stem: expected a model of timm or a registered stem"),
        ("model.at=7", "model: at: expected a stage, 0 to 1 or one of 0, 1, got 7"),
        ("model.at=layer2", "model: at: expected a stage, 0 to 1 or one of 0, 1, got 'layer2'"),
        ("model.at=100", "model.at: .*less than or equal to 64"),
        ("model.frozen=maybe", "model.frozen: expected boolean"),
        ("model.stem_options=[1]", "model.stem_options: expected dict"),
        ("model.stem_options={checkpoint_path: x}", "model: stem_options: expected arguments that describe"),
        ("model.stem_options={depth: 3}", "model: stem_options: expected those of 'convolutions'"),
        ("model.stem_weights=nothing.file", "model.stem_weights: nothing.file: no such checkpoint"),
        ("model.stem_weights=pretrained", "model: stem_weights: expected a file for convolutions"),
    ],
)
def test_stems_that_are_refused(tmp_path, data, change, message):
    with pytest.raises(TrainingError, match=message) as refused:
        run(tmp_path / "out", *HYBRID, *data, change)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


# -- the stem from the run of a conventional network
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnn(tmp_path_factory, data):
    """The folder of a run of a conventional network."""
    output = tmp_path_factory.mktemp("cnn")
    run(output, *CNN, *data, "optimizer.lr=0.02")
    return output


def test_a_conventional_network_trains(cnn):
    model, rows = coda_fast.load(cnn / "model.safetensors"), checkpoint_at(cnn)["history"]
    assert type(model) is CAMNet
    assert (model.stem.at, model.stem.frozen) == (1, False)
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["train_accuracy"] > 0.25


def test_a_hybrid_from_the_stem_of_a_run(tmp_path, data, cnn):
    """The stem is cut earlier than in the run that trained it, and stays as it was there."""
    shutil.copy(cnn / "model.safetensors", tmp_path / "cnn.safetensors")
    options = (
        *HYBRID,
        *data,
        f"model.stem_weights={tmp_path / 'cnn.safetensors'}",
        "checkpoint.every_steps=3",
    )
    run(tmp_path / "whole", *options)
    stem = coda_fast.load(tmp_path / "whole" / "model.safetensors").stem
    source = coda_fast.load(cnn / "model.safetensors").stem.network.state_dict()
    assert 0 < len(stem.network.state_dict()) < len(source)
    for name, tensor in stem.network.state_dict().items():
        assert torch.equal(tensor, source[name])
    interrupted(tmp_path / "broken", 8, *options)
    (tmp_path / "cnn.safetensors").unlink()
    run(tmp_path / "broken", *options, resume="auto")
    assert_ended_alike(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(TrainingError, match=r"other values of model.stem_weights \(was '.*', now None\)"):
        run(tmp_path / "broken", *options, "model.stem_weights=null", resume="auto")


def test_going_on_with_features_of_a_stem_from_a_run(tmp_path, data, cnn):
    stem = f"model.stem_weights={cnn / 'model.safetensors'}"
    assert_resumes_exactly(tmp_path, *HYBRID, *data, stem, f"data.cache={tmp_path / 'cache'}")


def test_going_on_with_features_of_a_network_from_a_file(tmp_path, data):
    run(tmp_path / "start", *HYBRID, *data, "epochs=1", "seed=7")
    weights = f"model.weights={tmp_path / 'start' / 'model.safetensors'}"
    cache = f"data.cache={tmp_path / 'cache'}"
    assert_resumes_exactly(tmp_path, "model.name=coda_hybrid", *NONE, *data, "batch_size=32", weights, cache)


def test_going_on_without_the_file_of_a_stem_that_the_model_names(tmp_path, data, cnn, monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(registry, "_LISTENERS", [])
    config = dict(stem="convolutions", at=0, stem_options={"widths": [4, 6], "strides": [1, 2]})
    layers = dict(out_channels=[4, 10], ranks=[4, 4], kernel_sizes=[3, 3], strides=[2, 1], temperature=4.0)
    registry.add("tiny_hybrid", HybridCoDANet, config | layers, "tests")
    shutil.copy(cnn / "model.safetensors", tmp_path / "cnn.safetensors")
    options = ("model.name=tiny_hybrid", "batch_size=32", "checkpoint.every_steps=3", *data)
    options = (*options, f"model.stem_weights={tmp_path / 'cnn.safetensors'}")
    run(tmp_path / "whole", *options)
    interrupted(tmp_path / "broken", 8, *options)
    (tmp_path / "cnn.safetensors").unlink()
    run(tmp_path / "broken", *options, resume="auto")
    assert_ended_alike(tmp_path / "whole", tmp_path / "broken")


def test_files_that_have_no_such_stem(tmp_path, data, cnn):
    run(tmp_path / "early", *HYBRID, *data, "epochs=1")
    weights = f"model.stem_weights={tmp_path / 'early' / 'model.safetensors'}"
    with pytest.raises(
        TrainingError, match="expected the weights of a stem 'convolutions' cut at 1, found no"
    ):
        run(tmp_path / "out", *HYBRID, *data, "model.at=1", weights)
    other = (
        "model.stem_options={widths: [8, 6], strides: [1, 2]}",
        f"model.stem_weights={cnn}/model.safetensors",
    )
    with pytest.raises(TrainingError, match=r"0.0.weight: expected \[8, 3, 3, 3\], got \[4, 3, 3, 3\]"):
        run(tmp_path / "out", *HYBRID, *data, *other)


def test_a_network_from_a_file_keeps_its_stem(tmp_path, data):
    run(tmp_path / "start", *HYBRID, *data, "epochs=1", "model.frozen=false")
    weights = f"model.weights={tmp_path / 'start' / 'model.safetensors'}"
    run(tmp_path / "out", "model.name=coda_hybrid", *NONE, *data, "batch_size=32", "epochs=1", weights)
    model = coda_fast.load(tmp_path / "out" / "model.safetensors")
    assert (model.stem_name, model.stem.frozen) == ("convolutions, stage 0", False)


@pytest.mark.parametrize(
    "change", ["model.stem=resnet18", "model.at=1", "model.stem_options={}", "model.stem_weights=nothing"]
)
def test_other_stems_than_that_of_the_file(tmp_path, data, change):
    run(tmp_path / "start", *HYBRID, *data, "epochs=1")
    weights = f"model.weights={tmp_path / 'start' / 'model.safetensors'}"
    with pytest.raises(TrainingError, match=f"^{change.partition('=')[0]}: expected "):
        run(
            tmp_path / "out",
            "model.name=coda_hybrid",
            *NONE,
            *data,
            "batch_size=32",
            weights,
            change,
            "epochs=1",
        )


def test_the_stem_of_a_file_is_trained_too(tmp_path, data):
    run(tmp_path / "start", *HYBRID, *data, "epochs=1")
    options = ("model.name=coda_hybrid", *NONE, *data, "batch_size=32", "model.frozen=false")
    options = (
        *options,
        f"model.weights={tmp_path / 'start' / 'model.safetensors'}",
        "checkpoint.every_steps=3",
    )
    assert_resumes_exactly(tmp_path, *options)
    before, after = (
        coda_fast.load(tmp_path / name / "model.safetensors").stem for name in ("start", "whole")
    )
    assert (before.frozen, after.frozen) == (True, False)
    assert not torch.equal(before.network[0][0].weight, after.network[0][0].weight)


# -- features that are kept
# ------------------------------------------------------------------------------------------------------------


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


# -- several processes
# ------------------------------------------------------------------------------------------------------------

TWO = ("--standalone", "--nproc-per-node=2")
BOUND = 1e-12  # float64: sums in another order


def two(output, *options, resume=None):
    """Train in two processes."""
    start = ("--quiet",) if resume is None else ("--quiet", "--resume", resume)
    finished(command(output, *options, launcher=TWO, options=start))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("ddp", ("loss.matrix_weight=0.1",)),
        ("ddp", ("data.flip=true", "data.cache=CACHE")),
        ("fsdp2", ("data.flip=true", "data.cache=CACHE")),
        ("fsdp2", ()),
    ],
    ids=["ddp", "ddp, cached", "fsdp2, cached", "fsdp2"],
)
def test_two_processes_are_as_one(tmp_path, data, strategy, more):
    """A frozen stem gives the run of one process; resumed in the middle of an epoch, it ends the same."""
    common = (
        *HYBRID,
        *data,
        "precision=float64",
        "ema.decay=0.9",
        "checkpoint.every_steps=3",
        "checkpoint.keep=9",
    )
    options = [*common, *more, f"strategy={strategy}"]
    for number in (1, 2):  # each computes features of its own
        chosen = [option.replace("CACHE", str(tmp_path / f"cache{number}")) for option in options]
        if number == 1:
            run(tmp_path / "one", *chosen)
    two(tmp_path / "two", *chosen)
    assert_same(checkpoint_at(tmp_path / "one"), checkpoint_at(tmp_path / "two"), BOUND)
    middle = tmp_path / "two" / "checkpoints" / "epoch_0001_step_0000004.pt"
    two(tmp_path / "again", *chosen, resume=middle)
    assert_same(
        checkpoint_at(tmp_path / "two"),
        checkpoint_at(tmp_path / "again"),
        BOUND if strategy == "fsdp2" else 0.0,
    )


@pytest.fixture(scope="module")
def two_train_a_stem(tmp_path_factory, data):
    """The same run of two processes that train a stem, undisturbed and resumed."""
    folder = tmp_path_factory.mktemp("stem")
    options = (*HYBRID, *data, "model.frozen=false", "precision=float64", "strategy=fsdp2")
    options = (*options, "checkpoint.every_steps=3", "checkpoint.keep=9")
    two(folder / "whole", *options)
    two(folder / "again", *options, resume=folder / "whole" / "checkpoints" / "epoch_0001_step_0000004.pt")
    return folder


@pytest.mark.slow
def test_two_processes_train_a_stem(two_train_a_stem):
    whole, again = (checkpoint_at(two_train_a_stem / name) for name in ("whole", "again"))
    assert_same(whole, again, BOUND)
    model = coda_fast.load(two_train_a_stem / "whole" / "model.safetensors")
    assert not model.stem.frozen
    assert int(model.stem.network[0][1].num_batches_tracked) == 10


@pytest.mark.slow
def test_an_evaluation_by_two_processes_is_that_of_the_weights_that_are_kept(two_train_a_stem, data):
    whole, again = (checkpoint_at(two_train_a_stem / name) for name in ("whole", "again"))
    assert again["history"][1]["val_loss"] == pytest.approx(whole["history"][1]["val_loss"], rel=1e-10)
