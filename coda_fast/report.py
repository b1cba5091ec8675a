"""A self-contained HTML page that shows for each image why a network decides as it does, beside other
attribution methods.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coda_fast import __version__, baselines, plot, viewer
from coda_fast._files import atomic_path
from coda_fast.data import decode, listing
from coda_fast.dynamic_linear import DynamicLinear, need_network
from coda_fast.explain import check_explainable
from coda_fast.explain_files import Means
from coda_fast.network import Network
from coda_fast.safety import printable
from coda_fast.viewer import METHODS, Picture

SHOWN = 160  # the shorter side of a picture without scripts, in pixels; enlarged pixels are sharp squares
# By default, as many classes get a map as take this many bytes, but at least so many.
_MAP_BYTES, _LEAST_CLASSES = 1 << 20, 3

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
  section { margin-top: 2.2rem; border-top: 1px solid #ddd; padding-top: 1rem; }
  p { margin: .3rem 0; max-width: 60rem; }
  figure { margin: 0; display: inline-block; }
  figure img { display: block; image-rendering: pixelated; border: 1px solid #ccc; }
  figcaption { font-size: .78rem; color: #444; margin-top: .25rem; }
  .note { color: #555; font-size: .85rem; }
</style>
{{ head }}
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
<p>Every logit is the bias{{ bias }} plus the sum of the contributions of all {{ terms }}, exactly; the error
below each map is what rounding leaves of that. Red speaks for the class, blue against it. Choose a class to
see its map, and a second one to see why the first and not the second. Another temperature T rescales the
network; a network that is trained at that T gives other maps.</p>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
{% for item in items %}
<section>
{{ item.element }}
<noscript>{{ figure(item.image) }} {{ figure(item.map) }}</noscript>
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
    model: Network | Mapping[str, Network],
    pictures: Iterable[Picture],
    *,
    classes: int | None = None,
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
        model: the network, or several, by the names that the pictures give (``Picture.network``).
        classes: how many of the most likely classes get a map; None: ``default_classes`` of each picture.
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
        import markupsafe
    except ImportError:
        raise ImportError("the report needs jinja2: pip install jinja2") from None
    several = isinstance(model, Mapping)
    given = dict(model) if isinstance(model, Mapping) else {None: model}
    networks = {name: need_network(network) for name, network in given.items()}
    most = min(network.num_classes for network in networks.values())
    if classes is not None and not 1 <= classes <= most:
        raise ValueError(f"classes: expected 1 to {most}, got {classes}")
    chosen = METHODS if methods is None else tuple(methods)
    try:  # before the first picture
        for name in viewer.columns(chosen).values():
            for network in networks.values():
                baselines.create(name, network)
    except ImportError as error:
        if methods is not None:
            raise
        chosen, notes = (), [*notes, f"No other methods are shown: {error}."]
    items = (
        _item(networks[picture.network if several else None], picture, classes, chosen)
        for picture in (progress(pictures, "report") if progress else pictures)
    )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["printable"] = printable
    page = environment.from_string(_FIGURE + _PAGE)
    described = (
        f"{'' if name is None else f'{name}: '}{sum(p.numel() for p in network.parameters()):,} parameters, "
        f"T = {network.temperature:g}"
        for name, network in networks.items()
    )
    subtitle = subtitle or f"{'; '.join(described)}; coda_fast {__version__}"
    biases = {f" {network.logit_bias:.3f}" for network in networks.values()}
    bias = biases.pop() if len(biases) == 1 else ""
    terms = (
        "pixels"
        if network.stem_name is None
        else f"features ({network.stem_name}; where they are drawn is not exact)"
        for network in networks.values()
    )
    pieces = page.generate(
        title=title,
        subtitle=subtitle,
        bias=bias,
        terms=printable(" or ".join(dict.fromkeys(terms))),
        items=items,
        notes=list(notes),
        skipped=skipped,
        head=markupsafe.Markup(viewer.head()),
    )
    return map(str, pieces)  # some are jinja's Markup, which would escape strings that it is joined with


def default_classes(model: DynamicLinear, height: int, width: int) -> int:
    """How many of the most likely classes get a map by default: those whose maps take a megabyte, at least 3
    and at most 20, of an image of ``height x width`` pixels. Larger maps would make the page too large.
    """
    bytes_each = max(1, 4 * height * width)
    return min(model.num_classes, viewer.MOST_CLASSES, max(_LEAST_CLASSES, _MAP_BYTES // bytes_each))


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
    means: Callable[[Path], Means],
    files: Iterable[tuple[Path, str, bool]],
    classes: int | None,
    skipped: list[str],
) -> Iterator[Picture]:
    """The pictures of ``find_images``, each read when it is needed, by what ``means`` gives for its path. The
    error of one in a folder that cannot be read, or explained for this number of ``classes``, is added to
    ``skipped``.

    Raises:
        ValueError: a picture that the user named cannot be read, or none can.
    """
    count, shown = 0, 0
    for path, name, in_folder in files:
        count += 1
        try:
            by = means(path)
            image = by.preprocessing(path)
            height, width = image.shape[1:]
            most = classes or default_classes(by.model, height, width)
            check_explainable(by.model, height, width, str(path), most)
            view = plot.View.of(decode(path), by.preprocessing)
        except ValueError as error:
            if not in_folder:
                raise
            skipped.append(str(error))
            continue
        shown += 1
        yield Picture(name, image, view, by.name)
    if not shown:
        raise ValueError(
            f"IMAGES: expected at least one image that can be read, got {count} files"
            + "".join(f"; {reason}" for reason in skipped[:1])
        )


def write(path: str | Path, page: str | Iterable[str]) -> None:
    """Write the page, or its pieces, to a file, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines([page] if isinstance(page, str) else page)


def _item(model, picture, classes, methods):
    import markupsafe

    classes = classes or default_classes(model, *picture.image.shape[-2:])
    payload = viewer.describe(model, picture, classes=classes, methods=methods)
    level = payload["levels"][0]
    maps = np.frombuffer(base64.b64decode(level["maps"]), "<f4")
    best = maps.reshape(level["count"], level["height"], level["width"])[0]
    return {
        "element": markupsafe.Markup(viewer.element(payload)),
        "image": _picture(picture.image, picture.view),
        "map": _map(best, level["scale"], f"why {payload['classes'][0]['name']}", picture.view),
    }


def _map(values, scale, caption, view):
    import matplotlib

    shade = matplotlib.colormaps[plot.COLOURS]((values.astype(np.float64) / scale + 1) / 2)
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
