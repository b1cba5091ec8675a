"""Runs that start from weights, and layers that are not trained."""

import functools
import os
import shutil

import branching
import numpy as np
import pytest
import torch
from support_train import assert_same, checkpoint_at, command, finished, losses, recipe, run

import coda_fast
from coda_fast import checkpoints, cli, registry, train
from coda_fast.data.digits import digits
from coda_fast.train import TrainingError, load_recipe, loop
from coda_fast.train.weights import checksum


class Interrupted(Exception):
    """An exception that a test raises in the middle of an epoch."""


def write_digits(path, classes, per_class=None):
    """Write scikit-learn's digits of some classes, numbered from 0, with ``per_class`` training images of
    each (None: all).
    """
    arrays = {}
    for name, split in zip(("train", "test"), digits()[:2], strict=True):
        images, labels = split.images.numpy()[:, 0], split.labels.numpy()
        limit = per_class if name == "train" else None
        index = np.concatenate([np.flatnonzero(labels == c)[:limit] for c in classes])
        arrays |= {f"{name}_images": images[index], f"{name}_labels": labels[index] - classes[0]}
    np.savez(path, **arrays, class_names=[str(c) for c in classes])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a network for the digits 0 to 5, model.safetensors, and with two images of each of the
    digits 6 to 9, few.npz.
    """
    folder = tmp_path_factory.mktemp("weights")
    write_digits(folder / "many.npz", range(6))
    write_digits(folder / "few.npz", range(6, 10), 2)
    options = ("data.kind=npz", f"data.path={folder / 'many.npz'}", "accelerator=cpu", "log.maps=0")
    train.run(load_recipe("digits-s", [*options, "epochs=8"]), folder / "run", progress=False)
    shutil.copy(folder / "run" / "model.safetensors", folder)
    return folder


@pytest.fixture
def weights(folder):
    return folder / "model.safetensors"


def options(folder, *more):
    """A run of two epochs with all digits or, with ``data.path``, with others."""
    return (
        "epochs=2",
        "log.maps=0",
        "log.tensorboard=false",
        "log.every=4",
        "accelerator=cpu",
        f"model.weights={folder / 'model.safetensors'}",
        *more,
    )


def tune(output, folder, *more, resume=None, progress=False):
    """Train all digits from the weights in ``folder``, and return the last row of the history."""
    return train.run(load_recipe("digits-s", options(folder, *more)), output, resume, progress)


@pytest.fixture
def at_the_start(monkeypatch):
    """The weights and the moving average before the first step, by name."""
    found, step = {}, loop.Trainer.step

    def noting(self, batch):
        if not found:
            found["setup"] = self.setup
            found["model"] = {k: t.clone() for k, t in self.setup.objective.model.state_dict().items()}
            if self.setup.ema is not None:
                found["ema"] = {k: t.clone() for k, t in self.setup.ema.module.model.state_dict().items()}
        return step(self, batch)

    monkeypatch.setattr(loop.Trainer, "step", noting)
    return found


# -- what a run starts from
# ------------------------------------------------------------------------------------------------------------


def test_fine_tuning_beats_training_from_scratch(tmp_path, folder):
    """With two images of each of four new classes, a network that has seen other digits is better than one
    that has not. Measured: 0.67 to 0.75 from scratch, 0.80 to 0.85 from the weights.
    """
    few = (
        "data.kind=npz",
        f"data.path={folder / 'few.npz'}",
        "accelerator=cpu",
        "log.maps=0",
        "log.tensorboard=false",
        "batch_size=8",
        "evaluation.every=20",
    )
    starts = {"scratch": (), "weights": (f"model.weights={folder / 'model.safetensors'}",)}
    found: dict[str, list[float]] = {name: [] for name in starts}
    for seed in range(3):
        for name, start in starts.items():
            chosen = load_recipe("digits-s", [*few, *start, f"seed={seed}"])
            row = train.run(chosen, tmp_path / f"{name}{seed}", progress=False)
            found[name].append(row["val_accuracy"])
    assert all(new > old + 0.02 for new, old in zip(found["weights"], found["scratch"], strict=True)), found
    assert sum(found["weights"]) / 3 > sum(found["scratch"]) / 3 + 0.07, found


def test_the_network_is_that_of_the_file(tmp_path, folder, weights, at_the_start, capsys):
    tune(tmp_path, folder, "ema.decay=0.9", progress=True)
    stored = coda_fast.load(weights)
    assert stored.num_classes == 6
    for name, tensor in at_the_start["model"].items():
        if name.startswith("layers.2."):
            assert tensor.shape[0] == (10 if "reduction" not in name else stored.layers[2].rank)
        else:
            assert torch.equal(tensor, stored.state_dict()[name]), name
        assert torch.equal(at_the_start["ema"][name], tensor), name
    net = coda_fast.load(tmp_path / "model.safetensors")
    assert net.class_names == [str(c) for c in range(10)]
    said = capsys.readouterr().err
    count = sum(parameter.numel() for parameter in net.parameters())
    assert f"weights: {weights} (sha256 {checksum(str(weights))[:12]}), a CoDANet with layers of" in said
    assert "new: layers.2, for 10 classes instead of 6" in said
    assert f"parameters: {count:,} of {count:,} are trained; frozen: none" in said
    stored = checkpoints.read_metadata(tmp_path / "model.safetensors")
    assert stored["origin"] == {"name": str(weights), "sha256": checksum(str(weights))}
    assert stored["recipe"]["model"]["weights"] == str(weights)


def test_the_same_classes_keep_the_last_layer(tmp_path, folder, weights, at_the_start, capsys):
    data = ("data.kind=npz", f"data.path={folder / 'many.npz'}")
    tune(tmp_path, folder, *data, progress=True)
    stored = coda_fast.load(weights).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in at_the_start["model"].items())
    said = capsys.readouterr().err
    assert "new: " not in said
    assert "the last layer is kept" not in said


def test_a_last_layer_that_is_kept_for_other_classes_is_said(tmp_path, folder, capsys):
    write_digits(tmp_path / "others.npz", range(4, 10))
    tune(tmp_path / "out", folder, "data.kind=npz", f"data.path={tmp_path / 'others.npz'}", progress=True)
    assert "the last layer is kept: its 6 classes were ['0', '1', '2', " in capsys.readouterr().err
    assert coda_fast.load(tmp_path / "out" / "model.safetensors").class_names == list("456789")


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_converted_to_the_dtype_of_the_run(tmp_path, folder, at_the_start, dtype, precision):
    stored = coda_fast.load(folder / "model.safetensors", dtype=dtype)
    coda_fast.save(stored, tmp_path / "model.safetensors")
    tune(tmp_path / "out", tmp_path, "epochs=1", f"precision={precision}", "batch_size=512")
    wanted = torch.float64 if precision == "float64" else torch.float32
    for name, tensor in at_the_start["model"].items():
        assert tensor.dtype == wanted
        if not name.startswith("layers.2."):
            assert torch.equal(tensor, stored.state_dict()[name].to(wanted))


def test_a_temperature_of_the_recipe_replaces_that_of_the_file(tmp_path, folder, weights, capsys):
    assert coda_fast.load(weights).temperature != 77
    tune(tmp_path, folder, "model.temperature=77", "epochs=1", progress=True)
    assert coda_fast.load(tmp_path / "model.safetensors").temperature == 77
    assert "model.temperature: 77 by the recipe, instead of " in capsys.readouterr().err


def test_a_logit_bias_is_replaced_beside_a_new_last_layer_alone(tmp_path, folder):
    tune(tmp_path / "a", folder, "model.logit_bias=-3", "epochs=1")
    assert coda_fast.load(tmp_path / "a" / "model.safetensors").logit_bias == -3
    data = ("data.kind=npz", f"data.path={folder / 'many.npz'}", "model.logit_bias=-3")
    with pytest.raises(TrainingError, match="model.logit_bias: expected -2.19722 as in .*is kept, got -3"):
        tune(tmp_path / "b", folder, *data)
    assert not (tmp_path / "b").exists()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_CLASSES", registry.classes())
    monkeypatch.setattr(registry, "_MODELS", registry.models())
    monkeypatch.setattr(registry, "_LISTENERS", [])
    branching.register()


def test_a_registered_network(tmp_path, registered, at_the_start):
    """A network of another class than a chain starts from weights, has frozen layers, and is resumed."""
    stored = coda_fast.create_model("branching_xs")
    coda_fast.save(stored, tmp_path / "model.safetensors")
    more = ("model.freeze=[smooth, far]", "ema.decay=0.9", "optimizer.weight_decay=0.1", "model.rank=4")
    tune(tmp_path / "whole", tmp_path, *more)
    net = coda_fast.load(tmp_path / "whole" / "model.safetensors")
    assert type(net) is branching.Branching
    for name, tensor in net.state_dict().items():
        if not name.startswith("classes."):
            assert torch.equal(at_the_start["model"][name], stored.state_dict()[name])
            assert torch.equal(tensor, stored.state_dict()[name]) == name.startswith(("smooth.", "far.")), (
                name
            )
    first = tmp_path / "whole" / "checkpoints" / "epoch_0001_step_0000000.pt"
    tune(tmp_path / "again", tmp_path, *more, resume=str(first))
    assert_same(checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "again"))
    with pytest.raises(TrainingError, match="model.ranks: expected none, because .* holds a Branching, got"):
        tune(tmp_path / "out", tmp_path, "model.ranks=[4, 4]")
    with pytest.raises(TrainingError, match="model.rank: expected rank 4 as in .*, got 2, which is rank 2"):
        tune(tmp_path / "out", tmp_path, "model.rank=2")
    registry._CLASSES.pop("Branching")
    with pytest.raises(TrainingError, match="expected a network of .*, got .'Branching'.; import the module"):
        tune(tmp_path / "out", tmp_path, *more, resume=str(first))
    with pytest.raises(TrainingError, match="model.weights: .*import the module that registers it"):
        tune(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


# -- what is refused
# ------------------------------------------------------------------------------------------------------------


def write_nothing(path, weights):
    pass


def write_text(path, weights):
    path.write_text("notes")


def write_other_tensors(path, weights):
    checkpoints.require_safetensors().torch.save_file({"x": torch.zeros(2)}, path)


def write_infinity(path, weights):
    net = coda_fast.load(weights)
    with torch.no_grad():
        net.layers[1].weight[0] = float("inf")
    coda_fast.save(net, path)


def write_what_overflows(path, weights):
    net = coda_fast.load(weights, dtype=torch.float64)
    with torch.no_grad():
        net.layers[0].weight[0] = 1e300
    coda_fast.save(net, path)


def write_checkpoint(path, weights):
    shutil.copy(weights.parent / "run" / "checkpoints" / "best.pt", path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, "no such file: .*x.safetensors"),
        (write_text, ".*x.safetensors: not a safetensors file: "),
        (write_other_tensors, ".*x.safetensors: expected a checkpoint of coda_fast"),
        (write_infinity, "expected finite numbers in .*x.safetensors, got others in layers.1.weight"),
        (write_what_overflows, "expected finite numbers in .*x.safetensors, got others in layers.0.weight"),
        (
            write_checkpoint,
            "expected a model file such as model.safetensors, got .*x.safetensors, a file of torch.save; if "
            "it is a checkpoint of a run, --resume goes on with that run, and the model.safetensors of its",
        ),
        (lambda path, weights: path.mkdir(), ".*x.safetensors: expected a file, got a folder"),
        (lambda path, weights: os.mkfifo(path), ".*x.safetensors: expected a file, got a pipe"),
    ],
)
def test_files_that_are_no_weights(tmp_path, weights, write, message):
    path = tmp_path / "x.safetensors"
    write(path, weights)
    with pytest.raises(TrainingError, match=f"^model.weights: {message}") as refused:
        run(tmp_path / "out", f"model.weights={path}", *map(_null, LAYERS))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


LAYERS = ("out_channels", "ranks", "kernel_sizes", "strides")


def _null(key):
    return f"model.{key}=null"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.out_channels=[4, 10]",),
            r"model.out_channels: expected \[\d+, \d+, 6\] as in .*, got \[4, 10\]",
        ),
        (
            ("model.out_channels=[16, 9, 10]",),
            r"model.out_channels: expected \[.*\] as in .*, got \[16, 9, 10\]",
        ),
        (("model.ranks=[1, 2, 3]",), r"model.ranks: expected \[.*\] as in .*, got \[1, 2, 3\]"),
        (("model.kernel_sizes=[3, 3, 5]",), r"model.kernel_sizes: expected .* as in .*, got \[3, 3, 5\]"),
        (("model.strides=[3, 1, 1]",), r"model.strides: expected .* as in .*, got \[3, 1, 1\]"),
        (("model.norm=l2",), "model.norm: expected squash as in .*, got l2"),
        (("model.rank=3",), r"model.rank: expected ranks \[.*\] as in .*, got 3, which is ranks \[3, "),
        (("model.backend=fast",), "model.weights: .*backend.*'fast'"),
        (("data.kind=cifar10", "data.path=x.npz"), "data.path: no such file or folder"),
        (
            ("model.freeze=[layers.0, layer.1]",),
            r"model.freeze: expected names or patterns of layers \(layers.0, "
            r"layers.1, layers.2\), got \['layer.1'\]",
        ),
        (("model.freeze=[layers.7]",), r"model.freeze: .*, got \['layers.7'\]"),
        (
            ("model.freeze=['*']",),
            r"model.freeze: expected a layer that is trained, got \['\*'\], which is all",
        ),
        (("model.freeze=[layers]",), r"model.freeze: expected a layer that is trained, got \['layers'\]"),
        (("model.freeze=[layers.0, 'layers.[12]']",), "model.freeze: expected a layer that is trained"),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit_the_weights(tmp_path, folder, overrides, message):
    with pytest.raises(TrainingError, match=message) as refused:
        tune(tmp_path / "out", folder, *overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["model.freeze=[1, 2]", "model.freeze=['']", "model.weights=''"])
def test_values_that_are_no_names(change):
    with pytest.raises(TrainingError, match=f"{change.partition('=')[0]}.*: expected "):
        load_recipe("digits-s", [change])


def test_layers_of_the_recipe_that_are_those_of_the_file(tmp_path, folder, weights):
    config = coda_fast.load(weights).config()
    same = [f"model.{key}={config[key]}" for key in ("ranks", "kernel_sizes", "strides")]
    tune(tmp_path, folder, *same, f"model.out_channels={[*config['out_channels'][:-1], 10]}", "epochs=1")
    assert coda_fast.load(tmp_path / "model.safetensors").config()["ranks"] == config["ranks"]


@pytest.mark.parametrize("name", ["model.safetensors", "model_best.safetensors", "recipe.yaml", "curve.png"])
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_run_never_writes_over_its_weights(tmp_path, folder, name, link):
    weights = tmp_path / "model.safetensors"
    shutil.copy(folder / "model.safetensors", weights)
    before = weights.read_bytes()
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    link(weights, tmp_path / "out" / name)
    with pytest.raises(
        TrainingError, match=f"output: expected another file than those that are read, got .*{name}, which is"
    ):
        tune(tmp_path / "out", tmp_path)
    assert weights.read_bytes() == before


# -- layers that are not trained
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "prefixes"),
    [
        ("layers.0", ("model.layers.0.",)),
        ("[layers.1]", ("model.layers.1.",)),
        ("'layers.[01]'", ("model.layers.0.", "model.layers.1.")),
        ("[layers.2]", ("model.layers.2.",)),
    ],
)
@pytest.mark.parametrize(
    "more",
    [
        ("optimizer.name=adamw", "optimizer.weight_decay=0.5", "ema.decay=0.9", "optimizer.clip=1"),
        # madgrad moves weights even if gradients are zero
        ("optimizer.name=madgrad", "optimizer.weight_decay=0.1", "ema.decay=0.99", "ema.warmup=true"),
        ("loss.matrix_weight=0.1", "optimizer.weight_decay=0.5"),
    ],
    ids=["adamw", "madgrad", "matrix"],
)
def test_frozen_layers_stay_bit_for_bit(tmp_path, folder, at_the_start, frozen, prefixes, more):
    tune(tmp_path, folder, f"model.freeze={frozen}", "epochs=1", *more)
    content = checkpoint_at(tmp_path, 1)
    for part in ("model", "ema"):
        for name, tensor in (content[part] or {}).items():
            same = torch.equal(tensor, at_the_start["model"][name.removeprefix("model.")])
            assert same == name.startswith(prefixes), (part, name)
    assert not [name for name in content["optimizer"]["state"] if name.startswith(prefixes)]
    net = coda_fast.load(tmp_path / "model.safetensors")
    assert all(parameter.requires_grad for parameter in net.parameters()), "the file freezes nothing"


def test_a_compiled_network_with_a_frozen_layer(tmp_path, folder, monkeypatch):
    # graphs are made, and run without inductor's minutes
    compiler = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiler)
    more = ("epochs=1", "precision=float64", "optimizer.weight_decay=0.1", "model.freeze=layers.1")
    for name in ("false", "true"):
        tune(tmp_path / name, folder, *more, f"compile={name}")
    assert_same(checkpoint_at(tmp_path / "false", 1), checkpoint_at(tmp_path / "true", 1), 1e-12)


def test_trained_layers_learn_as_if_nothing_were_frozen(tmp_path):
    """The first update of the layers that are trained is that of a run which trains all."""
    run(tmp_path / "all", "epochs=1", "precision=float64", "batch_size=1024", "optimizer.name=sgd")
    run(
        tmp_path / "some",
        "epochs=1",
        "precision=float64",
        "batch_size=1024",
        "optimizer.name=sgd",
        "model.freeze=layers.0",
    )
    both = [checkpoint_at(tmp_path / name, 1)["model"] for name in ("all", "some")]
    for name, tensor in both[0].items():
        close = torch.allclose(tensor, both[1][name], rtol=1e-12, atol=0)
        assert close != name.startswith("model.layers.0."), name


def test_frozen_layers_are_said(tmp_path, capsys):
    train.run(recipe("epochs=1", "model.freeze=layers.0"), tmp_path)
    net = coda_fast.load(tmp_path / "model.safetensors")
    trained, total = (sum(p.numel() for p in part.parameters()) for part in (net.layers[1], net))
    assert f"parameters: {trained:,} of {total:,} are trained; frozen: layers.0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_as_one(tmp_path, folder, strategy):
    """Runs from weights, with a frozen layer at the beginning or in the middle, are the same with two
    processes, and the frozen layer stays as it is.
    """
    start = ("precision=float64", "ema.decay=0.9", "optimizer.weight_decay=0.1", "optimizer.name=adamw")
    for frozen in ("layers.0", "layers.1"):
        more = (*start, f"model.freeze={frozen}", *map(_null, LAYERS))
        more = (*more, f"model.weights={folder / 'model.safetensors'}")
        one, two = tmp_path / f"one_{frozen}", tmp_path / f"two_{frozen}"
        run(one, *more)
        launcher = ("--standalone", "--nproc-per-node=2")
        finished(command(two, *more, f"strategy={strategy}", launcher=launcher))
        assert_same(checkpoint_at(one), checkpoint_at(two), 1e-12)
        first = ("--quiet", "--resume", two / "checkpoints" / "epoch_0001_step_0000000.pt")
        again = tmp_path / f"again_{frozen}"
        finished(command(again, *more, f"strategy={strategy}", launcher=launcher, options=first))
        assert_same(checkpoint_at(two), checkpoint_at(again), 1e-12 if strategy == "fsdp2" else 0.0)
        stored = coda_fast.load(folder / "model.safetensors", dtype=torch.float64).state_dict()
        for part in ("model", "ema"):
            for name, tensor in checkpoint_at(two)[part].items():
                if name.startswith(f"model.{frozen}."):
                    assert torch.equal(tensor, stored[name.removeprefix("model.")])


OTHER = """
import os, sys
from coda_fast.cli import main
from coda_fast.train import weights

if os.environ["RANK"] == "1":
    weights.checksum = lambda name, plain=weights.checksum: plain(name)[::-1]
main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_other_weights_on_another_host_are_refused(tmp_path, folder):
    (tmp_path / "other.py").write_text(OTHER)
    more = (f"model.weights={folder / 'model.safetensors'}", *map(_null, LAYERS))
    launcher = ("--standalone", "--nproc-per-node=2")
    program = (tmp_path / "other.py",)
    printed = finished(command(tmp_path / "out", *more, launcher=launcher, program=program), code=1)
    sha256 = checksum(str(folder / "model.safetensors"))
    message = (
        f"coda-fast: model.weights: expected the same file in every process, got "
        f"{folder / 'model.safetensors'} with SHA-256 {sha256[:12]} in process 0, {sha256[::-1][:12]} in "
        "process 1"
    )
    assert printed.count(message) == 2
    assert not (tmp_path / "out").exists()


# -- going on
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, folder, monkeypatch):
    """A run from a copy of the weights, a.safetensors, that was interrupted after 36 updates; its recipe; and
    the same run undisturbed.
    """
    shutil.copy(folder / "model.safetensors", tmp_path / "a.safetensors")
    more = (
        f"model.weights={tmp_path / 'a.safetensors'}",
        "model.freeze=layers.0",
        "ema.decay=0.9",
        "optimizer.name=adamw",
        "optimizer.weight_decay=0.1",
        "checkpoint.every_steps=10",
    )
    tune(tmp_path / "whole", folder, *more)
    step = loop.Trainer.step

    def dying(self, batch):
        if self.state.updates == 36:
            raise Interrupted
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", dying)
        with pytest.raises(Interrupted):
            tune(tmp_path / "broken", folder, *more)
    return more


def test_going_on_is_exact_and_needs_no_weights(tmp_path, folder, broken):
    (tmp_path / "a.safetensors").unlink()
    tune(tmp_path / "broken", folder, *broken, resume="auto")
    whole, other = checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "broken")
    assert_same(whole, other)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert whole["origin"] == other["origin"]
    assert whole["origin"]["name"] == str(tmp_path / "a.safetensors")
    assert whole["origin"]["sha256"] == checksum(str(folder / "model.safetensors"))
    for name in ("model", "model_ema", "model_best"):
        nets = [coda_fast.load(tmp_path / run / f"{name}.safetensors") for run in ("whole", "broken")]
        assert nets[0].config() == nets[1].config()
        assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in nets), strict=True))


def test_going_on_with_moved_weights_but_not_with_others(tmp_path, folder, broken, capsys):
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    os.rename(tmp_path / "a.safetensors", moved)
    net = coda_fast.load(moved)
    with torch.no_grad():
        net.layers[0].bias[0] += 1
    coda_fast.save(net, other)
    with pytest.raises(
        TrainingError,
        match=r"other values of model.weights \(was '.*a.safetensors', now '.*other.safetensors'\); a ",
    ):
        tune(tmp_path / "broken", folder, *broken, f"model.weights={other}", resume="auto")
    with pytest.raises(TrainingError, match=r"model.weights \(was '.*a.safetensors', now None\)"):
        tune(tmp_path / "broken", folder, *broken, "model.weights=null", resume="auto")
    with pytest.raises(TrainingError, match="model.weights: no such file: .*gone.safetensors"):
        tune(tmp_path / "broken", folder, *broken, "model.weights=gone.safetensors", resume="auto")
    with pytest.raises(TrainingError, match=r"model.freeze \(was \['layers.0'\], now \['layers.1'\]\)"):
        tune(tmp_path / "broken", folder, *broken, "model.freeze=layers.1", resume="auto")
    tune(tmp_path / "broken", folder, *broken, f"model.weights={moved}", resume="auto", progress=True)
    assert f"the run began with weights: {tmp_path / 'a.safetensors'} (sha256 " in capsys.readouterr().err
    assert_same(checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "broken"))


def test_a_run_without_weights_does_not_go_on_from_some(tmp_path, weights):
    run(tmp_path / "out", "epochs=1", "schedule.kind=constant")
    with pytest.raises(TrainingError, match=r"other values of model.weights \(was None, now '.*'\)"):
        run(tmp_path / "out", "schedule.kind=constant", f"model.weights={weights}", resume="auto")


def test_a_checkpoint_of_an_earlier_release_is_resumed(tmp_path):
    run(tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoints" / "epoch_0001_step_0000000.pt"
    content = torch.load(path, weights_only=True)
    del content["origin"], content["recipe"]["model"]["weights"], content["recipe"]["model"]["freeze"]
    torch.save(content, tmp_path / "old.pt")
    run(tmp_path / "out", resume=str(tmp_path / "old.pt"))
    assert_same(checkpoint_at(tmp_path / "whole"), checkpoint_at(tmp_path / "out"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("origin", 3, "c.pt: .*origin is a int that cannot be"),
        ("origin", {}, "c.pt: .*origin: expected name, sha256, network, config"),
        ("name", None, "c.pt: .*origin: expected name, sha256, network, config"),
        ("network", "Other", r"c.pt: .*expected a network of \['CoDANet'.*, got \['Other'\]"),
        ("config", {}, "c.pt: .*the network of the run cannot be made: .*out_channels"),
        ("config", {3: 4}, "c.pt: .*the network of the run cannot be made: "),
        ("out_channels", [4] * 10**6, "c.pt: .*cannot be made: it has more layers than the 9 tensors"),
        ("out_channels", [10**12, 16, 10], "model: weights, .*: expected what fits into"),
        ("out_channels", [4, 4, 10], "c.pt: .*weights that do not fit this model"),
        ("norm", "loud", "c.pt: .*cannot be made: norm: expected"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_checkpoint_of_bad_will(tmp_path, folder, tuned, key, value, message):
    content = torch.load(tuned, weights_only=True)
    place = content if key == "origin" else content["origin"]
    (place if key in place else place["config"])[key] = value
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(TrainingError, match=message) as refused:
        tune(tmp_path / "out", folder, resume=str(tmp_path / "c.pt"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, folder):
    """The first checkpoint of a run from weights."""
    output = tmp_path_factory.mktemp("tuned")
    tune(output, folder)
    return output / "checkpoints" / "epoch_0001_step_0000000.pt"


# -- the command
# ------------------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, folder, capsys):
    def code(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *map(str, arguments)])
        return stop.value.code or 0

    assert code("digits-s", "--show") == 0
    shown = capsys.readouterr().out
    assert "  weights: null\n  freeze: []\n" in shown
    assert code("digits-s", "model.freeze=layers.0", "model.weights=a.safetensors", "--show") == 0
    assert "  weights: a.safetensors\n  freeze:\n  - layers.0\n" in capsys.readouterr().out
    assert code("digits-s", *options(folder, "epochs=1"), "--output", tmp_path / "out") == 0
    assert "weights: " in capsys.readouterr().err
    assert code("digits-s", *options(tmp_path), "--output", tmp_path / "new") == 2
    message = capsys.readouterr().err
    assert "coda-fast: model.weights: no such file: " in message
    assert "and no network of the package (coda_xs_cifar10, " in message
    assert code(tmp_path / "out" / "recipe.yaml", "--output", tmp_path / "out", "--resume", "auto") == 0
