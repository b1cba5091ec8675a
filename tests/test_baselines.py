"""The baseline methods on models whose attributions are known, and that they leave a model unchanged."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from coda_fast import baselines, checkpoints, create_model, viewer
from coda_fast.baselines import _registry, perturbations
from coda_fast.cli import cli

captum = pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
FEW = {"RISE": {"masks": 60}, "LIME": {"samples": 40}, "IntGrad": {"n_steps": 5}}


class Linear(nn.Module):
    """logits = W x + b over all pixels of 3 x 6 x 6 images."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3, 6, 6, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("nchw,kchw->nk", x, self.weight) + 0.5


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_model("coda_xs_digits").double()


def digits(number=3):
    return torch.rand(number, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_linear():
    """Grad is W, and every method that multiplies by the input gives W x."""
    model, x, targets = Linear(), torch.rand(2, 3, 6, 6, dtype=torch.float64), torch.tensor([[2, 0], [1, 1]])
    w = model.weight.detach()[targets]
    torch.testing.assert_close(baselines.attribute("Grad", model, x, targets), w.sum(2))
    for method in ("IxG", "IntGrad", "DeepLIFT"):
        torch.testing.assert_close(
            baselines.attribute(method, model, x, targets), (w * x[:, None]).sum(2), msg=method
        )


def test_occlusion_of_a_linear_model():
    """Occluding a window removes the sum of W x in it. A pixel gets that sum divided by the area of the
    window, added up over the windows that cover it.
    """
    model, x = Linear(), torch.rand(1, 3, 6, 6, dtype=torch.float64)
    contribution = (model.weight.detach()[1] * x[0]).sum(0)
    total = torch.zeros(6, 6, dtype=torch.float64)
    starts = [0, 2]  # windows of 5 with stride 2, the last one cut off at the edge
    for i in starts:
        for j in starts:
            total[i : i + 5, j : j + 5] += contribution[i : i + 5, j : j + 5].sum()
    found = baselines.attribute("Occ5", model, x, torch.tensor([1]))[0]
    torch.testing.assert_close(found, total / 25, rtol=1e-5, atol=1e-6)  # captum sums in float32


@pytest.mark.parametrize("method", ["Ours", "IxG", "Occ5"])
def test_a_class_that_does_not_exist(network, method):
    with pytest.raises(ValueError, match="targets: expected classes from 0 to 9, got 10"):
        baselines.attribute(method, network, digits(2), torch.tensor([3, 10]))
    with pytest.raises(ValueError, match="targets: expected classes from 0 to 1, got 2"):
        baselines.attribute("IxG", Spot(), torch.rand(1, 3, 8, 8), torch.tensor([2]))


def test_lime_asks_once_for_all_classes(network):
    """The result for each class equals that for the class alone."""
    images, targets = digits(2), torch.tensor([[3, 7, 1], [0, 2, 5]])
    seen = []
    hook = network.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    together = baselines.attribute("LIME", network, images, targets, samples=40)
    hook.remove()
    assert sum(seen) < 2 * 45  # 40 samples per image, and the image itself
    for k in range(3):
        torch.testing.assert_close(
            together[:, k], baselines.attribute("LIME", network, images, targets[:, k], samples=40)
        )


class Spot(nn.Module):
    """Class 1 if the lower right quarter is bright; the other quarters have no effect."""

    def forward(self, x):
        score = x[:, :, x.shape[2] // 2 :, x.shape[3] // 2 :].mean((1, 2, 3))
        return torch.stack([-score, 8 * score], 1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("RISE", {"masks": 600, "cells": 4, "p1": 0.3}), ("LIME", {}), ("Occ5", {}), ("Occ9", {})],
)
def test_perturbations_find_the_spot(method, settings):
    image = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    # four uniform quarters, which quickshift segments
    for i, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        image[0, :, row : row + 8, column : column + 8] = torch.tensor([0.9, 0.2 + 0.2 * i, 0.9 - 0.2 * i])[
            :, None, None
        ]
    found = baselines.attribute(method, Spot(), image, torch.tensor([1]), **settings)[0]
    quarters = found.unflatten(0, (2, 8)).unflatten(2, (2, 8)).mean((1, 3))
    assert quarters.argmax() == 3
    background = 1.0 if method == "RISE" else 1.2  # RISE's map has the mean probability as background
    assert quarters[1, 1] > background * quarters.flatten()[:3].abs().max()


def test_rise_masks():
    """On average each mask keeps a share p1, every position is equally likely, and values are between 0 and
    1.
    """
    masks = perturbations._rise_masks(
        *perturbations._rise_random(4000, 6, 0.3, (20, 32), torch.Generator().manual_seed(0)), 20, 32
    )
    assert masks.shape == (4000, 20, 32)
    assert 0 <= float(masks.min()) <= float(masks.max()) <= 1
    assert float(masks.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(masks.mean(0).std()) < 0.02


def test_integrated_gradients_are_complete():
    """The attributions sum to the difference of the outputs. For a quadratic model captum's Gauss-Legendre
    rule is exact.
    """

    class Quadratic(nn.Module):
        def forward(self, x):
            total = x.sum((1, 2, 3))
            return torch.stack([total, total.square()], 1)

    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    found = baselines.attribute("IntGrad", Quadratic(), x, torch.tensor([1, 1]))
    torch.testing.assert_close(found.sum((1, 2)), x.sum((1, 2, 3)).square())


def test_on_a_coda_net(network):
    """DeepLIFT is IxG, and guided backprop is the gradient, because a CoDA-Net has no activation whose rule
    captum changes.
    """
    x, targets = digits(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    maps = {m: baselines.attribute(m, network, x, targets) for m in ("Ours", "Grad", "IxG", "GB", "DeepLIFT")}
    torch.testing.assert_close(maps["DeepLIFT"], maps["IxG"], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(maps["GB"], maps["Grad"], rtol=1e-9, atol=1e-15)
    logits = network(x).gather(1, targets)
    torch.testing.assert_close(maps["Ours"].sum((2, 3)) + network.logit_bias, logits)
    # captum's method is not complete on a CoDA-Net
    assert not torch.allclose(maps["IxG"].sum((2, 3)) + network.logit_bias, logits, atol=1e-3)


def test_grad_cam_on_a_coda_net(network):
    """With sum pooling, the weight of the evidence map of the class is the same everywhere, so that the
    result is its positive part, enlarged.
    """
    x = digits(1)
    evidence = network.run_layers(network.encoder(x))[0, 4].detach()
    found = baselines.attribute("GCam", network, x, torch.tensor([4]))[0]
    factor = 8 // evidence.shape[0]
    expected = (
        evidence.clamp(min=0).repeat_interleave(factor, 0).repeat_interleave(factor, 1) / network.temperature
    )
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())


@pytest.mark.parametrize("method", baselines.METHODS)
def test_several_classes_and_batches(network, method):
    """[N, K] targets at once give the same as one image and one class at a time, for any batch size."""
    x, targets = digits(2), torch.tensor([[1, 2, 1], [3, 4, 9]])
    settings = FEW.get(method, {})
    # captum sums in float32
    close = dict(rtol=1e-5, atol=1e-6) if method.startswith("Occ") else dict(rtol=1e-9, atol=1e-12)
    whole = baselines.attribute(method, network, x, targets, **settings)
    assert whole.shape == (2, 3, 8, 8)
    assert torch.isfinite(whole).all()
    assert whole.dtype == x.dtype
    if method != "Ours":
        small = baselines.attribute(method, network, x, targets, batch_size=2, **settings)
        torch.testing.assert_close(small, whole, **close)
    for i in range(2):
        for k in range(3):
            single = baselines.attribute(method, network, x[i : i + 1], targets[i : i + 1, k], **settings)
            torch.testing.assert_close(single[0], whole[i, k], **close)
    again = baselines.attribute(method, network, x, targets, **settings)
    assert torch.equal(again, whole)


def hooks_of(model):
    return [
        (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]


@pytest.mark.parametrize("method", [m for m in baselines.METHODS if m not in ("Ours", "DeepLIFT")])
def test_a_residual_network_stays_as_it_was(method):
    """A network of torchvision with in-place ReLUs that are called twice: maps are finite, and mode,
    gradients and hooks are as before.
    """
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    torch.manual_seed(0)
    model = resnet18(num_classes=4).train()
    model.layer1.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    modes, hooks = [m.training for m in model.modules()], hooks_of(model)
    buffers = [b.clone() for b in model.buffers()]
    x = torch.rand(2, 3, 32, 32)
    found = baselines.attribute(method, model, x, torch.tensor([1, 3]), **FEW.get(method, {}))
    assert found.shape == (2, 32, 32)
    assert torch.isfinite(found).all()
    assert found.abs().max() > 0
    assert [m.training for m in model.modules()] == modes
    assert hooks_of(model) == hooks
    assert model.fc.weight.grad.eq(1).all()
    assert model.conv1.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert not x.requires_grad


def test_deep_lift_of_a_residual_network():
    """Its ReLUs are in place and called twice. The map still sums to the difference from the black image, as
    the rescale rule promises.
    """
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    torch.manual_seed(0)
    model, x, targets = (
        resnet18(num_classes=4).double().eval(),
        torch.rand(2, 3, 32, 32, dtype=torch.float64),
        torch.tensor([[1, 0], [3, 2]]),
    )
    hooks = hooks_of(model)
    found = baselines.attribute("DeepLIFT", model, x, targets)
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, targets)
    torch.testing.assert_close(found.sum((2, 3)), difference, rtol=1e-6, atol=1e-8)
    assert hooks_of(model) == hooks
    assert model.relu.inplace


class Rectified(nn.Module):
    """A convolution followed by a rectification of ``kind`` and an average."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.linear, self.kind = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 3), kind

    def forward(self, x):
        x = self.conv(x)
        x = {
            "module": self.relu,
            "torch": torch.relu,
            "functional": nn.functional.relu,
            "method": lambda x: x.relu(),
        }[self.kind](x)
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["torch", "functional", "method"])
@pytest.mark.parametrize("method", ["GB", "DeepLIFT"])
def test_a_function_is_rectified_like_a_module(method, kind):
    """captum alone would silently return the plain gradient and Input x Gradient."""
    x, targets = torch.rand(1, 3, 6, 6), torch.tensor([1])
    expected = baselines.attribute(method, Rectified("module"), x, targets)
    torch.testing.assert_close(baselines.attribute(method, Rectified(kind), x, targets), expected)
    assert not torch.allclose(
        expected, baselines.attribute("Grad" if method == "GB" else "IxG", Rectified("module"), x, targets)
    )


def test_deep_lift_says_what_it_cannot():
    """For a model that torch.fx cannot trace, with a module that is called twice, the error is one sentence,
    and the model stays usable.
    """

    class Twice(Rectified):
        def forward(self, x):
            return self.relu(super().forward(x)) if float(x.detach().sum()) >= 0 else x

    model = Twice("module").eval()
    hooks = hooks_of(model)
    with pytest.raises(
        ValueError, match="DeepLIFT: expected a model that calls each of its activation modules once"
    ):
        baselines.attribute("DeepLIFT", model, torch.rand(1, 3, 6, 6), torch.tensor([1]))
    assert hooks_of(model) == hooks


def test_occlusion_sweeps_once_for_all_classes(network):
    """Three classes pass as many images through the network as one class."""
    counted = []
    network.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
    for targets in (torch.tensor([1, 2]), torch.tensor([[1, 2, 3], [4, 5, 6]])):
        baselines.attribute("Occ5", network, digits(2), targets)
    half = len(counted) // 2
    assert sum(counted[:half]) == sum(counted[half:])


def test_grad_cam_takes_another_layer():
    resnet18 = pytest.importorskip("torchvision.models").resnet18
    torch.manual_seed(0)
    model, x = resnet18(num_classes=4).eval(), torch.rand(1, 3, 32, 32)
    last = baselines.create("GCam", model).attribute(x, torch.tensor([1]))
    assert torch.equal(
        last, baselines.create("GCam", model, layer=model.layer4[1].conv2).attribute(x, torch.tensor([1]))
    )
    other = baselines.create("GCam", model, layer=model.layer1[0].conv1).attribute(x, torch.tensor([1]))
    assert not torch.equal(last, other)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("Magic", Linear()), ValueError, "method: expected one of Ours, Occ5, "),
        (("Ours", Linear()), ValueError, "method: 'Ours': expected a coda_fast.Network, got a Linear"),
        (
            ("GCam", Linear()),
            ValueError,
            "GCam: expected a model with a convolution, or layer=, got a Linear",
        ),
    ],
)
def test_bad_method(arguments, error, message):
    with pytest.raises(error) as caught:
        baselines.create(*arguments).attribute(torch.rand(1, 3, 6, 6, dtype=torch.float64), torch.tensor([0]))
    assert message in str(caught.value)


def test_bad_input():
    model, x = Linear(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="Grad: expected settings among batch_size, got steps"):
        baselines.create("Grad", model, steps=3)
    for targets, error, message in (
        (torch.tensor([1]), ValueError, r"targets: expected \[2\] or \[2, K\], got shape \[1\]"),
        (torch.tensor([0.0, 1.0]), TypeError, "targets: expected integers, got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            baselines.attribute("Grad", model, x, targets)
    with pytest.raises(ValueError, match=r"images: expected \[N, C, H, W\], got shape \[3, 6, 6\]"):
        baselines.attribute("Grad", model, x[0], torch.tensor([1]))


@pytest.mark.parametrize("method", baselines.METHODS)
def test_frozen_empty_and_inference_mode(network, method):
    """In any mode of the caller, for no images, and with frozen parameters, which stay frozen."""
    few, x, targets = FEW.get(method, {}), digits(2), torch.tensor([[1, 2], [3, 4]])
    expected = baselines.attribute(method, network, x, targets, **few)
    network.requires_grad_(False)
    with torch.inference_mode():
        found = baselines.attribute(method, network, x.clone(), targets.clone(), **few)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not any(p.requires_grad for p in network.parameters())
    assert baselines.attribute(method, network, x[:0], targets[:0], **few).shape == (0, 2, 8, 8)


@pytest.mark.parametrize("method", ["GB", "DeepLIFT"])
def test_the_model_as_it_is_when_called(method):
    """The model is used in its state at the call and not at ``create``: if a logit has been doubled since,
    its maps are doubled.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    attribution, x, targets = baselines.create(method, model), torch.rand(1, 3, 6, 6), torch.tensor([1])
    before = attribution.attribute(x, targets)
    with torch.no_grad():
        model[4].weight.mul_(2)
    torch.testing.assert_close(attribution.attribute(x, targets), 2 * before)


@pytest.mark.parametrize(
    ("method", "settings", "error", "message"),
    [
        ("Grad", {"batch_size": 0}, ValueError, "Grad: batch_size: expected an int of at least 1, got 0"),
        ("IntGrad", {"n_steps": "x"}, ValueError, "IntGrad: n_steps: expected an int of at least 1, got 'x'"),
        ("RISE", {"p1": 0}, ValueError, "RISE: p1: expected a positive number up to 1, got 0"),
        ("Occ5", {"stride": 0}, ValueError, "Occ5: stride: expected an int of at least 1, got 0"),
        ("Occ5", {"stride": 7}, ValueError, "Occ5: stride: expected at most size 5, got 7"),
        (
            "Grad",
            {"layer": nn.Conv2d(3, 3, 1)},
            TypeError,
            "layer: expected a module, for GCam only, got a Conv2d for Grad",
        ),
        (
            "GCam",
            {"layer": "layer4"},
            TypeError,
            "layer: expected a module, for GCam only, got a str for GCam",
        ),
    ],
)
def test_bad_settings(method, settings, error, message):
    with pytest.raises(error) as caught:
        baselines.create(method, Linear(), **settings)
    assert message == str(caught.value)


def test_negative_targets():
    """Negative targets are refused, because they would count from the last class."""
    with pytest.raises(ValueError, match="targets: expected classes from 0, got -1"):
        baselines.attribute(
            "RISE", Linear(), torch.rand(1, 3, 6, 6, dtype=torch.float64), torch.tensor([-1]), masks=4
        )


def test_another_library_s_explain_is_not_ours():
    model = Linear()
    model.explain = lambda images: {}
    with pytest.raises(ValueError, match="'Ours': expected a coda_fast.Network, got a Linear"):
        baselines.create("Ours", model)


def test_without_captum(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(
        ImportError, match=r"the baselines need captum: pip install 'coda-fast\[evaluation\]'"
    ):
        baselines.create("Grad", Linear())


# -- the registry
# ------------------------------------------------------------------------------------------------------------


def brightness(method, x, target):
    """How bright a pixel is, times ``gain``.

    Whatever the class.
    """
    return method.settings["gain"] * x.sum(1)


TOY = {"gain": baselines.Setting(2.0, most=10, least=None), "batch_size": baselines.Setting(3, most=64)}


@pytest.fixture
def toy():
    """A method that is registered for one test."""
    registered = (_registry.ENTRIES, baselines.METHODS, baselines.TWINS)
    before = [dict(each) for each in registered]
    baselines.baseline("Toy", each_class=True, twin="IxG", **TOY)(brightness)
    yield "Toy"
    for each, content in zip(registered, before, strict=True):
        each.clear()
        each.update(content)


def test_a_registered_method_is_found_everywhere(toy, network, tmp_path):
    """The decorator alone adds a method to attributions in batches, evaluations, reports, the command line
    and the documents.
    """
    # imported here, so that the other tests do not need these packages
    from experiments import evaluate_digits
    from tools import documents

    x, targets = digits(2), torch.tensor([[1, 2], [3, 4]])
    assert baselines.METHODS[toy] == {"gain": 2.0, "batch_size": 3}
    found = baselines.attribute(toy, network, x, targets, gain=3)
    torch.testing.assert_close(found, 3 * x.sum(1)[:, None].expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="Toy: gain: expected a positive number up to 10, got 11"):
        baselines.create(toy, network, gain=11)
    with pytest.raises(TypeError, match="Toy: expected settings among gain, batch_size, got size"):
        baselines.create(toy, network, size=1)

    assert viewer.columns(["Toy"]) == {"Toy": "Toy"}
    assert viewer.columns(["Toy", "IxG"]) == {"IxG = Toy": "IxG"}

    checkpoint, output = tmp_path / "net.safetensors", tmp_path / "out"
    checkpoints.save(network.float(), checkpoint)
    command = ["evaluate", "--checkpoint", checkpoint, "--data", "digits", "--metric", "removal"]
    command += ["--limit", 2, "--points", 3, "--output", output]
    command += ["--methods", "Toy,Ours", "--set", "Toy.gain=5"]
    done = CliRunner().invoke(cli, list(map(str, command)))
    assert done.exit_code == 0, done.output
    measured = json.loads((output / "results.json").read_text())["methods"]
    assert list(measured) == ["Toy", "Ours"]
    assert measured["Toy"]["settings"] == {"gain": 5, "batch_size": 3}
    for name in ("evaluate", "report"):
        assert f"Methods: {', '.join(baselines.METHODS)}." in " ".join(
            CliRunner().invoke(cli, [name, "--help"]).output.split()
        )

    description = "How bright a pixel is, times ``gain``. On a CoDA-Net, to rounding, IxG."
    assert f"| `Toy` | {description} | gain 2, batch_size 3 |" in documents.methods().splitlines()
    assert "docs/evaluation.md" in documents.stale()
    assert "Toy" not in evaluate_digits.methods()  # as every method that equals another one
    del baselines.TWINS["Toy"]
    assert "Toy" in evaluate_digits.methods()


def test_all_families_are_registered():
    """Every file of the package is imported, because a file that is not imported registers nothing."""
    folder = Path(baselines.__file__).parent
    missing = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert not [name for name in missing if f"coda_fast.baselines.{name}" not in sys.modules]


def undescribed(method, x, target):
    return x.sum(1)


@pytest.mark.parametrize(
    ("name", "function", "options", "error", "message"),
    [
        ("Grad", brightness, TOY, ValueError, "name: expected one that is not taken, got 'Grad'"),
        ("Toy", undescribed, TOY, ValueError, "Toy: expected a function with a docstring, got none"),
        ("Toy", brightness, {"gain": 2.0}, TypeError, "Toy: gain: expected a Setting, got float"),
        ("Toy", brightness, {"layer": TOY["gain"]}, ValueError, "Toy: expected settings that"),
        ("Toy", brightness, {"each_class": True}, ValueError, "Toy: expected the setting batch_size with"),
        ("Toy", brightness, {"twin": "No"}, ValueError, "Toy: twin: expected a registered method, got 'No'"),
        ("Toy", brightness, {"gain": baselines.Setting(3, most=2)}, ValueError, "expected at most 2, got 3"),
    ],
)  # fmt: skip
def test_what_is_forgotten_is_said(name, function, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        baselines.baseline(name, **options)(function)
    assert "Toy" not in baselines.METHODS
