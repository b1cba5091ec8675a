"""A network as a configuration and tensors, and the check that these describe it completely."""

from __future__ import annotations

import json

import torch

from coda_fast import registry
from coda_fast._files import some
from coda_fast._wrappers import plain_name, whole
from coda_fast.dynamic_linear import DynamicLinear
from coda_fast.nn import DAUConv2d

# by their names in safetensors
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def describe(model: DynamicLinear) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and tensors of a network; ``registry.class_of(model)(**config)`` with these tensors
    is the same network. The network itself must be unwrapped; its parts may be wrapped.

    Raises:
        ValueError: no configuration describes it completely; the message names the part and what is
            different about it. See ``save``.
    """
    kind = registry.class_of(model)
    _check_code("model", model, kind, ("forward", "evidence", "run_layers", "head", "check_images"))
    state = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    config = model.config()
    try:
        twin = kind(**json.loads(json.dumps(config)), device="meta")  # as load will do
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"model: its configuration does not give a network: {error}") from None
    # without wrappers: if several modules have the same plain name, the innermost comes last and wins
    parts = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    twins = dict(twin.named_modules())
    del twins[""]
    for name, same in twins.items():
        _check_code(name, parts.get(name), type(same), ("forward", "geometry"))
    expected = twin.state_dict()
    for owner in [*(f"{name}." for name in sorted(twins, key=lambda name: -name.count("."))), ""]:
        names = {name.removeprefix(owner) for name in state if name.startswith(owner)}
        known = {name.removeprefix(owner) for name in expected if name.startswith(owner)}
        if names != known:
            raise ValueError(
                _other_tensors(owner.rstrip(".") or "model", kind.__name__, names - known, known - names)
            )
    for name, same in twins.items():
        _check_options(name, parts[name], same)
    _check_tensors(state, expected)
    return config, state


def _check_code(name, module, kind, methods):
    """Raise a ValueError unless a module is of class ``kind`` and overrides none of ``methods``. Other
    libraries may add names to its class (FSDP2), or methods that do not compute.
    """
    if not isinstance(module, kind):
        raise ValueError(
            f"{name}: expected {kind.__name__}, got {type(module).__name__}, which no configuration describes"
        )
    for method in methods:
        found, known = getattr(type(module), method, None), getattr(kind, method, None)
        if found is not known and not _is_ours(found):
            raise ValueError(
                f"{name}: expected {kind.__name__}, got {type(module).__name__} with a {method} of its own, "
                "which no configuration describes"
            )


def _check_options(name, module, same):
    """Raise a ValueError unless a part has the options of ``same``, its twin built from the configuration."""
    options = ("geometry", "norm", "eps") if isinstance(same, DAUConv2d) else ()
    found = {option: (getattr(module, option), getattr(same, option)) for option in options}
    if not options and not isinstance(same, DynamicLinear):
        found = {"options": (module.extra_repr(), same.extra_repr())}
    for option, (has, expected) in found.items():
        if has != expected:
            raise ValueError(f"{name}: {option}: expected {expected}, as saved, got {has}")


def _check_tensors(state, expected):
    """Raise a ValueError unless the tensors are dense, have the expected shapes and share one floating-point
    dtype; counters of batch normalisation are integers.
    """
    first = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    owner = next(iter(state)).rpartition(".")[0]
    for name, tensor in state.items():
        if not is_dense(tensor):
            kind = (
                tensor.layout
                if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided
                else type(tensor).__name__
            )
            raise ValueError(f"{name}: expected a dense tensor, got {kind}")
        counts = expected[name].dtype == torch.int64
        if tensor.dtype not in ((torch.int64,) if counts else tuple(DTYPES.values())):
            wanted = "torch.int64" if counts else " or ".join(map(str, DTYPES.values()))
            raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}")
        if tensor.dtype != first and not counts:
            raise ValueError(f"{name}: expected {first}, as in {owner}, got {tensor.dtype}")
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name}: expected shape {list(expected[name].shape)}, as configured, got "
                f"{list(tensor.shape)}"
            )
        if tensor.is_meta:
            raise ValueError(f"{name}: expected numbers, got a tensor on the meta device")


def tensors_of(state):
    """The tensors on the CPU, none sharing memory with another: one that two layers share is stored twice."""
    found, owners = {}, set()
    for name, tensor in state.items():
        tensor = whole(tensor.detach()).cpu().contiguous()
        owner = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if owner in owners else tensor
        owners.add(owner)
    return found


def _is_ours(method):
    """Whether a method is defined in this package."""
    module = getattr(getattr(method, "fget", method), "__module__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]


def is_dense(tensor):
    """Whether a tensor holds plain numbers: it is neither sparse nor a library's quantised type. FSDP2's
    shards count as dense.
    """
    kinds = (torch.Tensor, torch.nn.Parameter)
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and (type(tensor) in kinds or hasattr(tensor, "full_tensor"))
    )


def _other_tensors(owner, kind, more, fewer):
    remedy = ""
    if any("parametrizations." in name for name in more):
        remedy = "; torch.nn.utils.parametrize.remove_parametrizations makes plain weights of them"
    elif any(name.endswith("_mask") for name in more):
        remedy = "; torch.nn.utils.prune.remove makes plain weights of them"
    elif any(name.endswith(("_g", "_v")) for name in more):
        remedy = "; torch.nn.utils.remove_weight_norm makes plain weights of them"
    lacks = f" and lacks {some(sorted(fewer))}" if fewer else ""
    has = f" has {some(sorted(more))} besides, which no configuration describes" if more else ""
    return f"{owner}: expected the tensors of a {kind} alone; it{has}{lacks}{remedy}"
