"""A CoDA-Net's own explanation as an attribution method, to be compared with the others."""

from __future__ import annotations

import torch
from torch import nn

from coda_fast.baselines._attribution import Attribution
from coda_fast.baselines._registry import baseline
from coda_fast.dynamic_linear import DynamicLinear, not_a_network


def _dau_layers(model: nn.Module) -> None:
    if not isinstance(model, DynamicLinear):  # other libraries' models have an ``explain`` too
        raise ValueError(f"method: 'Ours': {not_a_network(model)}")


@baseline("Ours", needs=_dau_layers)
def contribution_map(method: Attribution, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The contribution map of a CoDA-Net itself, which sums to the logit less its constant bias. Of a hybrid
    network it is the map of its features, placed on the image.
    """
    return method.model.explain(images, targets).pixel_map
