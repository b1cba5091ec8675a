"""CoDA-Nets: the network class and the named configurations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from coda_fast._autocast import autocasting
from coda_fast._geometry import pair
from coda_fast.explain import MEMORY_BUDGET, Explanation, explain
from coda_fast.functional import EPS
from coda_fast.nn import AddInverse, DAUConv2d, SumPool2d, explanation_mode

LOGIT_BIAS = math.log(0.1 / 0.9)


class CoDANet(nn.Module):
    r"""Convolutional Dynamic Alignment Network: ``logits = sum_pixels(DAU_L(... DAU_1([x, 1 - x]))) / T + logit_bias``.

    Dynamic linear: for a given image the logits (less the constant ``logit_bias``) are a linear map of the encoded image, which
    ``explain`` returns (arXiv:2104.00032). Train it with binary cross-entropy on one-hot targets.

    Args:
        out_channels, ranks, kernel_sizes, strides: one entry for each DAU layer; the last of ``out_channels`` is the number of
            classes.
        paddings: one entry for each layer; None: ``(k - 1) // 2``.
        temperature: T; larger T asks the layers for better alignment (paper, section 3.3).
        logit_bias: added to every logit; ``log(0.1 / 0.9)`` starts all classes at 10 %.
        norm, eps, bias, backend, save_contraction: as in ``DAUConv2d``, for all layers.
        image_channels: 3 for colour, 1 for grey images.
        image_size: native size in pixels: a hint for tools, any size is accepted.
        class_names: a hint for tools, one for each class.

    Raises:
        ValueError: lists of different lengths or values that a layer refuses.

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
        norm: str = "squash",
        eps: float = EPS,
        bias: bool = True,
        image_channels: int = 3,
        image_size: int | None = None,
        class_names: Sequence[str] | None = None,
        backend: str = "auto",
        save_contraction: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if paddings is None:
            paddings = [tuple((n - 1) // 2 for n in pair(k, "kernel_size")) for k in kernel_sizes]
        lists = {"ranks": ranks, "kernel_sizes": kernel_sizes, "strides": strides, "paddings": paddings}
        if not len(out_channels):
            raise ValueError("out_channels: expected at least one layer, got none")
        for name, values in lists.items():
            if len(values) != len(out_channels):
                raise ValueError(f"{name}: expected {len(out_channels)} entries, as many as out_channels, got {len(values)}")
        temperature, logit_bias = _number(temperature, "temperature"), _number(logit_bias, "logit_bias")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        if image_size is not None and not (isinstance(image_size, int) and image_size > 0):
            raise ValueError(f"image_size: expected a positive int or None, got {image_size!r}")
        if class_names is not None and not all(isinstance(name, str) for name in class_names):
            raise ValueError(f"class_names: expected a list of strings, got {class_names!r}")
        if class_names is not None and len(class_names) != out_channels[-1]:
            raise ValueError(f"class_names: expected {out_channels[-1]} names, one for each class, got {len(class_names)}")
        self.temperature, self.logit_bias = temperature, logit_bias
        self.image_channels, self.image_size = image_channels, image_size
        self.class_names = None if class_names is None else list(class_names)
        self.encoder = AddInverse()
        widths = [2 * image_channels, *out_channels]
        options = {
            "norm": norm, "eps": eps, "backend": backend, "save_contraction": save_contraction, "device": device, "dtype": dtype,
        }  # fmt: skip
        self.layers = nn.ModuleList(
            DAUConv2d(widths[i], widths[i + 1], kernel_sizes[i], strides[i], paddings[i], bias=bias, rank=ranks[i], **options)
            for i in range(len(out_channels))
        )
        self.pool = SumPool2d()

    @property
    def num_classes(self) -> int:
        return self.layers[-1].out_channels

    def config(self) -> dict:
        """The constructor's arguments, as plain JSON values (device, dtype, backend and save_contraction left out)."""
        layers = self.layers
        return {
            "out_channels": [layer.out_channels for layer in layers],
            "ranks": [layer.rank for layer in layers],
            "kernel_sizes": [_plain(layer.kernel_size) for layer in layers],
            "strides": [_plain(layer.stride) for layer in layers],
            "paddings": [_plain(layer.padding) for layer in layers],
            "temperature": self.temperature,
            "logit_bias": self.logit_bias,
            "norm": layers[0].norm,
            "eps": layers[0].eps,
            "bias": layers[0].bias is not None,
            "image_channels": self.image_channels,
            "image_size": self.image_size,
            "class_names": self.class_names,
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes] of images [N, image_channels, H, W] in [0, 1], unnormalised."""
        self.check_images(images)
        return self.head(self.run_layers(self.encoder(images)))

    def run_layers(self, activations: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Layers ``start`` to ``stop`` (excluded; None: all the rest) applied to what enters layer ``start``, [N, C, H, W]."""
        for layer in self.layers[start:stop]:
            activations = layer(activations)
        return activations

    def head(self, activations: torch.Tensor) -> torch.Tensor:
        """Class evidence maps [N, classes, H, W] -> logits [N, classes]; in float32 under autocast: beside the bias, bfloat16 would tell
        hardly any two logits apart.
        """
        if autocasting(activations.device.type) and activations.dtype != torch.float64:
            activations = activations.float()
        return self.pool(activations) / self.temperature + self.logit_bias

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
        """Context in which gradients are rows of the global linear map: see ``coda_fast.explanation_mode``."""
        return explanation_mode(self)

    def check_images(self, images: torch.Tensor) -> None:
        """TypeError or ValueError unless ``images`` is a floating-point [N, image_channels, H, W]."""
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
        if not images.dtype.is_floating_point:
            raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.image_channels:
            raise ValueError(f"images: expected [N, {self.image_channels}, H, W], got shape {list(images.shape)}")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"


# Published configurations (paper, appendix) and ours. "base": the rank that the override ``rank=`` replaces, others in proportion.
_S = dict(out_channels=[16, 16, 32, 32, 32, 64, 64, 64], kernel_sizes=[3] * 8 + [1], strides=[1, 1, 2, 1, 1, 2, 1, 1, 1])
_L = dict(out_channels=[16, 32, 32, 64, 64, 64, 64, 64], kernel_sizes=[7] + [3] * 8, strides=[3, 1, 1, 2, 1, 1, 2, 1, 1])
_MODELS = {
    # name: (classes, layers, origin)
    "coda_s_cifar10": (10, dict(_S, ranks=[32] * 2 + [64] * 7, temperature=1000.0, image_size=32), "published"),
    "coda_l_imagenet100": (100, dict(_L, ranks=[64] * 3 + [128] * 3 + [256] * 3, temperature=1e5, image_size=240), "published"),
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
        dict(_L, kernel_sizes=[7] + [3] * 7 + [1], ranks=[64] * 3 + [128] * 3 + [256] * 3, temperature=1e5, image_size=240),
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
            image_size=240,
        ),
        "coda_fast",
    ),
}


def list_models() -> dict[str, str]:
    """Names that ``create_model`` knows, with their origin: "published" (the paper's) or "coda_fast" (ours, not in the paper)."""
    return {name: origin for name, (_, _, origin) in _MODELS.items()}


def create_model(name: str, *, num_classes: int | None = None, rank: int | None = None, **overrides) -> CoDANet:
    """A CoDANet by name, with fresh weights.

    Args:
        name: a key of ``list_models()``.
        num_classes: width of the last layer.
        rank: rank of the first layer; the others keep their proportion to it (the paper's rank ablation: 4, 8, 16, 144 for
            ``coda_s_cifar10``).
        overrides: any argument of ``CoDANet`` (``temperature=10`` is the paper's temperature ablation).

    Raises:
        ValueError: unknown name or values that do not fit. TypeError: unknown override.

    >>> import coda_fast
    >>> sum(p.numel() for p in coda_fast.create_model("coda_s_cifar10").parameters())
    7782816
    """
    return CoDANet(**model_config(name, num_classes=num_classes, rank=rank, **overrides))


def model_config(name: str, *, num_classes: int | None = None, rank: int | None = None, **overrides) -> dict:
    """The arguments of ``CoDANet`` that ``create_model`` calls it with; same arguments, ValueError as there."""
    if name not in _MODELS:
        raise ValueError(f"model: expected one of {', '.join(_MODELS)}, got {name!r}")
    classes, layers, _ = _MODELS[name]
    config = dict(layers, out_channels=[*layers["out_channels"], classes if num_classes is None else num_classes])
    if rank is not None:
        if "ranks" in overrides:
            raise ValueError("rank and ranks: expected one of them, got both")
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank!r}")
        config["ranks"] = [max(1, rank * r // config["ranks"][0]) for r in config["ranks"]]
    return config | overrides


def _number(value, name):
    """``value`` as a finite float; numpy's numbers included."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


def _plain(value):
    """A pair of equal numbers as one number, so that configurations read like the published ones."""
    return value if isinstance(value, str) else value[0] if value[0] == value[1] else list(value)
