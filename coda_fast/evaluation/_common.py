"""Functions that the metrics share: checks of their input, and a model's own maps as an attribution."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

import torch
from torch import nn

from coda_fast._autocast import wide
from coda_fast._classes import one_each
from coda_fast.dynamic_linear import DynamicLinear, network_in

# images [N, C, H, W], classes [N, K] -> maps [N, K, H, W]: one map for each class, larger where the image
# contributes more to it
Attribution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PROTOCOLS = ("plain", "published")


class AttributionMethod(Protocol):
    """An object whose method ``attribute`` is an ``Attribution``, as ``coda_fast.baselines.create`` makes."""

    def attribute(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps [N, K, H, W] of images [N, C, H, W] for classes [N, K]."""


def attribution_of(model: nn.Module, attribution: Attribution | AttributionMethod | None) -> Attribution:
    """``attribution`` itself or its method ``attribute``; for None, the contribution maps of a CoDA-Net.

    Raises:
        ValueError: it is None and the model cannot explain itself. TypeError: it is not a function.
    """
    if attribution is None:
        model = network_in(model)
        if not hasattr(model, "explain"):
            raise ValueError(
                f"attribution: expected a function for a {type(model).__name__}, which cannot explain "
                "itself, got None"
            )
        return lambda images, targets: model.explain(images, targets).pixel_map
    attribute = getattr(attribution, "attribute", attribution)
    if not callable(attribute):
        raise TypeError(
            f"attribution: expected a function (images, targets) -> maps, got {type(attribution).__name__}"
        )
    return attribute


def maps_of(attribute: Attribution, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The maps [N, K, H, W] of an attribution; ValueError if they have another shape or are not finite."""
    maps = attribute(images, targets).detach()
    expected = (len(images), targets.shape[1], *images.shape[2:])
    if maps.shape != expected:
        raise ValueError(f"attribution: expected maps of shape {list(expected)}, got {list(maps.shape)}")
    if not torch.isfinite(maps).all():
        raise ValueError("attribution: expected finite maps, got NaN or infinity")
    return maps


# The modules that are in evaluation mode now, by id: [number of contexts, ``training`` before the first one].
_EVALUATED: dict[int, list] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluated(model: object) -> Iterator[None]:
    """A context in which the model is in evaluation mode; afterwards every module is in its earlier mode
    again. Several threads may evaluate one model at once: the last one to leave restores what the first one
    found.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    with _LOCK:
        for module in modules:
            _EVALUATED.setdefault(id(module), [0, module.training])[0] += 1
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                entry = _EVALUATED[id(module)]
                entry[0] -= 1
                if not entry[0]:
                    module.training = entry[1]
                    del _EVALUATED[id(module)]


def log_odds(model: object, logits: torch.Tensor) -> torch.Tensor:
    """The log-odds of each class, in float32 or wider. For a CoDA-Net, which is trained with a sigmoid for
    each class, they are its logits; for other models they are computed from the softmax.
    """
    if isinstance(network_in(model), DynamicLinear) or not isinstance(model, torch.nn.Module):
        return wide(logits)
    log_probability = logits.double().log_softmax(1)
    return (log_probability - torch.log(-torch.expm1(log_probability))).to(wide(logits).dtype)


def labelled(images: torch.Tensor, labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
    """The class of each image, [N] int64, from [N] or [N, 1] of any integer dtype.

    Raises:
        ValueError, TypeError: ``images`` is not [N, C, H, W], or there is not one class for each.
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4:
        raise ValueError(f"images: expected [N, C, H, W], got shape {list(images.shape)}")
    return one_each(labels, len(images), name)


def check_choice(name: str, value: object, known: Collection) -> None:
    """Raise a ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def check_positive(**values: object) -> None:
    """Raise a ValueError unless all values are positive integers."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def logits_of(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Log-odds of all classes of all images, [N, classes], computed in batches."""
    with torch.no_grad(), evaluated(model):
        return torch.cat([log_odds(model, model(chunk)) for chunk in images.split(batch_size)])
