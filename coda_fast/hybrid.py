"""Hybrid CoDA-Nets: DAU layers on the features of a conventional network (arXiv:2109.13004).

The logits are a linear map of the features at the joint, which ``explain`` returns exactly. How the stem
computes the features from the image is not explained: their contributions are placed on the image at the
centres of their receptive fields.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coda_fast import _arguments, registry
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.models import CoDANet
from coda_fast.network import LOGIT_BIAS, Network
from coda_fast.nn import DAUConv2d, SplitSigns
from coda_fast.placement import Placement
from coda_fast.stems import PRETRAINED, Stem

TEMPERATURE = 100.0
FRESH = "fresh"


class FeatureEncoder(nn.Module):
    """Images [N, C, H, W] -> encoded features of a stem: [N, 2 C', h, w] if they have both signs (see
    ``coda_fast.nn.SplitSigns``), else the features themselves, [N, C', h, w].
    """

    def __init__(self, stem: Stem):
        super().__init__()
        self.stem, self.signs = stem, _encoding(stem.signed)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, 2 C', h, w] or [N, C', h, w]."""
        return self.signs(self.stem(images))


def _encoding(signed):
    return SplitSigns() if signed else nn.ReLU()


class _WithStem(Network):
    """What networks with a stem share. List this class before that of the network among the bases. ``stem``
    None means that there is none: the joint is at the image, and the network is an ordinary one.
    """

    @property
    def stem(self) -> Stem | None:
        """The conventional part of the network."""
        return getattr(self.encoder, "stem", None)

    @property
    def stem_name(self) -> str | None:
        """See ``DynamicLinear.stem_name``: its name and the stage after which it is cut."""
        return None if self.stem is None else self.stem.in_words()

    @property
    def encoded_channels(self) -> int:
        """See ``DynamicLinear.encoded_channels``: two for each channel of signed features."""
        return super().encoded_channels if self.stem is None else (1 + self.stem.signed) * self.stem.channels

    @property
    def signed(self) -> bool:
        """See ``DynamicLinear.signed``."""
        return self.stem is None or self.stem.signed

    def encoded_size(self, height: int, width: int) -> tuple[int, int]:
        """See ``DynamicLinear.encoded_size``."""
        return (height, width) if self.stem is None else self.stem.size(height, width)

    def encoded_stride(self) -> int:
        """Pixels from one entry of the encoded image to the next one, the larger of rows and columns."""
        return 1 if self.stem is None else self.stem.stride()

    def encoded_placement(self, height: int, width: int) -> Placement | None:
        """Where features at the joint lie in an image of ``height x width`` pixels."""
        return None if self.stem is None else self.stem.placement(height, width)

    def check_mode(self) -> None:
        """See ``DynamicLinear.check_mode``."""
        if self.stem is not None and (names := self.stem.random()):
            raise ValueError(
                f"model: expected evaluation mode (model.eval()), in which features do not depend on other "
                f"images, got {names[0]} of the stem, which uses them or chance as it is now"
            )

    def config(self) -> dict:
        """The constructor's arguments as plain JSON values, without ``stem_weights``, device and dtype.

        Raises:
            ValueError: the stem is a module without a name, or as ``Network.config``.
        """
        stem = {"stem": None} if self.stem is None else self.stem.config()
        return {**stem, "stem_weights": None, **super().config()}


def _made_stem(stem, weights, **options):
    """A stem of these arguments of ``Stem``; None if there is none."""
    if stem is None or isinstance(stem, Stem):
        return stem
    if weights == "auto":
        weights = PRETRAINED if isinstance(stem, str) and "." in stem else None
    return Stem(stem, weights=None if weights == FRESH else weights, **options)


def _defaults(stem, preprocessing, image_size):
    """The preprocessing of a network: that of its stem, unless another one is given."""
    if preprocessing is None and image_size is None and stem is not None and stem.preprocessing is not None:
        return stem.preprocessing, stem.preprocessing.crop
    return preprocessing, image_size


class HybridCoDANet(_WithStem, CoDANet):
    """A CoDA-Net on the features of a conventional network (arXiv:2109.13004): ``logits =
    sum_pixels(DAU_L(... DAU_1([f+, f-]))) / T + logit_bias`` with the features ``f = stem(images)``.

    The logits are an exact linear map of ``[f+, f-]``, the positive and the negative parts of the features
    (of features after a ReLU, ``f`` alone): ``explain`` gives the contribution of every feature, and
    ``explain(...).pixel_map`` places them on the image. With ``stem=None`` it is a CoDANet, to the last bit.

    Args:
        stem: a timm model by name ("resnet18.a1_in1k"), a stem registered by ``coda_fast.register_stem``, a
            module that turns images into features [N, C', h, w], or None.
        out_channels, ranks, kernel_sizes, strides, paddings: of the DAU layers, as in ``CoDANet``.
        at: the stage after which the stem is cut, by index or name (``coda_fast.stems.Stem``).
        frozen: whether the stem is not trained; it is then always in evaluation mode.
        stem_weights: "auto": timm's weights if the name has a tag such as ".a1_in1k", else fresh ones;
            "pretrained", a file, or None or "fresh" (fresh ones, or those of the module): see ``Stem``.
        stem_options: arguments of ``timm.create_model``, such as ``img_size``, or of the registered stem.
        mean, std: with which the stem normalises images in [0, 1]; None: timm's for this model.
        signed: whether features have both signs; None: they do, unless the stem ends with a ReLU.
        options: as in ``CoDANet``. Without ``image_size`` and ``preprocessing``, those of timm are taken.

    Raises:
        ValueError, TypeError, ImportError, OSError, CheckpointError: as ``CoDANet`` and ``Stem``.

    >>> import torch, coda_fast
    >>> model = HybridCoDANet("convolutions", [32, 10], [8, 8], [3, 1], [1, 1], at=1, temperature=10).eval()
    >>> model.explain(torch.rand(2, 3, 32, 32)).contribution_map.shape
    torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self,
        stem: str | nn.Module | None,
        out_channels: Sequence[int],
        ranks: Sequence[int],
        kernel_sizes: Sequence[int | Sequence[int]],
        strides: Sequence[int | Sequence[int]],
        paddings: Sequence[int | Sequence[int]] | None = None,
        *,
        at: int | str = -1,
        frozen: bool = True,
        stem_weights: str | os.PathLike | None = "auto",
        stem_options: Mapping[str, Any] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        signed: bool | None = None,
        image_channels: int = 3,
        image_size: int | None = None,
        preprocessing: Preprocessing | Mapping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        made = _made_stem(
            stem,
            stem_weights,
            at=at,
            frozen=frozen,
            options=stem_options,
            mean=mean,
            std=std,
            signed=signed,
            image_channels=image_channels,
            device=device,
            dtype=dtype,
        )
        preprocessing, image_size = _defaults(made, preprocessing, image_size)
        super().__init__(
            out_channels,
            ranks,
            kernel_sizes,
            strides,
            paddings,
            encoder=None if made is None else FeatureEncoder(made),
            image_channels=image_channels,
            image_size=image_size,
            preprocessing=preprocessing,
            device=device,
            dtype=dtype,
            **options,
        )

    def head_network(self) -> CoDAHead:
        """The DAU layers as a network of features, with which they share their parameters.

        Raises:
            ValueError: there is no stem.
        """
        if self.stem is None:
            raise ValueError("head_network: expected a network with a stem, got one without")
        return CoDAHead.of(self)

    @classmethod
    def around(cls, stem: Stem, head: CoDAHead) -> HybridCoDANet:
        """The network of a stem and a head, with which it shares parameters: see ``CoDAHead.on``."""
        config = head.config()
        widths = [*config.pop("channels"), config.pop("num_classes")]
        for name in ("in_channels", "signed"):
            del config[name]
        made = cls(stem, widths, image_channels=stem.image_channels, **config, device="meta")
        made.layers = head.layers
        return made


class CoDAHead(CoDANet):
    """A classifier of features: DAU layers in place of the pooling and the linear layer of a conventional
    network. Its input are features [N, C, h, w] without a range, its output are logits [N, classes].

    With timm: ``nn.Sequential(timm.create_model("resnet18", pretrained=True, num_classes=0, global_pool=""),
    CoDAHead(512, 10))``, or ``backbone.fc = CoDAHead(512, 10)`` in a model made with ``global_pool=""``.
    ``explain(features)`` decomposes logits into contributions of features; ``on`` gives a network of images.

    Args:
        in_channels: C of the features.
        num_classes: the number of logits.
        ranks: of the DAU layers; their number is that of the layers.
        channels: of the output of each layer but the last; None: 64.
        kernel_sizes, strides: of the layers; None: 3, and 1 for the last one; stride 1.
        signed: whether features have both signs; False, as after a ReLU, halves the first layer, and makes
            negative features zero.
        temperature, options: as in ``CoDANet``.

    Raises:
        ValueError, TypeError: as ``CoDANet``.

    >>> import torch, coda_fast
    >>> head = CoDAHead(512, 10, ranks=[16, 16])
    >>> head(torch.randn(2, 512, 7, 7)).shape
    torch.Size([2, 10])
    """

    value_range = None

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        ranks: Sequence[int] = (32, 32),
        channels: Sequence[int] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        strides: Sequence[int | Sequence[int]] | None = None,
        paddings: Sequence[int | Sequence[int]] | None = None,
        *,
        signed: bool = True,
        temperature: float = TEMPERATURE,
        **options: Any,
    ):
        count = len(_arguments.list_of(ranks, "ranks"))
        super().__init__(
            [*([64] * (count - 1) if channels is None else channels), num_classes],
            ranks,
            [3] * (count - 1) + [1] if kernel_sizes is None else kernel_sizes,
            [1] * count if strides is None else strides,
            paddings,
            temperature=temperature,
            encoder=_encoding(signed),
            image_channels=in_channels,
            **options,
        )

    def config(self) -> dict:
        """The constructor's arguments as plain JSON values, without device and dtype."""
        config = super().config()
        *channels, num_classes = config.pop("out_channels")
        for name in ("image_size", "preprocessing"):
            del config[name]
        return {
            "in_channels": config.pop("image_channels"),
            "num_classes": num_classes,
            "channels": channels,
            **config,
            "signed": self.signed,
        }

    @property
    def signed(self) -> bool:
        """See ``DynamicLinear.signed``."""
        return isinstance(self.encoder, SplitSigns)

    @property
    def encoded_channels(self) -> int:
        """See ``DynamicLinear.encoded_channels``."""
        return (1 + self.signed) * self.image_channels

    @classmethod
    def adapted(cls, config: dict, num_classes: int | None = None, rank: int | None = None) -> dict:
        """As in ``CoDANet``."""
        changed = super().adapted({"out_channels": [0], **config}, num_classes, rank)
        del changed["out_channels"]
        return changed | ({} if num_classes is None else {"num_classes": num_classes})

    @classmethod
    def of(cls, model: CoDANet) -> CoDAHead:
        """The DAU layers of a hybrid network as a head, with which they share their parameters."""
        config = CoDANet.config(model)
        *channels, num_classes = config.pop("out_channels")
        for name in ("image_channels", "image_size", "preprocessing"):
            del config[name]
        signed, encoded = model.signed, model.encoded_channels
        head = cls(
            encoded // (1 + signed), num_classes, channels=channels, signed=signed, **config, device="meta"
        )
        head.layers = model.layers
        return head.train(model.training)

    def on(self, backbone: nn.Module, **options: Any) -> HybridCoDANet:
        """The network of images that feeds this head with the features of ``backbone``, a module of images
        in [0, 1]; both are shared, not copied. ``options`` are those of ``coda_fast.stems.Stem``, such as
        ``mean`` and ``std``, by which the network normalises its input, and ``frozen=False``, without which
        the backbone's parameters do not require a gradient any more.

        Raises:
            ValueError, TypeError: as ``Stem``, or the features do not have the head's channels.
        """
        stem = Stem(backbone, **{"signed": self.signed, **options})
        if stem.channels != self.image_channels:
            raise ValueError(
                f"backbone: expected features of {self.image_channels} channels, got {stem.channels}"
            )
        return HybridCoDANet.around(stem, self)


class CAMNet(_WithStem, Network):
    """A conventional network: a stem, a linear map of its features to classes at every pixel, and a sum over
    pixels. With ``temperature`` the number of these pixels it is global average pooling and a linear layer.

    It is the hybrid network without DAU layers. Its explanation are the class activation maps of
    arXiv:1512.04150, the exact contributions of the last features, times 1/T.

    Args:
        stem, at, stem_weights, stem_options, mean, std, signed: as in ``HybridCoDANet``, but None is no stem.
        frozen: whether only the linear map is trained.
        options: as in ``Network``.

    Raises:
        ValueError, TypeError, ImportError, OSError, CheckpointError: as ``Network`` and ``Stem``.

    >>> import torch, coda_fast
    >>> CAMNet("convolutions", num_classes=10, temperature=16)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    classifier = "linear"

    def __init__(
        self,
        stem: str | nn.Module,
        *,
        at: int | str = -1,
        frozen: bool = False,
        stem_weights: str | os.PathLike | None = "auto",
        stem_options: Mapping[str, Any] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        signed: bool | None = None,
        image_channels: int = 3,
        image_size: int | None = None,
        preprocessing: Preprocessing | Mapping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_classes: int,
        temperature: float,
        logit_bias: float = LOGIT_BIAS,
        class_names: Sequence[str] | None = None,
    ):
        made = _made_stem(
            stem,
            stem_weights,
            at=at,
            frozen=frozen,
            options=stem_options,
            mean=mean,
            std=std,
            signed=signed,
            image_channels=image_channels,
            device=device,
            dtype=dtype,
        )
        if made is None:
            raise TypeError("stem: expected the name of a network or a module, got None")
        preprocessing, image_size = _defaults(made, preprocessing, image_size)
        super().__init__(
            num_classes=num_classes,
            temperature=temperature,
            logit_bias=logit_bias,
            image_channels=image_channels,
            image_size=image_size,
            preprocessing=preprocessing,
            class_names=class_names,
            encoder=FeatureEncoder(made),
        )
        self.linear = nn.Conv2d(made.channels, num_classes, 1, bias=False, device=device, dtype=dtype)
        self.pool = self._modules.pop("pool")  # registered last, because it is called last

    def evidence(self, encoded: torch.Tensor) -> torch.Tensor:
        """See ``DynamicLinear.evidence``."""
        return self.linear(self.features(encoded))

    def features(self, encoded: torch.Tensor) -> torch.Tensor:
        """The features [N, C', h, w] that ``encoded`` encodes."""
        if not self.signed:
            return encoded
        positive, negative = encoded.chunk(2, 1)
        return positive - negative

    def explanation_mode(self) -> contextlib.AbstractContextManager:
        """There is nothing to change: the network is linear in its features."""
        return contextlib.nullcontext(self)

    def cut(self, encoded: torch.Tensor, layer: DAUConv2d | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DynamicLinear.cut``."""
        encoded = encoded.detach().requires_grad_()
        with torch.enable_grad():
            return encoded, self.evidence(encoded)

    def linearise(self, encoded: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """See ``DynamicLinear.linearise``."""

        def pull_back(value):
            sent = F.conv_transpose2d(value, self.linear.weight)
            return torch.cat((sent, -sent), 1) if self.signed else sent

        return self.evidence(encoded), pull_back

    def placement(self, layer: int | str, height: int, width: int) -> Placement | None:
        """See ``DynamicLinear.placement``."""
        return self.encoded_placement(height, width)

    def layer_sizes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Of the linear map; see ``DynamicLinear.layer_sizes``."""
        return {"linear": (self.num_classes, *self.encoded_size(height, width))}


registry.add_class(CoDAHead)
registry.add(
    "coda_hybrid",
    HybridCoDANet,
    dict(
        stem="resnet18.a1_in1k",
        at=2,
        out_channels=[64, 64, 1000],
        ranks=[32, 32, 32],
        kernel_sizes=[3, 3, 1],
        strides=[2, 1, 1],
        temperature=TEMPERATURE,
    ),
    "coda_fast",
)
registry.add(
    "coda_cam", CAMNet, dict(stem="resnet18.a1_in1k", num_classes=1000, temperature=49.0), "coda_fast"
)
