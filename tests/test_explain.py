"""Explanations are complete, can be computed in batches, and leave nothing behind in the network."""

import base64
import dataclasses
import gc
import io
import json
import os
import re
import sys
import threading
import warnings

import numpy as np
import psutil
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import coda_fast
from coda_fast import CoDANet, create_model, plot
from coda_fast import explain as explain_module
from coda_fast.functional import dau_conv2d_transpose

MAPS = ("dynamic_weight", "contributions", "contribution_map")


def _model(dtype=torch.float32, **options):
    torch.manual_seed(1)
    config = dict(
        out_channels=[6, 8, 5], ranks=[3, 4, 4], kernel_sizes=[3, 3, 1], strides=[1, 2, 1], temperature=5.0
    )
    return CoDANet(**(config | options), dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("layer", [None, 0, 1, 2, -1])
@pytest.mark.parametrize("norm", ["squash", "l2"])
def test_complete(layer, dtype, bound, norm):
    """Contributions plus bias equal the logit, for contributions of the image or of any layer's input."""
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


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("name", ["coda_s_cifar10", "coda_xs_digits"])
def test_completeness_error_is_rounding(name, dtype, bound):
    """The bounds of the README, relative to the sum of absolute contributions, for all classes including the
    unlikely ones.
    """
    torch.manual_seed(0)
    model = create_model(name, dtype=dtype)
    images = torch.rand(2, model.image_channels, model.image_size, model.image_size).to(dtype)
    e = model.explain(images, [list(range(10))] * 2)
    added_up = e.contributions.double().abs().sum((2, 3, 4)) + e.logits.gather(1, e.target).double().abs()
    assert (e.completeness_error <= bound * added_up).all(), (e.completeness_error / added_up).max()


def test_completeness_error_sees_what_is_missing():
    """A network that is not dynamic linear, because of a constant in the middle, has a large error."""
    model = _model()
    model.layers[1].register_forward_hook(lambda module, inputs, output: output + 0.1)
    e = model.explain(torch.rand(2, 3, 8, 8))
    assert (e.completeness_error > 1e-2).all()


def test_dynamic_weight_is_the_linear_map():
    """The contributions are the weight times the encoded image, and the weight is the row of the product of
    the layers' matrices.
    """
    model = _model(torch.float64, out_channels=[4, 5], ranks=[3, 3], kernel_sizes=[2, 1], strides=[1, 1])
    images = torch.rand(1, 3, 3, 4, dtype=torch.float64)
    e = model.explain(images, 2)
    encoded = torch.cat([images, 1 - images], 1)
    assert torch.equal(e.contributions[:, 0], e.dynamic_weight[:, 0] * encoded)
    activations, matrix = encoded, None
    with torch.no_grad():
        for layer in model.layers:
            # W(x) of one layer, row by row, from the adjoint of the reference backend
            output = layer(activations)
            rows = []
            for i in range(output.numel()):
                unit = torch.zeros_like(output).flatten()
                unit[i] = 1
                parameters = (layer.reduction_weight, layer.weight, layer.bias)
                rows.append(
                    dau_conv2d_transpose(
                        activations, unit.view_as(output), *parameters, backend="reference"
                    ).flatten()
                )
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
            assert torch.allclose(
                several.contributions[i, k], single.contributions[0, 0], rtol=1e-4, atol=1e-7
            )


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
    assert torch.equal(
        model.explain(images, layer=model.layers[1]).contributions,
        model.explain(images, layer=1).contributions,
    )
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
    """The estimate behind the chunk size covers the tensors that autograd keeps for an image."""
    from coda_fast import explain as module

    model, images = _model(), torch.rand(4, 3, 16, 16)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        model.explanation_mode(),
    ):
        model(images)
    parameters = {p.data_ptr() for p in model.parameters()}
    numbers = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in parameters)
    fixed, each = module._bytes_per_image(model, images)
    assert numbers <= 4 * fixed
    sizes = []
    chunked = module._explain_chunk
    monkeypatch.setattr(
        module, "_explain_chunk", lambda m, x, *rest: sizes.append(len(x)) or chunked(m, x, *rest)
    )
    model.explain(images, memory_budget=3 * (fixed + each))
    assert sizes == [3, 1]


def test_memory_budget_bounds_the_classes(monkeypatch):
    """If not all classes of an image fit into memory at once, as many as fit are propagated back together."""
    from coda_fast import explain as module
    from coda_fast.backends import factored

    model, images = _model(), torch.rand(1, 3, 16, 16)
    fixed, each = module._bytes_per_image(model, images)
    together, whole = [], factored.adjoints
    monkeypatch.setattr(
        factored, "adjoints", lambda values, *rest: together.append(len(values)) or whole(values, *rest)
    )
    model.explain(images, [[0, 1, 2, 3, 4]], memory_budget=fixed + 2 * each)
    assert together == [2] * 3 + [2] * 3 + [1] * 3  # for each of three layers


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


@pytest.mark.slow
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
    assert _tensors_alive() <= tensors  # there may be fewer, because tensors of earlier tests are collected
    grown = process.memory_info().rss - memory
    one_result = sum(getattr(model.explain(images, [[0, 1], [2, 3]]), name).nbytes for name in MAPS)
    assert grown < 50 * one_result, (
        f"{grown} bytes after 1000 calls; one leaked result would be {1000 * one_result}"
    )


def test_gradients_accumulated_elsewhere_stay():
    model, images = _model(), torch.rand(2, 3, 8, 8)
    model(images).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.explain(images)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


# -- the object
# ------------------------------------------------------------------------------------------------------------


def _fields(explanation):
    return {f.name: getattr(explanation, f.name) for f in dataclasses.fields(explanation)}


def _same(a, b):
    for name, value in _fields(a).items():
        other = getattr(b, name)
        same = (
            torch.equal(value, other) and value.dtype == other.dtype
            if isinstance(value, torch.Tensor)
            else value == other
        )
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
    reverse, several = [3, 2, 1, 0], [2, -4]
    for index, rows in [
        (slice(None, None, -1), reverse),
        (several, [2, 0]),
        (np.array(several), [2, 0]),
        (torch.tensor(several), [2, 0]),
        (range(1, 4, 2), [1, 3]),
        ([], []),
        (np.array([True, False, False, True]), [0, 3]),
        ([False, True, True, False], [1, 2]),
        (torch.tensor(3), [3]),
        (torch.tensor([1], dtype=torch.uint8), [1]),
    ]:
        assert torch.equal(e[index].target, classes[rows])
        assert torch.equal(e[index].images, images[rows])
    for index in (4, -5, [0, 4], [-5], torch.tensor([9]), [True, False]):
        with pytest.raises(IndexError):
            e[index]
    for index in (
        (0, 1),
        "a",
        None,
        ...,
        1.0,
        True,
        [0.5],
        torch.zeros(4),
        torch.tensor([[0, 1]]),
        torch.tensor(True),
        ["a"],
    ):
        with pytest.raises(TypeError, match="index: expected"):
            e[index]


def test_moved_explanations():
    e = _model().explain(torch.rand(2, 3, 8, 8))
    wide = e.to(torch.float64)
    assert all(
        t.dtype == (torch.float64 if t.is_floating_point() else torch.int64) for t in wide._tensors().values()
    )
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
    with pytest.raises(ValueError, match="text: not a safetensors file"):
        coda_fast.Explanation.load(tmp_path / "text")
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        coda_fast.Explanation.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    # reading a pipe would wait for a writer
    with pytest.raises(ValueError, match="expected a file, got a pipe"):
        coda_fast.Explanation.load(tmp_path / "pipe")
    coda_fast.save(_model(), tmp_path / "model")
    with pytest.raises(ValueError, match="expected an explanation .*, got format 'coda_fast.CoDANet'"):
        coda_fast.Explanation.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        (
            {"target": torch.zeros(2, 3, dtype=torch.long)},
            {},
            r"expected target of shape \[2, 2\], got \[2, 3\]",
        ),
        ({"target": torch.full((2, 2), 5)}, {}, "target: expected classes from 0 to 4, got 5 to 5"),
        ({"target": torch.zeros(2, 2)}, {}, "expected integer classes"),
        (
            {"logits": torch.zeros(2, 5, dtype=torch.long)},
            {},
            "expected integer classes and floating-point tensors",
        ),
        (
            {"contribution_map": torch.zeros(3)},
            {},
            r"expected contribution_map of shape \[2, 2, 8, 8\], got \[3\]",
        ),
        ({"dynamic_weight": torch.zeros(3)}, {}, "expected dynamic_weight"),
        ({"images": torch.zeros(3, 3, 8, 8)}, {}, r"expected images of shape \[2, C, H, W\]"),
        ({"logits": None}, {}, "expected the tensors of an explanation, got others or none: logits"),
        ({"more": torch.zeros(1)}, {}, "got others or none: more"),
        ({}, {"layer": "x"}, "damaged one"),
        ({}, {"layer": -1}, "expected a layer and a bias"),
        ({}, {"logit_bias": None}, "expected a layer and a bias"),
        ({}, {"class_names": ["a"]}, "expected 5 names of classes, got 1"),
        ({}, {"class_names": "abcde"}, "expected names of classes"),
        ({}, {"class_names": [1] * 5}, "expected names of classes"),
        ({}, {"more": 1}, "expected layer, logit_bias, class_names, placement, stem, signed"),
        ({}, None, "damaged one"),
    ],
    ids=str,
)
def test_damaged_explanations(tensors, facts, message, tmp_path):
    """All damage that would cause errors later is named when the file is loaded."""
    e = _model().explain(torch.rand(2, 3, 8, 8), [[0, 1], [2, 3]])
    e.save(path := tmp_path / "e.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = {name: tensor for name, tensor in ({**load_file(path)} | tensors).items() if tensor is not None}
    header["facts"] = "[" * 100 if facts is None else json.dumps(json.loads(header["facts"]) | facts)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=message) as caught:
        coda_fast.Explanation.load(path)
    assert "\n" not in str(caught.value)


def test_an_explanation_in_a_notebook():
    """The cell shows image, maps, classes and errors. Names are shown as text and not as HTML, and a long
    batch is shortened.
    """
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
    assert "<code>Explanation(0 images, 1 class each, " in model.explain(torch.rand(0, 3, 8, 8))._repr_html_()
    assert len(repr(e)) < 200


def test_a_long_explanation_in_a_notebook():
    """Of hundreds of classes a few are shown, and the others are counted."""
    model = _model(out_channels=[6, 8, 300])
    page = model.explain(torch.rand(5, 3, 8, 8), [list(range(300))] * 5)._repr_html_()
    assert page.count("<tr>") == 1 + 4 * 5
    assert "and 1 more image, 295 more classes of each" in page
    assert "data:image/png" in page


def test_an_explanation_without_a_picture(monkeypatch):
    """If matplotlib fails, the cell of a notebook shows the numbers, and on the meta device the sizes."""
    e = _model(class_names=["\x1b[31m", "b", "c", "d", "e"]).explain(torch.rand(1, 3, 8, 8), 0)
    monkeypatch.setattr(plot, "render", lambda figure, dpi: 1 / 0)
    page = e._repr_html_()
    assert "<p>no figure: division by zero</p>" in page
    assert page.count("<tr>") == 2
    assert "\x1b" not in page
    assert repr(e.to("meta")) == "Explanation(1 image, 1 class each, maps 8 x 8, layer 0, float32 on meta)"
    assert repr(e.to("meta")) in e.to("meta")._repr_html_()


def test_an_explanation_without_matplotlib(monkeypatch):
    e = _model().explain(torch.rand(1, 3, 8, 8))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "figures need matplotlib" in e._repr_html_()
    with pytest.raises(ImportError, match="figures need matplotlib"):
        e.plot()


# -- pixels out of range
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(explain_module, "_WARNED", threading.Event())


@pytest.mark.parametrize(
    ("scale", "shift", "cause"),
    [
        (255, 0, r"got \S+ to 25\S+; are they 0 to 255\? Divide them by 255\. This is said once\."),
        (
            1 / 0.22,
            -0.45 / 0.22,
            r"got -2\S* to 2\S*; were they normalised by mean and standard deviation\? "
            r"Give them as they were",
        ),
        (2, -1, r"got -0\.9\S* to (1|0\.9\S*); were they normalised"),
        (1.1, -0.05, r"got -0\.0\S* to 1\.0\S*; did resizing or added noise overshoot\? Clamp them"),
    ],
    ids=["bytes", "normalised", "symmetric", "resized"],
)
def test_images_out_of_range_are_said_once(scale, shift, cause, unwarned):
    model, images = _model(), scale * torch.rand(3, 3, 8, 8) + shift
    explain = lambda: [model.explain(images, memory_budget=1) for _ in range(3)]
    with pytest.warns(UserWarning, match=r"images: expected pixels in \[0, 1\].*" + cause) as caught:
        explain()
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_where_warnings_are_errors_each_call_is_one(unwarned):
    model, images = _model(), 255 * torch.rand(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="images: expected pixels"):
                model.explain(images)


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
    """Squares of 1e30 overflow float32. The error names the image and the range of its pixels."""
    model, images = _model(), torch.rand(3, 3, 8, 8)
    images[1] *= 1e30
    with pytest.raises(
        ValueError, match=r"expected finite logits, got \[nan.* for image 1; pixels reach (\S+e\+29|1e\+30)"
    ):
        model.explain(images)
