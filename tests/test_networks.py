"""A network that is not a chain, added in two places (its class and its registration), has everything that a
CoDANet has: exact explanations, the matrix regulariser, files, and a name here and in timm.
"""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import branching
import numpy as np
import pytest
import safetensors
import torch
from branching import Branching
from PIL import Image
from torch import nn

import coda_fast
from coda_fast import CheckpointError, DAUConv2d, baselines, checkpoints, evaluation, plot, registry, report
from coda_fast.explain import explanation_memory
from coda_fast.export import export_onnx
from coda_fast.losses import DynamicMatrixLoss, matrix_penalty

ROOT = Path(__file__).resolve().parents[1]
CUTS, AROUND = ("stem", "classes"), ("near", "far.0", "far.1", "inner")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The network, registered for one test."""
    monkeypatch.setattr(registry, "_CLASSES", registry.classes())
    monkeypatch.setattr(registry, "_MODELS", registry.models())
    monkeypatch.setattr(registry, "_LISTENERS", [])
    branching.register()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return coda_fast.create_model("branching_xs", dtype=torch.float64)


@pytest.fixture
def images():
    return torch.rand(3, 1, 10, 10, dtype=torch.float64)


def _rows(net, images, classes):
    """Rows of the global linear map, [N, K, 2, H, W], by autograd in explanation mode alone."""
    encoded = net.encoder(images).requires_grad_()
    with coda_fast.explanation_mode(net):
        maps = net.evidence(encoded)
        sums = [maps.sum((2, 3)).gather(1, classes[:, k : k + 1]).sum() for k in range(classes.shape[1])]
        rows = [torch.autograd.grad(total, encoded, retain_graph=True)[0] for total in sums]
    return torch.stack(rows, 1) / net.temperature


def test_explanation_is_complete(net, images):
    e = net.explain(images, [[0, 1, 2, 3, 4]] * 3)
    assert (e.completeness_error < 1e-14).all()
    assert torch.equal(e.logits, net(images))
    assert torch.allclose(e.dynamic_weight, _rows(net, images, e.target), rtol=1e-12, atol=1e-15)
    encoded = torch.cat((images, 1 - images), 1)
    assert torch.equal(e.contributions, e.dynamic_weight * encoded[:, None])
    assert e.layer == 0
    assert e.contribution_map.abs().max() > 1e-4
    chunks = net.explain(images, [[0, 1, 2, 3, 4]] * 3, memory_budget=1)
    assert torch.allclose(chunks.contributions, e.contributions, rtol=1e-12, atol=1e-15)
    assert torch.equal(coda_fast.explain.explain(nn.DataParallel(net), images).logits, e.logits)


@pytest.mark.parametrize("name", CUTS)
def test_decomposition_at_a_layer_that_cuts_the_network(net, images, name):
    entering = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda m, inputs: entering.append(inputs[0]))
    net(images)
    handle.remove()
    e = net.explain(images, [[1, 4]] * 3, layer=name)
    assert e.layer == name
    assert (e.completeness_error < 1e-14).all()
    assert torch.allclose(
        e.contributions, e.dynamic_weight * entering[0].detach()[:, None], rtol=1e-12, atol=1e-15
    )
    assert torch.equal(
        net.explain(images, [[1, 4]] * 3, layer=net.get_submodule(name)).contributions, e.contributions
    )
    assert f"layer {name}" in repr(e)


@pytest.mark.parametrize("name", AROUND)
def test_a_layer_that_does_not_cut_is_refused(net, images, name):
    message = f"layer: expected one that all ways from the image to the logits lead through, got '{name}'"
    for memory_budget in (1 << 30, 1):
        with pytest.raises(ValueError, match=message):
            net.explain(images, layer=name, memory_budget=memory_budget)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert (net.explain(images).completeness_error < 1e-14).all()  # the failed call leaves nothing behind


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("far", ValueError, "layer: expected one of stem, near, far.0, far.1, inner, classes, got 'far'"),
        (1, TypeError, "layer: expected the name of a DAU layer, a DAUConv2d of the model or None, got 1"),
        (True, TypeError, "layer: expected the name"),
        (DAUConv2d(2, 2, 1), ValueError, "layer: expected a DAU layer of this model, got one of another"),
    ],
    ids=str,
)
def test_refuses_layers(net, images, layer, error, message):
    with pytest.raises(error, match=message):
        net.explain(images, layer=layer)


class _Twice(coda_fast.Network):
    """A network that calls one layer twice."""

    def __init__(self, *, device=None, dtype=None, unused=False, **options):
        super().__init__(num_classes=2, **options)
        self.layer = DAUConv2d(2, 2, 3, padding=1, rank=2, device=device, dtype=dtype)
        self.unused = DAUConv2d(2, 2, 1, rank=2) if unused else None

    def evidence(self, encoded):
        return self.layer(self.layer(encoded))


def test_layers_that_are_called_twice_or_never(images):
    torch.manual_seed(0)
    net = _Twice(temperature=1.0, image_channels=1, unused=True).double()
    assert (net.explain(images, [[0, 1]] * 3).completeness_error < 1e-14).all()
    for name, count in (("layer", 2), ("unused", 0)):
        with pytest.raises(
            ValueError, match=f"layer: expected one that is called once, got '{name}'.*{count}"
        ):
            net.explain(images, layer=name)
    classes = torch.tensor([[0], [1], [0]])
    penalty = matrix_penalty(net, images, classes)
    assert torch.allclose(penalty, _rows(net, images, classes).abs().mean(), rtol=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_penalty_is_that_of_the_rows(net, images, norm):
    classes = torch.tensor([[0, 3], [1, 1], [4, 2]])
    rows = _rows(net, images, classes)
    expected = (rows.abs() if norm == "l1" else rows.square()).mean()
    assert torch.allclose(matrix_penalty(net, images, classes, norm), expected, rtol=1e-12)
    with torch.no_grad():
        assert torch.allclose(matrix_penalty(net, images, classes, norm), expected, rtol=1e-12)


def test_gradient_of_the_penalty_is_that_of_its_numbers(net, images):
    """The gradient equals finite differences, also through the activations that the weights of a layer are
    generated from.
    """
    classes = torch.tensor([[0, 3], [1, 1], [4, 2]])
    matrix_penalty(net, images, classes, "l2").backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found = (parameter.grad * direction).sum()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(matrix_penalty(net, images, classes, "l2"))
                parameter -= step * direction
        assert torch.allclose(found, (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-12), name


def test_a_chain_by_either_way(images):
    """A CoDANet gives the same rows and gradients by its own method for chains and by the general one."""
    torch.manual_seed(0)
    net = coda_fast.create_model("coda_xs_digits", dtype=torch.float64)
    any_network = coda_fast.dynamic_linear.DynamicLinear
    classes = torch.tensor([[0, 3], [1, 1], [4, 2]])
    expected = matrix_penalty(net, images, classes)
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    evidence, pull_back = any_network.linearise(net, net.encoder(images))
    rows = [
        pull_back(nn.functional.one_hot(c, 10).to(evidence)[:, :, None, None].expand_as(evidence))
        for c in classes.t()
    ]
    found = (torch.stack(rows) / net.temperature).abs().mean()
    assert torch.allclose(found, expected, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(found, list(net.parameters())), gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-15)
    for layer in net.layers:
        parts = zip(
            any_network.cut(net, net.encoder(images), layer), net.cut(net.encoder(images), layer), strict=True
        )
        assert all(torch.equal(a, b) for a, b in parts)
    assert any_network.layer_sizes(net, 9, 12) == net.layer_sizes(9, 12)


def test_training_with_the_regulariser(net, images):
    labels = torch.tensor([0, 1, 4])
    loss = DynamicMatrixLoss(0.5, generator=torch.Generator().manual_seed(0))(net, images, labels)
    loss.total.backward()
    assert torch.equal(loss.logits, net(images))
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())
    with coda_fast.explanation_mode(net), pytest.raises(ValueError, match="got one in explanation mode"):
        matrix_penalty(net, images, labels[:, None])


def test_penalty_under_autocast(net, images):
    net, images, classes = net.float(), images.float(), torch.tensor([[0], [1], [2]])
    exact = matrix_penalty(net, images, classes)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = matrix_penalty(net, images, classes)
    penalty.backward()
    assert penalty.dtype == torch.float32
    assert torch.allclose(penalty, exact, rtol=0.1)


def test_threads_know_nothing_of_each_other(net, images):
    """One thread explains at a layer while another predicts: calls are replaced only in their own thread."""
    expected, wrong, stop = net(images), [], threading.Event()

    def predict():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(net(images), expected):
                    wrong.append(True)

    thread = threading.Thread(target=predict)
    thread.start()
    for _ in range(20):
        net.explain(images, layer="stem")
        net.linearise(net.encoder(images))
    stop.set()
    thread.join()
    assert not wrong


def test_files_hold_everything(net, images, tmp_path):
    net.class_names = list("abcde")
    coda_fast.save(net, tmp_path / "net.safetensors", {"accuracy": 0.5})
    twin = coda_fast.load(tmp_path / "net.safetensors")
    assert type(twin) is Branching
    assert torch.equal(twin(images), net(images))
    assert twin.config() == net.config()
    assert str(twin) == str(net)
    assert checkpoints.read_metadata(tmp_path / "net.safetensors") == {"accuracy": 0.5}
    assert coda_fast.load(tmp_path / "net.safetensors", temperature=7.0).temperature == 7.0
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["format"] == "coda_fast.Branching"
    e = net.explain(images, layer="stem")
    e.save(tmp_path / "e.safetensors")
    again = coda_fast.Explanation.load(tmp_path / "e.safetensors")
    assert again.layer == "stem"
    assert torch.equal(again.contributions, e.contributions)


def test_a_file_of_an_unknown_network(net, tmp_path, monkeypatch):
    coda_fast.save(net, tmp_path / "net.safetensors")
    monkeypatch.delitem(registry._CLASSES, "Branching")
    with pytest.raises(
        CheckpointError, match=r"'coda_fast.CoDANet'.*found 'coda_fast.Branching'.*import the module"
    ):
        coda_fast.load(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="expected a network of a registered class, got Branching"):
        coda_fast.save(net, tmp_path / "other.safetensors")


class _Louder(Branching):
    def evidence(self, encoded):
        return 2 * super().evidence(encoded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: setattr(n, "near", nn.Conv2d(4, 4, 1)), "near: expected DAUConv2d, got Conv2d"),
        (lambda n: setattr(n.inner, "norm", "squash"), "inner: norm: expected l2, as saved, got squash"),
        (
            lambda n: setattr(n.smooth, "padding", (0, 0)),
            "smooth: options: expected 2, 2, kernel_size=.* as saved, got 2, 2, ",
        ),
        (lambda n: n.far.append(nn.Linear(2, 2)) and None, r"far: .*has \['2.bias', '2.weight'\] besides"),
        (
            lambda n: n.register_buffer("mean", torch.zeros(3)),
            r"model: .*Branching alone.*has \['mean'\] besides",
        ),
        (lambda n: n.stem.float() and None, "stem.reduction_weight: expected torch.float64, as in smooth"),
        (lambda n: setattr(n, "width", 5), r"stem.weight: expected shape \[5, 4, 2, 3, 3\], as configured"),
        (
            lambda n: _Louder(5, temperature=1.0),
            "model: expected Branching, got _Louder with a evidence of its own",
        ),
    ],
)
def test_refuses_to_save_what_load_would_misread(net, tmp_path, change, message):
    net = change(net) or net
    with pytest.raises(ValueError, match=message):
        coda_fast.save(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_registry():
    assert coda_fast.list_models()["branching_xs"] == "tests"
    net = coda_fast.create_model("branching_xs", num_classes=7, rank=2, width=3, image_size=12)
    assert (net.num_classes, net.stem.rank, net.near.out_channels, net.image_size) == (7, 2, 3, 12)
    branching.register()  # the same registration again is accepted


class _Forgetful(Branching):
    def config(self):
        return {name: value for name, value in super().config().items() if name != "width"}


def _namesake():
    return type("CoDANet", (Branching,), {})


@pytest.mark.parametrize(
    ("name", "network", "config", "error", "message"),
    [
        ("coda_s_cifar10", Branching, {}, ValueError, "name: expected one that no other model has"),
        (
            "x",
            _namesake(),
            {},
            ValueError,
            "no other class has, got CoDANet, which is coda_fast.models.CoDANet",
        ),
        ("x", nn.Linear, {}, TypeError, "network: expected a subclass of coda_fast.network.Network"),
        ("x", _Forgetful, {"width": 6}, ValueError, r"expected _Forgetful.config\(\) to hold all arg"),
        (
            "x",
            Branching,
            {"colour": 1},
            ValueError,
            r"expected Branching\(\*\*config, device=..., dtype=...\) to be one, got .*colour",
        ),
        ("x", _Twice, {}, ValueError, "expected _Twice.*num_classes"),
    ],
)
def test_refuses_to_register(name, network, config, error, message):
    before = coda_fast.list_models()
    with pytest.raises(error, match=message):
        coda_fast.register_model(name, network, dict(num_classes=5, temperature=3.0) | config)
    assert coda_fast.list_models() == before


def test_a_network_without_evidence_is_refused():
    class Empty(coda_fast.Network):
        def __init__(self, *, device=None, dtype=None, **options):
            super().__init__(**options)

    with pytest.raises(ValueError, match="network: expected evidence made of DAU layers, got none in Empty"):
        coda_fast.register_model("empty", Empty, dict(num_classes=2, temperature=1.0))


def test_sizes_and_memory(net, images):
    """The memory for an image of any size is estimated without computing."""
    assert net.layer_sizes(10, 8) == {
        "stem": (4, 5, 4),
        "near": (4, 5, 4),
        "far.0": (4, 5, 4),
        "far.1": (4, 5, 4),
        "inner": (8, 5, 4),
        "classes": (5, 5, 4),
    }
    assert explanation_memory(net, 10**6, 10**6) > 2**40
    assert copy.deepcopy(net).to("meta").layer_sizes(10, 8) == net.layer_sizes(10, 8)


def test_other_tools(net, images):
    """Evaluation, figures, reports and the explainer accept it as they accept a CoDANet."""
    labels, net = torch.tensor([0, 1, 4]), net.eval()
    assert evaluation.completeness_error(net, images, labels).max() < 1e-14
    assert evaluation.pixel_removal(net, images, labels, points=3).probabilities.shape == (3, 3)
    plot.explanation_figure(images, e := net.explain(images, layer="stem"), net.logit_bias)
    e.plot()
    maps = baselines.attribute("Ours", net, images, labels[:, None])
    assert torch.equal(maps, net.explain(images, labels).contribution_map)
    assert baselines.attribute("GCam", net, images, labels[:, None]).shape == (3, 1, 10, 10)
    page = report.render(net, [image.float() for image in images[:1]], ["a"], methods=[])
    assert "layer classes, 5 x 5" in page
    assert "layer inner" not in page
    logits, maps = coda_fast.Explainer(net)(images, labels)
    e = net.explain(images, labels)
    assert torch.equal(logits, e.logits)
    assert torch.allclose(maps, e.contribution_map[:, 0], rtol=1e-12, atol=1e-15)


def test_export_without_the_explanation(net, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="explain: expected a CoDANet, or a network that writes linearise"):
        export_onnx(net, tmp_path / "net.onnx", explain=True)
    assert not list(tmp_path.iterdir())
    export_onnx(net, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size


def test_sizes_of_pictures_are_optional(images):
    """A network without a native image size and without a name."""
    net = Branching(3, temperature=1.0, image_channels=1)
    assert net.image_size is None
    assert (net.explain(images.float()).completeness_error < 1e-5).all()


TIMM = """
import sys, tempfile, pickle, torch, timm, coda_fast, branching
from coda_fast.losses import matrix_penalty

if sys.argv[1] == "before":
    branching.register()
import coda_fast.timm_models
if sys.argv[1] == "after":
    branching.register()

def refused(call, message):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

torch.manual_seed(0)
assert timm.list_models("branching*") == ["branching_xs"]
net = timm.create_model("branching_xs", num_classes=7, in_chans=3, width=6)
assert isinstance(net, branching.Branching)
assert (net.num_classes, net.in_chans, net.num_features, net.width) == (7, 3, 12, 6)
assert net.get_classifier() is net.classes
assert net.default_cfg["classifier"] == "classes" and net.default_cfg["first_conv"] == "stem"
assert tuple(net.default_cfg["pool_size"]) == (5, 5)
pictures = torch.rand(2, 3, 10, 10)
assert torch.equal(net.forward_head(net.forward_features(pictures)), net(pictures))
assert net.forward_features(pictures).shape == (2, 12, 5, 5)
assert (net.explain(pictures).completeness_error < 1e-5).all()
matrix_penalty(net, pictures, torch.tensor([[0], [1]])).backward()
with tempfile.TemporaryDirectory() as folder:
    coda_fast.save(net, folder + "/net.safetensors")
    twin = coda_fast.load(folder + "/net.safetensors")
    assert type(twin) is branching.Branching and torch.equal(twin(pictures), net(pictures))
    coda_fast.save(timm.create_model("branching_xs"), folder + "/grey.safetensors")
    options = dict(file=folder + "/grey.safetensors")
    fine = timm.create_model("branching_xs", pretrained=True, num_classes=3, pretrained_cfg_overlay=options)
    grey = coda_fast.load(folder + "/grey.safetensors")
    assert fine.num_classes == 3 and torch.equal(fine.stem.weight, grey.stem.weight)
again = pickle.loads(pickle.dumps(net))
assert type(again) is type(net) and torch.equal(again(pictures), net(pictures))
kept = net.stem.weight.detach().clone()
net.reset_classifier(3)
assert net.num_classes == 3 and net(pictures).shape == (2, 3) and torch.equal(net.stem.weight, kept)
assert (net.explain(pictures).completeness_error < 1e-5).all()
net.reset_classifier(0)
assert net.num_classes == 0 and net(pictures).shape == (2, 12)
refused(lambda: net.explain(pictures), "expected a network with a classifier")
refused(lambda: coda_fast.save(net, "x.safetensors"), "expected a network with a classifier")
assert timm.create_model("branching_xs", num_classes=0, global_pool="")(pictures[:, :1]).shape == (2, 8, 5, 5)
refused(lambda: timm.create_model("branching_xs", drop_rate=0.1), "drop_rate: expected 0")
refused(lambda: timm.create_model("branching_xs", features_only=True), "features_only: expected")
refused(lambda: net.set_grad_checkpointing(), "enable: expected False")
print("all")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_timm(when, tmp_path):
    """In another process, because timm's registrations cannot be undone; registered before or after the
    plug-in.
    """
    pytest.importorskip("timm")
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", TIMM, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.stdout == "all\n", done.stderr


def test_evidence_of_another_shape_is_refused():
    """Pooled logits in place of maps would be summed over the batch or the classes without a word."""

    class Pooled(Branching):
        def evidence(self, encoded):
            return super().evidence(encoded).sum((2, 3))

    net = Pooled(num_classes=5, temperature=3.0, image_channels=1)
    with pytest.raises(ValueError, match=r"evidence: expected maps \[N, 5, H, W\], got shape \[2, 5\]"):
        net(torch.rand(2, 1, 10, 10))


def test_commands_know_the_network_of_the_page(tmp_path):
    """The code of docs/networks.md as a module in the working directory, which ``--import`` names."""
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    work, scripts = tmp_path / "work", tmp_path / "scripts"
    work.mkdir(), scripts.mkdir()
    (work / "my_networks.py").write_text(code)
    (scripts / "coda-fast").write_text("from coda_fast.cli import main\nmain()\n")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(work / "picture.png")
    save = (
        "import my_networks as m, coda_fast; coda_fast.save(coda_fast.create_model('residual_digits'), 'n')"
    )

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=work, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert python("-c", save)[0] == 0
    script, explain = str(scripts / "coda-fast"), ("explain", "picture.png", "--checkpoint", "n")
    code, text = python(script, *explain)
    assert (code, "import the module that registers it (coda-fast --import MODULE)" in text) == (2, True), (
        text
    )
    code, text = python(script, "--import", "my_networks", *explain, "--output", "map.png")
    assert code == 0, text
    assert (work / "map.png").stat().st_size > 1000
    code, text = python(script, "--import", "nowhere", *explain)
    assert (code, "'nowhere': No module named 'nowhere'" in text) == (2, True), text


def test_the_resnet_of_the_page():
    """The code of docs/replace.md: a converted ResNet that explains itself."""
    page = (ROOT / "docs" / "replace.md").read_text(encoding="utf-8")
    code = next(
        block.partition("```")[0] for block in page.split("```python\n") if "class DAUResNet" in block
    ).replace("dict(num_classes=10,", "dict(num_classes=10, rank=2,")
    found = {"coda_fast": coda_fast, "images": torch.rand(2, 3, 64, 64)}
    exec(code, found)
    assert found["explanation"].logits.shape == (2, 10)
    assert (found["explanation"].completeness_error < 1e-5).all()
