"""The registry of attribution methods, and the decorator that adds one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import torch
from torch import nn

from coda_fast._geometry import integer

# Increased when a method gives other numbers than before: an evaluation does not continue with pieces of
# another revision.
REVISION = 2
# {method: its settings with their published values}, in the order in which they are shown
METHODS: dict[str, dict] = {}
# {method: the method that it equals on a CoDA-Net, up to rounding (tested)}
TWINS: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A number that a method depends on.

    Attributes:
        value: the published value.
        most: the largest value; above it a method would take more memory or time than is useful.
        least: the smallest value, of an integer; None: any positive number, integer or not.
    """

    value: int | float
    most: int | float
    least: int | None = 1

    def check(self, value: int | float) -> None:
        """Raise a ValueError if a value is not allowed."""
        if self.least is None:
            if not (isinstance(value, int | float) and 0 < value <= self.most):
                raise ValueError(f"expected a positive number up to {self.most}, got {value!r}")
            return
        try:
            wrong = integer(value) < self.least
        except TypeError:
            wrong = True
        if wrong:
            raise ValueError(f"expected an int of at least {self.least}, got {value!r}")
        if value > self.most:
            raise ValueError(f"expected at most {self.most}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of the registry; its parts are the arguments of ``baseline``."""

    name: str
    function: Callable
    description: str
    settings: dict[str, Setting]
    needs: Callable[[nn.Module], object]
    check: Callable[[dict], None] | None
    takes_layer: bool

    def chosen(self, settings: dict) -> dict:
        """The published settings, updated with these. TypeError: unknown names; ValueError: bad values."""
        if unknown := set(settings) - set(self.settings):
            raise TypeError(
                f"{self.name}: expected settings among {', '.join(self.settings) or 'none'}, got "
                f"{', '.join(sorted(unknown))}"
            )
        found = {**METHODS[self.name], **settings}
        for name, value in found.items():
            try:
                self.settings[name].check(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: {name}: {error}") from None
        if self.check is not None:
            try:
                self.check(found)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        return found


ENTRIES: dict[str, Method] = {}


def captum(model: nn.Module | None = None):
    """The package ``captum.attr``, whatever the model, or an ImportError that says how to install it."""
    try:
        import captum.attr
    except ImportError:
        raise missing("captum") from None
    return captum.attr


def twins_on(model: object) -> dict[str, str]:
    """{method: the method that it equals on ``model``, up to rounding}: ``TWINS``, but none on a network with
    a stem, whose non-linearities they treat differently.
    """
    return {} if getattr(model, "stem_name", None) is not None else dict(TWINS)


def missing(package: str) -> ImportError:
    return ImportError(f"the baselines need {package}: pip install 'coda-fast[evaluation]'")


def baseline(
    name: str,
    *,
    each_class: bool = False,
    needs: Callable[[nn.Module], object] = captum,
    check: Callable[[dict], None] | None = None,
    takes_layer: bool = False,
    twin: str | None = None,
    **settings: Setting,
) -> Callable[[Callable], Callable]:
    """Decorator that makes a function an attribution method.

    The function is called with the ``Attribution`` (its ``model``, ``settings`` and ``layer``), images [N, C,
    H, W] and classes [N, K], and returns maps [N, K, H, W]. The first paragraph of its docstring describes it
    in the documents.

    Args:
        name: the name by which users select it; not taken yet.
        each_class: the function explains one class of each image, classes [M] -> maps [M, H, W]; it gets each
            image with each of its classes, ``batch_size`` pairs at once, which must be one of the settings.
        needs: called with the model when the method is created; raises ImportError if a package is missing,
            ValueError if the model is unsuitable. Default: captum must be installed.
        check: called with all settings together; raises a ValueError if they do not fit each other.
        takes_layer: whether ``create`` takes ``layer=`` for it.
        twin: a registered method that gives the same on a CoDA-Net, up to rounding.
        **settings: each with its published value and bounds.

    Raises:
        TypeError, ValueError: an argument is not as described here, or the function has no docstring.
    """
    if name in METHODS:
        raise ValueError(f"name: expected one that is not taken, got {name!r}")
    if wrong := [key for key, value in settings.items() if not isinstance(value, Setting)]:
        raise TypeError(f"{name}: {wrong[0]}: expected a Setting, got {type(settings[wrong[0]]).__name__}")
    for key, setting in settings.items():
        setting.check(setting.value)
        if key in ("method", "model", "layer"):
            raise ValueError(f"{name}: expected settings that ``create`` has no arguments for, got {key!r}")
    if each_class and "batch_size" not in settings:
        raise ValueError(f"{name}: expected the setting batch_size with each_class, got none")
    if twin is not None and twin not in METHODS:
        raise ValueError(f"{name}: twin: expected a registered method, got {twin!r}")

    def register(function):
        if not (function.__doc__ or "").strip():
            raise ValueError(f"{name}: expected a function with a docstring, got none")
        description = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
        run = _pairwise(function) if each_class else function
        ENTRIES[name] = Method(name, run, description, settings, needs, check, takes_layer)
        METHODS[name] = {key: setting.value for key, setting in settings.items()}
        if twin is not None:
            TWINS[name] = twin
        return function

    return register


def _pairwise(function):
    """A method for several classes of each image, from one for a single class: it computes the pairs of an
    image and one of its classes, ``batch_size`` at once.
    """

    def method(attribution, images, targets):
        count = targets.shape[1]
        pairs = images.repeat_interleave(count, 0), targets.flatten()
        step = attribution.settings["batch_size"]
        parts = zip(*(part.split(step) for part in pairs), strict=True)
        maps = [function(attribution, x, t) for x, t in parts]
        return torch.cat(maps).detach().view(len(images), count, *images.shape[2:])

    return method
