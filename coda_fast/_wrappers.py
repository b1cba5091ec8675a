"""The wrappers that other libraries put around a network, and the network inside them."""

from __future__ import annotations

import torch
from torch import nn

# Name of a wrapper's class -> the attribute that holds the wrapped module. The wrappers are those of
# torch.compile, data parallelism, weight averaging (torch, timm), Lightning Fabric and activation
# checkpointing. Classes are known by name because importing them all would take seconds. A module that
# computes anything itself is not a wrapper.
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
    """The network inside wrappers of any order and depth; a module that is not wrapped is returned as it is.

    Wrappers are those of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, weight averaging
    (``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEma``, ``ModelEmaV2``, ``ModelEmaV3``: the
    averaged network), Lightning Fabric and activation checkpointing.

    ``coda_fast.save``, explanations, losses and metrics unwrap their arguments by themselves. A wrapper has
    no method ``explain`` of its own:

    >>> import torch, coda_fast
    >>> wrapped = torch.nn.DataParallel(coda_fast.create_model("coda_xs_digits"))
    >>> coda_fast.unwrap(wrapped).explain(torch.rand(2, 1, 8, 8)).contribution_map.shape
    torch.Size([2, 1, 8, 8])
    """
    while (inner := _inside(model)) is not None:
        model = inner[1]
    return model


def _inside(model):
    """The class name of a wrapper and the module that it holds; None if ``model`` is no wrapper."""
    for kind in type(model).__mro__:
        if kind.__name__ in _INSIDE and kind.__module__.partition(".")[0] in _LIBRARIES:
            return kind.__name__, getattr(model, _INSIDE[kind.__name__])
    return None


def wrapped_by(model: nn.Module, kind: str) -> bool:
    """Whether a wrapper of the class named ``kind`` is among those that ``unwrap`` removes."""
    while (inner := _inside(model)) is not None:
        if inner[0] == kind:
            return True
        model = inner[1]
    return False


def plain_name(name: str) -> str:
    """The name of a parameter without the parts that wrappers of layers add to it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE.values())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, which may be sharded over processes (FSDP2's DTensor); each must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
