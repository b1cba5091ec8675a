"""The completeness error is rounding for a CoDA-Net, and finds contributions that are missing."""

import dataclasses

import pytest
import torch

import coda_fast
from coda_fast.evaluation import completeness_error

IMAGES, TARGETS = (
    torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 3, 9, 1, 1]),
)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rounding_only(dtype, bound):
    torch.manual_seed(0)
    model = coda_fast.create_model("coda_xs_digits", dtype=dtype)
    error = completeness_error(model, IMAGES.to(dtype), TARGETS, batch_size=2)
    assert error.shape == (5,)
    assert float(error.max()) < bound


def test_what_is_missing_is_found(monkeypatch):
    """For a map without its largest contribution, the error is that contribution, relative to |logit| and the
    remaining terms.
    """
    model = coda_fast.create_model("coda_xs_digits", dtype=torch.float64, temperature=1.0)
    explain, taken = type(model).explain, []

    def broken(self, images, targets):
        found = explain(self, images, targets)
        flat = found.contributions.flatten(2).clone()
        taken.append(flat.abs().max(2))
        value = flat.gather(2, taken[-1].indices[..., None])
        flat.scatter_(2, taken[-1].indices[..., None], 0.0)
        return dataclasses.replace(
            found, contributions=flat.view_as(found.contributions), completeness_error=value[..., 0].abs()
        )

    monkeypatch.setattr(type(model), "explain", broken)
    error = completeness_error(model, IMAGES.double(), TARGETS)
    whole = explain(model, IMAGES.double(), TARGETS)
    terms = (
        whole.contributions.abs().flatten(2).sum(2)
        - taken[0].values
        + whole.logits.gather(1, TARGETS[:, None]).abs()
    )
    torch.testing.assert_close(error, (taken[0].values / terms)[:, 0])


def test_needs_a_coda_net():
    with pytest.raises(ValueError, match="model: expected a coda_fast.Network, got a Linear"):
        completeness_error(torch.nn.Linear(2, 2), IMAGES, TARGETS)
