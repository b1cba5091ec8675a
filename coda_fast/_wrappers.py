"""The wrappers that other libraries put around a network, and the network inside of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from coda_fast.models import CoDANet

# The class of a wrapper -> its attribute that holds the wrapped module: of torch.compile, data parallelism,
# averages of weights (torch, timm), Lightning Fabric and activation checkpointing. Classes are known by name,
# because importing all of them would take seconds. A module that computes anything of its own is no wrapper.
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
    """The network inside of wrappers, in any order and depth; a module that is not wrapped is returned as it
    is.

    Wrappers are those of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, averages of
    weights (``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEma``, ``ModelEmaV2``, ``ModelEmaV3``: the
    averaged network), Lightning Fabric and activation checkpointing.

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
    """The class name of a wrapper and the module that it holds; None: ``model`` is no wrapper."""
    for kind in type(model).__mro__:
        if kind.__name__ in _INSIDE and kind.__module__.partition(".")[0] in _LIBRARIES:
            return kind.__name__, getattr(model, _INSIDE[kind.__name__])
    return None


def wrapped_by(model: nn.Module, kind: str) -> bool:
    """Whether a wrapper of the class named ``kind`` is among those that ``unwrap`` takes away."""
    while (inner := _inside(model)) is not None:
        if inner[0] == kind:
            return True
        model = inner[1]
    return False


def network_in(model: nn.Module) -> nn.Module:
    """The CoDANet that ``model`` is or wraps, gathered if it is sharded; any other model as it is.

    Metrics treat the two differently: the probabilities of a CoDANet are sigmoids of its logits, and pixels
    are removed from its encoded image.

    Raises:
        ValueError: a module that holds a CoDANet as a part, for which neither treatment is right.
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


def need_network(model: nn.Module, name: str = "model") -> CoDANet:
    """The CoDANet that ``model`` is or wraps. TypeError: there is none."""
    from coda_fast.models import CoDANet

    inner = unwrap(model)
    if not isinstance(inner, CoDANet):
        raise TypeError(f"{name}: expected a CoDANet, got {type(inner).__name__}")
    return inner


def plain_name(name: str) -> str:
    """The name of a parameter without the parts that wrappers of layers add to it."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE.values())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is sharded over processes (FSDP2's DTensor). Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(model: CoDANet) -> CoDANet:
    """A CoDANet whose layers can be called one by one: ``model`` itself, or a copy with whole weights of one
    that FSDP2 has sharded.

    FSDP2 gathers the weights of a layer only within a forward pass of the whole network. Every process must
    make the copy.
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
