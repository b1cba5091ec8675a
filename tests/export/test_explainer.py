"""The module ``Explainer``, which computes logits and contribution map in one call, as exported files do."""

import pytest
import torch
from support import assert_close
from support_export import digits
from torch import nn

import coda_fast
import coda_fast.data


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
    assert all(g.abs().max() > 0 for g in gradients), "differentiable, for penalties on the map"


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
    with pytest.raises(TypeError, match="model: expected a coda_fast.Network, got a Linear"):
        coda_fast.Explainer(nn.Linear(1, 1))
