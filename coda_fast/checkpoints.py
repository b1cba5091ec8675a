"""Saving and loading networks: safetensors files that contain the configuration."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from coda_fast import registry
from coda_fast._description import DTYPES, describe, tensors_of
from coda_fast._files import (
    CheckpointError,
    atomic_path,
    one_line,
    opened,
    require_safetensors,
    several,
    some,
)
from coda_fast._version import __version__
from coda_fast.dynamic_linear import need_network
from coda_fast.models import CoDANet
from coda_fast.network import Network
from coda_fast.published import from_published, read_state_dict, to_published
from coda_fast.safety import need_memory

__all__ = [
    "CheckpointError",
    "atomic_path",
    "describe",
    "from_published",
    "load",
    "opened",
    "read_metadata",
    "read_state_dict",
    "require_safetensors",
    "save",
    "to_published",
]
_PREFIX = "coda_fast."  # a file's format is this and the name of the network's class


def save(model: Network, path: str | os.PathLike, metadata: Mapping[str, object] | None = None) -> None:
    """Write weights and configuration to one safetensors file, all or nothing.

    The network that ``load`` reads from the file gives the same outputs, bit for bit: the options of every
    layer are stored, and a network that the file cannot describe is refused before anything is written.

    Args:
        model: a CoDANet or another registered network, or a wrapper of one (``coda_fast.unwrap``). If FSDP2
            shards it, it is gathered: every process must call this, and rank zero writes.
        metadata: anything JSON can hold (accuracy, recipe ...); ``read_metadata`` returns it.

    Raises:
        ImportError: safetensors is not installed. OSError: the file cannot be written; an older one stays as
            it was.
        TypeError: the model is not such a network, or JSON cannot hold the metadata.
        ValueError: the network's class is not registered, or the network has something that no configuration
            describes: layers of another class or dtype, pruned or parametrised layers
            (``torch.nn.utils.prune.remove``, ``torch.nn.utils.parametrize.remove_parametrizations`` mend
            them), further parameters or buffers, a forward pass of its own, class names that do not fit.
            Hooks and functions put on an instance go unnoticed.
    """
    safetensors = require_safetensors()
    model = need_network(model)
    config, state = describe(model)
    sharded, tensors = any(hasattr(tensor, "full_tensor") for tensor in state.values()), tensors_of(state)
    try:
        stored = json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"metadata: expected a dict that JSON can hold, got one that it cannot "
            f"({type(error).__name__}: {error})"
        ) from None
    header = {
        "format": _PREFIX + registry.class_of(model).__name__,
        "coda_fast_version": __version__,
        "config": json.dumps(config),
        "metadata": stored,
    }
    if sharded and torch.distributed.get_rank():
        return
    data = safetensors.torch.save(tensors, header)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | os.PathLike, *, device: torch.device | str = "cpu", **overrides: Any) -> Network:
    """Read what ``save`` wrote. The shapes of the tensors are checked against the configuration before any
    tensor is read.

    ``model.transform`` follows the preprocessing stored in the file. A file from before that was stored uses
    the preprocessing of its training recipe, or else resizes and crops to ``image_size``.

    Args:
        overrides: arguments of ``CoDANet`` (or of the class that the file names) that replace the stored
            ones (``backend="reference"``, ``temperature=...``).

    Raises:
        FileNotFoundError: there is no such file. CheckpointError: the file is not a checkpoint of coda_fast,
            holds a network that is not registered, is not a regular file (a folder, a pipe, a device), is
            damaged, or its weights do not fit. OSError: reading it is not permitted.
    """
    with opened(path, device) as file:
        header = _header(path, file)
        network = registry.classes()[header["format"].removeprefix(_PREFIX)]
        config = _config(path, header, network, overrides)
        found = {name: file.get_slice(name) for name in list(file.keys())}
        shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
        dtypes = {part.get_dtype() for part in found.values()}
        if len(dtypes) != 1 or (dtype := DTYPES.get(next(iter(dtypes)))) is None:
            raise CheckpointError(
                f"{path}: expected tensors of one dtype, {' or '.join(DTYPES)}, got {some(sorted(dtypes))}"
            )
        layers = config.get("out_channels") if network is CoDANet else None
        # checked first, because a long list would build as many layers
        if isinstance(layers, list) and 2 * len(layers) > len(found):
            raise CheckpointError(
                f"{path}: expected at least 2 tensors for each of {len(layers)} layers, got {len(found)}"
            )
        try:  # on the meta device: nothing is allocated for a configuration that does not fit the tensors
            model = network(**(config | overrides), device="meta", dtype=dtype)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the configuration does not give a network: {one_line(error)}"
            ) from None
        _check_keys(str(path), shapes, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        need_memory(f"{path}: weights", sum(p.nbytes for p in model.parameters()), device)
        try:
            # Copies, because the file may change, and because libraries round differently if a tensor is not
            # aligned in memory as torch aligns it.
            tensors = {name: file.get_tensor(name).clone() for name in found}
        except Exception as error:  # safetensors raises bare exceptions of its own
            raise CheckpointError(f"{path}: cannot read the tensors: {one_line(error)}") from None
    model.load_state_dict(tensors, assign=True)
    return model


def _config(path, header, network, overrides):
    """The stored configuration, which may have no entries but those that ``save`` writes."""
    config = _json(header, "config", path)
    # the stored preprocessing is for the stored image size, as in create_model
    if "image_size" in overrides:
        config.pop("preprocessing", None)
    elif "preprocessing" not in config and (implied := _implied(header)) is not None:
        config["preprocessing"] = implied
    parameters = [p for c in network.__mro__ for p in inspect.signature(c).parameters.values()]
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if unknown := set(config) - (known - {"device", "dtype", "backend", "save_contraction"}):
        raise CheckpointError(f"{path}: unknown entries {some(sorted(unknown))} in the stored configuration")
    return config


def _implied(header):
    """The preprocessing of a file from before it was stored, taken from the recipe in its metadata; None if
    the recipe does not give it.
    """
    try:
        data = json.loads(header["metadata"])["recipe"]["data"]
        return (
            None if data["size"] is None else {"resize": data["resize"] or data["size"], "crop": data["size"]}
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def read_metadata(path: str | os.PathLike) -> dict:
    """The ``metadata`` that was given to ``save``. Raises what ``load`` raises."""
    with opened(path) as file:
        return _json(_header(path, file), "metadata", path)


def _check_keys(source, found, expected):
    """Raise a CheckpointError unless ``found`` and ``expected``, shapes by name, agree."""
    problems = [f"unknown key {name!r}"[:200] for name in found if name not in expected]
    problems += [f"missing key {name!r}" for name in expected if name not in found]
    problems += [
        f"{name!r}: expected {list(shape)}, got {list(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        raise CheckpointError(f"{source}: " + several(problems))


def _json(header, key, path):
    try:
        value = json.loads(header[key], object_pairs_hook=_unique)
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {key} is missing or not JSON ({type(error).__name__}: {one_line(error)})"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key}: expected a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _header(path, file):
    header = file.metadata() or {}
    kind, known = header.get("format") or "", registry.classes()
    if not kind.startswith(_PREFIX) or kind.removeprefix(_PREFIX) not in known:
        found = some([header.get("format")]).strip("[]")
        formats = " or ".join(repr(_PREFIX + name) for name in known)
        raise CheckpointError(
            f"{path}: expected a checkpoint of coda_fast (format {formats}), found {found}; of another "
            "network, import the module that registers it (coda-fast --import MODULE)"
        )
    return header
