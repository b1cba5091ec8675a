"""Saving and loading: round trips, options of single layers, what save refuses."""

import os
import stat

import pytest
import torch
from support import GOLDEN, NORM_NAMES
from support_checkpoints import middle_layer, three_layer_network, two_layer_network
from torch import nn
from torch.nn.utils import prune

import coda_fast
from coda_fast import CoDANet, DAUConv2d, checkpoints, create_model


@pytest.fixture
def model():
    return two_layer_network()


def test_round_trip(model, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path, {"accuracy": 0.5})
    twin = coda_fast.load(path)
    assert twin.config() == model.config()
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(twin(images), model(images))
    assert checkpoints.read_metadata(path) == {"accuracy": 0.5}
    assert coda_fast.load(path, temperature=1.0, backend="reference").temperature == 1.0
    assert os.listdir(tmp_path) == ["net.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


def test_a_network_is_its_own(model, tmp_path):
    """A loaded network does not map its file into memory, where others could change it. Its weights are
    aligned like those of a new network, because libraries round differently otherwise.
    """
    path, images = tmp_path / "net.safetensors", torch.rand(2, 3, 9, 9)
    coda_fast.save(model, path)
    twin = coda_fast.load(path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in twin.parameters())
    with open(path, "r+b") as file:
        file.write(bytes([1]) * path.stat().st_size)
    assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(tmp_path, dtype):
    model = create_model("coda_xs_digits", dtype=dtype)
    coda_fast.save(model, tmp_path / "net.safetensors")
    assert next(coda_fast.load(tmp_path / "net.safetensors").parameters()).dtype == dtype


def test_files_of_the_first_release_load_as_before():
    """checkpoint_0 was written by the code of 2026-11-27. Its weights follow a formula, and the logits are
    those that this code gave in float64.
    """
    net = coda_fast.load(GOLDEN / "checkpoint_0.safetensors")
    for k, parameter in enumerate(net.parameters()):
        assert torch.equal(
            parameter,
            (torch.arange(parameter.numel(), dtype=torch.float32) * (0.7 + k)).sin().view_as(parameter),
        )
    assert net.config() == {
        "out_channels": [4, 3],
        "ranks": [2, 5],
        "kernel_sizes": [[3, 1], 2],
        "strides": [2, [1, 2]],
        "paddings": ["valid", 1],
        "temperature": 2.5,
        "logit_bias": -1.25,
        "norm": "l2",
        "eps": 1e-3,
        "bias": False,
        "image_channels": 1,
        "image_size": 9,
        "class_names": ["a", "b", "c"],
        # implied by image_size
        "preprocessing": {"resize": 9, "crop": 9, "interpolation": "bilinear", "value_range": [0.0, 1.0]},
    }
    assert checkpoints.read_metadata(GOLDEN / "checkpoint_0.safetensors") == {"accuracy": 0.5}
    logits = net.double()(torch.linspace(0, 1, 162, dtype=torch.float32).view(2, 1, 9, 9).double())
    expected = [
        [-1.3229814997841136, -0.7302787089452933, -0.3512620561748532],
        [-1.5117577149961785, -0.7785054876824571, -0.22584644581762592],
    ]
    assert torch.allclose(logits, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize(
    ("layer", "entry"),
    [
        (dict(padding=2, dilation=2), ("dilations", [1, 2, 1])),
        (dict(padding=(1, 3), dilation=(1, 3)), ("dilations", [1, [1, 3], 1])),
        (dict(norm="l2"), ("norm", ["squash", "l2", "squash"])),
        (dict(norm="l2", eps=0.5), ("eps", [1e-6, 0.5, 1e-6])),
        (dict(bias=False), ("bias", [True, False, True])),
        (dict(padding="same"), ("paddings", [1, "same", 0])),
    ],
    ids=str,
)
def test_every_layer_keeps_its_own_options(tmp_path, layer, entry):
    net, images = three_layer_network(), torch.rand(2, 3, 9, 9)
    plain = net(images)
    net.layers[1] = middle_layer(**layer)
    coda_fast.save(net, tmp_path / "net.safetensors")
    twin = coda_fast.load(tmp_path / "net.safetensors")
    assert torch.equal(twin(images), net(images))
    assert not torch.equal(twin(images), plain)
    assert twin.config() == net.config()
    assert net.config()[entry[0]] == entry[1]
    assert str(twin) == str(net)


class _Doubled(DAUConv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class _Halved(CoDANet):
    def head(self, activations):
        return super().head(activations) / 2


def halved_network():
    return _Halved([4, 5, 3], [2, 5, 3], [3, 3, 1], [1, 1, 1], temperature=2.0)


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def sparse_weight(layer):
    return nn.Parameter(layer.weight.detach().to_sparse())


def changed_network(change):
    """The network with three layers after ``change``, or the network that ``change`` returns instead."""
    net = three_layer_network()
    return change(net) or net


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: n.layers.__setitem__(1, nn.Conv2d(4, 5, 3)),
            "layers.1: expected DAUConv2d, got Conv2d, which no configuration",
        ),
        (
            lambda n: n.layers.__setitem__(1, _Doubled(4, 5, 3, rank=5)),
            "layers.1: .* got _Doubled with a forward of its own",
        ),
        (
            lambda n: n.layers.__setitem__(1, nn.Sequential(middle_layer())),
            "layers.1: expected DAUConv2d, got Sequential",
        ),
        (
            lambda n: n.layers[1].double() and None,
            "layers.1.reduction_weight: expected torch.float32, as in layers.0, got torch.float64",
        ),
        (
            lambda n: n.to(torch.float8_e4m3fn),
            "layers.0.reduction_weight: expected torch.float32 or .*, got torch.float8_e4m3fn",
        ),
        (
            lambda n: n.to("meta"),
            "layers.0.reduction_weight: expected numbers, got a tensor on the meta device",
        ),
        (lambda n: _pruned(n.layers[1]), r"layers.1: .*has \['weight_mask', 'weight_orig'\].*prune.remove"),
        (
            lambda n: nn.utils.parametrizations.weight_norm(n.layers[1]) and None,
            "layers.1: .*parametrizations.weight.original0.*remove",
        ),
        (
            lambda n: nn.utils.weight_norm(n.layers[1]) and None,
            r"layers.1: .*has \['weight_g', 'weight_v'\].*remove_weight_norm",
        ),
        (
            lambda n: nn.utils.parametrizations.spectral_norm(n.layers[0], "reduction_weight") and None,
            "layers.0: .*parametrizations.reduc",
        ),
        (
            lambda n: n.layers[2].register_buffer("mean", torch.zeros(3)),
            r"layers.2: .*has \['mean'\] besides",
        ),
        (
            lambda n: n.layers[2].add_module("batch", nn.BatchNorm2d(3)),
            r"layers.2: .*has \['batch.bias', .*\] besides",
        ),
        (lambda n: n.register_buffer("mean", torch.zeros(3)), r"model: .*has \['mean'\] besides"),
        (lambda n: n.layers[1].register_parameter("weight", None), r"layers.1: .*lacks \['weight'\]"),
        (
            lambda n: setattr(n, "class_names", ["a"]),
            "class_names: expected 3 names, one for each class, got 1",
        ),
        (
            lambda n: n.layers.__setitem__(2, DAUConv2d(5, 7, 1, rank=3)),
            "class_names: expected 7 names, one for each class, got 3",
        ),
        (
            lambda n: n.layers.__setitem__(1, DAUConv2d(4, 6, 3, rank=5)),
            r"layers.2.reduction_weight: expected shape \[3, 6, 1, 1\]",
        ),
        (
            lambda n: setattr(n.layers[1], "rank", 4),
            r"layers.1.reduction_weight: expected shape \[4, 4, 3, 3\], as configured, got \[5, 4",
        ),
        (lambda n: setattr(n.layers[1], "norm", "max"), f"norm: expected one of {NORM_NAMES}, got 'max'"),
        (lambda n: setattr(n, "temperature", float("nan")), "temperature: expected a finite number"),
        (lambda n: setattr(n, "encoder", nn.Identity()), "encoder: expected AddInverse, got Identity"),
        (lambda n: setattr(n, "pool", nn.Flatten()), "pool: expected SumPool2d, got Flatten"),
        (lambda n: halved_network(), "model: expected CoDANet, got _Halved with a head of its own"),
        (
            lambda n: setattr(n.layers[1], "weight", sparse_weight(n.layers[1])),
            "layers.1.weight: expected a dense tensor, got torch.sparse_coo",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_refuses_to_save_what_load_would_misread(tmp_path, change, message):
    """One line names the layer and the problem, and nothing is written."""
    net = changed_network(change)
    with pytest.raises(ValueError, match=message) as caught:
        coda_fast.save(net, tmp_path / "net.safetensors")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        checkpoints.to_published(net)


def test_saves_what_computes_the_same(tmp_path):
    """Subclasses that do not change the computation, one weight shared by two layers, weights in another
    memory format, and compiled layers can be saved.
    """

    class Named(DAUConv2d):
        """A subclass that changes nothing."""

    net, images = three_layer_network(), torch.rand(2, 3, 9, 9)
    net.layers[1] = Named(4, 4, 3, padding=1, rank=5)
    net.layers.insert(1, DAUConv2d(4, 4, 3, padding=1, rank=5))
    net.layers[2].weight = net.layers[1].weight
    net.layers[3] = torch.compile(DAUConv2d(4, 3, 1, rank=3), backend="eager")
    for _ in range(2):
        coda_fast.save(net, tmp_path / "net.safetensors")
        assert torch.allclose(coda_fast.load(tmp_path / "net.safetensors")(images), net(images), rtol=1e-6)
        net.to(memory_format=torch.channels_last)


def test_save_refuses_others(model, tmp_path):
    with pytest.raises(TypeError, match="model: expected a coda_fast.Network, got a Linear"):
        coda_fast.save(nn.Linear(2, 2), tmp_path / "net.safetensors")
    nested = []
    nested.append(nested)
    for metadata in ({"model": model}, {"a": nested}, [3]):
        with pytest.raises(TypeError, match="metadata: expected a dict that JSON can hold"):
            coda_fast.save(model, tmp_path / "net.safetensors", metadata)
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("/dev/null", "a device")):
        with pytest.raises(OSError, match=f"expected a file or nothing, got {what}"):
            coda_fast.save(model, path)
    assert os.listdir(tmp_path) == ["pipe"]


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    coda_fast.save(model, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        coda_fast.save(create_model("coda_xs_digits"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]
