"""One self-contained HTML file that shows why a network decides as it does, image by image, beside other methods of attribution."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from coda_fast import __version__, plot
from coda_fast.checkpoints import atomic_path
from coda_fast.models import CoDANet

SHOWN = 160  # pixels of a picture's shorter side on the page; sharp squares, not blurred, when enlarged

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: .2rem; }
  h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1rem; }
  h3 { font-size: .9rem; margin: 1rem 0 .3rem; color: #444; font-weight: 600; }
  p { margin: .3rem 0; max-width: 60rem; }
  .row { display: flex; flex-wrap: wrap; gap: 1rem; }
  figure { margin: 0; }
  figure img { display: block; image-rendering: pixelated; border: 1px solid #ccc; }
  figcaption { font-size: .78rem; color: #444; margin-top: .25rem; }
  .bar { height: .8rem; width: 16rem; background: linear-gradient(90deg, #00f, #fff, #f00); border: 1px solid #ccc; display: inline-block; }
  .note { color: #555; font-size: .85rem; }
  table { border-collapse: collapse; font-size: .85rem; }
  td, th { padding: .15rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
<p>Every logit is the bias {{ bias }} plus the sum of the contributions of all pixels, exactly; the completeness error beside each map is
what rounding leaves of that. Red speaks for the class, blue against it: <span class="bar"></span></p>
{% if skipped %}<p>Not shown, because they could not be read: {{ skipped | join("; ") }}.</p>{% endif %}
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
<h3>Contribution maps of the most likely classes, one scale: &plusmn; {{ item.scale }} logits a pixel</h3>
<div class="row">{% for f in item.maps %}{{ figure(f) }}{% endfor %}</div>
{% if item.methods %}<h3>Other methods for {{ item.prediction }}, each on a scale of its own</h3>
<div class="row">{% for f in item.methods %}{{ figure(f) }}{% endfor %}</div>{% endif %}
<h3>Contributions to {{ item.prediction }} of what enters each layer, each on a scale of its own</h3>
<div class="row">{% for f in item.layers %}{{ figure(f) }}{% endfor %}</div>
</section>
{% endfor %}
</body>
</html>
"""
_FIGURE = (
    '{% macro figure(f) %}<figure><img alt="{{ f.caption }}" src="data:image/png;base64,{{ f.data }}" width="{{ f.width }}" '
    'height="{{ f.height }}"><figcaption>{{ f.caption }}</figcaption></figure>{% endmacro %}'
)


def render(
    model: CoDANet,
    images: Sequence[torch.Tensor],
    names: Sequence[str],
    *,
    classes: int = 3,
    methods: Sequence[str] = (),
    title: str = "Why this network decides as it does",
    subtitle: str = "",
    skipped: Sequence[str] = (),
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> str:
    """The page as text, nothing loaded from elsewhere.

    Args:
        images: each [C, H, W] in [0, 1], of any sizes; ``names``: their captions.
        classes: how many of the most likely classes get a map.
        methods: names of ``coda_fast.baselines`` beside the network's own maps.

    Raises:
        ValueError: no images, unknown methods, images that the model cannot take. ImportError: jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
    except ImportError:
        raise ImportError("the report needs jinja2: pip install jinja2") from None
    if not images or len(images) != len(names):
        raise ValueError(f"images: expected at least one and a name for each, got {len(images)} images and {len(names)} names")
    if not 1 <= classes <= model.num_classes:
        raise ValueError(f"classes: expected 1 to {model.num_classes}, got {classes}")
    attributions = {}
    if others := [m for m in methods if m != "Ours"]:
        from coda_fast import baselines

        attributions = {name: baselines.create(name, model) for name in others}
    pairs = list(zip(images, names, strict=True))
    items = [_item(model, image, name, classes, attributions) for image, name in (progress(pairs, "report") if progress else pairs)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(_FIGURE + _PAGE)
    subtitle = subtitle or f"{sum(p.numel() for p in model.parameters()):,} parameters, T = {model.temperature:g}; coda_fast {__version__}"
    return page.render(title=title, subtitle=subtitle, bias=f"{model.logit_bias:.3f}", items=items, skipped=list(skipped))


def write(path: str | Path, page: str) -> None:
    """The page as a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _item(model, image, name, classes, attributions):
    batch = image[None].to(next(model.parameters()))
    with torch.no_grad():
        logits = model(batch)
    if not torch.isfinite(logits).all():
        raise ValueError(f"{name}: the network gives logits that are not finite")
    top = logits.topk(classes).indices
    explained = model.explain(batch, top)
    maps, scale = explained.contribution_map[0], plot.symmetric_scale(explained.contribution_map)
    label = lambda index: model.class_names[index] if model.class_names else f"class {index}"  # noqa: E731
    rows = [
        {
            "name": label(int(c)),
            "probability": plot.probability(float(logits[0, c].sigmoid())).removeprefix("p = "),
            "logit": f"{float(logits[0, c]):.3f}",
            "error": f"{float(explained.completeness_error[0, k]):.1e}",
        }
        for k, c in enumerate(top[0])
    ]
    best = top[:, :1]
    layers = [(i, model.explain(batch, best, layer=i).contribution_map[0, 0]) for i in range(1, len(model.layers))]
    others = [(method, a.attribute(batch, best)[0, 0]) for method, a in attributions.items()]
    return {
        "name": name,
        "prediction": f"{rows[0]['name']} (p = {rows[0]['probability']})",
        "image": _picture(image, f"{image.shape[2]} x {image.shape[1]} pixels"),
        "classes": rows,
        "scale": f"{scale:.2g}",
        "maps": [
            _map(m, scale, f"why {row['name']}" if k == 0 else f"why {row['name']}?")
            for k, (m, row) in enumerate(zip(maps, rows, strict=True))
        ],
        "methods": [_map(m, plot.symmetric_scale(m), method) for method, m in others],
        "layers": [_map(m, plot.symmetric_scale(m), f"layer {i + 1}, {m.shape[1]} x {m.shape[0]}") for i, m in layers],
    }


def _map(values, scale, caption):
    import matplotlib

    shade = matplotlib.colormaps[plot.COLOURS]((values.detach().double().cpu().numpy() / scale + 1) / 2)
    return _figure(np.round(255 * shade[..., :3]).astype(np.uint8), caption)


def _picture(image, caption):
    pixels = image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return _figure(np.round(255 * pixels).astype(np.uint8), caption)


def _figure(pixels, caption):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    factor = SHOWN / min(pixels.shape[:2])
    width, height = round(pixels.shape[1] * factor), round(pixels.shape[0] * factor)
    return {"data": base64.b64encode(buffer.getvalue()).decode(), "caption": caption, "width": width, "height": height}
