"""The weights from which a run starts (``model.weights``), and the layers that it does not train
(``model.freeze``).

The network of a run that starts from weights is that of their file. Its checkpoints describe the network and
identify the file (``origin``), so that the run is resumed without it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coda_fast import pretrained, registry
from coda_fast._files import CheckpointError, one_line, regular_file, some
from coda_fast.checkpoints import load
from coda_fast.network import Network
from coda_fast.train.errors import TrainingError
from coda_fast.train.schema import Model

# The keys of a recipe that the layers in a file decide.
_LAYERS = ("out_channels", "ranks", "kernel_sizes", "strides", "norm", "stem", "at", "stem_options")
# The keys of a recipe that replace what a file says.
_REPLACING = ("temperature", "logit_bias", "backend", "image_size", "frozen")


def find(name: str) -> Path:
    """The file that ``model.weights`` names: a path, or a network of the package."""
    return pretrained.find(name)


def checksum(name: str) -> str:
    """The SHA-256 of the file that ``model.weights`` names, in hexadecimal digits.

    Raises:
        TrainingError: there is no such file, it cannot be read, or it is a file of torch.save.
    """
    with _in_words(name), regular_file(path := find(name)) as file:
        if file.read(2) == b"PK":  # as files of torch.save begin
            raise TrainingError(
                f"model.weights: expected a model file such as model.safetensors, got {path}, a file of "
                "torch.save; if it is a checkpoint of a run, --resume goes on with that run, and the "
                "model.safetensors of its folder is what another run can start from"
            )
        file.seek(0)
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
        return digest.hexdigest()


class Weights:
    """The weights in the file that a recipe names.

    Args:
        spec: the section ``model`` of the recipe, with ``weights``.

    Attributes:
        name: as the recipe spells it.
        sha256: of the file, in hexadecimal digits.
        stored: the network in the file, on the meta device.

    Raises:
        TrainingError: the file is not a model file, or a key of the recipe asks for other layers.
    """

    def __init__(self, spec: Model):
        assert spec.weights is not None, "the caller checks this"
        if spec.stem_weights is not None:
            raise TrainingError(
                "model.stem_weights: expected none (null) beside model.weights, which has those of the stem, "
                f"got {spec.stem_weights}"
            )
        self.name, self.spec, self.sha256 = spec.weights, spec, checksum(spec.weights)
        self.stored = self._load(device="meta")
        _check_layers(spec, self.stored)

    def network(self, num_classes: int | None = None, device: str = "cpu", **options: Any) -> Network:
        """The network with these weights, and with a new last layer if ``num_classes`` is another number
        (None: that of the file). ``options`` are arguments of ``coda_fast.load``; values that the recipe
        gives take precedence.

        Raises:
            TrainingError: the network cannot have so many classes, or a value of the recipe does not fit.
        """
        bias, stored = self.spec.logit_bias, self.stored
        if num_classes == stored.num_classes and bias not in (None, stored.logit_bias):
            raise TrainingError(
                f"model.logit_bias: expected {stored.logit_bias:g} as in {self.name}, whose last layer "
                f"is kept, got {bias:g}"
            )
        replaced = {key: value for key in _REPLACING if (value := getattr(self.spec, key)) is not None}
        model = self._load(num_classes=num_classes, device=device, **options | replaced)
        for key, tensor in model.state_dict().items():
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise TrainingError(
                    f"model.weights: expected finite numbers in {self.name}, got others in {key}"
                )
        return model

    def origin(self, model: Network) -> dict:
        """What a checkpoint of the run stores, as plain values: name and checksum of the file, and the
        network ``model`` of the run.
        """
        network = registry.class_of(model).__name__
        return {"name": self.name, "sha256": self.sha256, "network": network, "config": model.config()}

    def in_words(self, model: Network) -> Iterator[str]:
        """Lines for the log of the run with the network ``model``."""
        stored, kind = self.stored, registry.class_of(model).__name__
        channels = model.config().get("out_channels")
        layers = f" with layers of {', '.join(map(str, channels))} channels" if channels else ""
        yield f"weights: {self.name} (sha256 {self.sha256[:12]}), a {kind}{layers}"
        if model.num_classes != stored.num_classes:
            yield f"new: {model.classifier}, for {model.num_classes} classes instead of {stored.num_classes}"
        elif stored.class_names != model.class_names:
            yield (
                f"the last layer is kept: its {stored.num_classes} classes were "
                f"{_names(stored.class_names)}, now {_names(model.class_names)}"
            )
        for key in ("temperature", "logit_bias"):
            before, after = getattr(stored, key), getattr(model, key)
            if before != after:
                yield f"model.{key}: {after:g} by the recipe, instead of {before:g} in the file"

    def _load(self, **options):
        with _in_words(self.name):
            return load(find(self.name), **options)


def again(
    resumed: tuple[Path, dict], backend: str | None, dtype: torch.dtype, device: str = "cpu"
) -> Network:
    """The network of a run that began with weights, to be resumed: as a checkpoint describes it, with fresh
    weights.

    Args:
        resumed: a checkpoint of the run, and its content.
        backend, dtype, device: arguments of the network.

    Raises:
        TrainingError: the checkpoint does not describe a network.
    """
    path, content = resumed
    origin, count = content["origin"], len(content["model"])
    try:
        kind, config = registry.classes()[origin["network"]], origin["config"]
        lists = [value for key, value in config.items() if isinstance(value, list) and key != "class_names"]
        # checked first, because a long list would build as many layers
        if any(len(value) > count for value in lists):
            raise ValueError(f"it has more layers than the {count} tensors of the checkpoint")
        options = {} if backend is None else {"backend": backend}
        return kind(**config, **options, device=device, dtype=dtype)
    except KeyError:
        raise TrainingError(
            f"{path}: expected a network of {some(list(registry.classes()))}, got "
            f"{some([origin['network']])}; import the module that registers it (coda-fast --import MODULE)"
        ) from None
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise TrainingError(f"{path}: the network of the run cannot be made: {one_line(error)}") from None


def is_same(name: str, origin: dict) -> bool:
    """Whether ``model.weights`` names the file from which a run began, by its checksum."""
    return checksum(name) == origin["sha256"]


def frozen_layers(model: Network, patterns: list[str]) -> list[str]:
    """The layers that ``model.freeze`` names: the modules of the network that have parameters of their own,
    and whose name, or that of a module around them, one of the ``patterns`` matches.

    Raises:
        TrainingError: a pattern matches no layer, or no layer would be trained.
    """
    layers = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))
    ]
    frozen = {name: [p for p in patterns if _matches(name, p)] for name in layers}
    used = {pattern for found in frozen.values() for pattern in found}
    if unknown := [pattern for pattern in patterns if pattern not in used]:
        raise TrainingError(
            f"model.freeze: expected names or patterns of layers ({', '.join(layers)}), got {some(unknown)}"
        )
    found = [name for name in layers if frozen[name]]
    trained = [
        name
        for name in layers
        if name not in found and any(p.requires_grad for p in model.get_submodule(name).parameters(False))
    ]
    if found and not trained:
        raise TrainingError(
            f"model.freeze: expected a layer that is trained, got {some(patterns)}, which is all layers "
            f"({', '.join(layers)})"
        )
    return found


def freeze(model: Network, layers: list[str]) -> None:
    """Exclude the parameters of these layers from training."""
    for name in layers:
        model.get_submodule(name).requires_grad_(False)


def trained_in_words(model: Network, layers: list[str]) -> str:
    """A line for the log: how many parameters are trained, and which layers are frozen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"parameters: {trained:,} of {total:,} are trained; frozen: {', '.join(layers) or 'none'}"


def _matches(name, pattern):
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _check_layers(spec, stored):
    """Raise a TrainingError unless the layers that the recipe asks for are those of the network ``stored``;
    the number of classes may differ.
    """
    config, kind = stored.config(), registry.class_of(stored).__name__
    for key in _LAYERS:
        wanted, found = getattr(spec, key), config.get(key)
        if wanted is None:
            continue
        if key == "at" and key in config:
            wanted = _stage(wanted, stored.stem.stages)
        if key not in config:
            raise TrainingError(
                f"model.{key}: expected none, because {spec.weights} holds a {kind}, got {wanted}"
            )
        classes = key == "out_channels"  # the last entry is checked against the data
        if (wanted[:-1], len(wanted)) != (found[:-1], len(found)) if classes else wanted != found:
            raise TrainingError(f"model.{key}: expected {found} as in {spec.weights}, got {wanted}")
    if spec.rank is not None:
        try:
            adapted = type(stored).adapted(config, rank=spec.rank)
        except (ValueError, TypeError) as error:
            raise TrainingError(f"model.{error}") from None
        for key in adapted:
            if adapted[key] != config.get(key):
                raise TrainingError(
                    f"model.rank: expected {key} {config.get(key)} as in {spec.weights}, got {spec.rank}, "
                    f"which is {key} {adapted[key]}"
                )


def _stage(at, stages):
    """The index of a stage that a recipe gives by name or by its number from the end, as files have it."""
    if isinstance(at, str) and at in stages:
        return stages.index(at)
    return at % len(stages) if isinstance(at, int) and -len(stages) <= at < 0 else at


def _names(names):
    return "not named" if names is None else some(names)


@contextlib.contextmanager
def _in_words(name):
    """A context in which errors of the file become TrainingErrors that name the key."""
    try:
        yield
    except FileNotFoundError:
        raise TrainingError(
            f"model.weights: no such file: {name}, and no network of the package "
            f"({', '.join(pretrained.names())})"
        ) from None
    except OSError as error:
        raise TrainingError(f"model.weights: cannot read {name}: {error.strerror or error}") from None
    except TrainingError:
        raise
    except (CheckpointError, ValueError, TypeError) as error:
        raise TrainingError(f"model.weights: {error}") from None
