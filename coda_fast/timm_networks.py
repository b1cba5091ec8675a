"""Networks with the interface that timm's training and tools expect."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from coda_fast import registry
from coda_fast._modes import calls_replaced
from coda_fast.explanation import Explanation
from coda_fast.hybrid import CAMNet
from coda_fast.models import CoDANet
from coda_fast.network import Network
from coda_fast.nn import DAUConv2d, SumPool2d

POOLS = {
    "sum": SumPool2d,
    "avg": lambda: SelectAdaptivePool2d(pool_type="avg", flatten=True),
    "": nn.Identity,
}


class _Classifying(Network):
    """What every network for timm has. List this class before that of the network among the bases."""

    num_features: int  # channels that enter the classifier
    global_pool: str  # a key of POOLS

    @property
    def in_chans(self) -> int:
        return self.image_channels

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier) if self.num_classes else nn.Identity()

    def head(self, activations: torch.Tensor) -> torch.Tensor:
        return super().head(activations) if self.num_classes else self.pool(activations)

    def config(self) -> dict:
        self._require_classifier()
        return super().config()

    def explain(self, images: torch.Tensor, target=None, **options) -> Explanation:
        self._require_classifier()
        return super().explain(images, target, **options)

    def _require_classifier(self):
        if not self.num_classes:
            raise ValueError("model: expected a network with a classifier, got one with num_classes=0")

    def _set_pool(self, num_classes, global_pool):
        """Check both arguments, set the pooling, and drop class names that no longer fit."""
        if global_pool is None:
            global_pool = "sum" if num_classes else self.global_pool
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(f"num_classes: expected an int of at least 0, got {num_classes!r}")
        if global_pool not in POOLS:
            raise ValueError(
                f"global_pool: expected one of {', '.join(map(repr, POOLS))}, got {global_pool!r}"
            )
        if num_classes and global_pool != "sum":
            raise ValueError(
                'global_pool: expected "sum" with a classifier (CoDA-Nets sum evidence over pixels), got '
                f"{global_pool!r}"
            )
        self.global_pool, self.pool = global_pool, POOLS[global_pool]().train(self.training)
        if self.class_names is not None and len(self.class_names) != num_classes:
            self.class_names = None


class TimmNetwork(_Classifying):
    """A network of any structure with timm's interface, except what needs a sequence of stages:
    ``features_only`` and gradient checkpointing. ``timm_class`` makes the class for timm of a network.

    Features are the input of the layer that the network names as its ``classifier``. Without a classifier it
    returns features; explaining or saving it then raises a ValueError.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.global_pool = "sum"
        self._made_with = self.config()
        self.num_features = self.get_submodule(self.classifier).in_channels if self.classifier else 0

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As ``TimmCoDANet.reset_classifier``; also a ValueError if the network names no classifier."""
        if self.classifier is None:
            raise ValueError(
                f"num_classes: expected a network that names its classifier, got {type(self).__name__}"
            )
        self._set_pool(num_classes, global_pool)
        like, fresh = next(self.parameters()), nn.Identity()
        if num_classes:
            kind = registry.class_of(self)
            config = kind.adapted(self._made_with, num_classes) | {"class_names": None}
            fresh = kind(**config, device=like.device, dtype=like.dtype).get_submodule(self.classifier)
        owner, _, name = self.classifier.rpartition(".")
        setattr(self.get_submodule(owner), name, fresh.train(self.training))
        self._num_classes = num_classes

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The classifier's input, [N, num_features, H', W'], for images [N, in_chans, H, W] in [0, 1]."""
        self.check_images(images)
        classifier = self.get_classifier()
        if isinstance(self, CAMNet) and self.num_classes:
            return self.features(self.encoder(images))
        skip = lambda layer, input: input if layer is classifier else layer.forward(input)
        with calls_replaced(skip):
            return self.evidence(self.encoder(images))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of features, or with ``pre_logits`` the features pooled."""
        return self.pool(features) if pre_logits else self.head(self.get_classifier()(features))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Raise a ValueError if ``enable``: there is no gradient checkpointing."""
        if enable:
            raise ValueError(f"enable: expected False, {type(self).__name__} has no gradient checkpointing")


@functools.cache
def timm_class(network: type[Network]) -> type[Network]:
    """The class for timm that belongs to a class of networks."""
    if network is CoDANet:
        return TimmCoDANet
    base = TimmCoDANet if issubclass(network, CoDANet) else TimmNetwork
    return type(f"Timm{network.__name__}", (base, network), {"__module__": __name__})


def __getattr__(name):
    """The classes that ``timm_class`` makes, by name, where pickle looks for them."""
    if (network := registry.classes().get(name.removeprefix("Timm"))) and name.startswith("Timm"):
        return timm_class(network)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TimmCoDANet(_Classifying, CoDANet):
    """A CoDANet with timm's interface; the last DAU layer is the classifier, the layers before it are the
    features.

    With a classifier it is a CoDANet with the same weights: ``explain``, ``coda_fast.save``, losses and
    evaluation work on it. Without one, or as a feature extractor, it returns features; explaining or saving
    it then raises a ValueError.

    Args:
        args, options: as for ``CoDANet``, including the classifier.
        num_classes: 0 leaves the classifier out; None: the last of ``out_channels``.
        global_pool: "sum", as CoDA-Nets are defined; without a classifier also "avg" and "" (none, [N, C, H,
            W]).
        drop_rate: dropout rate of the features before the classifier, in training.

    Attributes: ``feature_info``, one entry for each run of feature layers of the same resolution (its last
    layer); ``num_features`` and ``head_hidden_size``, the channels of the features.
    """

    def __init__(
        self,
        *args: Any,
        num_classes: int | None = None,
        global_pool: str = "sum",
        drop_rate: float = 0.0,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self.global_pool, self.head_drop, self.grad_checkpointing = "sum", nn.Dropout(drop_rate), False
        last = self.layers[-1]
        self._classifier_options = {
            name: getattr(last, name)
            for name in (
                "kernel_size",
                "stride",
                "padding",
                "dilation",
                "rank",
                "norm",
                "eps",
                "backend",
                "save_contraction",
            )
        } | {"bias": last.bias is not None}
        self._set_features(len(self.layers) - 1)
        num_classes = last.out_channels if num_classes is None else num_classes
        if (num_classes, global_pool) != (last.out_channels, "sum"):
            self.reset_classifier(num_classes, global_pool)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of units of the classifier; 0 without one."""
        return self.layers[-1].out_channels if len(self.layers) > self.depth else 0

    @property
    def num_features(self) -> int:  # type: ignore[override]
        """The number of channels that enter the classifier."""
        return self.layers[self.depth - 1].out_channels if self.depth else self.encoded_channels

    @property
    def classifier(self) -> str:  # type: ignore[override]
        """The name of the layer that outputs the classes."""
        return f"layers.{self.depth}"

    def _set_features(self, depth):
        """Make the first ``depth`` layers the features."""
        self.depth, self.feature_info, reduction = depth, [], self.encoded_stride()
        for index, layer in enumerate(self.layers[:depth]):
            reduction *= max(layer.stride)
            info = {"num_chs": layer.out_channels, "reduction": reduction, "module": f"layers.{index}"}
            if self.feature_info and self.feature_info[-1]["reduction"] == reduction:
                self.feature_info[-1] = info
            else:
                self.feature_info.append(info)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for ``num_classes`` with fresh weights (0: by none). ``global_pool``:
        None keeps the pooling, except that a classifier has "sum".

        Raises:
            ValueError: the number of classes or the pooling is invalid, or the pooling does not go with a
                classifier.
        """
        self._set_pool(num_classes, global_pool)
        like = next(self.parameters(), torch.empty(0))
        del self.layers[self.depth :]
        if num_classes:
            classifier = DAUConv2d(
                self.num_features,
                num_classes,
                **self._classifier_options,
                device=like.device,
                dtype=like.dtype,
            )
            self.layers.append(classifier.train(self.training))

    def run_layers(self, activations: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The output of layers ``start`` to ``stop`` (exclusive)."""
        for index in range(len(self.layers))[start:stop]:
            layer = self.layers[index]
            if index == self.depth:
                activations = self.head_drop(activations)
            if self.grad_checkpointing and torch.is_grad_enabled() and not layer.explaining:
                activations = checkpoint(layer, activations, use_reentrant=False)
            else:
                activations = layer(activations)
        return activations

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, num_features, H', W'] of images [N, in_chans, H, W] in [0, 1], unnormalised."""
        self.check_images(images)
        return self.run_layers(self.encoder(images), 0, self.depth)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of features, or with ``pre_logits`` the features pooled."""
        return self.pool(features) if pre_logits else self.head(self.run_layers(features, self.depth))

    def forward_intermediates(
        self,
        images: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features at ``indices`` of ``feature_info`` (an int: so many last ones; None: all), after the final
        features unless ``intermediates_only``. There is no norm to apply. ``output_fmt`` must be "NCHW", else
        a ValueError is raised.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt: expected "NCHW", got {output_fmt!r}')
        self.check_images(images)
        taken, last = feature_take_indices(len(self.feature_info), indices)
        features, done, found = self.encoder(images), 0, []
        for index, end in enumerate(self._ends()[: last + 1]):
            features, done = self.run_layers(features, done, end), end
            if index in taken:
                found.append(features)
        if intermediates_only:
            return found
        return features if stop_early else self.run_layers(features, done, self.depth), found

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last of ``indices``, and the classifier if a layer is dropped or if
        ``prune_head``. Return the absolute indices.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        end = self._ends()[last]
        if prune_head or end < self.depth:
            self._set_features(end)
            self.reset_classifier(0, "")
        return taken

    def _ends(self):
        """The number of layers up to each entry of ``feature_info``."""
        return [int(info["module"].rpartition(".")[2]) + 1 for info in self.feature_info]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the input of each layer and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The layers as groups of parameters, in order, for layer-wise learning rates."""
        return {"blocks": r"^layers\.(\d+)\."}
