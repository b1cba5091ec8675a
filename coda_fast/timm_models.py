"""A plug-in for timm: importing this module registers every model of ``coda_fast.list_models()`` with timm
under the same name, and later every model that ``coda_fast.register_model`` adds.

>>> import timm, coda_fast.timm_models
>>> timm.create_model("coda_s_cifar10", num_classes=100).num_classes
100
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from coda_fast import pretrained as shipped
from coda_fast import registry
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.models import CoDANet, create_model, model_config
from coda_fast.network import Network

try:
    from timm.data.constants import DEFAULT_CROP_PCT
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

    from coda_fast.timm_networks import POOLS, TimmCoDANet, timm_class
except ImportError as error:
    raise ImportError(f"coda_fast.timm_models needs timm: pip install 'coda-fast[timm]' ({error})") from error

__all__ = ["POOLS", "TimmCoDANet"]  # register_model adds the names of the models


def _default_cfg(name):
    """What timm's data pipeline and checkpoint loading need to know about a model. Mean 0 and standard
    deviation 1, because CoDA-Nets take pixels in [0, 1].
    """
    network = create_model(name, device="meta")
    cfg, layers = _data_cfg(network.transform), network.dau_layers()
    if size := cfg.get("input_size"):
        sizes = network.layer_sizes(*size[1:])
        names = list(sizes)
        last = names.index(network.classifier) if network.classifier else len(names)
        cfg["pool_size"] = sizes[names[last - 1]][1:] if last else network.encoded_size(*size[1:])
    if name in shipped.names():
        cfg["file"] = str(shipped.FOLDER / f"{name}.safetensors")
    return cfg | dict(
        num_classes=network.num_classes,
        first_conv=next(iter(layers), network.classifier),
        classifier=network.classifier,
    )


def _data_cfg(transform):
    """Preprocessing in timm's terms: with them, timm's pipeline does the same as ``transform`` to an upright,
    opaque 8-bit picture.
    """
    channels, crop = transform.channels, transform.crop
    cfg = dict(
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        interpolation=transform.interpolation,
        crop_mode="center",
        crop_pct=1.0,
    )
    if crop is None:  # timm always crops; without input_size it uses its own default
        return cfg
    share = crop / transform.resize
    if math.floor(crop / share) != transform.resize:  # timm computes the size to resize to like this
        share = math.nextafter(share, 0.0)
    return cfg | dict(input_size=(channels, crop, crop), crop_pct=share)


def _transform_of(cfg, transform):
    """The inverse: the preprocessing that a timm configuration, perhaps of a checkpoint, describes;
    ``transform`` itself if it describes none.
    """
    height, width = (cfg.get("input_size") or (0, 0, 1))[1:]
    if height != width or (cfg.get("crop_mode") or "center") != "center":
        return transform
    resize = math.floor(height / (cfg.get("crop_pct") or DEFAULT_CROP_PCT))
    try:
        return Preprocessing(
            transform.channels, resize, height, cfg.get("interpolation") or transform.interpolation
        )
    except ValueError:  # such as timm's interpolation "random"
        return transform


def _network(name, *, num_classes, in_chans, global_pool="sum", drop_rate=0.0, **overrides):
    config = model_config(name, num_classes=num_classes or None, image_channels=in_chans, **overrides)
    kind = timm_class(registry.model(name).network)
    if issubclass(kind, TimmCoDANet):
        return kind(**config, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate)
    if drop_rate:
        raise ValueError(f"drop_rate: expected 0 for {name}, whose features have no dropout, got {drop_rate}")
    model = kind(**config)
    if (num_classes, global_pool) != (model.num_classes, "sum"):
        model.reset_classifier(num_classes, global_pool)
    return model


def _fit_state_dict(state_dict, model):
    """Pretrained tensors for ``model``, without the classifier if it is for another number of classes.
    Weights for other image channels are refused.
    """
    first = state_dict.get("layers.0.reduction_weight") if isinstance(model, TimmCoDANet) else None
    if first is not None and first.shape[1] != model.encoded_channels and model.stem_name is None:
        # timm would sum the weights over colours; here that keeps z, but the dynamic weights would have
        # another norm
        raise ValueError(
            f"in_chans: expected {first.shape[1] // 2} as in the pretrained weights, got {model.in_chans}"
        )
    if model.num_classes == model.pretrained_cfg["num_classes"]:
        return state_dict
    classifier = model.pretrained_cfg["classifier"]
    return {key: tensor for key, tensor in state_dict.items() if not key.startswith(f"{classifier}.")}


def _entrypoint(name):
    def create(pretrained: bool = False, **options) -> nn.Module:
        if options.get("features_only") and not issubclass(registry.model(name).network, CoDANet):
            raise ValueError(f"features_only: expected a network with a sequence of stages, got {name}")
        known = None
        if pretrained and name in shipped.names():  # this also compares the checksum of the file
            known = shipped.create(name, device="meta").class_names
        names = options.get("class_names")
        if pretrained and names is not None and options.get("num_classes", len(names)) != len(names):
            del options["class_names"]  # timm read them from a folder, but other classes are asked for
        model = build_model_with_cfg(
            lambda **kwargs: _network(name, **kwargs),
            name,
            pretrained,
            pretrained_filter_fn=_fit_state_dict,
            feature_cfg={"out_indices": None, "feature_cls": "getter"},  # None: all
            **options,
        )
        if isinstance(model, Network):  # not a feature extractor
            if options.keys() & {"preprocessing", "image_size"}:
                model.pretrained_cfg = model.default_cfg = {
                    **model.pretrained_cfg,
                    **_data_cfg(model.transform),
                }
            else:
                model.transform = _transform_of(model.pretrained_cfg, model.transform)
            names = model.pretrained_cfg.get("label_names", known)  # timm's name for them
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
        f"``coda_fast.create_model({name!r})`` for timm; takes its ``options``, those of its class for timm "
        "and those of ``timm.create_model``."
    )
    return create


default_cfgs: dict[str, Any] = {}  # register_model looks here


def _enter(name):
    default_cfgs.update(generate_default_cfgs({name: _default_cfg(name)}))
    globals()[name] = register_model(_entrypoint(name))


registry.listen(_enter)
