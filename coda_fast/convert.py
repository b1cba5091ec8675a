"""Replacing a model's convolutions by DAU layers."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from coda_fast.functional import EPS
from coda_fast.nn import DAUConv2d, check_size

_NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What ``convert_conv2d`` did.

    Attributes:
        module: the converted module. It is the given module, changed in place, unless that was itself a
            convolution.
        converted: names of the convolutions that are DAU layers now ("" is the module itself).
        kept: names of the convolutions that are not replaced, each with the reason.
        inexact: names of the modules because of which contributions do not add up to the output, each with
            the reason: a bias, or the class of a normalisation or activation. Operations that ``forward``
            computes without a module are not noticed.
    """

    module: nn.Module
    converted: tuple[str, ...]
    kept: dict[str, str]
    inexact: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} convolutions are DAU layers now, {len(self.kept)} are kept"]
        lines += [f"  kept {name or 'the module itself'}: {reason}" for name, reason in self.kept.items()]
        if self.inexact:
            reasons = collections.Counter(self.inexact.values())
            counted = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
            lines.append(f"  contributions do not add up to the output, because of: {counted}")
        return "\n".join(lines)


def convert_conv2d(
    module: nn.Module,
    *,
    rank: int = 32,
    only: str | Iterable[str] | Callable[[str, nn.Conv2d], bool] | None = None,
    bias: bool = True,
    norm: str = "squash",
    eps: float = EPS,
    backend: str = "auto",
    save_contraction: bool | str = "auto",
) -> Conversion:
    """Replace every ``nn.Conv2d`` of a module, in place, by a ``DAUConv2d`` of the same geometry, device,
    dtype and mode.

    The new layers have fresh weights, which are frozen if the convolution's are. A DAU layer computes its
    weight from its input, so none of its parameters corresponds to a convolution's weight, and its bias adds
    to the computed weight, not to the output. Make the optimiser afterwards; a layer has about ``rank`` times
    as many parameters. A convolution that is used in several places becomes one layer in all of them. Shapes
    stay the same, so the model runs and trains. The contributions of its pixels add up to its outputs if
    nothing between the layers has a bias or normalises; the result names what does. They come from aligned
    weights alone only if there are no activations and no max pooling either (``coda_fast.CoDANet`` has none).

    These convolutions are kept and reported with the reason: those with groups, padding other than zeros,
    hooks, or a weight that they share with another module; those of a derived class (such as parametrised,
    pruned, lazy or quantised ones); transposed ones; and those of one or three dimensions.

    Args:
        module: any module; if it is itself a convolution, its replacement is ``Conversion.module``.
        rank: of the new layers, as for ``DAUConv2d``.
        only: which convolutions to replace: names or patterns of names (``"layer4.*"``), or a function of
            name and convolution; None: all. The others are not reported. A convolution that is used in
            several places is replaced in all of them if one of them is chosen.
        bias: of the new layers, as for ``DAUConv2d``.
        norm: of the new layers, as for ``DAUConv2d``.
        eps: of the new layers, as for ``DAUConv2d``.
        backend: of the new layers, as for ``DAUConv2d``.
        save_contraction: of the new layers, as for ``DAUConv2d``.

    Raises:
        ValueError: there is nothing to replace, no convolution has a given name or pattern, a layer refuses
            the options, or the weights do not fit in memory; the module is then unchanged. TypeError:
            ``module`` is not a module, or ``only`` holds something that is not a string.

    >>> from torch import nn
    >>> import coda_fast
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    >>> print(coda_fast.convert_conv2d(net, rank=4))
    1 convolutions are DAU layers now, 1 are kept
      kept 1: groups=2, a DAU layer aligns with all channels
      contributions do not add up to the output, because of: bias (1)
    >>> net[0]
    DAUConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), rank=4)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    found = {
        name: child
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, _ConvNd)
    }
    chosen = {id(found[name]) for name in _choice(only, found)}
    found = {name: conv for name, conv in found.items() if id(conv) in chosen}
    if not found:
        raise ValueError(
            f"module: expected at least one nn.Conv2d{'' if only is None else ' that only= chooses'}, got a "
            f"{type(module).__name__} without one"
        )
    owners = _owners(module)
    kept = {name: reason for name, conv in found.items() if (reason := _obstacle(conv, owners))}
    converted = tuple(name for name in found if name not in kept)
    if not converted:
        reasons = "; ".join(f"{name or 'the module itself'}: {reason}" for name, reason in kept.items())
        raise ValueError(f"module: expected a convolution that can be a DAU layer, got {reasons}")
    options = dict(
        bias=bias, rank=rank, norm=norm, eps=eps, backend=backend, save_contraction=save_contraction
    )
    different = {id(found[name]): found[name] for name in converted}
    for conv in different.values():
        _layer(conv, options, device="meta")  # raises for unusable options, and allocates nothing
    numbers = [
        conv.weight[0].numel() * (rank + conv.out_channels * (rank + bool(bias)))
        for conv in different.values()
    ]
    probe = next(iter(different.values())).weight
    check_size([sum(numbers)], probe.device, probe.dtype)
    # All layers are made before the first is installed, so that an error leaves the module unchanged.
    layers = {key: _layer(conv, options) for key, conv in different.items()}
    for name in converted:
        parent, _, last = name.rpartition(".")
        if name:
            setattr(module.get_submodule(parent), last, layers[id(found[name])])
    module = module if converted != ("",) else layers[id(module)]
    return Conversion(module, converted, kept, _inexact(module))


def _choice(only, found):
    """The names among ``found`` that ``only`` chooses."""
    if only is None:
        return set(found)
    if callable(only):
        return {name for name, conv in found.items() if only(name, conv)}
    patterns = [only] if isinstance(only, str) else list(only)
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f"only: expected names, or a function of name and convolution, got {odd[0]!r}")
    chosen = {pattern: [name for name in found if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns}
    if lost := [pattern for pattern, names in chosen.items() if not names]:
        raise ValueError(
            f"only: expected names or patterns of convolutions, got {lost[0]!r}, which matches none"
        )
    return {name for names in chosen.values() for name in names}


def _owners(module: nn.Module) -> dict[int, list[str]]:
    """For the id of each parameter, the names of the modules that hold it; a module has one name only."""
    owners: dict[int, list[str]] = {}
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _obstacle(conv, owners):
    """Why a convolution must be kept; empty if it can be replaced."""
    if not isinstance(conv, nn.Conv2d):
        kind = (
            "transposed" if isinstance(conv, _ConvTransposeNd) else f"of {len(conv.kernel_size)} dimensions"
        )
        return f"{kind}, a DAU layer is a convolution of two dimensions"
    if type(conv) is not nn.Conv2d or "forward" in vars(conv):
        return f"a {type(conv).__name__}, whose own behaviour would be lost"
    if conv.groups != 1:
        return f"groups={conv.groups}, a DAU layer aligns with all channels"
    if conv.padding_mode != "zeros":
        return f'padding_mode="{conv.padding_mode}", a DAU layer pads with zeros'
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    if any(hooks):
        return "hooks (of pruning, weight_norm or others) that would be lost"
    if len(names := owners.get(id(conv.weight), ())) > 1:
        return f"a weight that {' and '.join(name or 'the module itself' for name in names)} share"
    if not conv.weight.is_floating_point():
        return f"weights of {conv.weight.dtype}"
    if hasattr(conv.weight, "full_tensor"):
        return "weights that are spread over processes; convert before that"
    return ""


def _inexact(module: nn.Module) -> dict[str, str]:
    """The modules that keep contributions from adding up, by name, with the reason: their output is neither
    linear in their input, as that of a DAU layer in explanation mode is, nor homogeneous of degree 1, as that
    of a ReLU is.
    """
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, _NORMALISATIONS) or (
            type(child).__module__ == activation.__name__ and not isinstance(child, _HOMOGENEOUS)
        ):
            found[name] = type(child).__name__
        elif isinstance(child, (nn.Linear, _ConvNd)) and child.bias is not None:
            found[name] = "bias"
    return found


def _layer(conv, options, device=None):
    layer = DAUConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        device=device or conv.weight.device, dtype=conv.weight.dtype, **options,
    )  # fmt: skip
    return layer.train(conv.training).requires_grad_(conv.weight.requires_grad)
