"""Loading a network for other classes: a new last layer, and all other weights as stored."""

import branching
import pytest
import torch
from support_checkpoints import two_layer_network
from torch import nn

import coda_fast
from coda_fast import CheckpointError, DAUConv2d, checkpoints, create_model, registry


@pytest.fixture
def registered(monkeypatch):
    """Networks registered by a test are forgotten after it."""
    monkeypatch.setattr(registry, "_CLASSES", registry.classes())
    monkeypatch.setattr(registry, "_MODELS", registry.models())
    monkeypatch.setattr(registry, "_LISTENERS", [])


@pytest.fixture
def path(tmp_path):
    """The file of a network with three named classes."""
    coda_fast.save(two_layer_network(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def assert_only_new(found, stored, layer):
    """Assert that all tensors outside ``layer`` are the stored ones bit for bit, and those inside are not."""
    found, stored = found.state_dict(), stored.state_dict()
    assert found.keys() == stored.keys()
    assert any(name.startswith(f"{layer}.") for name in found)
    for name, tensor in found.items():
        assert torch.equal(tensor, stored[name]) == (not name.startswith(f"{layer}.")), name


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_chain_gets_a_new_last_layer(path, count):
    stored = coda_fast.load(path)
    torch.manual_seed(3)
    net = coda_fast.load(path, num_classes=count)
    assert_only_new(net, stored, "layers.1")
    assert net.num_classes == count
    assert net.class_names is None
    changed = {"out_channels": [4, count], "class_names": None}
    assert net.config() == stored.config() | changed
    torch.manual_seed(3)
    fresh = coda_fast.CoDANet(**net.config())
    assert all(
        torch.equal(tensor, fresh.layers[1].state_dict()[name])
        for name, tensor in net.layers[1].state_dict().items()
    ), "the weights are those that the constructor draws"
    # the network can be trained, explained and saved like any other
    images = torch.rand(2, 3, 9, 9)
    net(images).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert float(net.explain(images, 0).completeness_error.abs().max()) < 1e-4
    coda_fast.save(net, path)
    assert torch.equal(coda_fast.load(path)(images), net(images))


def test_the_same_number_replaces_nothing(path):
    state = torch.random.get_rng_state()
    net, stored = coda_fast.load(path, num_classes=3), coda_fast.load(path)
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn"
    assert net.config() == stored.config()
    assert net.class_names == ["a", "b", "c"]
    assert all(torch.equal(t, stored.state_dict()[name]) for name, t in net.state_dict().items())


def test_names_are_those_of_the_new_classes(path):
    assert coda_fast.load(path, num_classes=2, class_names=["x", "y"]).class_names == ["x", "y"]
    assert coda_fast.load(path, num_classes=3, class_names=["x", "y", "z"]).class_names == ["x", "y", "z"]
    assert coda_fast.load(path, num_classes=3, class_names=None).class_names is None
    with pytest.raises(CheckpointError, match="class_names: expected 2 names, one for each class, got 3"):
        coda_fast.load(path, num_classes=2, class_names=["x", "y", "z"])


def test_other_arguments_apply_too(path):
    net = coda_fast.load(path, num_classes=5, temperature=11.0, backend="reference")
    assert net.temperature == 11.0
    assert {layer.backend for layer in net.layers} == {"reference"}


def test_options_of_the_last_layer_are_kept(tmp_path):
    """The new layer has the rank, the kernel and the norm of the one that it replaces."""
    net = two_layer_network()
    net.layers[1] = DAUConv2d(4, 3, 3, rank=6, padding=2, dilation=2, norm="squash", eps=0.5, bias=False)
    coda_fast.save(net, tmp_path / "net.safetensors")
    last = coda_fast.load(tmp_path / "net.safetensors", num_classes=8).layers[1]
    assert (last.out_channels, last.rank, last.norm, last.eps, last.bias) == (8, 6, "squash", 0.5, None)
    assert last.geometry == net.layers[1].geometry


def test_a_registered_network_gets_a_new_classifier(tmp_path, registered):
    branching.register()
    stored = create_model("branching_xs")
    coda_fast.save(stored, tmp_path / "net.safetensors")
    net = coda_fast.load(tmp_path / "net.safetensors", num_classes=3)
    assert_only_new(net, stored, "classes")
    assert type(net) is branching.Branching
    assert net(torch.rand(2, 1, 10, 10)).shape == (2, 3)


class _Unnamed(branching.Branching):
    classifier = None


class _TwoHeads(branching.Branching):
    """A network with a second layer that depends on the number of classes."""

    def __init__(self, num_classes, **options):
        super().__init__(num_classes, **options)
        where = {name: options.get(name) for name in ("device", "dtype")}
        self.side = DAUConv2d(2 * self.image_channels, num_classes, 1, rank=2, **where)

    def evidence(self, encoded):
        return super().evidence(encoded) + self.side(encoded)[:, :, ::2, ::2]


class _Deaf(branching.Branching):
    """A network that has five classes whatever it is asked for."""

    def __init__(self, num_classes, **options):
        super().__init__(5, **options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Unnamed, "a _Unnamed names no classifier that could be replaced, got 4$"),
        (_TwoHeads, "in a _TwoHeads other weights than those of classes depend on it, got 4$"),
        (_Deaf, "the other arguments give 5, got 4$"),
    ],
)
def test_a_network_that_cannot_have_other_classes(tmp_path, registered, kind, message):
    config = dict(num_classes=5, temperature=3.0, image_channels=1)
    coda_fast.register_model("unfit", kind, config)
    coda_fast.save(create_model("unfit"), tmp_path / "net.safetensors")
    assert coda_fast.load(tmp_path / "net.safetensors", num_classes=5).num_classes == 5
    with pytest.raises(
        ValueError, match=f"num_classes: expected 5, as in .*net.safetensors, because {message}"
    ):
        coda_fast.load(tmp_path / "net.safetensors", num_classes=4)


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", True])
def test_what_is_no_number_of_classes(path, count):
    with pytest.raises(ValueError, match="num_classes: expected a positive int, got "):
        coda_fast.load(path, num_classes=count)


def test_arguments_that_contradict_the_number(path):
    with pytest.raises(ValueError, match="num_classes: expected 3, as in .* give 3, got 5"):
        coda_fast.load(path, num_classes=5, out_channels=[4, 3])


def test_all_is_checked_before_tensors_are_read(path, monkeypatch):
    """A damaged file is refused also if the damaged layer would be replaced, and so is a network that does
    not fit in memory; nothing is drawn.
    """
    state, safetensors = torch.random.get_rng_state(), checkpoints.require_safetensors()
    with pytest.raises(ValueError, match="net.safetensors: weights: expected what fits into"):
        coda_fast.load(path, num_classes=10**9)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = two_layer_network().state_dict()
    tensors["layers.1.weight"] = tensors["layers.1.weight"][:2].clone()
    safetensors.torch.save_file(tensors, path, header)
    state = torch.random.get_rng_state()
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a tensor is read"))
    with pytest.raises(CheckpointError, match=r"'layers.1.weight': expected \[3, 5, 4, 1, 1\], got \[2, 5"):
        coda_fast.load(path, num_classes=2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_in_another_dtype(tmp_path, stored, dtype):
    net = two_layer_network().to(stored)
    coda_fast.save(net, tmp_path / "net.safetensors")
    twin = coda_fast.load(tmp_path / "net.safetensors", dtype=dtype, num_classes=4)
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    assert_only_new(twin, net.to(dtype), "layers.1")
    assert all(parameter.data_ptr() % 64 == 0 for parameter in twin.parameters())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, "float32"], ids=str)
def test_what_is_no_dtype_of_weights(path, dtype):
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or .*, got (torch.)?(int|float)"):
        coda_fast.load(path, dtype=dtype)


def test_on_the_meta_device_nothing_is_read(path, monkeypatch):
    plain = coda_fast.load(path)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights are loaded"))
    for options in ({}, {"num_classes": 5}, {"dtype": torch.float16}):
        net = coda_fast.load(path, device="meta", **options)
        assert all(parameter.is_meta for parameter in net.parameters())
        assert net.num_classes == options.get("num_classes", 3)
    assert coda_fast.load(path, device=torch.device("meta")).config() == plain.config()
