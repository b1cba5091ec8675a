"""Files and formats: safetensors with the configuration inside, and the published implementation's state
dicts.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import pickle
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from coda_fast._version import __version__
from coda_fast._wrappers import need_network, plain_name, unwrap, whole
from coda_fast.functional import EPS
from coda_fast.models import CoDANet
from coda_fast.nn import AddInverse, DAUConv2d, SumPool2d
from coda_fast.safety import NotAFile, kind_of, need_memory, open_file, printable

_FORMAT = "coda_fast.CoDANet"
# What the published implementation calls B, A and b; design: rows of A and b are d * n, entry-major.
_PUBLISHED = {
    "reduction_weight": "weight_mod.weighting_f.0.weight",
    "weight": "weight_mod.weighting_f.1.weight",
    "bias": "weight_mod.weighting_f.1.bias",
}


# as safetensors names them
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class CheckpointError(ValueError):
    """A file or state dict that is not a usable checkpoint; the message names what was expected and what
    was found.
    """


def save(model: CoDANet, path: str | os.PathLike, metadata: Mapping[str, object] | None = None) -> None:
    """Write weights and configuration to one safetensors file, all or nothing.

    What ``load`` makes of the file gives the same outputs, bit for bit: every layer's own options are stored,
    and a network that the file cannot describe is refused before anything is written.

    Args:
        model: a CoDANet, or a wrapper of one (``coda_fast.unwrap``). One that is sharded by FSDP2 is
            gathered: every process must call this, the first one writes.
        metadata: anything JSON can hold, returned by ``read_metadata`` (accuracy, recipe ...).

    Raises:
        ImportError: safetensors is not installed. OSError: the file cannot be written; an older one stays as
            it was.
        TypeError: not a CoDANet, or metadata that JSON cannot hold.
        ValueError: a network with what no configuration describes: layers of another class, of another dtype,
            pruned or parametrised (``torch.nn.utils.prune.remove``,
            ``torch.nn.utils.parametrize.remove_parametrizations``), further parameters or buffers, a forward
            pass of its own, class names that do not fit. Hooks and functions put on an instance are not
            looked for.
    """
    safetensors = require_safetensors()
    model = need_network(model)
    config, state = describe(model)
    sharded, tensors = any(hasattr(tensor, "full_tensor") for tensor in state.values()), _gathered(state)
    try:
        stored = json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"metadata: expected a dict that JSON can hold, got another ({type(error).__name__}: {error})"
        ) from None
    header = {
        "format": _FORMAT,
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


def load(path: str | os.PathLike, *, device: torch.device | str = "cpu", **overrides) -> CoDANet:
    """Read what ``save`` wrote. Configuration and tensors are compared before any tensor is read.

    ``model.transform`` is what the file says of pictures; of files from before that was stored, what the
    recipe of their training says, or resized and cropped to ``image_size``.

    Args:
        overrides: arguments of ``CoDANet`` that replace the stored ones (``backend="reference"``,
            ``temperature=...``).

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint of coda_fast, no file at all (a
            folder, a pipe, a device), damaged, or weights that do not fit. OSError: it may not be read.
    """
    with opened(path, device) as file:
        header = _header(path, file)
        config = _json(header, "config", path)
        # what the file says of pictures is for another size, as in create_model
        if "image_size" in overrides:
            config.pop("preprocessing", None)
        elif "preprocessing" not in config and (implied := _implied(header)) is not None:
            config["preprocessing"] = implied
        unknown = set(config) - set(inspect.signature(CoDANet).parameters) | set(config) & {
            "device",
            "dtype",
            "backend",
            "save_contraction",
        }
        if unknown:
            raise CheckpointError(
                f"{path}: unknown entries {_some(sorted(unknown))} in the stored configuration"
            )
        found = {name: file.get_slice(name) for name in list(file.keys())}
        shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
        dtypes = {part.get_dtype() for part in found.values()}
        if len(dtypes) != 1 or (dtype := _DTYPES.get(next(iter(dtypes)))) is None:
            raise CheckpointError(
                f"{path}: expected tensors of one dtype, {' or '.join(_DTYPES)}, got {_some(sorted(dtypes))}"
            )
        layers = config.get("out_channels")
        # or a long list would make as many layers first
        if isinstance(layers, list) and 2 * len(layers) > len(found):
            raise CheckpointError(
                f"{path}: expected at least 2 tensors for each of {len(layers)} layers, got {len(found)}"
            )
        try:  # on no device first: nothing is allocated for a configuration that does not fit the tensors
            model = CoDANet(**(config | overrides), device="meta", dtype=dtype)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: the configuration does not give a network: {_line(error)}"
            ) from None
        _check_keys(str(path), shapes, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        need_memory(f"{path}: weights", sum(p.nbytes for p in model.parameters()), device)
        try:
            # Copies: libraries round differently where numbers lie otherwise in memory than torch puts them,
            # and the file may change.
            tensors = {name: file.get_tensor(name).clone() for name in found}
        except Exception as error:  # safetensors raises bare exceptions of its own
            raise CheckpointError(f"{path}: cannot read the tensors: {_line(error)}") from None
    model.load_state_dict(tensors, assign=True)
    return model


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


def from_published(
    state_dict: Mapping[str, torch.Tensor],
    *,
    strides: Sequence[int],
    paddings: Sequence[int],
    temperature: float,
    logit_bias: float,
    norm: str | Sequence[str] = "squash",
    eps: float | Sequence[float] = EPS,
) -> CoDANet:
    """A CoDANet from a state dict of the published implementation; widths, ranks and kernel sizes follow from
    the tensors.

    Keys are ``<layer>.weight_mod.weighting_f.{0.weight, 1.weight, 1.bias}`` with the layers numbered from 0,
    behind any common prefix such as ``module.``.

    Raises:
        CheckpointError: unknown, missing or misshapen keys, all named in one message; a number of strides or
            paddings that is not that of the layers, or any value that ``CoDANet`` refuses.
    """
    layers = _published_layers(state_dict)
    for name, values in (("strides", strides), ("paddings", paddings)):
        if not hasattr(values, "__len__") or len(values) != len(layers):
            got = len(values) if hasattr(values, "__len__") else repr(values)[:100]
            raise CheckpointError(
                f"{name}: expected {len(layers)} entries, one for each layer of the state dict, got {got}"
            )
    first = layers[0]["reduction_weight"]
    if first.shape[1] % 2:
        raise CheckpointError(
            "state dict: expected an even number of encoded channels in the first layer, got "
            f"{first.shape[1]}"
        )
    try:
        model = CoDANet(
            [layer["weight"].shape[0] for layer in layers],
            [layer["weight"].shape[1] for layer in layers],
            [tuple(layer["weight"].shape[3:]) for layer in layers],
            strides,
            paddings,
            temperature=temperature,
            logit_bias=logit_bias,
            norm=norm,
            eps=eps,
            bias=layers[0]["bias"] is not None,
            image_channels=first.shape[1] // 2,
            device=first.device,
            dtype=first.dtype,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"state dict: does not give a network: {_line(error)}") from None
    with torch.no_grad():
        for module, layer in zip(model.layers, layers, strict=True):
            for name, tensor in layer.items():
                if tensor is not None:
                    getattr(module, name).copy_(tensor)
    return model


def to_published(model: CoDANet) -> dict[str, torch.Tensor]:
    """The state dict that the published implementation would hold; the exact inverse of ``from_published``.

    Raises:
        TypeError, ValueError: as ``save``; and for layers with a dilation, or some with a bias and some
            without, for which the published form has no place.
    """
    config, tensors = describe(need_network(model))
    tensors = _gathered(tensors)
    for name in ("dilations", "bias"):
        if isinstance(config.get(name), list):
            raise ValueError(
                f"{name}: the published form has none of its own for each layer, got {config[name]}"
            )
    state = {}
    for index in range(len(config["out_channels"])):
        layer = {name: tensors.get(f"layers.{index}.{name}") for name in _PUBLISHED}
        units, rank = layer["weight"].shape[:2]
        state[f"{index}.{_PUBLISHED['reduction_weight']}"] = layer["reduction_weight"].clone()
        weight = layer["weight"].reshape(units, rank, -1).permute(2, 0, 1)  # [d, n, r]
        state[f"{index}.{_PUBLISHED['weight']}"] = weight.reshape(-1, rank, 1, 1).clone()
        if layer["bias"] is not None:
            state[f"{index}.{_PUBLISHED['bias']}"] = layer["bias"].reshape(units, -1).t().reshape(-1).clone()
    return state


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """A state dict from a ``torch.save`` file, on the CPU, with ``weights_only=True``: nothing is ever
    unpickled freely.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not such a file, no file at all (a folder, a pipe, a
            device), or it holds more than tensors, or more than this machine can. OSError: it may not be
            read.
    """
    with _regular(path) as file:
        try:
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                # packed, they may be a small file
                need_memory("tensors", sum(member.file_size for member in archive.infolist()))
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files end in whatever exception their bytes lead to
            reason = str(error).split("\n")[0] or type(error).__name__
            # torch's own message advises to read it without weights_only
            if isinstance(error, pickle.UnpicklingError):
                reason = "it is damaged, or holds other things"
            raise CheckpointError(
                f"{path}: expected a file of torch.save with tensors only: {_line(reason)}"
            ) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a state dict, names to tensors, got {type(state).__name__}")
    return dict(state)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends well and vanishes if it does
    not.

    Raises:
        OSError: the place is taken by what is no file (a folder, a pipe, a device), or the file cannot be
            written.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(mode := path.stat().st_mode):
            raise OSError(errno.EEXIST, f"expected a file or nothing, got {kind_of(mode)}", str(path))
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
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"state dict: expected names to tensors, got {type(state_dict).__name__}")
    pattern = re.compile(
        r"(?P<prefix>(?:.*[^0-9])?)(?P<layer>[0-9]{1,9})\.(?P<key>"
        + "|".join(map(re.escape, _PUBLISHED.values()))
        + ")"
    )
    names = {key: name for name, key in _PUBLISHED.items()}
    found, problems, prefixes = {}, [], set()
    for key, tensor in state_dict.items():
        match = pattern.fullmatch(str(key))
        if match is None:
            problems.append(f"unknown key {key!r}"[:200])
            continue
        prefixes.add(match["prefix"])
        if not _is_plain(tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            what = (
                f"{tensor.dtype} {list(tensor.shape)}"
                if isinstance(tensor, torch.Tensor)
                else type(tensor).__name__
            )
            problems.append(f"{key!r}: expected a floating-point tensor with something in it, got {what}")
            continue
        if names[match["key"]] in found.get(int(match["layer"]), {}):
            problems.append(f"{key!r}: a second tensor for layer {int(match['layer'])}")
            continue
        found.setdefault(int(match["layer"]), {})[names[match["key"]]] = tensor
    if len(prefixes) > 1:
        problems.append(f"keys with different prefixes {_some(sorted(prefixes))}")
    if not found:
        problems.append("no layers")
    biased = any("bias" in tensors for tensors in found.values())
    if len({tensor.dtype for tensors in found.values() for tensor in tensors.values()}) > 1:
        problems.append("tensors of different dtypes")
    # up to a layer whose number may be anything
    gaps = [index for index in range(len(found)) if index not in found]
    problems += [f"no keys for layer {index}" for index in gaps]
    if not problems:
        numbers = sum(
            tensor.numel() * tensor.element_size()
            for tensors in found.values()
            for tensor in tensors.values()
        )
        try:  # a tensor that is expanded takes nothing in a file
            need_memory("weights", numbers)
        except ValueError as error:
            raise CheckpointError(f"state dict of the published implementation: {error}") from None
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
                f"'{index}.{_PUBLISHED['reduction_weight']}': expected [rank, {channels or 'C'}, kh, kw], "
                f"got {list(reduction.shape)}"
            )
            channels = None
            continue
        rank, units = len(reduction), (len(weight) if weight.dim() else 0) // d
        if weight.shape != (units * d, rank, 1, 1) or units == 0:
            problems.append(
                f"'{index}.{_PUBLISHED['weight']}': expected [{d} * units, {rank}, 1, 1], got "
                f"{list(weight.shape)}"
            )
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
        raise CheckpointError("state dict of the published implementation: " + _several(problems))
    return layers


# -- what a network is, and whether a configuration says all of it
# ----------------------------------------------------------------------


def describe(model: CoDANet) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and tensors of a CoDANet (bare; its layers may be wrapped), of which
    ``CoDANet(**config)`` is the same network.

    Raises:
        ValueError: no configuration says all of it; the message names the part and what it has. See ``save``.
    """
    parts = {"model": (model, CoDANet, ("forward", "run_layers", "head", "check_images"))}
    parts |= {
        "encoder": (model.encoder, AddInverse, ("forward",)),
        "pool": (model.pool, SumPool2d, ("forward",)),
    }
    parts |= {
        f"layers.{i}": (unwrap(layer), DAUConv2d, ("forward", "geometry"))
        for i, layer in enumerate(model.layers)
    }
    for name, (module, kind, methods) in parts.items():
        if not isinstance(module, kind):
            raise ValueError(
                f"{name}: expected {kind.__name__}, got {type(module).__name__}, which no configuration "
                "describes"
            )
        for method in methods:
            if not _is_ours(type(module), method):
                raise ValueError(
                    f"{name}: expected {kind.__name__}, got {type(module).__name__} with a {method} of its "
                    "own, which no "
                    "configuration describes"
                )
    state = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    try:
        config = model.config()
        twin = CoDANet(**json.loads(json.dumps(config)), device="meta")  # as load will
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"model: its configuration does not give a network: {error}") from None
    expected = twin.state_dict()
    for owner in [*(f"layers.{i}." for i in range(len(model.layers))), ""]:
        names = {name.removeprefix(owner) for name in state if name.startswith(owner)}
        known = {name.removeprefix(owner) for name in expected if name.startswith(owner)}
        if names != known:
            raise ValueError(_other_tensors(owner.rstrip(".") or "model", names - known, known - names))
    for (name, (module, *_)), same in zip(list(parts.items())[3:], twin.layers, strict=True):
        for option in ("geometry", "norm", "eps"):
            if getattr(module, option) != getattr(same, option):
                raise ValueError(
                    f"{name}: {option}: expected {getattr(same, option)}, as saved, got "
                    f"{getattr(module, option)}"
                )
    first = next(iter(state.values())).dtype
    for name, tensor in state.items():
        if not _is_plain(tensor):
            kind = (
                tensor.layout
                if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided
                else type(tensor).__name__
            )
            raise ValueError(f"{name}: expected a dense tensor, got {kind}")
        if tensor.dtype not in _DTYPES.values():
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, _DTYPES.values()))}, got {tensor.dtype}"
            )
        if tensor.dtype != first:
            raise ValueError(f"{name}: expected {first}, as in layers.0, got {tensor.dtype}")
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name}: expected shape {list(expected[name].shape)}, as configured, got "
                f"{list(tensor.shape)}"
            )
        if tensor.is_meta:
            raise ValueError(f"{name}: expected numbers, got a tensor on the meta device")
    return config, state


def _gathered(state):
    """On the CPU, none in memory of another's: one tensor in two layers is stored twice."""
    found, owners = {}, set()
    for name, tensor in state.items():
        tensor = whole(tensor.detach()).cpu().contiguous()
        owner = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if owner in owners else tensor
        owners.add(owner)
    return found


def _is_ours(kind, method):
    """Whether a class takes ``method`` from this package. Others may put names on it (FSDP2) or methods
    that do not compute.
    """
    found = getattr(kind, method)
    return (
        getattr(getattr(found, "fget", found), "__module__", "").partition(".")[0]
        == __name__.partition(".")[0]
    )


def _is_plain(tensor):
    """Whether a tensor is numbers in memory: not sparse, not quantised by a library; FSDP2's shards are
    such.
    """
    kinds = (torch.Tensor, torch.nn.Parameter)
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and (type(tensor) in kinds or hasattr(tensor, "full_tensor"))
    )


def _other_tensors(owner, more, fewer):
    remedy = ""
    if any("parametrizations." in name for name in more):
        remedy = "; torch.nn.utils.parametrize.remove_parametrizations makes plain weights of them"
    elif any(name.endswith("_mask") for name in more):
        remedy = "; torch.nn.utils.prune.remove makes plain weights of them"
    elif any(name.endswith(("_g", "_v")) for name in more):
        remedy = "; torch.nn.utils.remove_weight_norm makes plain weights of them"
    lacks = f" and lacks {_some(sorted(fewer))}" if fewer else ""
    has = f" has {_some(sorted(more))} besides, which no configuration describes" if more else ""
    return f"{owner}: expected the tensors of a CoDANet alone; it{has}{lacks}{remedy}"


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
        raise CheckpointError(f"{source}: " + _several(problems))


# -- reading what anybody may have written
# ----------------------------------------------------------------------------------------------


def _json(header, key, path):
    try:
        value = json.loads(header[key], object_pairs_hook=_unique)
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {key} is missing or not JSON ({type(error).__name__}: {_line(error)})"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key}: expected a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


@contextlib.contextmanager
def _regular(path, kind="checkpoint") -> Iterator:
    """A file, open for reading."""
    try:
        file = open_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such {kind}") from None
    except ValueError as error:  # NotAFile, or a name with a zero byte
        raise CheckpointError(
            str(error) if isinstance(error, NotAFile) else f"{path!r}: expected the name of a file: {error}"
        ) from None
    with file:
        yield file


@contextlib.contextmanager
def opened(path, device="cpu", kind="checkpoint") -> Iterator:
    """A safetensors file, its header read and checked against its length."""
    safetensors = require_safetensors()
    with _regular(path, kind) as file:
        zipped = file.read(2) == b"PK"  # as files of torch.save begin
    try:
        opened = safetensors.safe_open(path, framework="pt", device=str(device))
    except Exception as error:  # safetensors raises bare exceptions of its own
        hint = "; of a checkpoint of coda-fast train, take the model.safetensors of its run" if zipped else ""
        raise CheckpointError(f"{path}: not a safetensors file: {_line(error)}{hint}") from None
    with opened as file:
        yield file


def _header(path, file):
    header = file.metadata() or {}
    if header.get("format") != _FORMAT:
        found = _some([header.get("format")]).strip("[]")
        raise CheckpointError(
            f"{path}: expected a checkpoint of coda_fast (format {_FORMAT!r}), found {found}"
        )
    return header


def _line(error):
    """A message of others in one line of bearable length, with nothing in it that moves a cursor."""
    text = " ".join(printable(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _some(values):
    """The first of a list, each of bearable length."""
    shown = [text if len(text := repr(value)) <= 80 else f"{text[:77]}..." for value in values[:5]]
    return f"[{', '.join(shown)}{', ...' * (len(values) > 5)}]"


def _several(problems):
    return "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")


def require_safetensors():
    """The safetensors module; ImportError with what to install."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "checkpoints need safetensors: pip install 'coda-fast[cli]' or pip install safetensors"
        ) from None
    return safetensors
