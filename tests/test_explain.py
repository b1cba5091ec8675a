"""Explanations: complete, batched, and leaving nothing behind."""

import gc

import psutil
import pytest
import torch

from coda_fast import CoDANet, create_model
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
