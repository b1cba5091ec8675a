"""The matrix regulariser against numerical gradients and an explicit linear map."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import coda_fast
from coda_fast.losses import DynamicMatrixLoss, matrix_penalty

BACKENDS = ("reference", "factored")


def network(backend="factored", **options):
    torch.manual_seed(0)
    layers = dict(
        out_channels=[3, 4],
        ranks=[3, 2],
        kernel_sizes=[3, 3],
        strides=[2, 1],
        temperature=2.0,
        image_channels=1,
    )
    net = coda_fast.CoDANet(**layers, backend=backend, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2).add_(0.1 * torch.randn_like(p))
    return net


def images(number=2):
    return torch.rand(number, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def linear_map(net, image):
    """W_{0->L}(x), [classes, 6 H W]: its columns are the images of unit vectors, layer by layer, with every s
    * w held at its value for the image.
    """
    with torch.no_grad():
        entering = net.encoder(image[None])
        matrix = torch.eye(entering.numel(), dtype=torch.float64)
        for layer in net.layers:
            leaving = layer(entering)
            rows = []
            for i in range(leaving.numel()):  # a row is the transpose applied to a unit vector
                unit = torch.zeros_like(leaving).flatten()
                unit[i] = 1
                rows.append(
                    coda_fast.functional.dau_conv2d_transpose(
                        entering, unit.view_as(leaving), layer.reduction_weight, layer.weight, layer.bias,
                        stride=layer.stride, padding=layer.padding, backend="reference",
                    ).flatten()
                )  # fmt: skip
            matrix = torch.stack(rows) @ matrix
            entering = leaving
        return matrix.unflatten(0, (net.num_classes, -1)).sum(1) / net.temperature


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "size"), [("l1", torch.abs), ("l2", torch.square)])
def test_penalty_is_of_the_linear_map(backend, norm, size):
    net, x, classes = network(backend), images(), torch.tensor([[2, 0], [1, 3]])
    expected = torch.stack([size(linear_map(net, x[i])[classes[i]]).mean() for i in range(2)]).mean()
    torch.testing.assert_close(matrix_penalty(net, x, classes, norm), expected, rtol=1e-10, atol=0)
    weight = net.explain(x, classes).dynamic_weight
    torch.testing.assert_close(size(weight).mean(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_images_that_do_not_count(norm):
    """They count as zeros in the mean, and have no gradient."""
    net, x, labels = network(), images(3), torch.tensor([2, 1, 0])
    loss, rows = DynamicMatrixLoss(1.0, 2, norm), torch.tensor([[2, 0], [1, 3], [0, 1]])
    found = loss(net, x, labels, rows, torch.tensor([True, False, True])).penalty
    expected = matrix_penalty(net, x[[0, 2]], rows[[0, 2]], norm) * 2 / 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        *(torch.autograd.grad(p, list(net.parameters())) for p in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_are_numerical_ones(backend, norm):
    """The gradient of every parameter along random directions equals central differences, for the penalty
    alone and for the whole loss.
    """
    net, x, labels = network(backend), images(), torch.tensor([2, 1])
    classes = torch.tensor([[2, 0], [1, 3]])
    loss = DynamicMatrixLoss(0.7, norm=norm)
    loss.rows = lambda *_: classes
    for function in (lambda: matrix_penalty(net, x, classes, norm), lambda: loss(net, x, labels).total):
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(function(), parameters)
        assert all(g.abs().max() > 0 for g in gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for seed in range(2):
                direction = torch.randn(
                    parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
                )
                step, values = 1e-6, []
                for sign in (1, -1):
                    with torch.no_grad():
                        parameter.add_(sign * step * direction)
                    values.append(float(function().detach()))
                    with torch.no_grad():
                        parameter.sub_(sign * step * direction)
                slope = float((gradient * direction).sum())
                assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-5, abs=1e-8)


def test_terms():
    net, x, labels = network(), images(), torch.tensor([2, 1])
    loss = DynamicMatrixLoss(0.5, generator=torch.Generator().manual_seed(3))
    rows = DynamicMatrixLoss(0.5, generator=torch.Generator().manual_seed(3)).rows(labels, 4)
    found = loss(net, x, labels)
    bce = F.binary_cross_entropy_with_logits(net(x), F.one_hot(labels, 4).double())
    torch.testing.assert_close(found.bce, bce)
    torch.testing.assert_close(found.penalty, matrix_penalty(net, x, rows))
    torch.testing.assert_close(found.total, bce + 0.5 * found.penalty)
    torch.testing.assert_close(found.logits, net(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integers(dtype):
    net, x, labels = network(), images(), torch.tensor([2, 1])
    wide, narrow = (
        DynamicMatrixLoss(0.5, classes=4)(net, x, given).total for given in (labels, labels.to(dtype))
    )
    torch.testing.assert_close(narrow, wide)
    torch.testing.assert_close(
        matrix_penalty(net, x, labels[:, None].to(dtype)), matrix_penalty(net, x, labels[:, None])
    )


def test_without_weight_it_is_cross_entropy():
    net, x, labels = network(), images(), torch.tensor([2, 1])
    found = torch.autograd.grad(DynamicMatrixLoss(0.0)(net, x, labels).total, list(net.parameters()))
    expected = torch.autograd.grad(
        F.binary_cross_entropy_with_logits(net(x), F.one_hot(labels, 4).double()), list(net.parameters())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows():
    """The true class comes first. The others are distinct, drawn uniformly, and reproducible."""
    labels = torch.arange(5).repeat(400)
    rows = DynamicMatrixLoss(1.0, classes=3, generator=torch.Generator().manual_seed(0)).rows(labels, 5)
    assert torch.equal(rows[:, 0], labels)
    assert all(len(set(row)) == 3 for row in rows.tolist())
    counts = torch.stack([torch.bincount(rows[labels == c, 1:].flatten(), minlength=5) for c in range(5)])
    assert (counts.diagonal() == 0).all()
    assert all(150 < n < 250 for n in counts[~torch.eye(5, dtype=torch.bool)].tolist())  # 200 each on average
    again = DynamicMatrixLoss(1.0, classes=3, generator=torch.Generator().manual_seed(0)).rows(labels, 5)
    assert torch.equal(rows, again)


def test_nothing_is_left_behind():
    net = network()
    matrix_penalty(net, images(), torch.tensor([[0], [1]])).backward()
    assert all(p.grad is not None for p in net.parameters())
    y = net(images().requires_grad_())
    (gradient,) = torch.autograd.grad(y.sum(), net.layers[0].weight)
    assert gradient.abs().max() > 0  # in explanation mode, parameters would have no gradient


def test_gradient_that_explanation_mode_cuts():
    """Rows computed in explanation mode have the same values, but wrong gradients for all layers except the
    last.
    """
    net, x, classes = network(), images(), torch.tensor([[2], [1]])
    with coda_fast.explanation_mode(net):
        encoded = net.encoder(x).requires_grad_()
        logits = net.head(net.run_layers(encoded))
        (row,) = torch.autograd.grad(logits.gather(1, classes).sum(), encoded, create_graph=True)
    cut, whole = row.abs().mean(), matrix_penalty(net, x, classes)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)
    for index, layer in enumerate(net.layers):
        (short,), (full,) = (torch.autograd.grad(p, layer.weight, retain_graph=True) for p in (cut, whole))
        assert ((short - full).norm() / full.norm() > 0.01) == (index == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [2.0, 1e5])
def test_autocast(dtype, temperature):
    """Values and gradients equal those of float32 within the accuracy of the dtype, also at the published T
    of 1e5.
    """
    net, x, classes = network().float(), images().float(), torch.tensor([[2, 0], [1, 3]])
    net.temperature = temperature
    exact = matrix_penalty(net, x, classes)
    with torch.autocast("cpu", dtype=dtype):
        found, whole = matrix_penalty(net, x, classes), DynamicMatrixLoss(0.1)(net, x, classes[:, 0])
    assert found.dtype == whole.total.dtype == torch.float32
    bound = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, exact, rtol=bound, atol=0)
    scale = 1e5  # as a GradScaler does
    for p in net.parameters():
        a, b = (torch.autograd.grad(scale * value, p, retain_graph=True)[0] for value in (found, exact))
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_value_is_read_from_a_gpu(backend):
    """Fake CUDA tensors have no values, so that reading one raises. On a GPU, reading a value would wait for
    the device.
    """
    options = dict(out_channels=[3, 4], ranks=[3, 2], kernel_sizes=[3, 3], strides=[2, 1])
    with FakeTensorMode():
        net = coda_fast.CoDANet(**options, temperature=2.0, image_channels=1, backend=backend, device="cuda")
        x, classes = torch.rand(2, 1, 5, 6, device="cuda"), torch.zeros(2, 2, dtype=torch.long, device="cuda")
        found = DynamicMatrixLoss(0.5)(net, x, classes[:, 0])
        assert found.total.device.type == matrix_penalty(net, x, classes).device.type == "cuda"
        assert DynamicMatrixLoss(0.5)(net, x, classes[:, 0], classes, classes[:, 0] == 0).total.shape == ()


def test_no_images():
    loss = DynamicMatrixLoss(1.0)
    assert float(matrix_penalty(network(), images(0), torch.zeros(0, 2, dtype=torch.long)).detach()) == 0
    assert loss.extra_repr() == "weight=1.0, classes=2, norm='l1'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weight=-1), "weight: expected a number that is not negative, got -1"),
        (dict(weight=float("nan")), "weight: expected a number that is not negative, got nan"),
        (dict(weight=1, classes=0), "classes: expected a positive integer, got 0"),
        (dict(weight=1, norm="l3"), "norm: expected one of 'l1', 'l2', got 'l3'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        DynamicMatrixLoss(**options)
    assert message in str(caught.value)


def test_bad_input():
    net, x = network(), images()
    long = torch.long
    for labels, error, message in (
        (torch.tensor([1]), ValueError, "labels: expected one class for each of 2 images, got shape [1]"),
        (torch.tensor([1.0, 2.0]), TypeError, "labels: expected integers, got torch.float32"),
        ([1, 2], TypeError, "labels: expected a tensor, got list"),
        (torch.tensor([1, 4]), ValueError, "labels: expected 0 to 3, got 1 to 4"),
    ):
        with pytest.raises(error) as caught:
            DynamicMatrixLoss(1.0)(net, x, labels)
        assert message in str(caught.value)
    for call in (
        lambda net: DynamicMatrixLoss(1.0)(net, x, torch.tensor([0, 1])),
        lambda net: matrix_penalty(net, x, torch.zeros(2, 1).long()),
    ):
        with pytest.raises(TypeError, match="model: expected a coda_fast.Network, got a Linear"):
            call(torch.nn.Linear(2, 2))
        with coda_fast.explanation_mode(net), pytest.raises(ValueError, match="got one in explanation mode"):
            call(net)
    with pytest.raises(ValueError, match="classes: expected at most 4, those of the model, got 5"):
        DynamicMatrixLoss(1.0, classes=5)(net, x, torch.tensor([0, 1]))
    for classes, error, message in (
        (torch.zeros(2, dtype=long), ValueError, "classes: expected [2, K] with K >= 1, got shape [2]"),
        (torch.zeros(2, 0, dtype=long), ValueError, "classes: expected [2, K] with K >= 1, got shape [2, 0]"),
        (torch.full((2, 1), 9), ValueError, "classes: expected 0 to 3, got 9 to 9"),
        (torch.zeros(2, 1), TypeError, "classes: expected integers, got torch.float32"),
        ([[0], [1]], TypeError, "classes: expected a tensor, got list"),
    ):
        with pytest.raises(error) as caught:
            matrix_penalty(net, x, classes)
        assert message in str(caught.value)
