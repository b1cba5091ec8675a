"""Networks in float16 and bfloat16 at T = 1e5, whose sums over the image exceed the range of float16 and the
precision of bfloat16.
"""

import pytest
import torch
from support import relative_error

from coda_fast import CoDANet, baselines, create_model
from coda_fast.evaluation import _common as common
from coda_fast.evaluation import completeness_error, confident_images, localisation, pixel_removal
from coda_fast.interop import CoDAAttribution
from coda_fast.losses import DynamicMatrixLoss, matrix_penalty

# Largest errors as a share of the largest value, for numbers that were rounded to 11 and 8 bits a few times
BOUNDS = [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)]
half = pytest.mark.parametrize(("dtype", "bound"), BOUNDS, ids=["float16", "bfloat16"])
TARGETS = torch.tensor([[0, 2]])


def network(dtype=torch.float64):
    """A tiny network whose class evidence sums to about 1e5, as that of L-CoDA does."""
    generator = torch.Generator().manual_seed(0)
    net = CoDANet([6, 3], [4, 4], [7, 3], [3, 1], temperature=1e5, dtype=torch.float64).eval()
    with torch.no_grad():
        for layer in net.layers:
            window = layer.reduction_weight.shape
            layer.reduction_weight.copy_(0.1 * torch.randn(window, generator=generator, dtype=torch.float64))
            layer.weight.copy_(
                0.1 * torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            )
            layer.bias.copy_(
                0.2 + 0.4 * torch.rand(layer.bias.shape, generator=generator, dtype=torch.float64)
            )
    return net.to(torch.bfloat16).to(dtype)  # the same weights in all dtypes


def images(dtype=torch.float64):
    return torch.rand(1, 3, 240, 240, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)


@pytest.fixture(scope="module")
def truth():
    net = network()
    return net(images()).detach(), net.explain(images(), TARGETS)


@half
def test_logits(dtype, bound, truth):
    net = network(dtype)
    evidence = net.run_layers(net.encoder(images(dtype)))
    sums = evidence.double().sum((2, 3))
    assert sums.min() > torch.finfo(torch.float16).max
    logits = net(images(dtype))
    assert logits.dtype == dtype
    expected = sums / 1e5 + net.logit_bias
    assert torch.equal(logits, expected.to(dtype))  # rounded once, at the end
    assert relative_error(logits, truth[0]) < bound


@half
@pytest.mark.parametrize("layer", [0, 1])
def test_explanations(dtype, bound, layer, truth):
    """The division by T is computed in float32: in float16, 1 / T has two digits, and the contribution of a
    pixel none.
    """
    e = network(dtype).explain(images(dtype), TARGETS, layer=layer)
    assert e.logits.dtype == dtype
    for name in ("dynamic_weight", "contributions", "contribution_map"):
        assert getattr(e, name).dtype == torch.float32
    added = e.contributions.double().abs().sum((2, 3, 4)) + e.logits.gather(1, TARGETS).double().abs()
    assert (e.completeness_error / added).max() < bound
    assert torch.allclose(e.contributions.sum(2), e.contribution_map)
    if not layer:
        for name in ("dynamic_weight", "contributions", "contribution_map"):
            error = getattr(e, name).double() - getattr(truth[1], name)
            assert error.square().mean().sqrt() < bound * getattr(truth[1], name).square().mean().sqrt(), name
        total = CoDAAttribution(network(dtype)).attribute(images(dtype), 2).double().sum()
        expected = float(truth[0][0, 2]) - network().logit_bias
        assert abs(float(total) - expected) < bound * expected


@half
def test_temperature_costs_no_digits(dtype, bound):
    """In float16, 1 / T = 1e-5 has eight bits, and 1e-9 none."""
    net, x = network(dtype), images(dtype)
    net.temperature = 16.0
    expected = 16 * net.explain(x, TARGETS).dynamic_weight
    for net.temperature in (1e5, 1e9):
        assert (
            relative_error(net.explain(x, TARGETS).dynamic_weight.double() * net.temperature, expected) < 1e-6
        )


@half
def test_losses(dtype, bound):
    classes = torch.tensor([[1, 0]])
    expected = matrix_penalty(network(), images(), classes)
    assert relative_error(matrix_penalty(network(dtype), images(dtype), classes), expected) < bound
    loss = DynamicMatrixLoss(1.0)
    found = loss(network(dtype), images(dtype), torch.tensor([1]), classes)
    assert {t.dtype for t in found[:3]} == {torch.float32}
    labels = torch.nn.functional.one_hot(torch.tensor([1]), 3).double()
    # only the logits are rounded
    bce = torch.nn.functional.binary_cross_entropy_with_logits(found.logits.detach().double(), labels)
    assert abs(float(found.bce.detach() - bce)) < 1e-6 * float(bce)
    found.total.backward()


def test_loss_of_no_images():
    """Weights whose sum overflows float16 do not give NaN."""
    net = create_model("coda_xs_digits", dtype=torch.float16)
    torch.nn.init.constant_(net.layers[1].weight, 1000.0)
    penalty = matrix_penalty(
        net, torch.zeros(0, 1, 8, 8, dtype=torch.float16), torch.zeros(0, 1, dtype=torch.long)
    )
    assert float(penalty.detach()) == 0
    penalty.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in net.parameters())


@half
def test_metrics(dtype, bound, truth):
    targets = torch.tensor([2])
    own = lambda x, c: truth[1].contribution_map[:, 1:]
    options = dict(points=3, order="most", batch_size=2)
    expected = pixel_removal(network(), images(), targets, own, **options).probabilities
    assert (
        relative_error(
            pixel_removal(network(dtype), images(dtype), targets, own, **options).probabilities, expected
        )
        < bound
    )
    assert completeness_error(network(dtype), images(dtype), targets).max() < bound
    logits = torch.tensor([[4.0, -4.0, -4.0]]).to(dtype)
    scores = [
        localisation(network(d), images(d), torch.tensor([0]), side=1, logits=logits).scores
        for d in (torch.float64, dtype)
    ]
    assert relative_error(scores[1], scores[0]) < bound


@half
def test_probabilities_are_not_rounded_twice(dtype, bound):
    """The sigmoid of 0.00005 is above 1/2. Computed in half precision, it would be 1/2."""
    logits = torch.tensor([[5e-5, -1.0]]).to(dtype)
    assert confident_images(logits, torch.tensor([0])) == {0: [0]}
    softmax = torch.tensor([[3.0, 3.01, -2.0]]).to(dtype)
    odds = common.log_odds(torch.nn.Identity(), softmax)
    assert odds.dtype == torch.float32
    assert torch.allclose(odds.sigmoid().double(), softmax.double().softmax(1), rtol=1e-6)
    assert common.log_odds(network(dtype), logits).dtype == torch.float32


@half
def test_rise(dtype, bound):
    options = dict(masks=4, cells=3, p1=0.5, batch_size=2)
    expected = baselines.attribute("RISE", network(), images(), TARGETS, **options)
    found = baselines.attribute("RISE", network(dtype), images(dtype), TARGETS, **options)
    assert relative_error(found, expected) < 2 * bound
