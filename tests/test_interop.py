"""CoDA-Nets in the form in which captum and Quantus call attributions."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

from coda_fast import create_model
from coda_fast.interop import CoDAAttribution, quantus_explain_func


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(
        "coda_s_cifar10",
        out_channels=[4, 10],
        ranks=[4, 4],
        kernel_sizes=[3, 1],
        strides=[2, 1],
        temperature=10,
    ).double()


def test_attributions_are_complete(model):
    """Attributions have the shape of the image and sum to the logit minus its bias. A colour channel has the
    contributions of itself and its complement.
    """
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
    with pytest.raises(TypeError, match="forward_func: expected a coda_fast.Network, got a Linear"):
        CoDAAttribution(torch.nn.Linear(2, 2))


def test_one_input_in_a_tuple(model):
    """captum passes a tuple and expects a tuple. The class of one image applies to all its repetitions."""
    x, attribute = torch.rand(2, 3, 8, 8, dtype=torch.float64), CoDAAttribution(model).attribute
    (found,) = attribute((x,), 4, None)
    assert torch.equal(found, attribute(x, 4))
    (found,), delta = attribute(
        (x,), torch.tensor([4]), additional_forward_args=None, return_convergence_delta=True
    )
    assert torch.equal(found, attribute(x, 4))
    assert delta.shape == (2,)
    with pytest.raises(ValueError, match="inputs: expected a tensor or a tuple of one, got 2 inputs"):
        attribute((x, x), 4)
    with pytest.raises(
        TypeError,
        match="additional_forward_args: expected None, as a CoDANet takes an image alone, got a tuple",
    ):
        attribute(x, 4, additional_forward_args=(x,))


def test_captum_is_imported_only_by_interop():
    """And interop itself does not need it."""
    program = (
        "import sys, coda_fast, coda_fast.cli, coda_fast.report; assert 'captum' not in sys.modules; "
        "sys.modules['captum'] = None;"
        "from coda_fast.interop import CoDAAttribution as A; import torch; a = "
        "A(coda_fast.create_model('coda_xs_digits'));"
        "print(a.get_name(), a.multiplies_by_inputs, a.has_convergence_delta(), "
        "list(a.attribute(torch.rand(2, 1, 8, 8), 3).shape))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "CoDA True True [2, 1, 8, 8]\n", done.stderr


def test_captum_has_the_same_interface(model):
    captum = pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    theirs = inspect.signature(captum.attr.DeepLift.attribute).parameters
    ours = inspect.signature(CoDAAttribution.attribute).parameters
    assert set(ours) <= set(theirs)
    attribution = CoDAAttribution(model)
    assert isinstance(attribution, captum.attr.Attribution)
    for name in (name for name in vars(captum.attr.Attribution) if not name.startswith("_")):
        assert hasattr(attribution, name)
    assert attribution.get_name() == "CoDA"
    assert attribution.has_convergence_delta() is captum.attr.DeepLift(model).has_convergence_delta()
    assert attribution.multiplies_by_inputs is captum.attr.InputXGradient(model).multiplies_by_inputs


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_noise_tunnel(model, count, in_tuple):
    """SmoothGrad is the mean of the attributions of noisy images, which this test draws again."""
    captum = pytest.importorskip("captum", reason="pip install 'coda-fast[evaluation]'")
    x, targets = torch.rand(count, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5])[:count]
    tunnel = captum.attr.NoiseTunnel(CoDAAttribution(model))
    assert tunnel.is_delta_supported is True
    assert tunnel.multiplies_by_inputs is True
    options = dict(
        nt_type="smoothgrad", nt_samples=5, stdevs=0.1, target=targets, additional_forward_args=None
    )
    torch.manual_seed(0)
    found, delta = tunnel.attribute((x,) if in_tuple else x, return_convergence_delta=True, **options)
    torch.manual_seed(0)
    noisy = x.repeat_interleave(5, 0) + torch.normal(0, torch.full((5 * count, 3, 8, 8), 0.1))
    explained = model.explain(noisy, targets.repeat_interleave(5))
    direct, inverse = explained.contributions[:, 0].chunk(2, 1)
    expected = (direct + inverse).view(count, 5, 3, 8, 8).mean(1)
    torch.testing.assert_close(found[0] if in_tuple else found, expected)
    assert isinstance(found, tuple) is in_tuple
    assert delta.shape == (5 * count,)
    assert delta.abs().max() < 1e-12


@pytest.mark.parametrize("count", [1, 2])
def test_sensitivity(model, count):
    """captum's sensitivity is the change of the attributions over their norm, for images moved by a known
    step.
    """
    metrics = pytest.importorskip("captum.metrics", reason="pip install 'coda-fast[evaluation]'")
    x, targets = torch.rand(count, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5])[:count]
    attribute = CoDAAttribution(model).attribute
    found = metrics.sensitivity_max(
        attribute, x, lambda inputs: inputs + 0.01, n_perturb_samples=2, target=targets
    )
    before, after = attribute(x, targets).flatten(1), attribute(x + 0.01, targets).flatten(1)
    torch.testing.assert_close(found, (after - before).norm(dim=1) / before.norm(dim=1))
    # captum's own perturbations
    drawn = metrics.sensitivity_max(attribute, x, target=targets, additional_forward_args=None)
    assert (drawn > 0).all()


def test_infidelity(model):
    """captum's infidelity measures how far contributions over the image, the local linear map, are from the
    effect of small steps.
    """
    metrics = pytest.importorskip("captum.metrics", reason="pip install 'coda-fast[evaluation]'")
    x, targets = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 5])
    found = CoDAAttribution(model).attribute(x, targets)
    step = 0.01 * torch.randn(3, 8, 8, dtype=torch.float64)

    def perturb(inputs):
        return step.expand_as(inputs), inputs - step

    score = metrics.infidelity(model, perturb, x, found / x, target=targets, n_perturb_samples=1)
    logits = lambda images: model(images).detach().gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(
        score, ((found / x * step).sum((1, 2, 3)) - (logits(x) - logits(x - step))).square()
    )


def test_quantus_function(model):
    x, targets = np.random.default_rng(0).random((2, 3, 8, 8)), np.array([3, 7])
    found = quantus_explain_func(model, x, targets, device="cpu", normalise=True)
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 1, 8, 8)
    expected = model.explain(torch.from_numpy(x), torch.from_numpy(targets)).contribution_map
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-8)


def test_quantus_itself(model):
    """A metric of Quantus, if Quantus is installed."""
    quantus = pytest.importorskip("quantus", reason="pip install quantus")
    x, targets = np.random.default_rng(0).random((2, 3, 8, 8)).astype(np.float32), np.array([3, 7])
    metric = quantus.Sparseness(abs=True, disable_warnings=True)
    scores = metric(
        model=model.float(), x_batch=x, y_batch=targets, explain_func=quantus_explain_func, device="cpu"
    )
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)
