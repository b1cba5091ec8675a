"""CoDA-Nets as captum and Quantus call attributions."""

import inspect

import numpy as np
import pytest
import torch

from coda_fast import create_model
from coda_fast.interop import CoDAAttribution, quantus_explain_func


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("coda_s_cifar10", out_channels=[4, 10], ranks=[4, 4], kernel_sizes=[3, 1], strides=[2, 1], temperature=10).double()


def test_attributions_are_complete(model):
    """In the shape of the image, they sum to the logit less its bias; a colour has what it and its complement contribute."""
    x, targets = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5, 9])
    found, delta = CoDAAttribution(model).attribute(x, targets, return_convergence_delta=True)
    logits = model(x).detach().gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.sum((1, 2, 3)), logits - model.logit_bias, rtol=1e-10, atol=1e-12)
    assert found.shape == x.shape
    assert delta.abs().max() < 1e-12
    weight = model.explain(x, targets).dynamic_weight[:, 0]
    torch.testing.assert_close(found, weight[:, :3] * x + weight[:, 3:] * (1 - x))


def test_targets(model):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    attribute = CoDAAttribution(model).attribute
    assert torch.equal(attribute(x), attribute(x, model(x).argmax(1)))
    assert torch.equal(attribute(x, target=4), attribute(x, torch.tensor([4, 4])))
    with pytest.raises(ValueError, match="target: expected one class for each image, got 2"):
        attribute(x, torch.tensor([[1, 2], [3, 4]]))
    with pytest.raises(TypeError, match="forward_func: expected a CoDANet, got Linear"):
        CoDAAttribution(torch.nn.Linear(2, 2))


def test_captum_has_the_same_interface(model):
    """Arguments by captum's names, and captum's own metric runs on it."""
    captum = pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    from captum.metrics import infidelity

    theirs = inspect.signature(captum.attr.DeepLift.attribute).parameters
    ours = inspect.signature(CoDAAttribution.attribute).parameters
    assert set(ours) <= set(theirs)
    assert CoDAAttribution(model).has_convergence_delta() is captum.attr.DeepLift(model).has_convergence_delta()
    x, targets = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5])
    found = CoDAAttribution(model).attribute(x, targets)

    def perturb(inputs):
        noise = 0.01 * torch.randn(inputs.shape, dtype=inputs.dtype)
        return noise, inputs - noise

    score = infidelity(model, perturb, x, found / x, target=targets)
    assert score.shape == (2,)
    assert torch.isfinite(score).all()


def test_quantus_function(model):
    x, targets = np.random.default_rng(0).random((2, 3, 8, 8)), np.array([3, 7])
    found = quantus_explain_func(model, x, targets, device="cpu", normalise=True)
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 1, 8, 8)
    expected = model.explain(torch.from_numpy(x), torch.from_numpy(targets)).contribution_map
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-8)


def test_quantus_itself(model):
    """A metric of Quantus, if it is installed."""
    quantus = pytest.importorskip("quantus", reason="pip install quantus")
    x, targets = np.random.default_rng(0).random((2, 3, 8, 8)).astype(np.float32), np.array([3, 7])
    metric = quantus.Sparseness(abs=True, disable_warnings=True)
    scores = metric(model=model.float(), x_batch=x, y_batch=targets, explain_func=quantus_explain_func, device="cpu")
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)
