"""Networks as files: safetensors with the configuration inside."""

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
_PREFIX = "coda_fast."  # of formats, before the name of a network's class


def save(model: Network, path: str | os.PathLike, metadata: Mapping[str, object] | None = None) -> None:
    """Write weights and configuration to one safetensors file, all or nothing.

    What ``load`` makes of the file gives the same outputs, bit for bit: every layer's own options are stored,
    and a network that the file cannot describe is refused before anything is written.

    Args:
        model: a CoDANet or another registered network, or a wrapper of one (``coda_fast.unwrap``). One that
            is sharded by FSDP2 is gathered: every process must call this, the first one writes.
        metadata: anything JSON can hold, returned by ``read_metadata`` (accuracy, recipe ...).

    Raises:
        ImportError: safetensors is not installed. OSError: the file cannot be written; an older one stays as
            it was.
        TypeError: not such a network, or metadata that JSON cannot hold.
        ValueError: a class that is not registered, or a network with what no configuration describes: layers
            of another class, of another dtype, pruned or parametrised (``torch.nn.utils.prune.remove``,
            ``torch.nn.utils.parametrize.remove_parametrizations``), further parameters or buffers, a forward
            pass of its own, class names that do not fit. Hooks and functions put on an instance are not
            looked for.
    """
    safetensors = require_safetensors()
    model = need_network(model)
    config, state = describe(model)
    sharded, tensors = any(hasattr(tensor, "full_tensor") for tensor in state.values()), tensors_of(state)
    try:
        stored = json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"metadata: expected a dict that JSON can hold, got another ({type(error).__name__}: {error})"
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
    """Read what ``save`` wrote. Configuration and tensors are compared before any tensor is read.

    ``model.transform`` is what the file says of pictures; of files from before that was stored, what the
    recipe of their training says, or resized and cropped to ``image_size``.

    Args:
        overrides: arguments of ``CoDANet`` (or of the class that the file names) that replace the stored
            ones (``backend="reference"``, ``temperature=...``).

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint of coda_fast, of a network that is
            not registered, no file at all (a folder, a pipe, a device), damaged, or weights that do not fit.
            OSError: it may not be read.
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
        # or a long list would make as many layers first
        if isinstance(layers, list) and 2 * len(layers) > len(found):
            raise CheckpointError(
                f"{path}: expected at least 2 tensors for each of {len(layers)} layers, got {len(found)}"
            )
        try:  # on no device first: nothing is allocated for a configuration that does not fit the tensors
            model = network(**(config | overrides), device="meta", dtype=dtype)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the configuration does not give a network: {one_line(error)}"
            ) from None
        _check_keys(str(path), shapes, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        need_memory(f"{path}: weights", sum(p.nbytes for p in model.parameters()), device)
        try:
            # Copies: libraries round differently where numbers lie otherwise in memory than torch puts them,
            # and the file may change.
            tensors = {name: file.get_tensor(name).clone() for name in found}
        except Exception as error:  # safetensors raises bare exceptions of its own
            raise CheckpointError(f"{path}: cannot read the tensors: {one_line(error)}") from None
    model.load_state_dict(tensors, assign=True)
    return model


def _config(path, header, network, overrides):
    """The stored configuration, of entries that ``save`` writes alone."""
    config = _json(header, "config", path)
    # what the file says of pictures is for another size, as in create_model
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
    """The preprocessing of a file from before it was written down, by the recipe in its metadata; None:
    that says nothing of it.
    """
    try:
        data = json.loads(header["metadata"])["recipe"]["data"]
        return (
            None if data["size"] is None else {"resize": data["resize"] or data["size"], "crop": data["size"]}
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def read_metadata(path: str | os.PathLike) -> dict:
    """The ``metadata`` that was given to ``save``. Raises as ``load``."""
    with opened(path) as file:
        return _json(_header(path, file), "metadata", path)


def _check_keys(source, found, expected):
    """Shapes by name."""
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
