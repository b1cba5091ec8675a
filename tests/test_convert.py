"""convert_conv2d replaces convolutions by DAU layers in models of other projects."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

import coda_fast
from coda_fast import DAUConv2d, convert_conv2d, explanation_mode


def test_resnet18_of_torchvision_trains():
    """All 20 convolutions are replaced, the shapes stay, and the loss falls."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4)
    x, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    shape = net(x).shape
    report = convert_conv2d(net, rank=2)
    assert report.module is net
    assert len(report.converted) == 20
    assert not report.kept
    assert not any(isinstance(m, nn.Conv2d) for m in net.modules())
    assert net(x).shape == shape
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_what_cannot_be_is_kept_and_said():
    """mobilenet_v2 has depthwise convolutions in each block. They are kept and named, and the model runs."""
    net = torchvision.models.mobilenet_v2(num_classes=4)
    depthwise = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    report = convert_conv2d(net, rank=2)
    assert list(report.kept) == depthwise
    assert len(depthwise) == 17
    assert set(report.kept.values()) == {
        f"groups={m.groups}, a DAU layer aligns with all channels" for m in map(net.get_submodule, depthwise)
    }
    assert str(report).startswith(
        "35 convolutions are DAU layers now, 17 are kept\n  kept features.1.conv.0.0: groups=32"
    )
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 4)


def test_what_breaks_the_sum_is_named():
    """What the report names is what keeps contributions from adding up: with it they do not, without it they
    do, whatever ReLU and max pooling are between.
    """

    def gap(net):
        x = torch.rand(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
        with explanation_mode(net):
            y = net(x)
            (row,) = torch.autograd.grad(y.sum(), x)
        return float(((row * x).sum() - y.sum()).detach().abs() / y.detach().abs().sum())

    def network(*between, bias):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), *between, nn.Conv2d(6, 4, 3), nn.Flatten(), nn.LazyLinear(5, bias=bias)
        ).double()

    cases = {
        "BatchNorm2d": ([nn.BatchNorm2d(6)], False),
        "GroupNorm": ([nn.GroupNorm(2, 6)], False),
        "GELU": ([nn.GELU()], False),
        "bias": ([], True),
    }
    for reason, (between, bias) in cases.items():
        net = network(*between, bias=bias)
        net(torch.rand(2, 3, 12, 12).double())
        report = convert_conv2d(net, rank=3)
        assert set(report.inexact.values()) == {reason}
        assert f"\n  contributions do not add up to the output, because of: {reason} (1)" in str(report)
        assert gap(net) > 1e-3, reason
    net = network(nn.ReLU(), nn.LeakyReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), bias=False)
    net(torch.rand(2, 3, 12, 12).double())
    report = convert_conv2d(net, rank=3)
    assert not report.inexact
    assert "add up" not in str(report)
    assert gap(net) < 1e-12


def _pruned():
    conv = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


def _replaced_forward():
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: x[:, :, 1:-1, 1:-1].repeat(1, 2, 1, 1)[:, :4]
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), 'padding_mode="reflect"'),
        (lambda: nn.LazyConv2d(4, 3), "a LazyConv2d"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "a ParametrizedConv2d"),
        (_pruned, "hooks"),
        (_replaced_forward, "a Conv2d, whose own behaviour"),
        (lambda: nn.ConvTranspose2d(3, 4, 3), "transposed, a DAU layer is a convolution of two dimensions"),
        (lambda: nn.Conv1d(3, 4, 3), "of 1 dimensions"),
        (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), "weights of torch.complex64"),
    ],
    ids=["groups", "padding", "lazy", "parametrised", "pruned", "forward", "transposed", "conv1d", "complex"],
)
def test_obstacles(make, reason):
    net = nn.Sequential(make(), nn.Conv2d(4, 4, 1))
    before = net[0]
    report = convert_conv2d(net, rank=2)
    assert report.converted == ("1",)
    assert report.kept["0"].startswith(reason)
    assert net[0] is before
    with pytest.raises(ValueError, match=f"expected a convolution that can be a DAU layer, got 0: {reason}"):
        convert_conv2d(nn.Sequential(make()))


def test_geometry_device_dtype_and_mode():
    conv = (
        nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2), bias=False, dtype=torch.float64)
        .eval()
        .requires_grad_(False)
    )
    report = convert_conv2d(conv, rank=3, bias=False, norm="l2", eps=1e-3, backend="reference")
    layer = report.module
    assert report.converted == ("",)
    assert isinstance(layer, DAUConv2d)
    assert (
        layer(torch.rand(1, 3, 9, 9, dtype=torch.float64)).shape
        == conv(torch.rand(1, 3, 9, 9, dtype=torch.float64)).shape
    )
    assert (layer.rank, layer.norm, layer.eps, layer.backend, layer.bias) == (
        3,
        "l2",
        1e-3,
        "reference",
        None,
    )
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert convert_conv2d(nn.Conv2d(3, 5, 4, padding="same")).module.padding == "same"
    assert convert_conv2d(nn.Conv2d(3, 5, 3, device="meta")).module.weight.device.type == "meta"


def test_a_shared_convolution_stays_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = self.first
            self.inside = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 2, 1))})

        def forward(self, x):
            return self.inside["a"](self.second(self.first(x)))

    net = Twice()
    report = convert_conv2d(net, rank=2)
    assert report.converted == ("first", "second", "inside.a.0")
    assert net.first is net.second
    assert net(torch.rand(1, 3, 5, 5)).shape == (1, 2, 5, 5)


def test_shared_weights_are_no_weights_of_one_layer():
    """Two convolutions that share one weight would become two layers with separate weights, so they are kept
    and named.
    """
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3, dilation=2), nn.Conv2d(3, 3, 1))
    net[1].weight = net[0].weight
    report = convert_conv2d(net, rank=2)
    assert report.converted == ("2",)
    assert report.kept == {"0": "a weight that 0 and 1 share", "1": "a weight that 0 and 1 share"}


def test_one_name_of_a_shared_convolution_is_all():
    net = nn.ModuleDict({"a": nn.Conv2d(3, 3, 3), "c": nn.Conv2d(3, 3, 3)})
    net["b"] = net["a"]
    report = convert_conv2d(net, rank=2, only="b")
    assert report.converted == ("a", "b")
    assert net["a"] is net["b"]
    assert isinstance(net["a"], DAUConv2d)
    assert isinstance(net["c"], nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "count", "kept"),
    [("resnet10t", 14, 0), ("efficientnet_lite0", 33, 16), ("convnext_atto", 28, 12)],
)
def test_models_of_timm(name, count, kept):
    """Stems, bottlenecks and patch embeddings become DAU layers, and depthwise convolutions are kept."""
    net = timm.create_model(name, num_classes=3)
    found = {name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    report = convert_conv2d(net, rank=1)
    assert {*report.converted, *report.kept} == found
    assert (len(report.converted), len(report.kept)) == (count, kept)
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    "only",
    ["layer4.*", ["layer4.0.*", "layer4.1.*"], lambda name, conv: conv.out_channels == 512],
    ids=["pattern", "patterns", "function"],
)
def test_only_some(only):
    net = torchvision.models.resnet18()
    report = convert_conv2d(net, rank=2, only=only)
    assert len(report.converted) == 5
    assert not report.kept
    assert isinstance(net.conv1, nn.Conv2d)


def test_nothing_is_changed_where_something_is_wrong():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    before = copy.deepcopy(net.state_dict())
    for options in (
        dict(rank=0),
        dict(norm="l3"),
        dict(only="nothing.*"),
        dict(only=["0", "2"]),
        dict(rank=10**13),
        dict(rank=2.5),
    ):
        with pytest.raises(ValueError, match="expected"):
            convert_conv2d(net, **options)
    for only in ([0], [None], 1):
        with pytest.raises(TypeError):
            convert_conv2d(net, only=only)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    with pytest.raises(ValueError, match="expected at least one nn.Conv2d, got a Linear without"):
        convert_conv2d(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
        convert_conv2d("resnet18")


def test_memory_is_asked_for_all_layers_together(monkeypatch):
    """Each of the two layers would fit into memory, but not both: nothing is changed."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))

    def need(what, needed, device):
        raise ValueError(f"{what}: expected less")

    monkeypatch.setattr("coda_fast.nn.need_memory", need)
    with pytest.raises(ValueError, match=r"weights of 7\.6e\+07 numbers: expected less"):
        convert_conv2d(net, rank=1010)
    assert isinstance(net[0], nn.Conv2d)


def test_a_network_without_anything_between_is_explained_exactly():
    """A network of convolutions alone becomes a dynamic linear network: the rows of its linear map, applied
    to the input, are its outputs.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, 2)).double()
    convert_conv2d(net, rank=3)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with coda_fast.explanation_mode(net):
        output = net(x)[:, 1].sum((1, 2))
        (row,) = torch.autograd.grad(output.sum(), x)
    assert torch.allclose((row * x).sum((1, 2, 3)), output, rtol=1e-12)
