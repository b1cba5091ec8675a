"""Explanations: complete, batched, and leaving nothing behind."""

import base64
import dataclasses
import gc
import io
import re
import sys
import threading
import warnings

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import coda_fast
from coda_fast import CoDANet, create_model
from coda_fast import explain as explain_module
from coda_fast.functional import dau_conv2d_transpose

MAPS = ("dynamic_weight", "contributions", "contribution_map")


def _model(dtype=torch.float32, **options):
    torch.manual_seed(1)
    config = dict(out_channels=[6, 8, 5], ranks=[3, 4, 4], kernel_sizes=[3, 3, 1], strides=[1, 2, 1], temperature=5.0)
    return CoDANet(**(config | options), dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("layer", [None, 0, 1, 2, -1])
@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_complete(layer, dtype, bound, norm):
    """Contributions plus bias are the logit, from the image or from any layer on."""
    model = _model(dtype, norm=norm)
    images = torch.rand(3, 3, 9, 10, dtype=dtype)
    e = model.explain(images, [[0, 1], [4, 2], [3, 3]], layer=layer)
    logits = model(images).detach()
    assert torch.equal(e.logits, logits)
    chosen = logits.gather(1, e.target)
    index = 0 if layer is None else layer % 3
    assert e.layer == index
    assert e.contributions.shape[:3] == (3, 2, [6, 6, 8][index])
    total = e.contributions.double().sum((2, 3, 4)) + model.logit_bias
    assert ((total - chosen).abs() <= bound * chosen.abs().clamp_min(1)).all()
    assert torch.allclose(e.completeness_error, (total - chosen).abs(), atol=1e-15)
    assert torch.allclose(e.contribution_map, e.contributions.sum(2))


@pytest.mark.parametrize("name", ["coda_s_cifar10", "coda_xs_mnist"])
def test_complete_in_published_depth(name):
    """Relative to the logit, the completeness error of the named networks is at most 1e-5 in float32."""
    torch.manual_seed(0)
    model = create_model(name)
    size = model.image_size
    e = model.explain(torch.rand(2, model.image_channels, size, size))
    chosen = e.logits.gather(1, e.target).abs()
    assert (e.completeness_error <= 1e-5 * chosen).all(), e.completeness_error / chosen


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", ["coda_s_cifar10", "coda_xs_digits"])
def test_completeness_error_is_rounding(name, dtype, bound):
    """The bounds of the README: a share of what is added up, for all classes, the unlikely ones too."""
    torch.manual_seed(0)
    model = create_model(name, dtype=dtype)
    images = torch.rand(2, model.image_channels, model.image_size, model.image_size).to(dtype)
    e = model.explain(images, [list(range(10))] * 2)
    added_up = e.contributions.double().abs().sum((2, 3, 4)) + e.logits.gather(1, e.target).double().abs()
    assert (e.completeness_error <= bound * added_up).all(), (e.completeness_error / added_up).max()


def test_completeness_error_sees_what_is_missing():
    """A network that is not dynamic linear (a constant in the middle) shows in the error."""
    model = _model()
    model.layers[1].register_forward_hook(lambda module, inputs, output: output + 0.1)
    e = model.explain(torch.rand(2, 3, 8, 8))
    assert (e.completeness_error > 1e-2).all()


def test_dynamic_weight_is_the_linear_map():
    """contributions = weight * encoded image, and the weight is the row of the product of the layers' matrices."""
    model = _model(torch.float64, out_channels=[4, 5], ranks=[3, 3], kernel_sizes=[2, 1], strides=[1, 1])
    images = torch.rand(1, 3, 3, 4, dtype=torch.float64)
    e = model.explain(images, 2)
    encoded = torch.cat([images, 1 - images], 1)
    assert torch.equal(e.contributions[:, 0], e.dynamic_weight[:, 0] * encoded)
    activations, matrix = encoded, None
    with torch.no_grad():
        for layer in model.layers:
            # W(x) of one layer, row by row, from the reference's adjoint
            output = layer(activations)
            rows = []
            for i in range(output.numel()):
                unit = torch.zeros_like(output).flatten()
                unit[i] = 1
                parameters = (layer.reduction_weight, layer.weight, layer.bias)
                rows.append(dau_conv2d_transpose(activations, unit.view_as(output), *parameters, backend="reference").flatten())
            step = torch.stack(rows)
            matrix = step if matrix is None else step @ matrix
            activations = output
        row = matrix.view(5, -1, encoded.numel())[2].sum(0) / model.temperature
    assert torch.allclose(e.dynamic_weight.flatten(), row, rtol=1e-10, atol=1e-15)


def test_targets():
    model, images = _model(), torch.rand(3, 3, 8, 8)
    predicted = model(images).argmax(1)
    assert torch.equal(model.explain(images).target[:, 0], predicted)
    assert model.explain(images, 2).target.tolist() == [[2], [2], [2]]
    assert model.explain(images, [0, 1, 4]).target.tolist() == [[0], [1], [4]]
    several = model.explain(images, torch.tensor([[0, 1], [1, 2], [2, 3]]))
    for i in range(3):
        for k in range(2):
            single = model.explain(images[i : i + 1], int(several.target[i, k]))
            assert torch.allclose(several.contributions[i, k], single.contributions[0, 0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (5, ValueError, "target: expected classes from 0 to 4, got 5 to 5"),
        (-1, ValueError, "target: expected classes from 0 to 4, got -1"),
        ([0, 1], ValueError, r"target: expected an int, \[3\] or \[3, K\] classes, got shape \[2\]"),
        (torch.zeros(3, 0, dtype=torch.long), ValueError, "target: expected"),
        (1.5, TypeError, "target: expected integers"),
        (torch.tensor([0.0, 1, 2]), TypeError, "target: expected integers, got torch.float32"),
        ("cat", TypeError, "target: expected"),
        ([[0, 1], [2], [3]], TypeError, "target: expected"),
    ],
    ids=str,
)
def test_refuses_targets(target, error, message):
    with pytest.raises(error, match=message):
        _model().explain(torch.rand(3, 3, 8, 8), target)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (3, ValueError, "layer: expected an index from -3 to 2, got 3"),
        ("head", TypeError, "layer: expected an int"),
        (1.0, TypeError, "layer"),
    ],
)
def test_refuses_layers(layer, error, message):
    with pytest.raises(error, match=message):
        _model().explain(torch.rand(1, 3, 8, 8), layer=layer)


def test_layer_as_module():
    model, images = _model(), torch.rand(1, 3, 8, 8)
    assert torch.equal(model.explain(images, layer=model.layers[1]).contributions, model.explain(images, layer=1).contributions)
    with pytest.raises(ValueError, match="of this model, got one of another"):
        model.explain(images, layer=_model().layers[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_nan(value):
    images = torch.rand(2, 3, 8, 8)
    images[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="finite values, got NaN or infinity"):
        _model().explain(images)


def test_chunks_agree():
    model, images = _model(), torch.rand(7, 3, 8, 8)
    targets = torch.arange(28).view(7, 4) % 5
    whole, pieces = model.explain(images, targets), model.explain(images, targets, memory_budget=1)
    for name in (*MAPS, "logits"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), rtol=1e-4, atol=1e-6), name
    assert torch.equal(whole.target, pieces.target)


def test_memory_budget_bounds_the_chunk(monkeypatch):
    """The estimate behind the chunk size covers what autograd really keeps for an image."""
    from coda_fast import explain as module

    model, images = _model(), torch.rand(4, 3, 16, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), model.explanation_mode():
        model(images)
    parameters = {p.data_ptr() for p in model.parameters()}
    numbers = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in parameters)
    fixed, each = module._bytes_per_image(model, images)
    assert numbers <= 4 * fixed
    sizes = []
    chunked = module._explain_chunk
    monkeypatch.setattr(module, "_explain_chunk", lambda m, x, *rest: sizes.append(len(x)) or chunked(m, x, *rest))
    model.explain(images, memory_budget=3 * (fixed + each))
    assert sizes == [3, 1]


def test_memory_budget_bounds_the_classes(monkeypatch):
    """Of one image whose classes do not fit at once, as many as fit go back together."""
    from coda_fast import explain as module
    from coda_fast.backends import factored

    model, images = _model(), torch.rand(1, 3, 16, 16)
    fixed, each = module._bytes_per_image(model, images)
    together, whole = [], factored.adjoints
    monkeypatch.setattr(factored, "adjoints", lambda x, values, *rest: together.append(len(values)) or whole(x, values, *rest))
    model.explain(images, [[0, 1, 2, 3, 4]], memory_budget=fixed + 2 * each)
    assert together == [2] * 3 + [2] * 3 + [1] * 3  # three layers


def test_empty_batch():
    e = _model().explain(torch.rand(0, 3, 8, 8))
    assert e.contributions.shape == (0, 1, 6, 8, 8)
    assert e.completeness_error.shape == (0, 1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_leaves_nothing_behind(context):
    model = _model()
    model.layers[2].weight.requires_grad_(False)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    with context():
        inside = torch.rand(2, 3, 8, 8)  # under inference_mode, an inference tensor
        results = [
            model.explain(images),
            model.explain(inside),
            model.explain(inside, 2),
            model.explain(inside, inside.sum((1, 2, 3)).long() % 5),
        ]
    for e in results:
        for name in (*MAPS, "logits", "completeness_error"):
            tensor = getattr(e, name)
            assert not tensor.requires_grad
            assert tensor.grad_fn is None
    assert images.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.explaining for layer in model.layers)
    assert [p.requires_grad for p in model.layers[2].parameters()] == [True, False, True]
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert model.training


def _tensors_alive():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_thousand_calls_keep_memory_flat():
    model, images = _model(), torch.rand(2, 3, 16, 16)
    process = psutil.Process()
    for _ in range(200):
        model.explain(images, [[0, 1], [2, 3]])
    gc.collect()
    tensors, memory = _tensors_alive(), process.memory_info().rss
    for _ in range(1000):
        model.explain(images, [[0, 1], [2, 3]])
    gc.collect()
    assert _tensors_alive() <= tensors  # fewer: what tests before this one left to the collector
    grown = process.memory_info().rss - memory
    one_result = sum(getattr(model.explain(images, [[0, 1], [2, 3]]), name).nbytes for name in MAPS)
    assert grown < 50 * one_result, f"{grown} bytes after 1000 calls; one leaked result would be {1000 * one_result}"


def test_gradients_accumulated_elsewhere_stay():
    model, images = _model(), torch.rand(2, 3, 8, 8)
    model(images).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.explain(images)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


# -- the object -------------------------------------------------------------------------------------------------------------------------


def _fields(explanation):
    return {f.name: getattr(explanation, f.name) for f in dataclasses.fields(explanation)}


def _same(a, b):
    for name, value in _fields(a).items():
        other = getattr(b, name)
        same = torch.equal(value, other) and value.dtype == other.dtype if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_images_of_an_explanation():
    model, images = _model(), torch.rand(4, 3, 8, 8)
    classes = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]])
    e = model.explain(images.requires_grad_(), classes)
    assert len(e) == 4
    assert torch.equal(e.images, images)
    assert not e.images.requires_grad
    assert e.images.data_ptr() == images.data_ptr()  # no copy
    for index in (2, -1, np.int64(1)):
        i = range(4)[index]
        one = e[index]
        assert len(one) == 1
        for name, value in _fields(one).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(e, name)[i : i + 1])
    assert torch.equal(e[1:3].target, classes[1:3])
    assert torch.equal(e[[3, 0]].target, classes[[3, 0]])
    assert torch.equal(e[torch.tensor([True, False, True, False])].target, classes[::2])
    assert [len(one) for one in e] == [1] * 4
    for index in (4, -5):
        with pytest.raises(IndexError):
            e[index]


def test_moved_explanations():
    e = _model().explain(torch.rand(2, 3, 8, 8))
    wide = e.to(torch.float64)
    assert all(t.dtype == (torch.float64 if t.is_floating_point() else torch.int64) for t in wide._tensors().values())
    assert torch.equal(wide.contributions, e.contributions.double())
    assert e.to("meta").contributions.device.type == "meta"
    _same(e.to("cpu"), e)
    with pytest.raises(TypeError, match="dtype: expected a floating-point one|only accepts floating point"):
        e.to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [None, ["a", "b", "\u732b", "$", "e"]])
def test_saved_explanations(dtype, names, tmp_path):
    model = _model(class_names=names).to(dtype)
    e = model.explain(torch.rand(2, 3, 8, 8).to(dtype), [[0, 1], [2, 3]], layer=1)
    e.save(tmp_path / "e.safetensors")
    loaded = coda_fast.Explanation.load(tmp_path / "e.safetensors")
    _same(loaded, e)
    assert loaded.name(2) == (names[2] if names else "class 2")
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_files_that_are_no_explanation(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such explanation"):
        coda_fast.Explanation.load(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="expected an explanation that was saved, got a file that safetensors cannot read"):
        coda_fast.Explanation.load(tmp_path / "text")
    coda_fast.save(_model(), tmp_path / "model")
    with pytest.raises(ValueError, match="expected an explanation .*, got format 'coda_fast.CoDANet'"):
        coda_fast.Explanation.load(tmp_path / "model")


def test_an_explanation_in_a_notebook():
    """Image, maps, classes, errors; names are text, not HTML; a long batch is cut."""
    model = _model(class_names=["<b>bold</b>", "b", "c", "d", "e"])
    e = model.explain(torch.rand(6, 3, 8, 8), 0)
    page = e._repr_html_()
    assert page.count("<tr>") == 1 + 4
    assert "and 2 more images" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>" not in page
    picture = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", page).group(1))
    assert Image.open(io.BytesIO(picture)).width > 200
    for k in range(4):
        assert f"{float(e.completeness_error[k, 0]):.1e}" in page
    without = dataclasses.replace(e, images=None)
    assert "expected an explanation with its images" in without._repr_html_()
    assert model.explain(torch.rand(0, 3, 8, 8))._repr_html_().count("<tr>") == 1
    assert len(repr(e)) < 200


def test_an_explanation_without_matplotlib(monkeypatch):
    e = _model().explain(torch.rand(1, 3, 8, 8))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "figures need matplotlib" in e._repr_html_()
    with pytest.raises(ImportError, match="figures need matplotlib"):
        e.plot()


# -- pixels out of range ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(explain_module, "_WARNED", threading.Event())


@pytest.mark.parametrize(
    ("scale", "shift", "cause"),
    [(255, 0, r"got \S+ to 25\S+; are they 0 to 255"), (1 / 0.22, -0.45 / 0.22, r"got -2\S* to 2\S*; were they normalised")],
    ids=["bytes", "normalised"],
)
def test_images_out_of_range_are_said_once(scale, shift, cause, unwarned):
    model, images = _model(), scale * torch.rand(3, 3, 8, 8) + shift
    explain = lambda: [model.explain(images, memory_budget=1) for _ in range(3)]  # noqa: E731
    with pytest.warns(UserWarning, match=r"images: expected pixels in \[0, 1\].*" + cause) as caught:
        explain()
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_warn(dtype, unwarned):
    images = torch.rand(2, 3, 8, 8)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1 + 1e-6, -1e-6
    images[0, 1, 0, 0] = 1 + float(torch.finfo(dtype).eps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _model().to(dtype).explain(images.to(dtype))


@pytest.mark.filterwarnings("ignore:images. expected pixels")
def test_logits_that_are_not_finite():
    """Squares of 1e30 leave float32: named, with the image and how far its pixels reach."""
    model, images = _model(), torch.rand(3, 3, 8, 8)
    images[1] *= 1e30
    with pytest.raises(ValueError, match=r"expected finite logits, got \[nan.* for image 1; pixels reach (\S+e\+29|1e\+30)"):
        model.explain(images)
