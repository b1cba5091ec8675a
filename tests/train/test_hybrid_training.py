"""Training hybrid networks: frozen and trained stems, their weights from the run of a conventional network,
and runs of several processes.
"""

import shutil

import pytest
import torch
from support_hybrid import (
    CNN,
    HYBRID,
    NONE,
    assert_ended_alike,
    assert_resumes_exactly,
    coloured_digits,
    interrupted,
)
from support_train import assert_same, checkpoint_at, command, finished, recipe, run

import coda_fast
from coda_fast import HybridCoDANet, registry, train
from coda_fast.data.sources import seeded
from coda_fast.hybrid import CAMNet
from coda_fast.train import TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured_digits(tmp_path_factory.mktemp("data"))


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
