"""Conversion from and to state dicts of the published implementation of CoDA-Nets, bit for bit."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence

import torch

from coda_fast._description import describe, is_dense, tensors_of
from coda_fast._files import CheckpointError, one_line, regular_file, several, some
from coda_fast.dynamic_linear import need_network
from coda_fast.functional import EPS
from coda_fast.models import CoDANet
from coda_fast.safety import need_memory

# The keys of B, A and b in the published implementation. Its A is [d n, r, 1, 1] and its b [d n]: all units
# for the first entry of the patch, then all units for the second, and so on.
_PUBLISHED = {
    "reduction_weight": "weight_mod.weighting_f.0.weight",
    "weight": "weight_mod.weighting_f.1.weight",
    "bias": "weight_mod.weighting_f.1.bias",
}


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

    Keys are ``<layer>.weight_mod.weighting_f.{0.weight, 1.weight, 1.bias}`` with layers numbered from 0,
    after any common prefix such as ``module.``.

    Raises:
        CheckpointError: keys are unknown, missing or of the wrong shape (all are named in one message), there
            are not as many strides or paddings as layers, or ``CoDANet`` refuses a value.
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
        raise CheckpointError(f"state dict: does not give a network: {one_line(error)}") from None
    with torch.no_grad():
        for module, layer in zip(model.layers, layers, strict=True):
            for name, tensor in layer.items():
                if tensor is not None:
                    getattr(module, name).copy_(tensor)
    return model


def to_published(model: CoDANet) -> dict[str, torch.Tensor]:
    """The state dict of the same network in the published implementation; the exact inverse of
    ``from_published``.

    Raises:
        TypeError, ValueError: as ``save``; or layers have a dilation, or only some have a bias, which the
            published form cannot express.
    """
    config, tensors = describe(need_network(model, kind=CoDANet))
    tensors = tensors_of(tensors)
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
    """A state dict from a ``torch.save`` file, on the CPU. It is read with ``weights_only=True``, so that no
    code in it can run.

    Raises:
        FileNotFoundError: there is no such file. CheckpointError: it is not such a file, not a regular file
            (but a folder, a pipe, a device), holds other things than tensors, or does not fit in this
            machine's memory. OSError: reading it is not permitted.
    """
    with regular_file(path) as file:
        try:
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                # a small file may unpack to large tensors
                need_memory("tensors", sum(member.file_size for member in archive.infolist()))
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise any exception
            reason = str(error).split("\n")[0] or type(error).__name__
            # torch's own message suggests reading it without weights_only
            if isinstance(error, pickle.UnpicklingError):
                reason = "it is damaged, or holds other things"
            raise CheckpointError(
                f"{path}: expected a file of torch.save with tensors only: {one_line(reason)}"
            ) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a state dict, names to tensors, got {type(state).__name__}")
    return dict(state)


def _published_layers(state_dict):
    """A dict of tensors in our shapes for each layer, in order."""
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"state dict: expected names to tensors, got {type(state_dict).__name__}")
    found, problems = _by_layer(state_dict)
    if not found:
        problems.append("no layers")
    tensors = [tensor for layer in found.values() for tensor in layer.values()]
    if len({tensor.dtype for tensor in tensors}) > 1:
        problems.append("tensors of different dtypes")
    # counts up to the number of layers found, because a layer's number can be huge
    problems += [f"no keys for layer {index}" for index in range(len(found)) if index not in found]
    if not problems:
        try:  # an expanded tensor takes no space in a file
            need_memory("weights", sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        except ValueError as error:
            raise CheckpointError(f"state dict of the published implementation: {error}") from None
    biased = any("bias" in layer for layer in found.values())
    wanted = ("reduction_weight", "weight", "bias") if biased else ("reduction_weight", "weight")
    layers, channels = [], None
    for index in sorted(found):
        problems += [f"missing key '{index}.{_PUBLISHED[k]}'" for k in wanted if k not in found[index]]
        layer = _in_our_shapes(index, found[index], channels, problems)
        channels = None if layer is None else len(layer["weight"])
        layers.append(layer)
    if problems:
        raise CheckpointError("state dict of the published implementation: " + several(problems))
    return layers


def _by_layer(state_dict):
    """{layer: {our name of a tensor: tensor}}, and a list of what is wrong with the keys."""
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
        if not is_dense(tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            what = (
                f"{tensor.dtype} {list(tensor.shape)}"
                if isinstance(tensor, torch.Tensor)
                else type(tensor).__name__
            )
            problems.append(f"{key!r}: expected a floating-point tensor with something in it, got {what}")
            continue
        layer = found.setdefault(int(match["layer"]), {})
        if names[match["key"]] in layer:
            problems.append(f"{key!r}: a second tensor for layer {int(match['layer'])}")
        else:
            layer[names[match["key"]]] = tensor
    if len(prefixes) > 1:
        problems.append(f"keys with different prefixes {some(sorted(prefixes))}")
    return found, problems


def _in_our_shapes(index, tensors, channels, problems):
    """The tensors of a layer with ``channels`` inputs (None: any); or None, and why in ``problems``."""
    if "reduction_weight" not in tensors or "weight" not in tensors:
        return None
    reduction, weight, bias = tensors["reduction_weight"], tensors["weight"], tensors.get("bias")
    d = reduction.shape[1:].numel()
    if reduction.dim() != 4 or (channels is not None and reduction.shape[1] != channels):
        problems.append(
            f"'{index}.{_PUBLISHED['reduction_weight']}': expected [rank, {channels or 'C'}, kh, kw], "
            f"got {list(reduction.shape)}"
        )
        return None
    rank, units = len(reduction), (len(weight) if weight.dim() else 0) // d
    if weight.shape != (units * d, rank, 1, 1) or units == 0:
        problems.append(
            f"'{index}.{_PUBLISHED['weight']}': expected [{d} * units, {rank}, 1, 1], got "
            f"{list(weight.shape)}"
        )
        return None
    if bias is not None and bias.shape != (units * d,):
        problems.append(f"'{index}.{_PUBLISHED['bias']}': expected [{units * d}], got {list(bias.shape)}")
        bias = None
    window = reduction.shape[1:]
    return {
        "reduction_weight": reduction,
        "weight": weight.reshape(d, units, rank).permute(1, 2, 0).reshape(units, rank, *window),
        "bias": None if bias is None else bias.reshape(d, units).t().reshape(units, *window),
    }
