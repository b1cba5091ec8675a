"""The interactive view of one picture in a page: maps of its classes, their differences and sums.

``describe`` explains a picture and collects all that the view needs, ``element`` is its HTML, and ``head`` is
what a page that shows views needs once. The page loads nothing from elsewhere; it works from the disk.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch

from coda_fast import baselines, plot
from coda_fast._classes import class_name, fits_no_class
from coda_fast.dynamic_linear import DynamicLinear, NoCut, need_network
from coda_fast.explain import batch_within, check_explainable
from coda_fast.safety import printable

# The default methods take a few passes per image; occlusion and RISE take thousands for a large one.
METHODS = ("IxG", "IntGrad", "GCam")
MOST_CLASSES = 20  # the classes that a view lists, unless more of them are to have a map
# Layers are explained for each class that has a map if that takes at most so many numbers (layers x classes x
# pixels), as for ten classes of a small picture; otherwise for the most likely class.
_LAYER_NUMBERS = 1 << 17
_SURROUNDINGS = 256  # the shorter side of the picture around a crop, in pixels


class Picture(NamedTuple):
    """A picture to show: its caption, the network's input [C, H, W] in [0, 1], the original picture if that
    differs, and the name of the network that explains it, if the page is to say it.
    """

    name: str
    image: torch.Tensor
    view: plot.View | None = None
    network: str | None = None


def describe(
    model: DynamicLinear,
    picture: Picture,
    *,
    classes: int | None = None,
    methods: Sequence[str] = METHODS,
    layers: bool = True,
) -> dict[str, Any]:
    """What a view shows of one picture, as values of JSON; ``element`` takes it.

    Args:
        model: the network, or a wrapper of it.
        picture: the picture, on any device.
        classes: how many of the most likely classes get a map; None: all, at most ``MOST_CLASSES``.
        methods: names of ``coda_fast.baselines`` whose maps of the most likely class are shown beside the
            network's own; two that are equal on a CoDA-Net share a map.
        layers: whether to add the contributions of what enters each layer; of the most likely class alone if
            those of all would take long.

    Returns:
        name, verdict (with the name of the network), height, width (of the network's input, in pixels),
        picture (PNG), surroundings (the picture around a crop, or None), class_count, logit_bias,
        temperature; classes: name, logit and probability of each class that is listed, the most likely first;
        levels: the image and then layers, each with its label, height, width, scale (the end of its colour
        scale, in logits), count (how many classes have a map, from the first) and maps
        [count, height, width]; methods: the same for one map, without count. errors of a level are
        completeness errors in logits. PNG and maps are base64, the latter of little-endian float32.

    Raises:
        ValueError: the number of classes or a method is not valid, the model cannot take the image, its
            logits are not finite, or the explanation does not fit in memory.
        ImportError: captum is missing, and ``methods`` names some that need it.
    """
    model = need_network(model)
    if classes is not None and not 1 <= classes <= model.num_classes:
        raise ValueError(f"classes: expected 1 to {model.num_classes}, got {classes}")
    attributions = {title: baselines.create(name, model) for title, name in columns(methods, model).items()}
    name, image = printable(picture.name), picture.image
    listed = min(MOST_CLASSES, model.num_classes) if classes is None else classes
    height, width = image.shape[-2:]
    check_explainable(model, height, width, name, listed)
    batch = image[None].to(next(model.parameters()))
    with torch.no_grad():
        logits = model(batch)[0]
    if not torch.isfinite(logits).all():
        raise ValueError(f"{name}: the network gives logits that are not finite")
    order = logits.topk(max(listed, min(MOST_CLASSES, model.num_classes))).indices
    target, best = order[None, :listed], order[None, :1]
    e = model.explain(batch, target)
    terms = "image" if e.stem is None else f"features of {e.stem}"
    size = f"{e.contribution_map.shape[3]} x {e.contribution_map.shape[2]}"
    levels = [_level(printable(f"{terms}, {size}"), e)]
    if layers:
        levels += _layers(model, batch, target)
    return {
        "name": name,
        "verdict": verdict(logits, model.class_names, picture.network),
        "height": height,
        "width": width,
        "picture": _png(_pixels(image)),
        "surroundings": _surroundings(picture.view),
        "class_count": model.num_classes,
        "logit_bias": float(model.logit_bias),
        "temperature": float(model.temperature),
        "classes": [
            {
                "name": printable(class_name(model.class_names, int(c))),
                "logit": float(logits[c]),
                "probability": float(logits[c].double().sigmoid()),
            }
            for c in order
        ],
        "levels": levels,
        "methods": [
            {"label": title, **_map(_within(method, model, image).attribute(batch, best)[0])}
            for title, method in attributions.items()
        ],
    }


def verdict(
    logits: torch.Tensor, class_names: Sequence[str] | None = None, network: str | None = None
) -> str:
    """What the network says of an image with ``logits`` [classes], in words: the most likely class and its
    probability, or that the image fits none (``fits_no_class``); and the name of the network, if it is given.
    """
    by = "" if network is None else f", explained by {printable(network)}"
    logits = logits.detach()
    best = int(logits.argmax())
    name = printable(class_name(None if class_names is None else list(class_names), best))
    sure = plot.probability(float(logits[best].sigmoid()))
    if not fits_no_class(logits):
        return f"{name} ({sure}){by}"
    if len(logits) == 1:
        return f"does not fit the only class, {name} ({sure}){by}"
    return f"fits none of the {len(logits)} classes: the most likely, {name}, has {sure}{by}"


def columns(methods: Sequence[str], model: DynamicLinear | None = None) -> dict[str, str]:
    """{title of a map: method}, in order, without duplicates, and without the network's own maps, which are
    always shown. Methods that are equal on ``model`` (None: a CoDA-Net without a stem) share a map.
    """
    found, pairs = {}, [(method, twin) for twin, method in baselines.twins_on(model).items()]
    for method in methods:
        pair = next((pair for pair in pairs if set(pair) <= set(methods) and method in pair), (method,))
        found[" = ".join(pair)] = pair[0]
    found.pop("Ours", None)
    return found


def head() -> str:
    """The style and the script that a page with views needs once, in any place. The script also starts views
    that are added to the page later.
    """
    style, script = (
        resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("viewer.css", "viewer.js")
    )
    return f"<style>\n{style}</style>\n<script>\n{script}</script>\n"


def element(payload: dict[str, Any]) -> str:
    """The HTML of one view, from a result of ``describe``. Without a script it is a heading."""
    text = json.dumps(payload, allow_nan=False)
    # "<" occurs in strings only; escaped, no name of a file or class can end the script or begin a comment
    text = text.replace("<", "\\u003c")
    heading = html.escape(f"{payload['name']}: {payload['verdict']}")
    return (
        f'<div class="coda-viewer">\n<h2>{heading}</h2>\n'
        f'<script type="application/json">{text}</script>\n</div>\n'
    )


def _layers(model, batch, target):
    """A level for each DAU layer after the first that cuts the network. In a CoDANet its label is the layer's
    number, counted from 1.
    """
    names = list(model.dau_layers().values())[1:]
    numbers = len(names) * target.shape[1] * batch.shape[2] * batch.shape[3]
    found = []
    for layer in names:
        with contextlib.suppress(NoCut):
            e = model.explain(batch, target if numbers <= _LAYER_NUMBERS else target[:, :1], layer=layer)
            height, width = e.contribution_map.shape[2:]
            number = e.layer if isinstance(e.layer, str) else e.layer + 1
            found.append(_level(f"layer {printable(number)}, {width} x {height}", e))
    return found


def _level(label, e):
    maps = e.contribution_map[0]
    return {"label": label, "count": len(maps), "errors": e.completeness_error[0].tolist(), **_map(maps)}


def _map(maps):
    """Maps [K, H, W] on one scale."""
    data = maps.detach().cpu().numpy().astype("<f4")
    return {
        "height": data.shape[1],
        "width": data.shape[2],
        "scale": plot.symmetric_scale(maps),
        "maps": base64.b64encode(data.tobytes()).decode(),
    }


def _within(attribution, model, image):
    """The method with a batch size that fits in memory for images of this size."""
    settings = dict(attribution.settings)
    if "batch_size" in settings:
        settings["batch_size"] = batch_within(model, *image.shape[1:], settings["batch_size"])
    return dataclasses.replace(attribution, settings=settings)


def _pixels(image):
    """[H, W] (grey) or [H, W, 3] uint8."""
    pixels = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    pixels = np.round(255 * pixels).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _surroundings(view):
    """The faded picture around what the network saw, and where that lies in it, as shares of its sides: left,
    top, right, bottom. None if the network saw all of it.
    """
    if view is None or not view.cropped:
        return None
    from PIL import Image

    grey = Image.fromarray(view.faded()[..., 0])
    width, height = grey.size
    if (share := _SURROUNDINGS / min(width, height)) < 1:
        grey = grey.resize([max(1, round(share * side)) for side in grey.size])
    left, top, right, bottom = view.box
    return {
        "picture": _png(np.asarray(grey)),
        "box": [left / width, top / height, right / width, bottom / height],
    }


def _png(pixels):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
