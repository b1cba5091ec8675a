"""Completeness: whether contributions add up to the logit. Those of a CoDA-Net do, up to rounding."""

from __future__ import annotations

import torch
from torch import nn

from coda_fast.dynamic_linear import DynamicLinear, network_in, not_a_network
from coda_fast.evaluation import _common as common


def completeness_error(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, *, batch_size: int = 64
) -> torch.Tensor:
    """The relative error ``|sum of contributions + logit bias - logit|`` of each target's logit, [N].

    It is relative to ``|logit|`` plus the sum of absolute contributions, to which the rounding error of the
    sum is proportional.

    Args:
        model: a CoDA-Net, or a wrapper of one.
        images: [N, C, H, W].
        targets: a class for each image, [N] or [N, 1], of any integer dtype.
        batch_size: the number of images explained at once.

    Raises:
        ValueError, TypeError: the model is not a CoDA-Net, or shapes do not fit.
    """
    network = network_in(model)
    if not isinstance(network, DynamicLinear):
        raise ValueError(f"model: {not_a_network(network)}")
    targets = common.labelled(images, targets, "targets")
    common.check_positive(batch_size=batch_size)
    found = [images.new_zeros(0, dtype=torch.float64)]
    for part, classes in zip(images.split(batch_size), targets.split(batch_size), strict=True):
        explained = network.explain(part, classes)
        terms = (
            explained.contributions.double().abs().sum((2, 3, 4))
            + explained.logits.gather(1, explained.target).double().abs()
        )
        found.append((explained.completeness_error / terms)[:, 0])
    return torch.cat(found)
