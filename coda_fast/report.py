"""A self-contained HTML page that shows for each image why a network decides as it does, beside other
attribution methods.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coda_fast import __version__, baselines, plot
from coda_fast._classes import class_name
from coda_fast._files import atomic_path
from coda_fast.data import Preprocessing, decode, listing
from coda_fast.dynamic_linear import NoCut, need_network
from coda_fast.explain import batch_within, check_explainable
from coda_fast.explain_files import as_network_sees
from coda_fast.network import Network
from coda_fast.safety import printable

SHOWN = 160  # the shorter side of a picture on the page, in pixels; enlarged pixels are sharp squares
# The default methods take a few passes per image; occlusion and RISE take thousands for a large one.
METHODS = ("IxG", "IntGrad", "GCam")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 76rem;
       padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: .2rem; }
  h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1rem; }
  h3 { font-size: .9rem; margin: 1rem 0 .3rem; color: #444; font-weight: 600; }
  p { margin: .3rem 0; max-width: 60rem; }
  .row { display: flex; flex-wrap: wrap; gap: 1rem; }
  .beside { display: flex; flex-wrap: wrap; column-gap: 3rem; }
  figure { margin: 0; }
  figure img { display: block; image-rendering: pixelated; border: 1px solid #ccc; }
  figcaption { font-size: .78rem; color: #444; margin-top: .25rem; }
  .bar { height: .8rem; width: 16rem; background: linear-gradient(90deg, #00f, #fff, #f00);
       border: 1px solid #ccc; display: inline-block; }
  .note { color: #555; font-size: .85rem; }
  table { border-collapse: collapse; font-size: .85rem; }
  td, th { padding: .15rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
<p>Every logit is the bias {{ bias }} plus the sum of the contributions of all pixels, exactly;
the completeness error beside each map is
what rounding leaves of that. Red speaks for the class, blue against it: <span class="bar"></span></p>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
{% for item in items %}
<section>
<h2>{{ item.name }}: {{ item.prediction }}</h2>
<div class="row">
  {{ figure(item.image) }}
  <table><tr><th>class</th><th>probability</th><th>logit</th><th>completeness error</th></tr>
  {% for c in item.classes %}
  <tr><td>{{ c.name }}</td><td>{{ c.probability }}</td><td>{{ c.logit }}</td><td>{{ c.error }}</td></tr>
  {% endfor %}
  </table>
</div>
<div class="beside">
<div><h3>Contribution maps, one scale: &plusmn; {{ item.scale }} logits a pixel</h3>
<div class="row">{% for f in item.maps %}{{ figure(f) }}{% endfor %}</div></div>
{% if item.methods %}<div><h3>Other methods for {{ item.classes[0].name }}, each on a scale of its own</h3>
<div class="row">{% for f in item.methods %}{{ figure(f) }}{% endfor %}</div></div>{% endif %}
</div>
<h3>Contributions to {{ item.prediction }} of what enters each layer, each on a scale of its own</h3>
<div class="row">{% for f in item.layers %}{{ figure(f) }}{% endfor %}</div>
</section>
{% endfor %}
{% if skipped %}
<p>Not shown, because they could not be read: {{ skipped | map("printable") | join("; ") }}.</p>
{% endif %}
</body>
</html>
"""
_FIGURE = (
    '{% macro figure(f) %}<figure><img alt="{{ f.caption }}" src="data:image/png;base64,{{ f.data }}" '
    'width="{{ f.width }}" '
    'height="{{ f.height }}"><figcaption>{{ f.caption }}</figcaption></figure>{% endmacro %}'
)


class Picture(NamedTuple):
    """A picture for the page: its caption, the network's input [C, H, W] in [0, 1], and the original picture
    if that differs.
    """

    name: str
    image: torch.Tensor
    view: plot.View | None = None


def render(model: Network, images: Sequence[torch.Tensor], names: Sequence[str], **options: Any) -> str:
    """The page for images [C, H, W] in [0, 1] of any size, with their captions, as one string. Takes the
    ``options`` of ``stream`` and raises the same errors.
    """
    if not images or len(images) != len(names):
        raise ValueError(
            f"images: expected at least one and a name for each, got {len(images)} images and {len(names)} "
            "names"
        )
    return "".join(stream(model, list(map(Picture, names, images)), **options))


def stream(
    model: Network,
    pictures: Iterable[Picture],
    *,
    classes: int = 3,
    methods: Sequence[str] | None = None,
    title: str = "Why this network decides as it does",
    subtitle: str = "",
    notes: Sequence[str] = (),
    skipped: Sequence[str] = (),
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Iterator[str]:
    """The page in pieces, which loads nothing from elsewhere. Each picture is taken and explained only when
    its piece is.

    Args:
        classes: how many of the most likely classes get a map.
        methods: names of ``coda_fast.baselines`` to show beside the network's own maps, none if empty; two
            that are equal on a CoDA-Net share a column. None: ``METHODS``, or none if captum is missing,
            which the page then says.
        notes: sentences for the top of the page.
        skipped: unreadable files, with the reasons, for the end of the page; it is read only then.

    Raises:
        ValueError: a method is unknown, the model cannot take an image, or an explanation does not fit in
            memory.
        ImportError: jinja2 or matplotlib is missing, or captum if ``methods`` names some that need it.
    """
    try:
        import jinja2
    except ImportError:
        raise ImportError("the report needs jinja2: pip install jinja2") from None
    model = need_network(model)
    if not 1 <= classes <= model.num_classes:
        raise ValueError(f"classes: expected 1 to {model.num_classes}, got {classes}")
    try:
        attributions = {
            title: baselines.create(name, model)
            for title, name in _columns(METHODS if methods is None else methods).items()
        }
    except ImportError as error:
        if methods is not None:
            raise
        attributions, notes = {}, [*notes, f"No other methods are shown: {error}."]
    items = (
        _item(model, picture, classes, attributions)
        for picture in (progress(pictures, "report") if progress else pictures)
    )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["printable"] = printable
    page = environment.from_string(_FIGURE + _PAGE)
    subtitle = (
        subtitle
        or f"{sum(p.numel() for p in model.parameters()):,} parameters, T = {model.temperature:g}; "
        f"coda_fast {__version__}"
    )
    bias = f"{model.logit_bias:.3f}"
    pieces = page.generate(
        title=title, subtitle=subtitle, bias=bias, items=items, notes=list(notes), skipped=skipped
    )
    return map(str, pieces)  # some are jinja's Markup, which would escape strings that it is joined with


def find_images(paths: Iterable[Path], limit: int) -> tuple[list[tuple[Path, str, bool]], int]:
    """The files among ``paths``, and the image files in the folders among them, at any depth, except hidden
    ones.

    At most ``limit`` files from folders are taken, evenly spaced in their order, so that all classes of a
    folder of classes are shown.

    Returns:
        A list of (path, caption, whether it was found in a folder) in the order of ``paths``, and the number
        of image files in the folders. Captions of files in a folder are relative paths. OSError: a folder
        cannot be read.
    """
    listed = []
    for path in paths:
        if path.is_dir():
            listed += [(file, file.relative_to(path).as_posix(), True) for file in listing.pictures(path)]
        else:
            listed.append((path, path.name, False))
    found = [i for i, (*_, in_folder) in enumerate(listed) if in_folder]
    kept = set(found if len(found) <= limit else (found[k * len(found) // limit] for k in range(limit)))
    return [entry for i, entry in enumerate(listed) if i in kept or not entry[2]], len(found)


def read_pictures(
    model: Network,
    files: Iterable[tuple[Path, str, bool]],
    preprocessing: Preprocessing,
    classes: int,
    skipped: list[str],
) -> Iterator[Picture]:
    """The pictures of ``find_images``, each read when it is needed. The error of an unreadable one in a
    folder is added to ``skipped``.

    Raises:
        ValueError: a picture that the user named cannot be read, or none can.
    """
    count, shown = 0, 0
    for path, name, in_folder in files:
        count += 1
        try:
            image = as_network_sees(model, path, preprocessing, classes)
            view = plot.View.of(decode(path), preprocessing)
        except ValueError as error:
            if not in_folder:
                raise
            skipped.append(str(error))
            continue
        shown += 1
        yield Picture(name, image, view)
    if not shown:
        raise ValueError(
            f"IMAGES: expected at least one image that can be read, got {count} files"
            + "".join(f"; {reason}" for reason in skipped[:1])
        )


def write(path: str | Path, page: str | Iterable[str]) -> None:
    """Write the page, or its pieces, to a file, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines([page] if isinstance(page, str) else page)


def _columns(methods):
    """{title of a column: method}, in order, without duplicates."""
    columns, pairs = {}, [(method, twin) for twin, method in baselines.TWINS.items()]
    for method in methods:
        pair = next((pair for pair in pairs if set(pair) <= set(methods) and method in pair), (method,))
        columns[" = ".join(pair)] = pair[0]
    columns.pop("Ours", None)  # the network's own maps are always shown
    return columns


def _item(model, picture, classes, attributions):
    name, image, view = printable(picture.name), picture.image, picture.view
    check_explainable(model, *image.shape[-2:], name, classes)
    batch = image[None].to(next(model.parameters()))
    with torch.no_grad():
        logits = model(batch)
    if not torch.isfinite(logits).all():
        raise ValueError(f"{name}: the network gives logits that are not finite")
    top = logits.topk(classes).indices
    explained = model.explain(batch, top)
    maps, scale = explained.contribution_map[0], plot.symmetric_scale(explained.contribution_map)
    rows = [
        {
            "name": class_name(model.class_names, int(c)),
            "probability": plot.probability(float(logits[0, c].sigmoid()))
            .removeprefix("p ")
            .removeprefix("= "),
            "logit": f"{float(logits[0, c]):.3f}",
            "error": f"{float(explained.completeness_error[0, k]):.1e}",
        }
        for k, c in enumerate(top[0])
    ]
    best = top[:, :1]
    layers = _layer_maps(model, batch, best)
    others = [
        (method, _within(a, model, image).attribute(batch, best)[0, 0]) for method, a in attributions.items()
    ]
    return {
        "name": name,
        "prediction": f"{rows[0]['name']} ({plot.probability(float(logits[0, top[0, 0]].sigmoid()))})",
        "image": _picture(image, view),
        "classes": rows,
        "scale": f"{scale:.2g}",
        "maps": [
            _map(m, scale, f"why {row['name']}" if k == 0 else f"why {row['name']}?", view)
            for k, (m, row) in enumerate(zip(maps, rows, strict=True))
        ],
        "methods": [_map(m, plot.symmetric_scale(m), method, view) for method, m in others],
        "layers": [
            _map(m, plot.symmetric_scale(m), f"layer {name}, {m.shape[1]} x {m.shape[0]}", view)
            for name, m in layers
        ],
    }


def _layer_maps(model, batch, best):
    """(name, map [H, W] of the best class) for all DAU layers after the first that cut the network. In a
    CoDANet the name is the layer's number, counted from 1.
    """
    found = []
    for layer in list(model.dau_layers().values())[1:]:
        with contextlib.suppress(NoCut):
            e = model.explain(batch, best, layer=layer)
            found.append((e.layer if isinstance(e.layer, str) else e.layer + 1, e.contribution_map[0, 0]))
    return found


def _within(attribution, model, image):
    """The method with a batch size that fits in memory for images of this size."""
    settings = dict(attribution.settings)
    if "batch_size" in settings:
        settings["batch_size"] = batch_within(model, *image.shape[1:], settings["batch_size"])
    return dataclasses.replace(attribution, settings=settings)


def _map(values, scale, caption, view):
    import matplotlib

    shade = matplotlib.colormaps[plot.COLOURS]((values.detach().double().cpu().numpy() / scale + 1) / 2)
    colours = np.round(255 * shade[..., :3]).astype(np.uint8)
    return _figure(colours if view is None else view.with_map(colours, SHOWN), caption)


def _picture(image, view):
    pixels = image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    pixels, caption = np.round(255 * pixels).astype(np.uint8), f"{image.shape[2]} x {image.shape[1]} pixels"
    if view is not None and view.cropped:
        return _figure(view.with_crop(pixels, SHOWN), f"what the network saw: {caption} of the middle")
    return _figure(pixels, caption)


def _figure(pixels, caption):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    factor = SHOWN / min(pixels.shape[:2])
    width, height = round(pixels.shape[1] * factor), round(pixels.shape[0] * factor)
    return {
        "data": base64.b64encode(buffer.getvalue()).decode(),
        "caption": caption,
        "width": width,
        "height": height,
    }
