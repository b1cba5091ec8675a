"""Completeness: do the contributions add up to the logit? Of a CoDA-Net they do, to rounding."""

from __future__ import annotations

import torch

from coda_fast.dynamic_linear import DynamicLinear, network_in
from coda_fast.evaluation import _common as common


def completeness_error(
    model, images: torch.Tensor, targets: torch.Tensor, *, batch_size: int = 64
) -> torch.Tensor:
    """``|sum of contributions + logit bias - logit|`` of the logit of each target, [N], as a share of
    ``|logit|`` plus the sum of absolute
    contributions: what rounding of that many terms is measured against.

    Args:
        model: a CoDA-Net, or a wrapper of one. images, targets: [N, C, H, W] and a class for each, [N] or [N,
            1], of any integer dtype.

    Raises:
        ValueError, TypeError: a model without DAU layers; shapes that do not fit.
    """
    model = network_in(model)
    if not isinstance(model, DynamicLinear):
        raise ValueError(f"model: expected one made of DAU layers, got a {type(model).__name__}")
    targets = common.labelled(images, targets, "targets")
    common.check_positive(batch_size=batch_size)
    found = [images.new_zeros(0, dtype=torch.float64)]
    for part, classes in zip(images.split(batch_size), targets.split(batch_size), strict=True):
        explained = model.explain(part, classes)
        terms = (
            explained.contributions.double().abs().sum((2, 3, 4))
            + explained.logits.gather(1, explained.target).double().abs()
        )
        found.append((explained.completeness_error / terms)[:, 0])
    return torch.cat(found)
