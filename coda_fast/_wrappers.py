"""What others put around a network, and the network inside."""

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


def network_in(model):
    """The CoDANet that ``model`` is or wraps, whose own rules (sigmoid, encoded pixels) then count; else
    ``model`` as it is. A sharded one is gathered.

    Raises:
        ValueError: a module that holds a CoDANet as a part: by which rules it is to be judged cannot be
            known.
    """
    from coda_fast.models import CoDANet

    inner = unwrap(model)
    if isinstance(inner, CoDANet):
        return gathered(inner)
    if isinstance(inner, nn.Module):
        for name, module in inner.named_modules():
            if isinstance(module, CoDANet):
                raise ValueError(
                    "model: expected a CoDANet, alone or in a wrapper that unwrap knows, or a model "
                    "without one; got a "
                    f"{type(inner).__name__} around the CoDANet {name!r}: give that"
                )
    return model


def need_network(model, name: str = "model"):
    """The CoDANet that ``model`` is or wraps; TypeError where there is none."""
    from coda_fast.models import CoDANet

    inner = unwrap(model)
    if not isinstance(inner, CoDANet):
        raise TypeError(f"{name}: expected a CoDANet, got {type(inner).__name__}")
    return inner


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of parts of a network add to it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE.values())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is spread over processes (FSDP2's DTensor), gathered from them: every process
    must call it.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(model):
    """A CoDANet whose layers can be called one by one: ``model`` itself, or, where FSDP2 has its weights, a
    copy with all of them, which every process must make. (FSDP2 lends a layer its weights in a forward pass
    of the whole network alone.)
    """
    from coda_fast.models import CoDANet

    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model
    twin = CoDANet(**model.config(), device="meta")
    state = {plain_name(name): whole(tensor.detach()) for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    for layer, original in zip(twin.layers, model.layers, strict=True):
        layer.backend = unwrap(original).backend
    return twin.requires_grad_(False).train(model.training)
