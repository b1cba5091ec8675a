"""ONNX files in onnxruntime, made by torch.onnx.export and by ``export_onnx``, on real images."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import ROOT, assert_close
from support_export import digits, onnx_session, photograph, run_onnx, trained_network
from torch import nn

import coda_fast
from coda_fast import export as exporter

pytest.importorskip("onnx", reason="needs the extra coda-fast[onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra coda-fast[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra coda-fast[onnx]")


@pytest.fixture(scope="module")
def trained():
    return trained_network()


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):
    """The trained network and its explanation as an ONNX file."""
    path = tmp_path_factory.mktemp("export") / "digits.onnx"
    exporter.export_onnx(trained, path, explain=True)
    return path


class LayersOfEveryGeometry(nn.Module):
    """DAU layers of every geometry, after layers of torch."""

    def __init__(self):
        super().__init__()
        options = [
            dict(kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2), padding=1, rank=3),
            dict(kernel_size=(4, 2), padding="same", dilation=2, rank=3),
            dict(kernel_size=3, norm="l2", bias=False, rank=1),
            dict(kernel_size=1, rank=9),
            dict(kernel_size=(2, 4), padding="same", backend="reference", rank=2),
        ]
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.layers = nn.ModuleList(coda_fast.DAUConv2d(4, 5, **chosen) for chosen in options)
        self.in_half = coda_fast.DAUConv2d(4, 5, 3, rank=3).half()

    def forward(self, images):
        features = self.first(images)
        return *(layer(features) for layer in self.layers), self.in_half(features.half())


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_plain_export_of_layers(tmp_path):
    """torch.onnx.export of a module in training mode that contains DAU layers. The file also computes batch
    sizes and image sizes other than the exported ones.
    """
    module = LayersOfEveryGeometry()
    images = photograph(12).repeat(2, 1, 1, 1)
    dynamic = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        module, (images,), tmp_path / "x.onnx", dynamo=True, dynamic_shapes=(dynamic,), verbose=False
    )
    session = onnx_session(tmp_path / "x.onnx")
    for shape in ((1, 12, 16), (5, 12, 16), (3, 15, 11)):
        images = F.interpolate(photograph(24), shape[1:]).repeat(shape[0], 1, 1, 1) * torch.rand(
            shape[0], 1, 1, 1
        )
        with torch.no_grad():
            expected = module(images)
        for index, (ours, truth) in enumerate(zip(run_onnx(session, images), expected, strict=True)):
            assert ours.dtype == truth.dtype
            assert_close(
                ours, truth, 2e-3 if truth.dtype == torch.float16 else 1e-5, f"layer {index}, {shape}"
            )


class GradientTimesInput(nn.Module):
    """The explanation as input times gradient in explanation mode."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        images = images.detach().requires_grad_()
        with torch.enable_grad(), coda_fast.explanation_mode(self.model):
            (row,) = torch.autograd.grad(self.model(images)[:, 3].sum(), images)
        return row * images.detach()


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_plain_export_of_networks(trained, tmp_path):
    """A network in training mode, and a module whose program contains the gradient in explanation mode."""
    images = digits()[0][1500:1502]
    for name, module in {"network": trained, "gradient": GradientTimesInput(trained)}.items():
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(module, (images,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
        session = onnx_session(path)
        for batch in (1, 2, 7):
            some = digits()[0][1600 : 1600 + batch]
            (ours,) = run_onnx(session, some)
            assert_close(ours, module(some), 1e-5, f"{name}, batch {batch}")


def assert_explains(model, session, images, target):
    """Assert that logits and map are within 1e-5 of those of the network in float64, relative to the sum of
    absolute contributions where this exceeds 1, and that the map is complete: it sums to the logit.
    """
    logits, contribution_map = run_onnx(session, images, target)
    truth = coda_fast.CoDANet(**model.config()).double()
    truth.load_state_dict(model.state_dict())
    e = truth.explain(images.double(), target)
    size = e.contributions.abs().sum((2, 3, 4))[:, 0]
    bound = 1e-5 * size.clamp_min(1)
    assert logits.dtype == contribution_map.dtype == torch.float32
    assert ((logits - e.logits).abs() <= bound[:, None]).all()
    assert contribution_map.shape == e.contribution_map[:, 0].shape
    assert ((contribution_map - e.contribution_map[:, 0]).abs().amax((1, 2)) <= bound).all()
    assert_close(contribution_map, e.contribution_map[:, 0], 1e-4)  # and relative to the map itself
    total = contribution_map.sum((1, 2), dtype=torch.float64) + model.logit_bias
    assert (
        (total - logits.gather(1, target[:, None])[:, 0]).abs() <= 1e-6 * (size + logits.abs().amax(1))
    ).all()


def test_digits(trained, explained):
    session = onnx_session(explained)
    images, classes = digits()
    for batch in (1, 2, 9):
        assert_explains(trained, session, images[1500 : 1500 + batch], classes[1500 : 1500 + batch])
    other = F.interpolate(images[1500:1503], (13, 19), mode="bilinear")
    assert_explains(trained, session, other, torch.tensor([9, 0, 4]))


def test_colour_photograph(tmp_path):
    """The published S-CoDA at a quarter of its rank."""
    torch.manual_seed(2)
    model = coda_fast.create_model("coda_s_cifar10", rank=8, temperature=4.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    exporter.export_onnx(model, tmp_path / "net.onnx", explain=True, size=(37, 41))
    session = onnx_session(tmp_path / "net.onnx")
    for batch in (1, 3):
        assert_explains(model, session, photograph(37).repeat(batch, 1, 1, 1), torch.arange(batch) + 4)


@pytest.mark.parametrize(
    "options",
    [
        dict(
            norm="l2",
            bias=False,
            ranks=[1, 3, 40],
            strides=[2, 1, 1],
            kernel_sizes=[(3, 2), (4, 2), 1],
            paddings=[1, "same", 0],
        ),
        dict(
            ranks=[2, 3, 4],
            strides=[3, (1, 2), 1],
            kernel_sizes=[2, 3, (1, 2)],
            paddings=[(0, 2), 1, (1, 0)],
            backend="reference",
        ),
    ],
    ids=["l2, same, rank 1", "edges that no window reaches"],
)
def test_odd_networks(options, tmp_path):
    """Networks with unusual layers, exported with a fixed image size."""
    torch.manual_seed(3)
    backend = options.pop("backend", "auto")
    model = coda_fast.CoDANet([5, 6, 4], temperature=2.0, backend=backend, dtype=torch.bfloat16, **options)
    exporter.export_onnx(model, tmp_path / "net.onnx", explain=True, size=(17, 21))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the model stays as it is"
    session = onnx_session(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 17, 21]
    assert_explains(model, session, photograph(17).repeat(3, 1, 1, 1), torch.tensor([3, 0, 1]))


def test_what_the_file_says(trained, explained, tmp_path):
    session = onnx_session(explained)
    shapes = {
        entry.name: (entry.type, entry.shape) for entry in (*session.get_inputs(), *session.get_outputs())
    }
    assert shapes == {
        "images": ("tensor(float)", ["batch", 1, "height", "width"]),
        "target": ("tensor(int64)", ["batch"]),
        "logits": ("tensor(float)", ["batch", 10]),
        "contribution_map": ("tensor(float)", ["batch", "height", "width"]),
    }
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == trained.class_names
    assert (about["image_size"], about["image_channels"]) == ("8", "1")
    said = {"resize": 8, "crop": 8, "interpolation": "bilinear", "value_range": [0.0, 1.0], "channels": 1}
    assert json.loads(about["preprocessing"]) == said
    assert (float(about["logit_bias"]), float(about["temperature"])) == (
        trained.logit_bias,
        trained.temperature,
    )
    assert (about["coda_fast_version"], about["torch_version"]) == (
        coda_fast.__version__,
        str(torch.__version__),
    )
    content = explained.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in content, "paths of this machine"
    assert len(content) < 1.2 * 4 * sum(p.numel() for p in trained.parameters()) + 150_000
    assert [p.name for p in explained.parent.iterdir()] == [explained.name], "one file"


def test_a_class_that_does_not_exist_has_no_map(explained):
    images = digits()[0][:3]
    _, contribution_map = run_onnx(onnx_session(explained), images, torch.tensor([10, -1, 3]))
    assert not contribution_map[:2].any()
    assert contribution_map[2].any()
