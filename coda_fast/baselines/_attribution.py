"""Applying any attribution method to a model: checks of the arguments, and a model that stays unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from coda_fast._classes import as_classes
from coda_fast._wrappers import unwrap
from coda_fast.baselines._registry import ENTRIES, METHODS
from coda_fast.dynamic_linear import DynamicLinear, network_in
from coda_fast.evaluation._common import evaluated


@dataclasses.dataclass(frozen=True)
class Attribution:
    """An attribution method for a model; make it with ``create``.

    Attributes:
        method: its name.
        settings: all its settings as plain values, to be stored with results.
    """

    method: str
    model: nn.Module
    settings: dict
    layer: nn.Module | None = None
    _function: Callable = None  # type: ignore[assignment]

    def attribute(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps of how much each pixel of ``images`` [N, C, H, W] speaks for ``targets``: [N] -> [N, H, W],
        [N, K] -> [N, K, H, W].

        The model's mode, gradients and hooks stay as they were. ValueError, TypeError: shapes do not fit.
        """
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if images.dim() != 4:
            raise ValueError(f"images: expected [N, C, H, W], got shape {list(images.shape)}")
        targets = as_classes(torch.as_tensor(targets, device=images.device), "targets")
        if targets.dim() not in (1, 2) or len(targets) != len(images) or targets.shape[1:].numel() == 0:
            raise ValueError(
                f"targets: expected [{len(images)}] or [{len(images)}, K], got shape {list(targets.shape)}"
            )
        if targets.numel() and targets.min() < 0:  # a negative index would count from the end
            raise ValueError(f"targets: expected classes from 0, got {int(targets.min())}")
        table = targets if targets.dim() == 2 else targets[:, None]
        if not len(images):
            return images.new_zeros(*targets.shape, *images.shape[2:])
        # These tensors are differentiated, so they must not be inference tensors, whatever the caller's mode.
        with torch.inference_mode(False), torch.enable_grad(), _quiet(self.model):
            _check_classes(self.model, images, table)
            maps = self._function(self, images.detach().clone(), table.clone())
        return maps if targets.dim() == 2 else maps[:, 0]


def create(method: str, model: nn.Module, *, layer: nn.Module | None = None, **settings) -> Attribution:
    """A method by name, with the published settings unless others are given.

    Args:
        method: a key of ``METHODS``; "Ours" is the contribution map of a CoDA-Net itself.
        model: a CoDA-Net, or any classifier [N, C, H, W] -> [N, classes]. A wrapped one is unwrapped
            (``coda_fast.unwrap``), because captum's hooks do not work in compiled modules.
        layer: for "GCam" only, the layer whose output is weighted; default: a CoDA-Net's last layer, else the
            last convolution that is called.
        settings: see ``METHODS[method]``; ``batch_size`` limits how many images (including perturbed ones)
            are computed at once.

    Raises:
        ValueError: the method is unknown, or it is "Ours" and the model cannot explain itself. TypeError: a
            setting is unknown. ImportError: captum is missing.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> create("Ours", model).attribute(torch.rand(2, 1, 8, 8), torch.tensor([[3, 7], [1, 2]])).shape
    torch.Size([2, 2, 8, 8])
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    model, entry = network_in(unwrap(model)), ENTRIES[method]
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    chosen = entry.chosen(settings)
    if layer is not None and not (entry.takes_layer and isinstance(layer, nn.Module)):
        those = ", ".join(name for name, other in ENTRIES.items() if other.takes_layer)
        raise TypeError(
            f"layer: expected a module, for {those} only, got a {type(layer).__name__} for {method}"
        )
    entry.needs(model)
    return Attribution(method, model, chosen, layer, entry.function)


def attribute(
    method: str, model: nn.Module, images: torch.Tensor, targets: torch.Tensor, **settings
) -> torch.Tensor:
    """``create(method, model, **settings).attribute(images, targets)``."""
    return create(method, model, **settings).attribute(images, targets)


@contextlib.contextmanager
def _quiet(model) -> Iterator[None]:
    """``evaluated``, without captum's warnings. Neither this nor captum touches the parameters' ``.grad``,
    because another thread may be training the model.
    """
    with evaluated(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\..*")
        yield


def _check_classes(model, images, targets):
    """Raise a ValueError for a class that the model does not have."""
    with torch.no_grad():
        count = model.num_classes if isinstance(model, DynamicLinear) else model(images[:1]).shape[1]
    if int(targets.max()) >= count:
        raise ValueError(f"targets: expected classes from 0 to {count - 1}, got {int(targets.max())}")
