"""CoDA-Nets: the network class and the named configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import nn

from coda_fast._autocast import autocasting, wide
from coda_fast._geometry import integer, pair
from coda_fast._wrappers import unwrap
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.explain import MEMORY_BUDGET, Explanation, explain
from coda_fast.functional import EPS
from coda_fast.nn import AddInverse, DAUConv2d, SumPool2d, check_size, explanation_mode

LOGIT_BIAS = math.log(0.1 / 0.9)
# pixels: of an image's side, of a kernel, stride, padding or dilation. A file that asks for more is damaged,
# or hostile
MOST = 1 << 16
_FLOAT32 = torch.finfo(torch.float32)


class CoDANet(nn.Module):
    r"""Convolutional Dynamic Alignment Network: ``logits = sum_pixels(DAU_L(... DAU_1([x, 1 - x]))) / T +
    logit_bias``.

    Dynamic linear: for a given image the logits (less the constant ``logit_bias``) are a linear map of the
    encoded image, which ``explain`` returns (arXiv:2104.00032). Train it with binary cross-entropy on one-hot
    targets.

    Args:
        out_channels, ranks, kernel_sizes, strides: one entry for each DAU layer; the last of ``out_channels``
            is the number of classes.
        paddings, dilations: one entry for each layer; None: ``dilation * (k - 1) // 2``, and 1.
        temperature: T; larger T asks the layers for better alignment (paper, section 3.3).
        logit_bias: added to every logit; ``log(0.1 / 0.9)`` starts all classes at 10 %.
        norm, eps, bias: as in ``DAUConv2d``, for all layers, or a list with one entry for each.
        backend, save_contraction: as in ``DAUConv2d``, for all layers.
        image_channels: 3 for colour, 1 for grey images.
        image_size: native size in pixels: a hint for tools, any size is accepted.
        preprocessing: what pictures go through before the network, which ``transform`` does: resize, crop and
            interpolation of ``coda_fast.data.Preprocessing`` (as a dict, or one itself); None: resized and
            cropped to ``image_size``, if there is one.
        class_names: a hint for tools, one for each class.

    Attributes:
        transform: ``coda_fast.data.Preprocessing``: ``model(model.transform("photo.jpg")[None])``. Stored
            with the weights.

    Raises:
        ValueError, TypeError: lists of different lengths, values that a layer refuses, weights that this
            machine cannot hold: before anything is allocated.

    >>> import torch, coda_fast
    >>> net = coda_fast.CoDANet([16, 10], ranks=[8, 8], kernel_sizes=[3, 1], strides=[2, 1], temperature=100)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        out_channels: Sequence[int],
        ranks: Sequence[int],
        kernel_sizes: Sequence[int],
        strides: Sequence[int],
        paddings: Sequence[int] | None = None,
        *,
        temperature: float,
        logit_bias: float = LOGIT_BIAS,
        dilations: Sequence[int] | None = None,
        norm: str | Sequence[str] = "squash",
        eps: float | Sequence[float] = EPS,
        bias: bool | Sequence[bool] = True,
        image_channels: int = 3,
        image_size: int | None = None,
        preprocessing: Preprocessing | Mapping | None = None,
        class_names: Sequence[str] | None = None,
        backend: str = "auto",
        save_contraction: bool | str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        out_channels = [
            _integer(n, f"out_channels[{i}]") for i, n in enumerate(_list(out_channels, "out_channels"))
        ]
        count = len(out_channels)
        if not count:
            raise ValueError("out_channels: expected at least one layer, got none")
        ranks = [_integer(r, f"ranks[{i}]") for i, r in enumerate(_list(ranks, "ranks", count))]
        kernel_sizes, strides = _pairs(kernel_sizes, "kernel_sizes", count), _pairs(strides, "strides", count)
        dilations = [(1, 1)] * count if dilations is None else _pairs(dilations, "dilations", count)
        if paddings is None:
            paddings = [
                tuple(d * (k - 1) // 2 for k, d in zip(*two, strict=True))
                for two in zip(kernel_sizes, dilations, strict=True)
            ]
        paddings = _pairs(paddings, "paddings", count, least=0)
        temperature, logit_bias = _number(temperature, "temperature"), _number(logit_bias, "logit_bias")
        if temperature < _FLOAT32.tiny:
            least = f", at least {_FLOAT32.tiny:.1e}" * (temperature > 0)
            raise ValueError(f"temperature: expected a positive number{least}, got {temperature:g}")
        norm, eps, bias = (
            _each(value, name, count) for name, value in (("norm", norm), ("eps", eps), ("bias", bias))
        )
        eps = [_number(value, "eps") for value in eps]
        if wrong := [value for value in bias if not isinstance(value, bool | np.bool_)]:
            raise ValueError(f"bias: expected True or False, got {wrong[0]!r}")
        image_channels = _integer(image_channels, "image_channels")
        image_size = None if image_size is None else _integer(image_size, "image_size", MOST)
        self.temperature, self.logit_bias = temperature, logit_bias
        self.image_channels, self.image_size = image_channels, image_size
        self.transform = Preprocessing.of(preprocessing, image_channels, image_size)
        self.class_names = None if class_names is None else _names(class_names, out_channels[-1])
        widths = [2 * image_channels, *out_channels]
        check_size(
            (
                widths[i] * math.prod(k) * (ranks[i] + widths[i + 1] * (ranks[i] + bool(bias[i])))
                for i, k in enumerate(kernel_sizes)
            ),
            device,
            dtype,
        )
        self.encoder = AddInverse()
        options = {"backend": backend, "save_contraction": save_contraction, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            DAUConv2d(
                widths[i],
                widths[i + 1],
                kernel_sizes[i],
                strides[i],
                paddings[i],
                dilations[i],
                bias=bool(bias[i]),
                rank=ranks[i],
                norm=norm[i],
                eps=eps[i],
                **options,
            )
            for i in range(count)
        )
        self.pool = SumPool2d()

    @property
    def num_classes(self) -> int:
        return self.layers[-1].out_channels

    def config(self) -> dict:
        """The constructor's arguments, as plain JSON values (device, dtype, backend and save_contraction left
        out).

        Lists have an entry for each layer. ``norm``, ``eps`` and ``bias`` are one value where all layers
        agree, and ``dilations`` is there where one is not 1. ``CoDANet(**config)`` has layers of the same
        options and shapes.

        Raises:
            ValueError: a layer that is no ``DAUConv2d``, a ``transform`` that is no ``Preprocessing`` of its
                channels.
        """
        layers = [unwrap(layer) for layer in self.layers]
        for index, layer in enumerate(layers):
            if not isinstance(layer, DAUConv2d):
                raise ValueError(
                    f"layers.{index}: expected a DAUConv2d, got a {type(layer).__name__}, which no "
                    "configuration describes"
                )
        if not isinstance(self.transform, Preprocessing) or self.transform.channels != self.image_channels:
            raise ValueError(
                f"transform: expected a Preprocessing of {self.image_channels} channels, got "
                f"{str(self.transform)[:100]}, which no "
                f"configuration describes"
            )
        dilations = [_plain(layer.dilation) for layer in layers]
        return {
            "out_channels": [int(layer.out_channels) for layer in layers],
            "ranks": [int(layer.rank) for layer in layers],
            "kernel_sizes": [_plain(layer.kernel_size) for layer in layers],
            "strides": [_plain(layer.stride) for layer in layers],
            "paddings": [_plain(layer.padding) for layer in layers],
            **({"dilations": dilations} if any(d != 1 for d in dilations) else {}),
            "temperature": float(self.temperature),
            "logit_bias": float(self.logit_bias),
            "norm": _one([layer.norm for layer in layers]),
            "eps": _one([float(layer.eps) for layer in layers]),
            "bias": _one([layer.bias is not None for layer in layers]),
            "image_channels": self.image_channels,
            "image_size": self.image_size,
            "preprocessing": self.transform.config(),
            "class_names": self.class_names,
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes] of images [N, image_channels, H, W] in [0, 1], unnormalised."""
        self.check_images(images)
        return self.head(self.run_layers(self.encoder(images)))

    def run_layers(self, activations: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Layers ``start`` to ``stop`` (excluded; None: all the rest) applied to what enters layer
        ``start``, [N, C, H, W].
        """
        for layer in self.layers[start:stop]:
            activations = layer(activations)
        return activations

    def send_back(self, activations: Sequence[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
        """``value``, one number for every output of the last layer [N, n, OH, OW], sent back through the
        transposed layers, whose weights are those that ``activations``, what enters each layer, generate: to
        the first of these, in its shape and dtype.
        """
        for layer, entering in zip(reversed(self.layers), reversed(activations), strict=True):
            value = layer.adjoint(entering, value.to(entering.dtype))
        return value

    def head(self, activations: torch.Tensor) -> torch.Tensor:
        """Class evidence maps [N, classes, H, W] -> logits [N, classes], summed and divided by T in float32
        at least.

        They have the dtype of the maps (sums of a network with a large T leave float16, logits do not), but
        are float32 under autocast: beside the bias, bfloat16 would tell hardly any two logits apart.
        """
        logits = self.pool(wide(activations)) / self.temperature + self.logit_bias
        return _as_maps(logits, activations)

    def explain(
        self,
        images: torch.Tensor,
        target: int | Sequence | torch.Tensor | None = None,
        *,
        layer: int | DAUConv2d | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> Explanation:
        """Exact contributions of pixels to logits: see ``coda_fast.explain.explain``."""
        return explain(self, images, target, layer=layer, memory_budget=memory_budget)

    def explanation_mode(self):
        """Context in which gradients are rows of the global linear map: see
        ``coda_fast.explanation_mode``.
        """
        return explanation_mode(self)

    def check_images(self, images: torch.Tensor) -> None:
        """TypeError or ValueError unless ``images`` is a floating-point [N, image_channels, H, W]."""
        if isinstance(images, torch.fx.Proxy):
            return  # traced: nothing is known of it
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if not images.dtype.is_floating_point:
            raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.image_channels:
            raise ValueError(
                f"images: expected [N, {self.image_channels}, H, W], got shape {list(images.shape)}"
            )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"


def _as_maps(logits, maps):
    return logits if autocasting(maps.device.type) else logits.to(maps.dtype)


# What asks about a dtype is one call in a graph of torch.fx, where it is not known yet.
torch.fx.wrap("wide")
torch.fx.wrap("_as_maps")


# Published configurations (paper, appendix) and ours. "base": the rank that the override ``rank=`` replaces,
# others in proportion.
_S = dict(
    out_channels=[16, 16, 32, 32, 32, 64, 64, 64],
    kernel_sizes=[3] * 8 + [1],
    strides=[1, 1, 2, 1, 1, 2, 1, 1, 1],
)
_IMAGENET = dict(image_size=240, preprocessing=dict(resize=256, crop=240))
_L = dict(
    out_channels=[16, 32, 32, 64, 64, 64, 64, 64],
    kernel_sizes=[7] + [3] * 8,
    strides=[3, 1, 1, 2, 1, 1, 2, 1, 1],
)
_MODELS = {
    # name: (classes, layers, origin)
    "coda_s_cifar10": (
        10,
        dict(_S, ranks=[32] * 2 + [64] * 7, temperature=1000.0, image_size=32),
        "published",
    ),
    "coda_l_imagenet100": (
        100,
        dict(_L, ranks=[64] * 3 + [128] * 3 + [256] * 3, temperature=1e5, **_IMAGENET),
        "published",
    ),
    "coda_xs_digits": (
        10,
        dict(
            out_channels=[8, 16],
            ranks=[16, 32, 32],
            kernel_sizes=[3] * 3,
            strides=[1, 2, 1],
            temperature=40.0,
            image_size=8,
            image_channels=1,
        ),
        "coda_fast",
    ),
    "coda_xs_mnist": (
        10,
        dict(
            out_channels=[8, 16, 32],
            ranks=[16, 32, 32, 32],
            kernel_sizes=[3] * 3 + [1],
            strides=[2, 2, 1, 1],
            temperature=50.0,
            image_size=28,
            image_channels=1,
        ),
        "coda_fast",
    ),
    "coda_m_tinyimagenet": (
        200,
        dict(
            out_channels=[16, 32, 32, 64, 64, 64, 128, 128],
            ranks=[32] * 2 + [64] * 4 + [128] * 3,
            kernel_sizes=[3] * 8 + [1],
            strides=[1, 1, 2, 1, 1, 2, 1, 1, 1],
            temperature=5e3,
            image_size=64,
        ),
        "coda_fast",
    ),
    "coda_l_imagenet1k": (
        1000,
        dict(
            _L,
            kernel_sizes=[7] + [3] * 7 + [1],
            ranks=[64] * 3 + [128] * 3 + [256] * 3,
            temperature=1e5,
            **_IMAGENET,
        ),
        "coda_fast",
    ),
    "coda_xl_imagenet1k": (
        1000,
        dict(
            out_channels=[32, 64, 64, 128, 128, 128, 128, 128],
            ranks=[64] * 3 + [128] * 3 + [256] * 3,
            kernel_sizes=[7] + [3] * 7 + [1],
            strides=[3, 1, 1, 2, 1, 1, 2, 1, 1],
            temperature=1e5,
            **_IMAGENET,
        ),
        "coda_fast",
    ),
}


def list_models() -> dict[str, str]:
    """Names that ``create_model`` knows, with their origin: "published" (the paper's) or "coda_fast"
    (ours, not in the paper).
    """
    return {name: origin for name, (_, _, origin) in _MODELS.items()}


def create_model(
    name: str, *, num_classes: int | None = None, rank: int | None = None, **overrides
) -> CoDANet:
    """A CoDANet by name, with fresh weights.

    Args:
        name: a key of ``list_models()``.
        num_classes: width of the last layer.
        rank: rank of the first layer; the others keep their proportion to it (the paper's rank ablation: 4,
            8, 16, 144 for ``coda_s_cifar10``).
        overrides: any argument of ``CoDANet`` (``temperature=10`` is the paper's temperature ablation).

    Raises:
        ValueError: unknown name or values that do not fit. TypeError: unknown override.

    >>> import coda_fast
    >>> sum(p.numel() for p in coda_fast.create_model("coda_s_cifar10").parameters())
    7782816
    """
    return CoDANet(**model_config(name, num_classes=num_classes, rank=rank, **overrides))


def model_config(name: str, *, num_classes: int | None = None, rank: int | None = None, **overrides) -> dict:
    """The arguments of ``CoDANet`` that ``create_model`` calls it with; same arguments, ValueError as
    there.
    """
    if name not in _MODELS:
        raise ValueError(f"model: expected one of {', '.join(_MODELS)}, got {name!r}")
    classes, layers, _ = _MODELS[name]
    config = dict(
        layers, out_channels=[*layers["out_channels"], classes if num_classes is None else num_classes]
    )
    if rank is not None:
        if "ranks" in overrides:
            raise ValueError("rank and ranks: expected one of them, got both")
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank!r}")
        config["ranks"] = [max(1, rank * r // config["ranks"][0]) for r in config["ranks"]]
    if "image_size" in overrides:  # what is said of pictures is for the other size
        config.pop("preprocessing", None)
    return config | overrides


def _number(value, name):
    """``value`` as a finite float that float32 holds; numpy's numbers included."""
    try:
        if isinstance(value, bool | str | bytes | bytearray):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
    except OverflowError:
        number = math.inf
    if not abs(number) <= _FLOAT32.max:
        raise ValueError(f"{name}: expected a finite number, at most {_FLOAT32.max:.1e}, got {_short(value)}")
    return number


def _integer(value, name, most=None):
    try:
        number = integer(value)
    except TypeError:
        number = 0
    if number < 1 or number > (most or number):
        raise ValueError(
            f"{name}: expected a positive int{'' if most is None else f', at most {most}'}, got "
            f"{_short(value)}"
        )
    return number


def _short(value):
    text = (
        f"about 2**{value.bit_length() - 1}"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )
    return text if len(text) <= 100 else f"{text[:97]}..."


def _list(values, name, count=None):
    """``values`` as a list, of ``count`` entries."""
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
        raise TypeError(f"{name}: expected a list with an entry for each layer, got {_short(values)}")
    if count is not None and len(values) != count:
        raise ValueError(f"{name}: expected {count} entries, as many as out_channels, got {len(values)}")
    return list(values)


def _each(value, name, count):
    """One value for each layer, of a list or of one for all."""
    return (
        _list(value, name, count)
        if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        else [value] * count
    )


def _pairs(values, name, count, least=1):
    """Two numbers for each layer, or what ``padding`` may be besides."""
    found = []
    for index, value in enumerate(_list(values, name, count)):
        if not (isinstance(value, str) and name == "paddings"):
            value = pair(value, f"{name}[{index}]", least)
            if max(value) > MOST:
                raise ValueError(f"{name}[{index}]: expected at most {MOST}, got {_short(max(value))}")
        found.append(value)
    return found


def _names(values, count):
    if (
        isinstance(values, str | Mapping)
        or not hasattr(values, "__len__")
        or not all(isinstance(name, str) for name in values)
    ):
        raise ValueError(f"class_names: expected a list of strings, got {_short(values)}")
    if len(values) != count:
        raise ValueError(f"class_names: expected {count} names, one for each class, got {len(values)}")
    return list(values)


def _plain(value):
    """A pair of equal numbers as one number, so that configurations read like the published ones."""
    if isinstance(value, str):
        return value
    first, second = pair(value, "pair", least=0)
    return first if first == second else [first, second]


def _one(values):
    """One value where all layers have the same."""
    return values[0] if all(value == values[0] for value in values) else values
