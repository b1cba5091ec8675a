"""Plug-in for timm: importing this module registers every model of ``coda_fast.list_models()`` under its own
name.

>>> import timm, coda_fast.timm_models
>>> timm.create_model("coda_s_cifar10", num_classes=100).num_classes
100
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from coda_fast.data.preprocessing import Preprocessing
from coda_fast.explain import Explanation
from coda_fast.models import CoDANet, create_model, list_models, model_config
from coda_fast.nn import DAUConv2d, SumPool2d

try:
    from timm.data.constants import DEFAULT_CROP_PCT
    from timm.layers import SelectAdaptivePool2d
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models._features import feature_take_indices
except ImportError as error:
    raise ImportError(f"coda_fast.timm_models needs timm: pip install 'coda-fast[timm]' ({error})") from error

__all__ = ["TimmCoDANet"]  # register_model adds the names of the models

POOLS = {
    "sum": SumPool2d,
    "avg": lambda: SelectAdaptivePool2d(pool_type="avg", flatten=True),
    "": nn.Identity,
}


class TimmCoDANet(CoDANet):
    """A CoDANet with timm's interface; the last DAU layer is the classifier, the layers before it are the
    features.

    With a classifier it is the CoDANet of the same weights: ``explain``, ``coda_fast.save``, losses and
    evaluation work on it. Without one, or as a feature extractor, it returns features, and there is nothing
    to explain or to save as a CoDANet: ValueError.

    Args:
        args, options: as for ``CoDANet``, the classifier included.
        num_classes: 0 leaves the classifier out; None: the last of ``out_channels``.
        global_pool: "sum", the definition; without a classifier also "avg" and "" (none, [N, C, H, W]).
        drop_rate: of the features before the classifier, while training.

    Attributes: ``feature_info``, one entry for each run of feature layers of the same resolution (its last
    layer); ``num_features`` and ``head_hidden_size``, the channels of the features.
    """

    def __init__(
        self,
        *args,
        num_classes: int | None = None,
        global_pool: str = "sum",
        drop_rate: float = 0.0,
        **options,
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
    def in_chans(self) -> int:
        return self.image_channels

    @property
    def num_classes(self) -> int:
        return self.layers[-1].out_channels if len(self.layers) > self.depth else 0

    @property
    def num_features(self) -> int:
        return self.layers[self.depth - 1].out_channels if self.depth else 2 * self.image_channels

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def _set_features(self, depth):
        """The first ``depth`` layers are the features."""
        self.depth, self.feature_info, reduction = depth, [], 1
        for index, layer in enumerate(self.layers[:depth]):
            reduction *= max(layer.stride)
            info = {"num_chs": layer.out_channels, "reduction": reduction, "module": f"layers.{index}"}
            if self.feature_info and self.feature_info[-1]["reduction"] == reduction:
                self.feature_info[-1] = info
            else:
                self.feature_info.append(info)

    def get_classifier(self) -> nn.Module:
        return self.layers[-1] if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A classifier with fresh weights for ``num_classes``, 0: none; ``global_pool``: None keeps the
        pooling, a classifier has "sum".

        Raises:
            ValueError: not a number of classes, not a pooling, or a pooling that a classifier cannot have.
        """
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
        self.global_pool, self.pool = global_pool, POOLS[global_pool]().train(self.training)
        if self.class_names is not None and len(self.class_names) != num_classes:
            self.class_names = None

    def run_layers(self, activations: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        for index in range(len(self.layers))[start:stop]:
            layer = self.layers[index]
            if index == self.depth:
                activations = self.head_drop(activations)
            if self.grad_checkpointing and torch.is_grad_enabled() and not layer.explaining:
                activations = checkpoint(layer, activations, use_reentrant=False)
            else:
                activations = layer(activations)
        return activations

    def head(self, activations: torch.Tensor) -> torch.Tensor:
        return super().head(activations) if self.num_classes else self.pool(activations)

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
        """Features at ``indices`` of ``feature_info`` (an int: the last ones; None: all), behind the final
        features unless ``intermediates_only``. There is no norm to apply, and ``output_fmt`` is "NCHW": else
        ValueError.
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
        """Drop the layers behind the last of ``indices``, and the classifier if a layer goes or
        ``prune_head``; the absolute indices.
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
        """While training, keep only what enters each layer and compute the rest again in the backward
        pass.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers as groups of parameters, in order, for layer-wise learning rates."""
        return {"blocks": r"^layers\.(\d+)\."}

    def config(self) -> dict:
        self._require_classifier()
        return super().config()

    def explain(self, images: torch.Tensor, target=None, **options) -> Explanation:
        self._require_classifier()
        return super().explain(images, target, **options)

    def _require_classifier(self):
        if not self.num_classes:
            raise ValueError("model: expected a network with a classifier, got one with num_classes=0")


def _default_cfg(name):
    """What timm's data pipeline and checkpoint loading ask about a model. Mean 0 and deviation 1:
    CoDA-Nets take pixels in [0, 1].
    """
    network = create_model(name, device="meta")
    cfg = _data_cfg(network.transform)
    pool_size = cfg["input_size"][1:]
    for layer in network.layers[:-1]:
        pool_size = layer.geometry.output_size(*pool_size)
    return cfg | dict(
        num_classes=network.num_classes,
        pool_size=pool_size,
        first_conv="layers.0",
        classifier=f"layers.{len(network.layers) - 1}",
    )


def _data_cfg(transform):
    """Preprocessing in timm's terms: with these, its pipeline makes of an upright, opaque picture of 8
    bits what ``transform`` does.
    """
    channels, crop = transform.channels, transform.crop
    cfg = dict(
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        interpolation=transform.interpolation,
        crop_mode="center",
        crop_pct=1.0,
    )
    if crop is None:  # timm crops always: to what the network's name says
        return cfg
    share = crop / transform.resize
    if math.floor(crop / share) != transform.resize:  # so timm finds the size to resize to
        share = math.nextafter(share, 0.0)
    return cfg | dict(input_size=(channels, crop, crop), crop_pct=share)


def _transform_of(cfg, transform):
    """The same the other way: what a configuration of timm, of a checkpoint perhaps, says of
    preprocessing.
    """
    height, width = cfg["input_size"][1:]
    if height != width or (cfg.get("crop_mode") or "center") != "center":
        return transform
    resize = math.floor(height / (cfg.get("crop_pct") or DEFAULT_CROP_PCT))
    try:
        return Preprocessing(
            transform.channels, resize, height, cfg.get("interpolation") or transform.interpolation
        )
    except ValueError:  # timm's "random", say
        return transform


def _network(name, *, num_classes, in_chans, global_pool="sum", drop_rate=0.0, **overrides):
    config = model_config(name, num_classes=num_classes or None, image_channels=in_chans, **overrides)
    return TimmCoDANet(**config, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)


def _fit_state_dict(state_dict, model):
    """Pretrained tensors for ``model``: those of a classifier for other classes left out, other image
    channels refused.
    """
    first = state_dict.get("layers.0.reduction_weight")
    if first is not None and first.shape[1] != 2 * model.in_chans:
        # not adapted as timm does: a sum over colours keeps z, but no weight has the norm that three colours
        # gave
        raise ValueError(
            f"in_chans: expected {first.shape[1] // 2} as in the pretrained weights, got {model.in_chans}"
        )
    if model.num_classes == model.pretrained_cfg["num_classes"]:
        return state_dict
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(f"layers.{model.depth}.")}


def _entrypoint(name):
    def create(pretrained: bool = False, **options) -> nn.Module:
        names = options.get("class_names")
        if pretrained and names is not None and options.get("num_classes", len(names)) != len(names):
            del options["class_names"]  # which timm read from a folder: of other classes than are asked for
        model = build_model_with_cfg(
            lambda **kwargs: _network(name, **kwargs),
            name,
            pretrained,
            pretrained_filter_fn=_fit_state_dict,
            feature_cfg={"out_indices": None, "feature_cls": "getter"},  # None: all
            **options,
        )
        if isinstance(model, TimmCoDANet):  # not one that gives features alone
            if options.keys() & {"preprocessing", "image_size"}:
                model.pretrained_cfg = model.default_cfg = {
                    **model.pretrained_cfg,
                    **_data_cfg(model.transform),
                }
            else:
                model.transform = _transform_of(model.pretrained_cfg, model.transform)
            names = model.pretrained_cfg.get("label_names")  # as timm calls them
            if model.class_names is not None:
                model.pretrained_cfg = model.default_cfg = {
                    **model.pretrained_cfg,
                    "label_names": model.class_names,
                }
            elif names is not None and len(names) == model.num_classes:
                model.class_names = list(names)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"``coda_fast.create_model({name!r})`` for timm; ``options``: of it, of ``TimmCoDANet`` and of "
        "``timm.create_model``."
    )
    return create


# register_model looks here
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in list_models()})
for _name in list_models():
    globals()[_name] = register_model(_entrypoint(_name))
