"""The network classes that files may name, and the named configurations for ``create_model`` and timm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# type[Any], because constructors of subclasses take device and dtype, and that of Network does not.
_CLASSES: dict[str, type[Any]] = {}
_MODELS: dict[str, Model] = {}
_LISTENERS: list[Callable[[str], None]] = []


@dataclasses.dataclass(frozen=True)
class Model:
    """A named configuration: the class of the network, its arguments, and its origin."""

    network: type[Any]
    config: dict
    origin: str


def add(name: str, network: type[Any], config: Mapping, origin: str) -> None:
    """Register a model and its class, and call the listeners.

    Raises:
        ValueError: the name belongs to another model, or the name of the class to another class.
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


def add_class(network: type[Any]) -> None:
    """Register a class of networks of which there is no named model, so that files can name it."""
    _CLASSES[network.__name__] = network


def listen(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with the name of every model, including those that are registered later."""
    _LISTENERS.append(listener)
    for name in list(_MODELS):
        listener(name)


def models() -> dict[str, Model]:
    """All models by name, in the order of their registration."""
    return dict(_MODELS)


def model(name: str) -> Model:
    """A model by name; ValueError if there is none."""
    if name not in _MODELS:
        raise ValueError(f"model: expected one of {', '.join(_MODELS)}, got {name!r}")
    return _MODELS[name]


def classes() -> dict[str, type[Any]]:
    """The registered network classes by name."""
    return dict(_CLASSES)


def class_of(network: object) -> type[Any]:
    """The registered class that a network belongs to or inherits from; a file names it.

    Raises:
        ValueError: there is none.
    """
    for kind in type(network).__mro__:
        if _CLASSES.get(kind.__name__) is kind:
            return kind
    raise ValueError(
        f"model: expected a network of a registered class, got {type(network).__name__}: register it "
        "with coda_fast.register_model, so that files that name it can be loaded"
    )


def name_of(kind: type, otherwise: str) -> str:
    """The name of the registered class that ``kind`` is or inherits from, or ``otherwise`` without one."""
    return next((k.__name__ for k in kind.__mro__ if _CLASSES.get(k.__name__) is k), otherwise)
