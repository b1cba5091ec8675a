"""Files and formats: safetensors with the configuration inside, and the published implementation's state dicts."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from coda_fast._version import __version__
from coda_fast.models import CoDANet

_FORMAT = "coda_fast.CoDANet"
# What the published implementation calls B, A and b; design: rows of A and b are d * n, entry-major.
_PUBLISHED = {
    "reduction_weight": "weight_mod.weighting_f.0.weight",
    "weight": "weight_mod.weighting_f.1.weight",
    "bias": "weight_mod.weighting_f.1.bias",
}


class CheckpointError(ValueError):
    """A file or state dict that is not a usable checkpoint; the message names what was expected and what was found."""


def save(model: CoDANet, path: str | os.PathLike, metadata: Mapping[str, object] | None = None) -> None:
    """Write weights and configuration to one safetensors file, all or nothing.

    Args:
        metadata: anything JSON can hold, returned by ``read_metadata`` (accuracy, recipe ...).

    Raises:
        ImportError: safetensors is not installed. OSError: the file cannot be written; an older one stays as it was.
    """
    safetensors = require_safetensors()
    header = {
        "format": _FORMAT,
        "coda_fast_version": __version__,
        "config": json.dumps(model.config()),
        "metadata": json.dumps(dict(metadata or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    data = safetensors.torch.save(tensors, header)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(path: str | os.PathLike, *, device: torch.device | str = "cpu", **overrides) -> CoDANet:
    """Read what ``save`` wrote.

    Args:
        overrides: arguments of ``CoDANet`` that replace the stored ones (``backend="reference"``, ``temperature=...``).

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint of coda_fast, damaged, or weights that do not fit.
    """
    header = _read_header(path)
    safetensors = require_safetensors()
    try:
        tensors = safetensors.torch.load_file(path, device=str(device))
    except Exception as error:  # safetensors raises bare exceptions of its own
        raise CheckpointError(f"{path}: cannot read the tensors: {error}") from None
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point or dtype.itemsize < 2:
        raise CheckpointError(
            f"{path}: expected tensors of one dtype, float16 to float64, got {sorted(str(t.dtype) for t in tensors.values())[:4]}"
        )
    config = _json(header, "config", path)
    unknown = set(config) - set(inspect.signature(CoDANet).parameters) | set(config) & {"device", "dtype", "backend"}
    if unknown:
        raise CheckpointError(f"{path}: unknown entries {sorted(unknown)} in the stored configuration")
    try:  # on no device first: nothing is allocated for a configuration that does not fit the tensors
        model = CoDANet(**(config | overrides), device="meta", dtype=dtype)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the configuration does not give a network: {error}") from None
    _check_keys(str(path), tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict(tensors, assign=True)
    return model


def read_metadata(path: str | os.PathLike) -> dict:
    """The ``metadata`` that was given to ``save``."""
    return _json(_read_header(path), "metadata", path)


def from_published(
    state_dict: Mapping[str, torch.Tensor],
    *,
    strides: Sequence[int],
    paddings: Sequence[int],
    temperature: float,
    logit_bias: float,
    norm: str = "squash",
) -> CoDANet:
    """A CoDANet from a state dict of the published implementation; widths, ranks and kernel sizes follow from the tensors.

    Keys are ``<layer>.weight_mod.weighting_f.{0.weight, 1.weight, 1.bias}`` with the layers numbered from 0, behind
    any common prefix such as ``module.``.

    Raises:
        CheckpointError: unknown, missing or misshapen keys, all named in one message; a number of strides or paddings that is
            not that of the layers.
    """
    layers = _published_layers(state_dict)
    for name, values in (("strides", strides), ("paddings", paddings)):
        if len(values) != len(layers):
            raise CheckpointError(f"{name}: expected {len(layers)} entries, one for each layer of the state dict, got {len(values)}")
    first = layers[0]["reduction_weight"]
    if first.shape[1] % 2:
        raise CheckpointError(f"state dict: expected an even number of encoded channels in the first layer, got {first.shape[1]}")
    model = CoDANet(
        [layer["weight"].shape[0] for layer in layers],
        [layer["weight"].shape[1] for layer in layers],
        [tuple(layer["weight"].shape[3:]) for layer in layers],
        list(strides),
        list(paddings),
        temperature=temperature,
        logit_bias=logit_bias,
        norm=norm,
        bias=layers[0]["bias"] is not None,
        image_channels=first.shape[1] // 2,
        device=first.device,
        dtype=first.dtype,
    )
    with torch.no_grad():
        for module, layer in zip(model.layers, layers, strict=True):
            for name, tensor in layer.items():
                if tensor is not None:
                    getattr(module, name).copy_(tensor)
    return model


def to_published(model: CoDANet) -> dict[str, torch.Tensor]:
    """The state dict that the published implementation would hold; the exact inverse of ``from_published``."""
    state = {}
    for index, layer in enumerate(model.layers):
        units, rank = layer.weight.shape[:2]
        state[f"{index}.{_PUBLISHED['reduction_weight']}"] = layer.reduction_weight.detach().clone()
        weight = layer.weight.detach().reshape(units, rank, -1).permute(2, 0, 1)  # [d, n, r]
        state[f"{index}.{_PUBLISHED['weight']}"] = weight.reshape(-1, rank, 1, 1).clone()
        if layer.bias is not None:
            state[f"{index}.{_PUBLISHED['bias']}"] = layer.bias.detach().reshape(units, -1).t().reshape(-1).clone()
    return state


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """A state dict from a ``torch.save`` file, on the CPU, with ``weights_only=True``: nothing is ever unpickled freely.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not such a file, or it holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files end in whatever exception their bytes lead to
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: expected a file of torch.save with tensors only: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a state dict, names to tensors, got {type(state).__name__}")
    return dict(state)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends well and vanishes if it does not."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is not what a user expects of a result
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _published_layers(state_dict):
    """One dict of tensors in our shapes for each layer, in order."""
    pattern = re.compile(r"(?P<prefix>.*?)(?P<layer>\d+)\.(?P<key>" + "|".join(map(re.escape, _PUBLISHED.values())) + ")")
    names = {key: name for name, key in _PUBLISHED.items()}
    found, problems, prefixes = {}, [], set()
    for key, tensor in state_dict.items():
        match = pattern.fullmatch(str(key))
        if match is None:
            problems.append(f"unknown key {key!r}")
            continue
        prefixes.add(match["prefix"])
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            what = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            problems.append(f"{key!r}: expected a floating-point tensor with something in it, got {what}")
            continue
        if names[match["key"]] in found.get(int(match["layer"]), {}):
            problems.append(f"{key!r}: a second tensor for layer {int(match['layer'])}")
            continue
        found.setdefault(int(match["layer"]), {})[names[match["key"]]] = tensor
    if len(prefixes) > 1:
        problems.append(f"keys with different prefixes {sorted(prefixes)}")
    if not found:
        problems.append("no layers")
    biased = any("bias" in tensors for tensors in found.values())
    if len({tensor.dtype for tensors in found.values() for tensor in tensors.values()}) > 1:
        problems.append("tensors of different dtypes")
    gaps = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    problems += [f"no keys for layer {index}" for index in gaps]
    layers, channels = [], None
    for index in sorted(found):
        tensors = found[index]
        wanted = ("reduction_weight", "weight", "bias") if biased else ("reduction_weight", "weight")
        problems += [f"missing key '{index}.{_PUBLISHED[k]}'" for k in wanted if k not in tensors]
        if "reduction_weight" not in tensors or "weight" not in tensors:
            channels = None
            continue
        reduction, weight, bias = tensors["reduction_weight"], tensors["weight"], tensors.get("bias")
        d = reduction.shape[1:].numel()
        if reduction.dim() != 4 or (channels is not None and reduction.shape[1] != channels):
            problems.append(
                f"'{index}.{_PUBLISHED['reduction_weight']}': expected [rank, {channels or 'C'}, kh, kw], got {list(reduction.shape)}"
            )
            channels = None
            continue
        rank, units = len(reduction), (len(weight) if weight.dim() else 0) // d
        if weight.shape != (units * d, rank, 1, 1) or units == 0:
            problems.append(f"'{index}.{_PUBLISHED['weight']}': expected [{d} * units, {rank}, 1, 1], got {list(weight.shape)}")
            channels = None
            continue
        if bias is not None and bias.shape != (units * d,):
            problems.append(f"'{index}.{_PUBLISHED['bias']}': expected [{units * d}], got {list(bias.shape)}")
            bias = None
        channels = units
        window = reduction.shape[1:]
        layers.append(
            {
                "reduction_weight": reduction,
                "weight": weight.reshape(d, units, rank).permute(1, 2, 0).reshape(units, rank, *window),
                "bias": None if bias is None else bias.reshape(d, units).t().reshape(units, *window),
            }
        )
    if problems:
        raise CheckpointError("state dict of the published implementation: " + "; ".join(problems))
    return layers


def _check_keys(source, tensors, expected):
    problems = [f"unknown key {name!r}" for name in tensors if name not in expected]
    problems += [f"missing key {name!r}" for name in expected if name not in tensors]
    problems += [
        f"{name!r}: expected {list(shape)}, got {list(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise CheckpointError(f"{source}: " + "; ".join(problems))


def _json(header, key, path):
    try:
        value = json.loads(header[key])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {key} is missing or not JSON ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_header(path):
    safetensors = require_safetensors()
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: expected a file, got a folder")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except Exception as error:  # safetensors raises bare exceptions of its own
        hint = "; of a checkpoint of coda-fast train, take the model.safetensors of its run" if _starts_as_zip(path) else ""
        raise CheckpointError(f"{path}: not a safetensors file: {error}{hint}") from None
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of coda_fast (format {_FORMAT!r}), found {header.get('format')!r}")
    return header


def _starts_as_zip(path):
    """As files of torch.save do."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def require_safetensors():
    """The safetensors module; ImportError with what to install."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need safetensors: pip install 'coda-fast[cli]' or pip install safetensors") from None
    return safetensors
