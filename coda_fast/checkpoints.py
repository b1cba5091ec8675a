"""Saving and loading networks: safetensors files that contain the configuration."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from coda_fast import _arguments, registry
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
from coda_fast.stems import PREFIX, PRETRAINED, checksum

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


def save(
    model: Network,
    path: str | os.PathLike,
    metadata: Mapping[str, object] | None = None,
    *,
    stem: str = "weights",
) -> None:
    """Write weights and configuration to one safetensors file, all or nothing.

    The network that ``load`` reads from the file gives the same outputs, bit for bit: the options of every
    layer are stored, and a network that the file cannot describe is refused before anything is written.

    Args:
        model: a CoDANet or another registered network, or a wrapper of one (``coda_fast.unwrap``). If FSDP2
            shards it, it is gathered: every process must call this, and rank zero writes.
        metadata: anything JSON can hold (accuracy, recipe ...); ``read_metadata`` returns it.
        stem: what the file holds of the conventional stem of a hybrid network: its "weights", or only their
            "checksum" and its name. ``load`` then needs the weights from elsewhere, and compares them.

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
    if stem not in ("weights", "checksum"):
        raise ValueError(f"stem: expected 'weights' or 'checksum', got {stem!r}")
    safetensors = require_safetensors()
    model = need_network(model)
    if stem == "checksum" and getattr(model, "stem", None) is None:
        raise ValueError(f"stem: expected 'weights' for a network without a stem, got {stem!r}")
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
    if stem == "checksum":
        whole = {
            name.removeprefix(PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)
        }
        header["stem_sha256"] = checksum(whole)
    if sharded and torch.distributed.get_rank():
        return
    data = safetensors.torch.save(tensors, header)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(
    path: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> Network:
    """Read what ``save`` wrote. The shapes of the tensors are checked against the configuration before any
    tensor is read.

    ``model.transform`` follows the preprocessing stored in the file. A file from before that was stored uses
    the preprocessing of its training recipe, or else resizes and crops to ``image_size``.

    Args:
        device: of the network. On "meta" no tensor is read: the network has shapes and no weights.
        dtype: of the weights, float32, float16, bfloat16 or float64; None: as stored.
        num_classes: the number of classes; None: as stored. If it is another number, the layer that the
            network names as its ``classifier`` is new, with weights drawn as by the constructor, and the
            stored class names are dropped. All other weights are the stored ones.
        overrides: arguments of ``CoDANet`` (or of the class that the file names) that replace the stored
            ones (``backend="reference"``, ``temperature=...``). ``class_names`` are those of ``num_classes``
            classes. ``stem_weights``: where the weights of a stem come from of which the file holds the
            checksum alone (None: timm's pretrained ones).

    Raises:
        FileNotFoundError: there is no such file. CheckpointError: the file is not a checkpoint of coda_fast,
            holds a network that is not registered, is not a regular file (a folder, a pipe, a device), is
            damaged, or its weights do not fit. OSError: reading it is not permitted.
        TypeError: the network takes no argument of the name of an override.
        ValueError: ``dtype`` or ``num_classes`` is not such a value, or the number of classes is another one
            and the network names no ``classifier``, or has other weights that depend on this number.
    """
    if num_classes is not None:
        num_classes = _arguments.positive_integer(num_classes, "num_classes")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype: expected {' or '.join(map(str, DTYPES.values()))}, got {dtype}")
    is_meta = str(device) == "meta"
    with opened(path, "cpu" if is_meta else device) as file:
        header = _header(path, file)
        network = registry.classes()[header["format"].removeprefix(_PREFIX)]
        config = _config(path, header, network, overrides)
        found = {name: file.get_slice(name) for name in list(file.keys())}
        shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
        counters = {name for name, part in found.items() if part.get_dtype() == "I64"}
        dtypes = {part.get_dtype() for name, part in found.items() if name not in counters}
        elsewhere, stem_weights = header.get("stem_sha256"), overrides.pop("stem_weights", None)
        if stem_weights is not None and elsewhere is None:
            raise ValueError(
                f"stem_weights: expected none, because {path} holds all weights, got {stem_weights!r}"
            )
        if len(dtypes) != 1 or (stored_dtype := DTYPES.get(next(iter(dtypes)))) is None:
            raise CheckpointError(
                f"{path}: expected tensors of one dtype, {' or '.join(DTYPES)}, got {some(sorted(dtypes))}"
            )
        layers = config.get("out_channels") if network is CoDANet else None
        # checked first, because a long list would build as many layers
        if isinstance(layers, list) and 2 * len(layers) > len(found):
            raise CheckpointError(
                f"{path}: expected at least 2 tensors for each of {len(layers)} layers, got {len(found)}"
            )
        dtype = dtype or stored_dtype
        # on the meta device: nothing is allocated for a configuration that does not fit the tensors
        stored = config | overrides
        if num_classes is not None and "class_names" in overrides:  # these are not for the stored classes
            stored["class_names"] = config.get("class_names")
        model = _made(path, network, stored, device="meta", dtype=dtype)
        _check_keys(str(path), shapes, _shapes(model, elsewhere is not None))
        # batch normalisation counts its batches; all other tensors are floating point
        wrong = counters ^ {n for n, t in model.state_dict().items() if n in found and t.dtype == torch.int64}
        if wrong:
            raise CheckpointError(
                f"{path}: {some(sorted(wrong))}: expected floating point for weights and integers for "
                "counters, got the other"
            )
        new: set[str] = set()  # the tensors that are not read
        if num_classes is not None:
            if num_classes != model.num_classes:
                config = network.adapted(config, num_classes) | {"class_names": None}
            wanted = _made(path, network, config | overrides, device="meta", dtype=dtype)
            new = _new_tensors(path, model, wanted, num_classes)
            model = wanted
        size = sum(p.nbytes for p in model.parameters())
        need_memory(f"{path}: weights", size * (2 if new else 1), device)
        if is_meta:
            return model
        try:
            # Copies, because the file may change, and because libraries round differently if a tensor is not
            # aligned in memory as torch aligns it.
            tensors = {name: _copied(file.get_tensor(name), dtype) for name in found if name not in new}
        except Exception as error:  # safetensors raises bare exceptions of its own
            raise CheckpointError(f"{path}: cannot read the tensors: {one_line(error)}") from None
    if new:  # a whole network is made, because only its constructor knows how weights are drawn
        drawn = _made(path, network, config | overrides, device=device, dtype=dtype).state_dict()
        tensors |= {name: drawn[name] for name in new}
    if elsewhere is not None:
        options = config | overrides | {"stem_weights": stem_weights or PRETRAINED}
        tensors |= _stem_tensors(path, network, options, elsewhere, stored_dtype, dtype, device)
    model.load_state_dict(tensors, assign=True)
    return model


def _copied(tensor, dtype):
    """A copy of a tensor from a file, in ``dtype`` if it is floating point."""
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _stem_tensors(path, network, options, sha256, stored_dtype, dtype, device):
    """The tensors of a stem of which the file holds only the checksum."""
    try:
        stem = _made(path, network, options, device="cpu", dtype=stored_dtype).stem
    except OSError as error:  # of the network connection, or of the file of weights
        raise CheckpointError(f"{path}: stem_weights: {one_line(error)}") from None
    if (found := checksum(stem.network.state_dict())) != sha256:
        raise CheckpointError(
            f"{path}: stem_weights: expected weights of {stem.name} with SHA-256 {str(sha256)[:12]}, got "
            f"{found[:12]} from {options['stem_weights']}"
        )
    return {
        PREFIX + name: _copied(tensor, dtype).to(device) for name, tensor in stem.network.state_dict().items()
    }


def _made(path, network, config, **where):
    try:
        return network(**config, **where)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the configuration does not give a network: {one_line(error)}"
        ) from None


def _shapes(model, without_stem=False):
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (without_stem and name.startswith(PREFIX))
    }


def _new_tensors(path, stored, wanted, num_classes):
    """The tensors of ``wanted`` that the network ``stored`` in the file does not have: none, or those of the
    classifier.
    """
    before, after = _shapes(stored), _shapes(wanted)
    if num_classes == stored.num_classes == wanted.num_classes and before == after:
        return set()
    why, kind = "", registry.class_of(stored).__name__
    if stored.classifier is None:
        why = f"a {kind} names no classifier that could be replaced"
    elif wanted.num_classes != num_classes:
        why = f"the other arguments give {wanted.num_classes}"
    else:
        own = f"{stored.classifier}."
        new = {name for name in after if name.startswith(own)}
        kept = [
            {name: shape for name, shape in shapes.items() if not name.startswith(own)}
            for shapes in (before, after)
        ]
        if kept[0] == kept[1]:
            return new
        why = f"in a {kind} other weights than those of {stored.classifier} depend on it"
    raise ValueError(
        f"num_classes: expected {stored.num_classes}, as in {path}, because {why}, got {num_classes}"
    )


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
    # a file must not name other files, or weights to be fetched
    if config.get("stem_weights") is None:
        config.pop("stem_weights", None)
    known_in_files = known - {"device", "dtype", "backend", "save_contraction", "encoder", "stem_weights"}
    if unknown := set(config) - known_in_files:
        raise CheckpointError(f"{path}: unknown entries {some(sorted(unknown))} in the stored configuration")
    if "stem" in config:
        config["stem_weights"] = None
    if wrong := set(overrides) - known:
        raise TypeError(f"{network.__name__}: expected arguments that it takes, got {some(sorted(wrong))}")
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
