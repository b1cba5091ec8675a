"""CoDA-Nets: the network class, making networks by name, and registering further ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from coda_fast import _arguments, registry
from coda_fast._geometry import integer, pair
from coda_fast._modes import explanation_mode
from coda_fast._wrappers import unwrap
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.dynamic_linear import DynamicLinear
from coda_fast.functional import EPS
from coda_fast.named_models import MODELS
from coda_fast.network import LOGIT_BIAS, Network
from coda_fast.nn import DAUConv2d, check_size
from coda_fast.placement import PIXELS, Placement


class CoDANet(Network):
    r"""Convolutional Dynamic Alignment Network: ``logits = sum_pixels(DAU_L(... DAU_1([x, 1 - x]))) / T +
    logit_bias``.

    It is dynamic linear: for a given image the logits (minus the constant ``logit_bias``) are a linear map of
    the encoded image, which ``explain`` returns (arXiv:2104.00032). Train it with binary cross-entropy on
    one-hot targets.

    Args:
        out_channels, ranks, kernel_sizes, strides: one entry for each DAU layer; the last of ``out_channels``
            is the number of classes. A kernel size or stride is one number, or two for rows and columns.
        paddings, dilations: one entry for each layer, likewise; None: ``dilation * (k - 1) // 2``, and 1.
        temperature: T; a larger T makes the layers align better (paper, section 3.3).
        logit_bias: added to every logit; ``log(0.1 / 0.9)`` starts all classes at 10 %.
        norm, eps, bias: as in ``DAUConv2d``, for all layers, or a list with one entry for each.
        backend, save_contraction: as in ``DAUConv2d``, for all layers.
        image_channels: 3 for colour, 1 for grey images.
        image_size: native size in pixels, as a hint for tools; any size is accepted.
        preprocessing: how ``transform`` turns pictures into inputs: a ``coda_fast.data.Preprocessing``, or a
            dict of its resize, crop and interpolation; None: resize and crop to ``image_size``, if that is
            given.
        class_names: one for each class, as a hint for tools.
        encoder: as in ``Network``, for subclasses; None: ``[x, 1 - x]``.

    Attributes:
        transform: ``coda_fast.data.Preprocessing``: ``model(model.transform("photo.jpg")[None])``. Stored
            with the weights.

    Raises:
        ValueError, TypeError: lists differ in length, a layer refuses a value, or the weights do not fit in
            this machine's memory. Raised before anything is allocated.

    >>> import torch, coda_fast
    >>> net = coda_fast.CoDANet([16, 10], ranks=[8, 8], kernel_sizes=[3, 1], strides=[2, 1], temperature=100)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        out_channels: Sequence[int],
        ranks: Sequence[int],
        kernel_sizes: Sequence[int | Sequence[int]],
        strides: Sequence[int | Sequence[int]],
        paddings: Sequence[int | Sequence[int]] | None = None,
        *,
        temperature: float,
        logit_bias: float = LOGIT_BIAS,
        dilations: Sequence[int | Sequence[int]] | None = None,
        norm: str | Sequence[str] = "squash",
        eps: float | Sequence[float] = EPS,
        bias: bool | Sequence[bool] = True,
        image_channels: int = 3,
        image_size: int | None = None,
        preprocessing: Preprocessing | Mapping | None = None,
        class_names: Sequence[str] | None = None,
        encoder: nn.Module | None = None,
        backend: str = "auto",
        save_contraction: bool | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        layers = _layer_arguments(
            out_channels, ranks, kernel_sizes, strides, paddings, dilations, norm=norm, eps=eps, bias=bias
        )
        super().__init__(
            num_classes=layers[-1]["out_channels"],
            temperature=temperature,
            logit_bias=logit_bias,
            image_channels=image_channels,
            image_size=image_size,
            preprocessing=preprocessing,
            class_names=class_names,
            encoder=encoder,
        )
        widths = [self.encoded_channels, *(layer["out_channels"] for layer in layers)]
        numbers = (
            channels * math.prod(o["kernel_size"]) * (o["rank"] + o["out_channels"] * (o["rank"] + o["bias"]))
            for channels, o in zip(widths, layers, strict=False)
        )
        check_size(numbers, device, dtype)
        common: dict[str, Any] = {
            "backend": backend,
            "save_contraction": save_contraction,
            "device": device,
            "dtype": dtype,
        }
        self.layers = nn.ModuleList(
            DAUConv2d(channels, **layer, **common) for channels, layer in zip(widths, layers, strict=False)
        )
        self.pool = self._modules.pop("pool")  # registered last, because it is called last

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of units of the last layer."""
        return self.layers[-1].out_channels

    @property
    def classifier(self) -> str:  # type: ignore[override]
        """The name of the last layer."""
        return f"layers.{len(self.layers) - 1}"

    def config(self) -> dict:
        """The constructor's arguments as plain JSON values, without device, dtype, backend and
        save_contraction.

        Lists have an entry for each layer. ``norm``, ``eps`` and ``bias`` are a single value if all layers
        agree; ``dilations`` is present only if one is not 1. ``CoDANet(**config)`` has layers with the same
        options and shapes.

        Raises:
            ValueError: a layer is not a ``DAUConv2d``, or ``transform`` is not a ``Preprocessing`` with the
                network's channels.
        """
        layers = [unwrap(layer) for layer in self.layers]
        for index, layer in enumerate(layers):
            if not isinstance(layer, DAUConv2d):
                raise ValueError(
                    f"layers.{index}: expected DAUConv2d, got {type(layer).__name__}, which no "
                    "configuration describes"
                )
        common = super().config()
        del common["num_classes"]  # the last of out_channels
        dilations = [_plain(layer.dilation) for layer in layers]
        return {
            "out_channels": [int(layer.out_channels) for layer in layers],
            "ranks": [int(layer.rank) for layer in layers],
            "kernel_sizes": [_plain(layer.kernel_size) for layer in layers],
            "strides": [_plain(layer.stride) for layer in layers],
            "paddings": [_plain(layer.padding) for layer in layers],
            **({"dilations": dilations} if any(d != 1 for d in dilations) else {}),
            "temperature": common.pop("temperature"),
            "logit_bias": common.pop("logit_bias"),
            "norm": _one([layer.norm for layer in layers]),
            "eps": _one([float(layer.eps) for layer in layers]),
            "bias": _one([layer.bias is not None for layer in layers]),
            **common,
        }

    @classmethod
    def adapted(cls, config: dict, num_classes: int | None = None, rank: int | None = None) -> dict:
        """As in ``Network``; ``rank`` is that of the first layer, and the others keep their ratio to it."""
        config = dict(config)
        if num_classes is not None:
            config["out_channels"] = [*config["out_channels"][:-1], num_classes]
        if rank is not None:
            if rank < 1:
                raise ValueError(f"rank: expected at least 1, got {rank!r}")
            config["ranks"] = [max(1, rank * r // config["ranks"][0]) for r in config["ranks"]]
        return config

    def evidence(self, encoded: torch.Tensor) -> torch.Tensor:
        """See ``DynamicLinear.evidence``."""
        return self.run_layers(encoded)

    def run_layers(self, activations: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Apply layers ``start`` to ``stop`` (exclusive; None: all the rest) to the input of layer ``start``,
        [N, C, H, W].
        """
        for layer in self.layers[start:stop]:
            activations = layer(activations)
        return activations

    def send_back(self, activations: Sequence[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
        """Multiply ``value``, [N, n, OH, OW] for the output of the last layer, by the transposed layers, the
        last layer first. ``activations`` are the inputs of the layers, which generate their weights. The
        result has the shape and dtype of the first of them.
        """
        for layer, entering in zip(reversed(self.layers), reversed(activations), strict=True):
            value = layer.adjoint(entering, value.to(entering.dtype))
        return value

    def find_layer(self, layer: int | DAUConv2d | None) -> tuple[int, DAUConv2d]:  # type: ignore[override]
        """(index, layer) from either of the two (None: the first layer). The layers of a chain have numbers,
        those of other networks have names.

        Raises:
            ValueError: not a layer of this network. TypeError: neither an index nor a layer.
        """
        count, layer = len(self.layers), unwrap(layer)
        layers = [unwrap(candidate) for candidate in self.layers]
        if isinstance(layer, DAUConv2d):
            for index, candidate in enumerate(layers):
                if candidate is layer:
                    return index, layer
            raise ValueError("layer: expected a DAU layer of this model, got one of another")
        try:
            index = 0 if layer is None else integer(layer)
        except TypeError:
            raise TypeError(
                f"layer: expected an int, a DAUConv2d of the model or None, got {type(layer).__name__}"
            ) from None
        if not -count <= index < count:
            raise ValueError(f"layer: expected an index from {-count} to {count - 1}, got {index}")
        return index % count, layers[index]

    # A chain need not record its calls: the layers before a cut run without a graph, and the transposed chain
    # is a program that can be compiled and exported.

    def cut(self, encoded: torch.Tensor, layer: DAUConv2d | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DynamicLinear.cut``."""
        index = self.find_layer(layer)[0]
        with torch.no_grad():
            entering = self.run_layers(encoded, 0, index)
        entering = entering.detach().requires_grad_()
        with torch.enable_grad(), explanation_mode(self):
            return entering, self.run_layers(entering, index)

    def linearise(self, encoded: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """See ``DynamicLinear.linearise``; each layer is transposed by its adjoint."""
        activations = [encoded]
        for layer in self.layers:
            activations.append(layer(activations[-1]))
        evidence = activations.pop()
        return evidence, lambda value: self.send_back(activations, value)

    def placement(self, layer: int | str, height: int, width: int) -> Placement | None:
        """See ``DynamicLinear.placement``."""
        found = self.encoded_placement(height, width)
        for each in self.layers[: int(layer)]:
            g = unwrap(each).geometry
            left, _, top, _ = g.padding
            found = (found or PIXELS).then(g.kernel, g.stride, (top, left), g.dilation)
        return found

    def encoded_stride(self) -> int:
        """Pixels from one entry of an encoded image to the next one."""
        return 1

    def encoded_placement(self, height: int, width: int) -> Placement | None:
        """Where the entries of an encoded image lie in an image of ``height x width`` pixels; None: each at
        the pixel with its own indices.
        """
        return None

    def layer_sizes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """See ``Network.layer_sizes``; nothing is run."""
        found, (height, width) = {}, self.encoded_size(height, width)
        for index, layer in enumerate(self.layers):
            height, width = layer.geometry.output_size(height, width)
            found[f"layers.{index}"] = layer.out_channels, height, width
        return found


for _name, (_classes, _config, _origin) in MODELS.items():
    _widths = [*_config["out_channels"], _classes]
    registry.add(_name, CoDANet, _config | {"out_channels": _widths}, _origin)


def list_models(pretrained: bool = False) -> dict[str, str]:
    """The names that ``create_model`` knows, with their origin: "published" (in the paper), "coda_fast"
    (ours, not in the paper), or what was passed to ``register_model``. With ``pretrained`` only those whose
    weights the package contains.
    """
    found = {name: model.origin for name, model in registry.models().items()}
    if pretrained:
        from coda_fast import (
            pretrained as shipped,
        )  # late, because it reads files with networks of this module

        return {name: found[name] for name in shipped.names()}
    return found


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    rank: int | None = None,
    **overrides: Any,
) -> Network:
    """A network by name: a CoDANet, or the class registered under that name. Its weights are fresh, or with
    ``pretrained`` those that the package contains (``coda_fast.pretrained``).

    Args:
        name: a key of ``list_models()``.
        pretrained: whether the weights are trained ones, in float32. Needs safetensors.
        num_classes: width of the last layer. If pretrained weights are for another number of classes, that
            layer has fresh weights.
        rank: rank of the first layer; the others keep their ratio to it (the paper's rank ablation: 4, 8, 16,
            144 for ``coda_s_cifar10``).
        overrides: any argument of ``CoDANet`` (``temperature=10`` is the paper's temperature ablation), or of
            the registered class.

    Raises:
        ValueError: the name is unknown, values do not fit, or the package contains no weights of that name.
            TypeError: an override is unknown.
        CheckpointError: the file of the pretrained weights is damaged, or they do not fit the overrides.
        ImportError: safetensors, which reads pretrained weights, is not installed.

    >>> import coda_fast
    >>> sum(p.numel() for p in coda_fast.create_model("coda_s_cifar10").parameters())
    7782816
    """
    if pretrained:
        from coda_fast import pretrained as shipped

        return shipped.create(name, num_classes=num_classes, rank=rank, **overrides)
    config = model_config(name, num_classes=num_classes, rank=rank, **overrides)
    return registry.model(name).network(**config)


def model_config(
    name: str, *, num_classes: int | None = None, rank: int | None = None, **overrides: Any
) -> dict:
    """The arguments with which ``create_model`` calls the class of the network. Takes the same arguments and
    raises the same ValueError.
    """
    model = registry.model(name)
    if rank is not None and "ranks" in overrides:
        raise ValueError("rank and ranks: expected one of them, got both")
    config = model.network.adapted(model.config, num_classes, rank)
    if "image_size" in overrides:  # the stored preprocessing is for the other size
        config.pop("preprocessing", None)
    return config | overrides


def register_model(name: str, network: type[Network], config: Mapping, origin: str = "registered") -> None:
    """Register a network under a name, for ``create_model``, ``list_models`` and timm, and its class, so that
    ``coda_fast.load`` can make such a network from a file. Call this in the module that defines the class.

    Args:
        name: of the model.
        network: a subclass of ``coda_fast.network.Network``. Files contain the name of the class.
        config: its arguments, at least those without a default.
        origin: whose network it is, for ``list_models``.

    Raises:
        ValueError: the name is taken, the network's ``config()`` does not describe it, or it cannot be made
            on the meta device. TypeError: ``network`` is not such a class.
    """
    if not (isinstance(network, type) and issubclass(network, Network)):
        raise TypeError(f"network: expected a subclass of coda_fast.network.Network, got {network!r}")
    make: Callable[..., Network] = network  # subclasses also take a device
    try:
        made = make(**config, device="meta")
        twin = make(**made.config(), device="meta")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"network: expected {network.__name__}(**config, device=..., dtype=...) to be one, got {error}"
        ) from error
    shapes = [{key: t.shape for key, t in each.state_dict().items()} for each in (made, twin)]
    if shapes[0] != shapes[1] or made.config() != twin.config():
        raise ValueError(
            f"network: expected {network.__name__}.config() to hold all arguments of the constructor, got "
            f"{made.config()}, which gives another network"
        )
    if network.evidence is DynamicLinear.evidence or not made.dau_layers():
        raise ValueError(f"network: expected evidence made of DAU layers, got none in {network.__name__}")
    if made.classifier is not None and made.classifier not in (known := made.dau_layers()):
        raise ValueError(f"layer: expected one of {', '.join(known)}, got {made.classifier!r}")
    registry.add(name, network, config, origin)


def _layer_arguments(
    out_channels, ranks, kernel_sizes, strides, paddings, dilations, *, norm, eps, bias
) -> list[dict]:
    """The checked arguments of each ``DAUConv2d``, except ``in_channels``."""
    out_channels = [
        _arguments.positive_integer(n, f"out_channels[{i}]")
        for i, n in enumerate(_arguments.list_of(out_channels, "out_channels"))
    ]
    count = len(out_channels)
    if not count:
        raise ValueError("out_channels: expected at least one layer, got none")
    ranks = [
        _arguments.positive_integer(r, f"ranks[{i}]")
        for i, r in enumerate(_arguments.list_of(ranks, "ranks", count))
    ]
    kernel_sizes = _arguments.pairs(kernel_sizes, "kernel_sizes", count)
    strides = _arguments.pairs(strides, "strides", count)
    dilations = [(1, 1)] * count if dilations is None else _arguments.pairs(dilations, "dilations", count)
    if paddings is None:
        paddings = [
            tuple(d * (k - 1) // 2 for k, d in zip(*two, strict=True))
            for two in zip(kernel_sizes, dilations, strict=True)
        ]
    paddings = _arguments.pairs(paddings, "paddings", count, least=0)
    norm, eps, bias = (
        _arguments.each(value, name, count) for name, value in (("norm", norm), ("eps", eps), ("bias", bias))
    )
    eps = [_arguments.number(value, "eps") for value in eps]
    if wrong := [value for value in bias if not isinstance(value, bool | np.bool_)]:
        raise ValueError(f"bias: expected True or False, got {wrong[0]!r}")
    return [
        {
            "out_channels": out_channels[i],
            "kernel_size": kernel_sizes[i],
            "stride": strides[i],
            "padding": paddings[i],
            "dilation": dilations[i],
            "bias": bool(bias[i]),
            "rank": ranks[i],
            "norm": norm[i],
            "eps": eps[i],
        }
        for i in range(count)
    ]


def _plain(value):
    """A pair of equal numbers as one number, so that configurations read like the published ones."""
    if isinstance(value, str):
        return value
    first, second = pair(value, "pair", least=0)
    return first if first == second else [first, second]


def _one(values):
    """A single value if all layers have the same one, else the list."""
    return values[0] if all(value == values[0] for value in values) else values
