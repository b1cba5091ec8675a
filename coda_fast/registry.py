"""The classes of networks that files may name, and the named configurations that ``create_model`` and timm
know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# type[Any]: constructors of networks also take device and dtype, which that of Network does not take.
_CLASSES: dict[str, type[Any]] = {}
_MODELS: dict[str, Model] = {}
_LISTENERS: list[Callable[[str], None]] = []


@dataclasses.dataclass(frozen=True)
class Model:
    """A named configuration: the class of the network, its arguments, and who it is from."""

    network: type[Any]
    config: dict
    origin: str


def add(name: str, network: type[Any], config: Mapping, origin: str) -> None:
    """Enter a model and its class, and tell who listens.

    Raises:
        ValueError: the name stands for another model, or the name of the class for another class.
    """
    known, entry = _CLASSES.get(network.__name__, network), Model(network, dict(config), origin)
    if known is not network:
        raise ValueError(
            f"network: expected a name that no other class has, got {network.__name__}, which is "
            f"{known.__module__}.{known.__qualname__} too"
        )
    if _MODELS.get(name, entry) != entry:
        raise ValueError(f"name: expected one that no other model has, got {name!r}")
    fresh = name not in _MODELS
    _CLASSES[network.__name__], _MODELS[name] = network, entry
    for listener in _LISTENERS if fresh else ():
        listener(name)


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every model, those that come later too."""
    _LISTENERS.append(listener)
    for name in list(_MODELS):
        listener(name)


def models() -> dict[str, Model]:
    """All models by name, in the order of their registration."""
    return dict(_MODELS)


def model(name: str) -> Model:
    """A model by name; ValueError where there is none."""
    if name not in _MODELS:
        raise ValueError(f"model: expected one of {', '.join(_MODELS)}, got {name!r}")
    return _MODELS[name]


def classes() -> dict[str, type[Any]]:
    """The classes of networks by name."""
    return dict(_CLASSES)


def class_of(network: object) -> type[Any]:
    """The registered class that a network is of, or of a subclass of; a file names it.

    Raises:
        ValueError: none is.
    """
    for kind in type(network).__mro__:
        if _CLASSES.get(kind.__name__) is kind:
            return kind
    raise ValueError(
        f"model: expected a network of a registered class, got {type(network).__name__}: enter it with "
        "coda_fast.register_model, or no file that names it can be loaded"
    )


def name_of(kind: type, otherwise: str) -> str:
    """The name of the registered class that ``kind`` is or inherits from; ``otherwise`` where none is."""
    return next((k.__name__ for k in kind.__mro__ if _CLASSES.get(k.__name__) is k), otherwise)
