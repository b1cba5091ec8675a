"""What others put around a network, and how their names and tensors look through it."""

from __future__ import annotations

import torch
from torch import nn

# Class -> attribute that holds what is inside. By name, because importing all of them would take seconds:
# torch.compile, data parallel, averages of weights (torch, timm), Lightning Fabric, activation checkpointing.
# A wrapper that computes anything of its own is none.
_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "_FabricModule": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
_LIBRARIES = ("torch", "timm", "lightning", "lightning_fabric")


def unwrap(model: nn.Module) -> nn.Module:
    """The network that wrappers hold: of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``,
    averages of weights (``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEma``, ``ModelEmaV2``,
    ``ModelEmaV3``: the averaged network), Lightning Fabric and activation checkpointing, in any order and
    depth. Anything else is returned as it is.

    ``coda_fast.save``, explanations, losses and metrics unwrap what they are given; wrappers have no
    ``explain`` of their own:

    >>> import torch, coda_fast
    >>> wrapped = torch.nn.DataParallel(coda_fast.create_model("coda_xs_digits"))
    >>> coda_fast.unwrap(wrapped).explain(torch.rand(2, 1, 8, 8)).contribution_map.shape
    torch.Size([2, 1, 8, 8])
    """
    while (inner := _inside(model)) is not None:
        model = inner[1]
    return model


def _inside(model):
    """The kind of wrapper that ``model`` is, and what it holds; None: it is none."""
    for kind in type(model).__mro__:
        if kind.__name__ in _INSIDE and kind.__module__.partition(".")[0] in _LIBRARIES:
            return kind.__name__, getattr(model, _INSIDE[kind.__name__])
    return None


def wrapped_by(model, kind: str) -> bool:
    """Whether a wrapper of this kind is around what ``unwrap`` finds."""
    while (inner := _inside(model)) is not None:
        if inner[0] == kind:
            return True
        model = inner[1]
    return False


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of parts of a network add to it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE.values())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is spread over processes (FSDP2's DTensor), gathered from them: every process
    must call it.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
