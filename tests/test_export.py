"""Export: decompositions, ONNX files in onnxruntime on real pictures, packages of AOTInductor, the
command, the example.
"""

import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_extremes
import torch
import torch.nn.functional as F
from odd_pictures import odd_files
from support import assert_close, random_layer
from torch import nn

import coda_fast
import coda_fast.data
from coda_fast import _decompositions, cli, ops
from coda_fast import export as exporter
from coda_fast._geometry import Geometry
from coda_fast._spec import Adjoint, Align, Kept, Parameters, Spec, flatten
from coda_fast.backends import factored, reference

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "onnx_explanation.py"
onnx = pytest.importorskip("onnx", reason="needs the extra coda-fast[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra coda-fast[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra coda-fast[onnx]")


def digits():
    """Scans of digits [N, 1, 8, 8] and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images / 16).float()[:, None], torch.from_numpy(data.target)


def photograph(side):
    """A colour photograph, [1, 3, side, side + 4]."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 255
    return F.interpolate(pixels, (side, side + 4), mode="bilinear", antialias=True).clamp(0, 1)


@pytest.fixture(scope="module")
def trained():
    """A network that tells digits apart, in a few seconds of training."""
    torch.manual_seed(0)
    model = coda_fast.create_model(
        "coda_xs_digits", temperature=10.0, class_names=[f"digit {i}" for i in range(10)]
    )
    images, classes = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        chosen = torch.arange(step * 64, (step + 1) * 64) % 1500
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(
            model(images[chosen]), F.one_hot(classes[chosen], 10).float()
        ).backward()
        optimizer.step()
    with torch.no_grad():
        assert (model(images[1500:]).argmax(1) == classes[1500:]).float().mean() > 0.7
    return model


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):
    """The trained network and its explanation as an ONNX file."""
    path = tmp_path_factory.mktemp("export") / "digits.onnx"
    exporter.export_onnx(trained, path, explain=True)
    return path


def session(path):
    """The file in onnxruntime, after a look inside: standard operators only."""
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(started, *tensors):
    names = [entry.name for entry in started.get_inputs()]
    results = started.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
    return [torch.from_numpy(result) for result in results]


# -- the decompositions
# ------------------------------------------------------------------------------------------------------------

WINDOWS = {
    "plain": ([1, 1], [0, 0, 0, 0], [1, 1]),
    "odd": ([2, 1], [1, 0, 1, 2], [1, 2]),
    "edges that no window reaches": ([3, 2], [2, 2, 1, 1], [2, 1]),
    "even kernel, same": ([1, 1], [0, 1, 1, 2], [1, 1]),
}


decomposed = {op._opname: function for op, function in _decompositions.table().items()}


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("norm", ["squash", "l2"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(
    ("channels", "units", "rank", "kernel", "bias"),
    [
        (5, 4, 3, (3, 2), True),
        (3, 4, 1, (2, 2), False),
        (2, 3, 9, (1, 3), True),
        (4, 3, 9, (1, 1), False),
        (1, 2, 1, (1, 1), True),
    ],
)
def test_decompositions_are_the_definition(channels, units, rank, kernel, bias, window, norm, applied):
    """In float64; what is kept is what the factored backend keeps, with its dtypes and strides."""
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    u = torch.randn_like(x) if applied else None
    layer = random_layer(channels, units, rank, kernel, bias=bias)
    stride, padding, dilation = window
    geometry = Geometry(kernel, tuple(stride), tuple(dilation), tuple(padding))
    spec, rest = Spec(geometry, norm, 1e-6), (*window, norm, 1e-6)
    found = decomposed["align"](x, u, *layer, *rest, False, "products", "factored")
    truth = reference.align(x, x if u is None else u, Parameters(*layer), spec)
    assert_close(found[0], truth, 1e-10)
    for ours, kept in zip(found, ops.align(x, u, *layer, *rest, False, "products", "factored"), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (kept.shape, kept.dtype, kept.stride())
        assert_close(ours, kept, 1e-10)
    value = torch.randn_like(truth)
    transposed = decomposed["adjoint"](x, value, *layer, *rest, "factored")
    assert_close(transposed, reference.adjoint(x, value, Parameters(*layer), spec), 1e-10)
    needs = [not applied, applied, False, False, False]
    backward = decomposed["align_backward"](value, x, u, *layer, *found[1:], *rest, True, needs, "factored")
    assert [t.numel() > 0 for t in backward] == needs
    assert torch.equal(backward[needs.index(True)], transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decompositions_in_lower_precision(dtype):
    """Sums and norms in float32: only what comes in and goes out is rounded."""
    x = torch.randn(2, 5, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    layer = [t.to(dtype) for t in random_layer(5, 4, 3, (3, 2))]
    rest = (*WINDOWS["odd"], "squash", 1e-6)
    output, dot, square, *_ = decomposed["align"](x, None, *layer, *rest, False, "norm", "factored")
    value = torch.randn_like(output)
    transposed = decomposed["adjoint"](x, value, *layer, *rest, "factored")
    assert (output.dtype, transposed.dtype, square.dtype, dot.numel()) == (dtype, dtype, torch.float32, 0)
    assert output.is_contiguous(memory_format=torch.channels_last)
    wide = [t.double() for t in (x, *layer)]
    bound = 2 * torch.finfo(dtype).eps
    kept = decomposed["align"](wide[0], None, *wide[1:], *rest, False, "norm", "factored")
    assert_close(output, kept[0], bound)
    assert_close(square, kept[2], 1e-6)
    assert_close(
        transposed, decomposed["adjoint"](wide[0], value.double(), *wide[1:], *rest, "factored"), bound
    )


@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_weights_that_nearly_cancel(norm):
    """|w| is 1e-4 of A z and of b: a Gram matrix in float32 would be wrong by as much as |w|^2 itself."""
    torch.manual_seed(1)
    reduce, generate, _ = random_layer(4, 6, 3, (3, 3), dtype=torch.float32)
    x = torch.randn(1, 4, 3, 3)
    z = F.conv2d(x.double(), reduce.double()).flatten()
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], norm, 1e-6)
    opposite = -torch.einsum("nrchw,r->nchw", generate.double(), z)
    bias = (opposite + 1e-4 * torch.randn_like(opposite)).float()
    output, _, square, *_ = decomposed["align"](
        x, None, reduce, generate, bias, *rest, False, "norm", "factored"
    )
    wide = [t.double() for t in (x, reduce, generate, bias)]
    geometry = Geometry((3, 3), (1, 1), (1, 1), (0, 0, 0, 0))
    length = torch.linalg.vector_norm(opposite.flatten(1) - wide[3].flatten(1), dim=1)
    assert 1e-6 < float(length.max() / opposite.flatten(1).norm(dim=1).max()) < 1e-3
    assert_close(square.flatten(), length.square(), 1e-2)
    truth = reference.align(wide[0], wide[0], Parameters(*wide[1:]), Spec(geometry, norm, 1e-6))
    assert_close(output, truth, 1e-2)
    value = torch.ones_like(output)
    transposed = decomposed["adjoint"](x, value, reduce, generate, bias, *rest, "factored")
    assert_close((transposed * x).sum(), output.sum(), 1e-2, terms=[output])


@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_weights_that_are_rounding(norm):
    """A z and b cancel to the last digit: |y| <= |x| s(|w|^2) |w| all the same, in half of the units
    thanks to Cauchy-Schwarz alone.
    """
    torch.manual_seed(1)
    reduce, generate, _ = random_layer(3, 1000, 1, (1, 1), dtype=torch.float32)
    generate = generate * 1e3
    x = torch.randn(1, 3, 1, 1)
    bias = -generate[:, 0] * F.conv2d(x, reduce)[0]
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], norm, 1e-6)
    output, _, square, *_ = decomposed["align"](
        x, None, reduce, generate, bias, *rest, False, "norm", "factored"
    )
    assert (square >= 0).all()
    length = square.view(output.shape).sqrt()
    most = x.norm() * (
        length.square() / (1 + length.square()) if norm == "squash" else length / length.clamp_min(1e-6)
    )
    assert (output.abs() <= most * (1 + 1e-5) + 1e-10).all()


@contextlib.contextmanager
def decompositions_for_factored():
    """The operators compute by their decompositions; gradients then begin with what those have kept."""

    def align(input, applied, parameters, spec, *, keep):
        call = Align(input, applied, parameters, spec, False, keep, "factored")
        output, dot, square, *_ = decomposed["align"](*flatten(call))
        return output, Kept(*(kept if kept.numel() else None for kept in (dot, square)))

    def adjoint(input, value, parameters, spec):
        return decomposed["adjoint"](*flatten(Adjoint(input, value, parameters, spec, "factored")))

    with mock.patch.multiple(factored, align=align, adjoint=adjoint):
        yield


@pytest.mark.parametrize("kind", test_extremes.KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_ends_of_the_range_of_numbers(dtype, kind):
    """Every number of every result within its own tolerance, as for the backends."""
    with decompositions_for_factored():
        for seed in range(10):
            test_extremes.check(test_extremes.make(seed, kind, dtype), "factored")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_not_finite(dtype):
    """In images; of weights that are infinite, a convolution takes no notice where they meet its own
    padding.
    """
    tried = 0
    with decompositions_for_factored():
        for seed in range(80):
            case = test_extremes.make(seed, "ordinary", dtype)
            if any(f" in {name} " in test_extremes.spoil(case, seed)[1] for name in "xuv"):
                test_extremes.check_not_finite(case, "factored", seed, test_extremes.WHATS)
                tried += 1
    assert tried > 20


def test_fake_kernels_stay_what_they_are():
    """torch.compile with symbolic sizes asks the fake kernels, not the decompositions, which torch would
    prefer otherwise.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    layer = random_layer(5, 4, 3, (3, 2))
    x, value = torch.randn(2, 5, 9, 8, dtype=torch.float64), torch.randn(2, 4, 4, 7, dtype=torch.float64)
    calls = []
    watched = {op: lambda *args, _op=op, **options: calls.append(_op) for op in _decompositions.table()}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mock.patch.dict(torch._decomp.decomposition_table, watched), mode:
        fake = [mode.from_tensor(t, symbolic_context=None) for t in (x, value, *layer)]
        assert any(isinstance(length, torch.SymInt) for length in fake[0].shape)
        rest = (*WINDOWS["odd"], "squash", 1e-6)
        output, *kept = ops.align(fake[0], None, *fake[2:], *rest, True, "norm", "factored")
        ops.align_backward(
            output, fake[0], None, *fake[2:], *kept, *rest, True, [True, *[False] * 4], "factored"
        )
        ops.adjoint(fake[0], fake[1], *fake[2:], *rest, "factored")
    assert not calls


def test_import_is_light():
    code = (
        "import sys, coda_fast; print(*(n for n in sys.modules if n.split('.')[:2] in (['torch', 'onnx'], "
        "['torch', '_inductor'])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


# -- plain torch.onnx.export
# ------------------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Layers of every geometry, beside others of torch."""

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
    """Whatever module a layer is in, as anybody exports it, while it trains: batches and sizes other than
    the exported one.
    """
    module = Several()
    images = photograph(12).repeat(2, 1, 1, 1)
    dynamic = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        module, (images,), tmp_path / "x.onnx", dynamo=True, dynamic_shapes=(dynamic,), verbose=False
    )
    started = session(tmp_path / "x.onnx")
    for shape in ((1, 12, 16), (5, 12, 16), (3, 15, 11)):
        images = F.interpolate(photograph(24), shape[1:]).repeat(shape[0], 1, 1, 1) * torch.rand(
            shape[0], 1, 1, 1
        )
        with torch.no_grad():
            expected = module(images)
        for index, (ours, truth) in enumerate(zip(run_onnx(started, images), expected, strict=True)):
            assert ours.dtype == truth.dtype
            assert_close(
                ours, truth, 2e-3 if truth.dtype == torch.float16 else 1e-5, f"layer {index}, {shape}"
            )


class GradientTimesInput(nn.Module):
    """The explanation as a gradient, for those who write it so."""

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
    """A network in training mode and one whose gradient in explanation mode is part of the program."""
    images = digits()[0][1500:1502]
    for name, module in {"network": trained, "gradient": GradientTimesInput(trained)}.items():
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(module, (images,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
        started = session(path)
        for batch in (1, 2, 7):
            some = digits()[0][1600 : 1600 + batch]
            (ours,) = run_onnx(started, some)
            assert_close(ours, module(some), 1e-5, f"{name}, batch {batch}")


# -- logits and explanation in onnxruntime
# ----------------------------------------------------------------------------------------------


def _assert_explains(model, started, images, target):
    """Logits and map to 1e-5 of the network in float64, and complete: relative to the sum of absolute
    contributions where that is large.
    """
    logits, contribution_map = run_onnx(started, images, target)
    truth = coda_fast.CoDANet(**model.config()).double()
    truth.load_state_dict(model.state_dict())
    e = truth.explain(images.double(), target)
    size = e.contributions.abs().sum((2, 3, 4))[:, 0]
    bound = 1e-5 * size.clamp_min(1)
    assert logits.dtype == contribution_map.dtype == torch.float32
    assert ((logits - e.logits).abs() <= bound[:, None]).all()
    assert contribution_map.shape == e.contribution_map[:, 0].shape
    assert ((contribution_map - e.contribution_map[:, 0]).abs().amax((1, 2)) <= bound).all()
    assert_close(contribution_map, e.contribution_map[:, 0], 1e-4)  # as pictures, too
    total = contribution_map.sum((1, 2), dtype=torch.float64) + model.logit_bias
    assert (
        (total - logits.gather(1, target[:, None])[:, 0]).abs() <= 1e-6 * (size + logits.abs().amax(1))
    ).all()


def test_digits(trained, explained):
    started = session(explained)
    images, classes = digits()
    for batch in (1, 2, 9):
        _assert_explains(trained, started, images[1500 : 1500 + batch], classes[1500 : 1500 + batch])
    other = F.interpolate(images[1500:1503], (13, 19), mode="bilinear")
    _assert_explains(trained, started, other, torch.tensor([9, 0, 4]))


def test_colour_photograph(tmp_path):
    """The published S-CoDA at a quarter of its rank."""
    torch.manual_seed(2)
    model = coda_fast.create_model("coda_s_cifar10", rank=8, temperature=4.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    exporter.export_onnx(model, tmp_path / "net.onnx", explain=True, size=(37, 41))
    started = session(tmp_path / "net.onnx")
    for batch in (1, 3):
        _assert_explains(model, started, photograph(37).repeat(batch, 1, 1, 1), torch.arange(batch) + 4)


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
    """Of a fixed size."""
    torch.manual_seed(3)
    backend = options.pop("backend", "auto")
    model = coda_fast.CoDANet([5, 6, 4], temperature=2.0, backend=backend, dtype=torch.bfloat16, **options)
    exporter.export_onnx(model, tmp_path / "net.onnx", explain=True, size=(17, 21))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the model stays as it is"
    started = session(tmp_path / "net.onnx")
    assert started.get_inputs()[0].shape == ["batch", 3, 17, 21]
    _assert_explains(model, started, photograph(17).repeat(3, 1, 1, 1), torch.tensor([3, 0, 1]))


def test_what_the_file_says(trained, explained, tmp_path):
    started = session(explained)
    shapes = {
        entry.name: (entry.type, entry.shape) for entry in (*started.get_inputs(), *started.get_outputs())
    }
    assert shapes == {
        "images": ("tensor(float)", ["batch", 1, "height", "width"]),
        "target": ("tensor(int64)", ["batch"]),
        "logits": ("tensor(float)", ["batch", 10]),
        "contribution_map": ("tensor(float)", ["batch", "height", "width"]),
    }
    about = started.get_modelmeta().custom_metadata_map
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
    for place in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(place).encode() not in content, "paths of this machine"
    assert len(content) < 1.2 * 4 * sum(p.numel() for p in trained.parameters()) + 150_000
    assert [p.name for p in explained.parent.iterdir()] == [explained.name], "one file"


# -- the module
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "factored"])
def test_explainer_is_explain(backend):
    model = coda_fast.CoDANet(
        [4, 5, 3], [4, 4, 2], [3, 3, 1], [2, 1, 1], temperature=3.0, dtype=torch.float64, backend=backend
    )
    images, target = (
        torch.rand(4, 3, 9, 7, dtype=torch.float64),
        torch.tensor([2, 0, 1, 1], dtype=torch.int32),
    )
    logits, contribution_map = coda_fast.Explainer(model)(images, target)
    e = model.explain(images, target)
    assert_close(logits, e.logits, 1e-12)
    assert_close(contribution_map, e.contribution_map[:, 0], 1e-12)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(contribution_map.square().sum(), parameters)
    assert all(g.abs().max() > 0 for g in gradients), "differentiable, as a penalty on explanations is"


def test_explainer_of_timm_leaves_dropout_out():
    timm = pytest.importorskip("timm", reason="needs the extra coda-fast[timm]")
    import coda_fast.timm_models

    model = timm.create_model("coda_xs_digits", drop_rate=0.5).train()
    images, target = digits()[0][:3], torch.tensor([1, 2, 3])
    logits, contribution_map = coda_fast.Explainer(model)(images, target)
    assert model.training
    assert_close(contribution_map, model.eval().explain(images, target).contribution_map[:, 0], 1e-5)
    assert_close(logits, model(images), 1e-6)
    with pytest.raises(ValueError, match="expected a network with a classifier"):
        coda_fast.Explainer(timm.create_model("coda_xs_digits", num_classes=0))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([1, 2], TypeError, "target: expected a tensor of integers, got list"),
        (torch.tensor([1.0, 2.0]), TypeError, "target: expected a tensor of integers, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "target: expected a tensor of integers, got torch.bool"),
        (
            torch.tensor([1, 2, 3]),
            ValueError,
            r"target: expected shape \[2\], a class for each image, got \[3\]",
        ),
        (
            torch.tensor([[1], [2]]),
            ValueError,
            r"target: expected shape \[2\], a class for each image, got \[2, 1\]",
        ),
        (torch.tensor([1, 10]), ValueError, "target: expected classes from 0 to 9, got 1 to 10"),
        (torch.tensor([-1, 1]), ValueError, "target: expected classes from 0 to 9, got -1 to 1"),
    ],
)
def test_explainer_refuses(target, error, message):
    explainer = coda_fast.Explainer(coda_fast.create_model("coda_xs_digits"))
    with pytest.raises(error, match=message):
        explainer(torch.rand(2, 1, 8, 8), target)
    with pytest.raises(TypeError, match="model: expected a CoDANet, got Linear"):
        coda_fast.Explainer(nn.Linear(1, 1))


def test_a_class_that_does_not_exist_has_no_map(explained):
    images = digits()[0][:3]
    _, contribution_map = run_onnx(session(explained), images, torch.tensor([10, -1, 3]))
    assert not contribution_map[:2].any()
    assert contribution_map[2].any()


# -- files and errors
# ------------------------------------------------------------------------------------------------------------


def test_all_or_nothing(tmp_path, monkeypatch):
    model = coda_fast.CoDANet([2], [1], [1], [1], temperature=1)
    path = tmp_path / "net.onnx"
    path.write_text("an older file")

    def fails(self, destination, **options):
        Path(destination).write_text("half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        exporter.export_onnx(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_text() == "an older file"


def test_refuses(trained, tmp_path, monkeypatch):
    path = tmp_path / "new" / "net.onnx"
    with pytest.raises(TypeError, match="model: expected a CoDANet, got Conv2d"):
        exporter.export_onnx(nn.Conv2d(1, 1, 1), path)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .onnx, got net.pt2"):
        exporter.export_onnx(trained, "net.pt2")
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .pt2, got net.onnx"):
        exporter.export_pt2(trained, "net.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        exporter.export_onnx(trained, tmp_path / "folder.onnx")
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        exporter.export_onnx(trained, path, size=0)
    with pytest.raises(ValueError, match="the kernel does not fit"):
        exporter.export_onnx(coda_fast.CoDANet([2], [2], [9], [1], [0], temperature=1), path, size=8)
    monkeypatch.setattr(exporter, "ONNX_LIMIT", 1000)
    with pytest.raises(
        ValueError,
        match="expected at most 1000 bytes of weights, what one ONNX file holds, got 380736; export to pt2",
    ):
        exporter.export_onnx(trained, path)
    for missing in ("onnx", "onnxscript"):
        refused = pytest.raises(ImportError, match=rf"needs {missing}: pip install 'coda-fast\[onnx\]'")
        with mock.patch.dict(sys.modules, {missing: None}), refused:
            exporter.export_onnx(trained, path)
    assert not path.parent.exists()


def test_example_size_leaves_no_single_pixels():
    """A map of one pixel would make a constant of its size."""
    model = coda_fast.CoDANet([2, 2], [2, 2], [64, 3], [32, 1], [0, 0], temperature=1)
    size = exporter._example_size(model)
    assert min(exporter._check_size(model, size)) > 1
    assert size[0] != size[1]


# -- the command and the example
# --------------------------------------------------------------------------------------------------------


def _environment():
    """Of a process that finds our packages."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    }


def command(*arguments):
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", *map(str, arguments)])
    return stop.value.code or 0


@pytest.fixture
def checkpoint(trained, tmp_path):
    path = tmp_path / "net.safetensors"
    coda_fast.save(trained, path)
    return path


def test_command_and_example(trained, checkpoint, tmp_path, monkeypatch, capsys):
    """The commands of docs/export.md; the example sees neither torch nor us."""
    Image = pytest.importorskip("PIL.Image", reason="needs the extra coda-fast[cli]")
    monkeypatch.chdir(tmp_path)
    assert command("net.safetensors", "--explain") == 0
    assert re.fullmatch(
        r"net.safetensors: logits and contribution map of images of any size, 0\.\d MB -> net.onnx\n",
        capsys.readouterr().out,
    )
    image, label = digits()[0][1510, 0], int(digits()[1][1510])
    Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save("scan.png")
    code = f"""
        import runpy, sys
        sys.modules["torch"] = sys.modules["coda_fast"] = None
        sys.argv = ["example", *sys.argv[2:]]
        runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code), "--", "net.onnx", "scan.png"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    e = trained.explain(torch.from_numpy(np.asarray(Image.open("scan.png"), np.float32) / 255)[None, None])
    assert int(e.target) == label
    said = {line[:15].strip(): line[15:].split()[0] for line in done.stdout.splitlines()[1:]}
    assert done.stdout.startswith(
        f"scan.png: digit {label}, probability {float(e.logits[0, label].sigmoid()):.1%}"
    )
    assert float(said["logit"]) == pytest.approx(float(e.logits[0, label]), abs=1e-5)
    assert float(said["map + bias"]) == pytest.approx(float(e.logits[0, label]), abs=1e-5)
    assert float(said["difference"]) < 1e-5
    page = np.asarray(Image.open(said["picture"]).convert("RGB")).astype(int)
    best = divmod(int(e.contribution_map[0, 0].argmax()), 8)
    colour = page[48 + 40 * best[0] + 20, 16 + 320 + 16 + 40 * best[1] + 20]
    assert tuple(colour) == (255, 0, 0), "the pixel that speaks most for the class is red"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_reads_pictures_as_the_network_does(channels, tmp_path):
    """By what the file says of preprocessing; 16 bits and strips aside, which it leaves out."""
    transform = coda_fast.data.Preprocessing(channels, 20, 16)
    read = runpy.run_path(str(EXAMPLE))["read_picture"]
    for name, data in odd_files().items():
        if not name.startswith(("broken", "grey16", "deep", "float", "strip", "tower")):
            (tmp_path / name).write_bytes(data)
            found = read(
                tmp_path / name, transform.config() | {"channels": channels}, ("batch", "height", "width")[1:]
            )
            assert np.array_equal(found[0], transform(tmp_path / name).numpy()), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.safetensors"], "missing.safetensors: no such checkpoint"),
        (
            ["net.safetensors", "--output", "net.safetensors"],
            "output: expected another file than those that are read, got net.safetensors",
        ),
        (
            ["net.safetensors", "--output", "link.onnx"],
            "output: expected another file than those that are read, got link.onnx",
        ),
        (
            ["net.safetensors", "--output", "hard.onnx"],
            "output: expected another file than those that are read, got hard.onnx",
        ),
        (["link.onnx"], "output: expected another file than those that are read, got link.onnx"),
        (["net.safetensors", "--output", "net.pt2"], "path: expected a name that ends in .onnx, got net.pt2"),
        (["net.safetensors", "--output", "net.safetensors/x.onnx"], "net.safetensors"),
        (["net.safetensors", "--format", "tflite"], "'tflite' is not one of 'onnx', 'pt2'"),
        (["net.safetensors", "--size", "0"], "--size"),
        (["net.safetensors", "--size", "100000"], "--size"),
        (["net.safetensors", "--device", "warp"], "--device: 'warp' cannot be used here"),
    ],
    ids=str,
)
def test_command_refuses(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("link.onnx").symlink_to(checkpoint)
    os.link(checkpoint, "hard.onnx")
    before, content = sorted(p.name for p in tmp_path.iterdir()), checkpoint.read_bytes()
    assert command(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("coda-fast: ")
    assert message in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert checkpoint.read_bytes() == content


def test_no_compiler(checkpoint, tmp_path, monkeypatch, capsys):
    """As on a machine without one, or whose CXX names what is not there."""
    monkeypatch.chdir(tmp_path)
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert command("net.safetensors", "--format", "pt2") == 2
    assert capsys.readouterr().err == (
        "coda-fast: export to pt2 needs a C++ compiler: install g++, or name one in the environment "
        "variable CXX\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.slow
def test_package_of_aotinductor(trained, checkpoint, tmp_path):
    """It runs in a process that never sees coda_fast, with the inputs checked; other batches and sizes
    than the exported one.
    """
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("AOTInductor needs a C++ compiler: none of g++, clang++, c++ is here")
    path = tmp_path / "net.pt2"
    assert command(checkpoint, "--format", "pt2", "--explain", "--output", path) == 0
    images, classes = digits()
    cases = [(images[1500:1501], classes[1500:1501]), (images[1500:1507], classes[1500:1507])]
    cases.append((F.interpolate(images[1500:1503], (13, 19), mode="bilinear"), torch.tensor([9, 0, 4])))
    torch.save(cases, tmp_path / "cases.pt")
    code = """
        import sys
        sys.modules["coda_fast"] = None  # an import would fail
        import torch, torch._inductor
        package = torch._inductor.aoti_load_package("net.pt2")
        torch.save([package(*case) for case in torch.load("cases.pt")], "results.pt")
        print(package.get_metadata()["class_names"], package.get_metadata()["logit_bias"])
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "AOTI_RUNTIME_CHECK_INPUTS": "1"
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == repr(trained.logit_bias)
    assert json.loads(done.stdout.rpartition(" ")[0]) == trained.class_names
    for (some, target), (logits, contribution_map) in zip(
        cases, torch.load(tmp_path / "results.pt"), strict=True
    ):
        e = trained.explain(some, target)
        assert_close(logits, e.logits, 1e-5)
        assert_close(contribution_map, e.contribution_map[:, 0], 1e-5, terms=[e.logits])
        total = contribution_map.sum((1, 2), dtype=torch.float64) + trained.logit_bias
        assert_close(
            total, logits.gather(1, target[:, None])[:, 0], 1e-6, terms=[e.contributions.abs().sum((2, 3, 4))]
        )
