"""A figure of the channels that make a decision, and of pictures that excite them."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import torch

from coda_fast import plot
from coda_fast._classes import class_name
from coda_fast.channels.contributions import halves, leading
from coda_fast.channels.pictures import Strongest, stem_of
from coda_fast.data.errors import ImageError
from coda_fast.data.sources import to_float
from coda_fast.evaluation import _common as common
from coda_fast.explanation import Explanation
from coda_fast.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIDES = 4  # the most strides that a crop is wide, if it is no receptive field
_CELL, _GAP = 0.82, 0.08  # inches: the side of a crop, and what lies between two


def channel_figure(
    model: torch.nn.Module,
    explanation: Explanation,
    strongest: Strongest,
    pictures: Any,
    image: int = 0,
    class_index: int = 0,
    count: int = 5,
    examples: int = 5,
    view: plot.View | None = None,
) -> Figure:
    """A figure of the channels that make a decision: the picture, its whole map and the sum that gives the
    logit; and for each leading channel its map, where in this picture it contributes most, and the pictures
    of a set that excite it most.

    Args:
        model: that gave ``explanation`` and ``strongest``.
        pictures: the set of ``strongest``: its source, or what gives an image [C, H, W] in [0, 1] for an
            index.
        image, class_index, count: as for ``leading``.
        examples: the number of pictures of the set for each channel.
        view: the original picture, which is drawn instead of the image, with the maps in their places.

    Raises:
        ValueError: these do not belong together, or ``strongest`` lacks a channel. ImageError: a picture of
            the set cannot be read any more. ImportError: matplotlib is not installed.
    """
    strongest.check(model, pictures)
    stem, found, e = stem_of(model), leading(explanation, image, class_index, count), explanation[image]
    rows = {channel: k for k, channel in enumerate(strongest.channels.tolist())}
    channels, target = [term.channel for term in found.terms], int(e.target[0, class_index])
    if e.images is None or e.placement is None or e.stem != stem.in_words() or {*channels} - {*rows}:
        raise ValueError(f"explanation: expected one by {stem.in_words()}, of channels that strongest has")
    size, joint = (e.images.shape[2], e.images.shape[3]), stem.placement(*strongest.size)
    parts = halves(e, 0, class_index)[:, channels]
    maps = torch.cat((e.contribution_map[0, class_index][None], parts.sum(0)))
    maps = e.placement.interpolate(maps, size)
    scales = plot.symmetric_scale(maps[0]), plot.symmetric_scale(maps[1:])
    with torch.no_grad(), common.evaluated(model):
        features = stem(e.images.to(stem.mean))[0]

    height, width = size if view is None else view.picture.shape[:2]
    across, down = (_CELL * min(1.6, max(1.0, ratio)) for ratio in (width / height, height / width))
    here, most = 1.15 + across + _GAP, 1.15 + across + _CELL + 4 * _GAP  # the left edges of columns
    top, step = 0.65 + max(2 * down, 0.12 * (len(channels) + 7)), max(down, _CELL) + 0.36
    examples = min(examples, strongest.values.shape[2])
    broad = max(most + examples * (_CELL + _GAP), 4 * across + 2.8)
    notes = _notes(float(e.completeness_error[0, class_index]), joint, strongest.size, scales[1], broad)
    page = _Page(broad, top + step * len(channels) + 0.15 + 0.12 * len(notes))
    axes = page.axes(0.1, 0.3, 2 * across, 2 * down)
    plot.show_image(axes, e.images[0], "image") if view is None else plot.show_view(axes, view, "image")
    axes = page.axes(0.1 + 2 * across + _GAP, 0.3, 2 * across, 2 * down)
    artist = plot.show_map(axes, maps[0], scales[0], "all channels", view)
    bar = page.figure.colorbar(artist, cax=page.axes(0.28 + 4 * across, 0.3, 0.07, 2 * down), extend="both")
    bar.set_label("logit, per pixel", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    bar.ax.yaxis.get_offset_text().set_fontsize(6)
    x, amounts = 4 * across + 1.05, found.amounts()
    others = f"{found.others} other channels" if found.others else "rounding"
    page.text(x, 0.28, e.name(target), 9, 1.7)
    page.text(x, 0.46, plot.probability(float(e.logits[0, target].sigmoid())), 7)
    labels = ["bias", *(f"channel {c}" for c in channels), others, "logit"]
    for line, (label, amount) in enumerate(zip(labels, amounts, strict=True)):
        page.text(x, 0.7 + 0.12 * line, label, 7)
        page.text(x + 1.6, 0.7 + 0.12 * line, amount, 7, ha="right")
    columns = (1.15, "its map"), (here, "here"), (most, f"pictures that excite it most, of {strongest.seen}")
    for x, words in columns:
        page.text(x, top - 0.17, words, 7)
    for k, (term, amount) in enumerate(zip(found.terms, amounts[1:], strict=False)):
        y, half = top + k * step, int(term.sign < 0)
        part = f" ({'+-'[half]})" if e.signed else ""
        words = f"channel {term.channel}{part}\n{amount} logits\n{term.share:.1%} of all"
        page.text(0.1, y + max(down, _CELL) / 2, words, 7, va="center")
        axes = page.axes(1.15, y + max(0.0, _CELL - down) / 2, across, down)
        axes.set_anchor("W")
        artist = plot.show_map(axes, maps[k + 1], scales[1], view=view)
        acting = parts[half, k] if term.contribution > 0 else -parts[half, k]
        cell = divmod(int(acting.argmax()), acting.shape[1])
        y += max(0.0, down - _CELL) / 2
        box = page.crop(here, y, e.images[0], e.placement, cell, features[term.channel][cell])
        left, right, bottom, upper = artist.get_extent()
        xs = [left + (right - left) * box[edge] / size[1] for edge in (1, 3, 3, 1, 1)]
        ys = [upper + (bottom - upper) * box[edge] / size[0] for edge in (0, 0, 2, 2, 0)]
        axes.plot(xs, ys, color="0.3", linewidth=0.7)
        values, places = (of[half, rows[term.channel]] for of in (strongest.values, strongest.places))
        for s in range(examples):
            index, label, *cell = places[s].tolist()
            if index >= 0:
                name = "" if label < 0 else class_name(e.class_names, label)
                x, shown = most + s * (_CELL + _GAP), _picture(pictures, index)
                page.crop(x, y, shown, joint, cell, term.sign * values[s], name)
    for line, words in enumerate(notes):
        page.text(0.1, page.height - 0.1 - 0.12 * (len(notes) - line), words, 6.5)
    return page.figure


class _Page:
    """A figure with axes and texts at places in inches, from the left and from the top."""

    def __init__(self, width, height):
        self.figure, self.width, self.height = plot.new_figure(width, height), width, height
        self.figure.set_layout_engine("none")  # all places are given

    def axes(self, x, y, width, height):
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, x, y, text, size, most=None, va="top", **options):
        """Draw a text, of which no more than ``most`` inches are shown."""
        lines = [drawable(line[: 60 if most else None]) for line in text.split("\n")]
        families = list(dict.fromkeys(family for _, names in lines for family in names))
        text = "\n".join(line for line, _ in lines)
        place = x / self.width, 1 - y / self.height
        drawn = self.figure.text(
            *place, text, fontsize=size, va=va, fontfamily=families, parse_math=False, **options
        )
        while most is not None and drawn.get_window_extent().width > 0.95 * most * self.figure.dpi:
            text = text[:-1].rstrip()
            drawn.set_text(f"{text}\u2026")

    def crop(self, x, y, image, placement, cell, value, name=""):
        """Draw the crop around a cell, with the value of the feature and a name below; what of it lies
        outside of the picture is grey. Return its top, left, bottom and right in the picture.
        """
        size, axes = tuple(image.shape[1:]), self.axes(x, y, _CELL, _CELL)
        extent, whole = _extent(placement, size)
        low = [
            first + stride * i - (e - 1) / 2
            for first, stride, i, e in zip(placement.first, placement.stride, cell, extent, strict=True)
        ]
        if not whole:  # moved into the picture
            low = [min(max(round(v), 0), side - e) for v, side, e in zip(low, size, extent, strict=True)]
        top, left, bottom, right = box = (
            placement.box(*cell, size) if whole else (*low, low[0] + extent[0], low[1] + extent[1])
        )
        plot.show_image(axes, image[:, top:bottom, left:right])
        axes.images[-1].set_extent((left, right, bottom, top))
        axes.set(xlim=(low[1], low[1] + extent[1]), ylim=(low[0] + extent[0], low[0]), facecolor="0.85")
        self.text(x + _CELL / 2, y + _CELL + 0.1, f"{float(value):#.3g}", 6, va="baseline", ha="center")
        self.text(x + _CELL / 2, y + _CELL + 0.2, name, 6, _CELL, va="baseline", ha="center")
        return box


def _extent(placement, size):
    """Rows and columns of crops, and whether they are the receptive fields: if these are known, and at most
    half of the picture. Otherwise crops are a few strides wide.
    """
    sides = list(zip(size, placement.stride, placement.field or size, strict=True))
    if all(2 * field <= side for side, _, field in sides):
        return placement.field, True
    strides = max(1, min(_STRIDES, *(int(side / (2 * stride)) for side, stride, _ in sides)))
    return [min(side, max(1, round(strides * stride))) for side, stride, _ in sides], False


def _notes(error, placement, size, scale, width):
    """What is exact and what is not, as lines that fit on a page of this width."""
    (rows, columns), whole = _extent(placement, size)
    about = "" if whole else " around the centres of the receptive fields"
    if not whole and placement.field is not None:
        about += f", which are {placement.field[0]} x {placement.field[1]}"
    texts = (
        f"Exact: the contributions of all channels and the bias add up to the logit (error {error:.0e}). %: "
        "of the sum of absolute contributions.",
        "Not exact: where in the image, drawn around the centres of the receptive fields; and what a channel "
        "stands for: pictures only show what excites it.",
        f"Crops: {'receptive fields of ' * whole}{rows} x {columns} pixels{about}, with the value of the "
        f"channel; 'here': framed in its map, whose full colour is {scale:.2g} per pixel.",
    )
    return [line for text in texts for line in textwrap.wrap(text, int(width * 20))]


def _picture(pictures, index):
    """Picture number ``index`` of a set, [C, H, W] in [0, 1]."""
    if not hasattr(pictures, "some"):
        return pictures[index]
    batch = pictures.some([index])
    if batch.failures:
        name, reason = batch.failures[0]
        raise ImageError(f"could be read before: {reason}", name)
    return to_float(batch.images[0], torch.float32)
