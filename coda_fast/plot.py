"""Figures of explanations: contribution maps in red and blue, and the dynamic weight as a colour picture with
transparency.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coda_fast._classes import class_name, fits_no_class
from coda_fast._files import atomic_path
from coda_fast.data.preprocessing import middle
from coda_fast.explanation import Explanation
from coda_fast.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from PIL.Image import Image

    from coda_fast.data.preprocessing import Preprocessing

COLOURS = "bwr"  # blue: against the class, white: zero, red: for the class, as in the paper
PERCENTILE = 99.5


def symmetric_scale(maps: torch.Tensor) -> float:
    """The end of a symmetric colour scale: the ``PERCENTILE`` of absolute contributions, so that a few
    extreme pixels do not make the map pale.
    """
    values = maps.detach().abs().flatten().double()
    if not len(values) or not (scale := float(np.percentile(values.cpu().numpy(), PERCENTILE))):
        return float(values.max()) if len(values) and values.max() > 0 else 1.0
    return scale


def weight_rgba(dynamic_weight: torch.Tensor, contribution_map: torch.Tensor) -> np.ndarray:
    """The dynamic weight as the picture that it responds to, [H, W, 4] in [0, 1].

    Colour: for each channel, the positive weight on ``x`` as a share of the positive weights on ``x`` and
    ``1 - x``, which is the colour to which the linear map of this pixel responds most. Alpha: the pixel's
    contribution, 0 if it is negative, opaque from the ``PERCENTILE`` on.

    Args:
        dynamic_weight: [2 C, H, W] with C = 1 or 3 (as ``explanation.dynamic_weight[i, k]``).
        contribution_map: [H, W].

    Raises:
        ValueError: shapes do not fit, for example those of an explanation with ``layer=``.
    """
    if dynamic_weight.dim() != 3 or dynamic_weight.shape[0] not in (2, 6):
        raise ValueError(
            "dynamic_weight: expected [6, H, W] or [2, H, W], that of an encoded image, got "
            f"{list(dynamic_weight.shape)}"
        )
    if contribution_map.shape != dynamic_weight.shape[1:]:
        raise ValueError(
            f"contribution_map: expected {list(dynamic_weight.shape[1:])}, got {list(contribution_map.shape)}"
        )
    positive = dynamic_weight.detach().double().clamp(min=0).cpu()
    direct, inverse = positive.chunk(2)
    total = direct + inverse
    colour = torch.where(total > 0, direct / total.clamp(min=torch.finfo(torch.float64).tiny), 0.5)
    colour = colour.expand(3, -1, -1).permute(1, 2, 0).numpy()
    evidence = contribution_map.detach().double().clamp(min=0).cpu().numpy()
    top = np.percentile(evidence, PERCENTILE) or evidence.max() or 1.0
    return np.concatenate((colour, np.clip(evidence / top, 0, 1)[..., None]), 2)


@dataclasses.dataclass(frozen=True)
class View:
    """The original picture, upright, and the part of it that a network saw, ``box``: left, top, right, bottom
    in its pixels.
    """

    picture: np.ndarray  # [H, W, 3] uint8
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, image: Image, preprocessing: Preprocessing, most: int = 1024) -> View:
        """The view of a Pillow image (``coda_fast.data.decode``), reduced to at most ``most`` pixels a side.
        Of a very long image that is cropped, only the middle is kept.
        """
        box = preprocessing.box(*image.size)
        if preprocessing.crop is not None and (size := middle(*image.size)) != image.size:
            left, top = ((whole - part) // 2 for whole, part in zip(image.size, size, strict=True))
            image = image.crop((left, top, left + size[0], top + size[1]))
            box = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        if (share := most / max(image.size)) < 1:
            reduced = image.resize([max(1, round(share * side)) for side in image.size], reducing_gap=2.0)
            across, down = (small / large for small, large in zip(reduced.size, image.size, strict=True))
            image, box = reduced, (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return cls(np.asarray(image.convert("RGB")), box)

    @property
    def cropped(self) -> bool:
        """Whether the network saw less than all of it."""
        height, width = self.picture.shape[:2]
        # tolerant, because the sides of the box are quotients
        return not np.allclose(self.box, (0, 0, width, height), rtol=0, atol=1e-6 * max(height, width))

    def seen(self) -> tuple[int, int, int, int]:
        """``box`` in whole pixels: all pixels that the network saw at least partly, and at least one."""
        height, width = self.picture.shape[:2]
        left, top, right, bottom = self.box
        left, top = min(math.floor(left), width - 1), min(math.floor(top), height - 1)
        return (
            left,
            top,
            min(max(math.ceil(right), left + 1), width),
            min(max(math.ceil(bottom), top + 1), height),
        )

    def faded(self) -> np.ndarray:
        """The picture in pale grey, as a background: [H, W, 3] uint8."""
        grey = self.picture.astype(np.float32).mean(2, keepdims=True)
        return np.repeat(150 + 0.4 * grey, 3, 2).astype(np.uint8)

    def with_map(self, colours: np.ndarray, side: int) -> np.ndarray:
        """The map ``colours`` [h, w, 3] uint8 in its place on the faded picture, whose shorter side gets
        about ``side`` pixels; each pixel of the map is enlarged by the same integer factor. Without a crop,
        ``colours`` itself.
        """
        if not self.cropped:
            return colours
        return self._composed(self.faded(), colours, side)

    def with_crop(self, colours: np.ndarray, side: int) -> np.ndarray:
        """The picture in the size of ``with_map``, faded outside the part that the network saw; without a
        crop, ``colours`` (what the network saw) itself.
        """
        if not self.cropped:
            return colours
        left, top, right, bottom = self.seen()
        page = self.faded()
        page[top:bottom, left:right] = self.picture[top:bottom, left:right]
        return self._composed(page, None, side, colours.shape)

    def _composed(self, page, colours, side, shape=None):
        from PIL import Image

        height, width = (colours.shape if shape is None else shape)[:2]
        left, top, right, bottom = self.box
        # the side of a map's pixel on the canvas
        pixel = max(1, round(side / min(page.shape[:2]) * (right - left) / width))
        across, down = pixel * width / (right - left), pixel * height / (bottom - top)
        whole = max(1, round(page.shape[1] * across)), max(1, round(page.shape[0] * down))
        canvas = Image.fromarray(page).resize(whole, Image.Resampling.BILINEAR)
        if colours is not None:
            enlarged = Image.fromarray(colours).resize(
                (pixel * width, pixel * height), Image.Resampling.NEAREST
            )
            canvas.paste(enlarged, (round(left * across), round(top * down)))
        return np.array(canvas)


def show_view(axes: Axes, view: View, title: str = "") -> None:
    """Draw the original picture. If it is cropped, the part that the network did not see is faded, and a line
    surrounds the rest.
    """
    height, width = view.picture.shape[:2]
    axes.imshow(view.faded() if view.cropped else view.picture, extent=(0, width, height, 0))
    if view.cropped:
        left, top, right, bottom = view.seen()
        axes.imshow(view.picture[top:bottom, left:right], extent=(left, right, bottom, top))
        _outline(axes, view)
    _bare(axes, title)


def _under(axes, view):
    """Draw the faded picture as a background; return where to draw over it, as ``extent`` of ``imshow``."""
    if view is None:
        return None
    height, width = view.picture.shape[:2]
    if view.cropped:
        axes.imshow(view.faded(), extent=(0, width, height, 0))
    left, top, right, bottom = view.box
    return left, right, bottom, top


def _over(axes, view):
    """Reset the limits of the axes to the whole picture, after drawing over a part of it."""
    if view is not None:
        height, width = view.picture.shape[:2]
        axes.set(xlim=(0, width), ylim=(height, 0))
        if view.cropped:
            _outline(axes, view)


def _outline(axes, view):
    left, top, right, bottom = view.box
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="0.3", linewidth=0.8)
    height, width = view.picture.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0))


def show_image(axes: Axes, image: torch.Tensor, title: str = "") -> None:
    """Draw ``image`` [C, H, W] in [0, 1]."""
    pixels = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    axes.imshow(
        pixels if pixels.shape[2] == 3 else pixels[..., 0],
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    _bare(axes, title)


def show_map(
    axes: Axes, contribution_map: torch.Tensor, scale: float, title: str = "", view: View | None = None
) -> AxesImage:
    """Draw a contribution map [H, W] in red (for) and blue (against), white at 0, saturated at +-``scale``,
    over the picture of ``view`` if that is given. Return the matplotlib artist.
    """
    pixels, extent = contribution_map.detach().cpu().float().numpy(), _under(axes, view)
    artist = axes.imshow(
        pixels, cmap=COLOURS, vmin=-scale, vmax=scale, interpolation="nearest", extent=extent
    )
    _over(axes, view)
    _bare(axes, title)
    return artist


def show_weight(
    axes: Axes,
    dynamic_weight: torch.Tensor,
    contribution_map: torch.Tensor,
    title: str = "",
    view: View | None = None,
) -> None:
    """Draw ``weight_rgba`` on white, at its place in the picture of ``view`` if that is given."""
    extent = _under(axes, view)
    if view is not None and view.cropped:
        axes.imshow(np.ones((1, 1, 3)), extent=extent)
    axes.imshow(weight_rgba(dynamic_weight, contribution_map), interpolation="nearest", extent=extent)
    _over(axes, view)
    _bare(axes, title)


def proof(explanation: Explanation, i: int, k: int, logit_bias: float) -> str:
    """Text that shows that the contributions and the bias add up to the logit."""
    target = explanation.target[i, k]
    total = float(explanation.contributions[i, k].sum(dtype=torch.float64))
    logit, error = float(explanation.logits[i, target]), float(explanation.completeness_error[i, k])
    return f"sum {total:+.2f}, bias {logit_bias:+.2f}: logit {logit:+.2f}\nerror {error:.0e}"


def explained_by(logits: torch.Tensor, network: str | None) -> str:
    """Text for below a picture with ``logits`` [classes]: that it fits no class, if so, and the name of the
    network, if it is given.
    """
    fits = [f"fits none of the {len(logits)} classes"] if fits_no_class(logits) else []
    return "\n".join([*fits, *([] if network is None else [f"explained by {_shortened(network, 28)}"])])


def probability(p: float) -> str:
    """A probability as text for a title, never as "0.000" or "1.000"."""
    return "p < 0.001" if p < 0.001 else "p > 0.999" if p > 0.999 else f"p = {p:.3f}"


def explanation_figure(
    images: torch.Tensor,
    explanation: Explanation,
    logit_bias: float,
    class_names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    views: Sequence[View] | None = None,
    networks: Sequence[str | None] | None = None,
) -> Figure:
    """A figure with a row for each image: the image, a contribution map for each explained class, and the
    dynamic weight of the first class if that applies to the encoded image (``layer=None``).

    All maps share one symmetric scale; below each is the proof that it is complete. Contributions of the
    features of a stem are drawn as ``explanation.pixel_map``, and a line says what is exact.

    Args:
        images: [N, C, H, W], as given to ``model.explain``.
        explanation: what it returned.
        logit_bias: ``model.logit_bias``.
        class_names: one for each class; numbers if None.
        labels: the true class of each image, written above it.
        views: the original pictures, which are drawn instead of ``images``, with all maps over them, in
            their places.
        networks: the name of the network that explains each image. With it, ``explained_by`` is written below
            each image.

    Raises:
        ValueError: images and explanation do not belong together. ImportError: matplotlib is not installed.
    """
    _check_together(images, explanation, labels)
    encoded, (count, classes) = explanation.layer == 0, explanation.target.shape
    maps = explanation.contribution_map
    if placed := explanation.stem is not None and explanation.placement is not None:
        maps, encoded = explanation.placement.interpolate(maps, tuple(images.shape[2:])), True

    def name(number):
        text = " ".join(str(class_name(class_names, number)).split())
        return _shortened(text, 20)  # longer titles would overlap

    shape = images.shape[2:] if not views else views[0].picture.shape
    # bounded, so that a very long image is drawn small, not on a page of metres
    aspect = min(4.0, max(0.25, shape[0] / shape[1]))
    # other weights have no picture
    weighted = encoded and not placed and explanation.dynamic_weight.shape[2] in (2, 6)
    columns = classes + 1 + weighted
    figure = new_figure(width=2.3 * columns + 0.7, height=count * (2.3 * aspect + 0.65) + 0.1)
    axes: Any = figure.subplots(max(1, count), columns, squeeze=False)
    named = {*explanation.target.flatten().tolist(), *([] if labels is None else map(int, labels))}
    drawable(" ".join(map(name, sorted(named))))  # one warning for all names
    scale = symmetric_scale(maps)
    sigmoid = explanation.logits.sigmoid()
    for i in range(count):
        view, title = (
            None if views is None else views[i],
            "image" if labels is None else f"image: {name(int(labels[i]))}",
        )
        if view is None:
            show_image(axes[i, 0], images[i], title)
        else:
            show_view(axes[i, 0], view, title)
        if networks is not None:
            network, families = drawable(networks[i] or "")
            below = explained_by(explanation.logits[i], network or None)
            axes[i, 0].set_xlabel(below, fontsize=7, fontfamily=families, parse_math=False)
        for k in range(classes):
            target = int(explanation.target[i, k])
            title = f"{name(target)}: {probability(float(sigmoid[i, target]))}"
            artist = show_map(axes[i, k + 1], maps[i, k], scale, title, view if encoded else None)
            axes[i, k + 1].set_xlabel(proof(explanation, i, k, logit_bias), fontsize=7)
        if weighted:
            title = f"weight of {name(int(explanation.target[i, 0]))}"
            show_weight(
                axes[i, -1], explanation.dynamic_weight[i, 0], explanation.contribution_map[i, 0], title, view
            )
    if count:
        low = count * aspect < 0.6  # the colour bar is then too low for the long label
        colour_bar(
            figure, artist, axes, "logit, per pixel" if low else "contribution to the logit, per pixel"
        )
    if placed:
        figure.supxlabel(exactness(explanation), fontsize=7)
    return figure


def exactness(explanation: Explanation) -> str:
    """A text for figures that says what the maps of a network with a stem are."""
    what = "features" if explanation.layer == 0 else f"the input of layer {explanation.layer}"
    return (
        f"Exact: the sum over {what} ({explanation.stem}).\n"
        "Not exact: where in the image; drawn around the centres of the receptive fields."
    )


def _check_together(images, explanation, labels):
    """Raise a ValueError unless explanation and labels belong to these images."""
    count, _, *size = explanation.contribution_map.shape
    whole = explanation.layer == 0 and explanation.stem is None  # as large as the image
    if count != len(images) or (whole and size != list(images.shape[2:])):
        raise ValueError(
            f"explanation: expected maps of these images ({list(images.shape)}), got "
            f"{list(explanation.contribution_map.shape)}, layer {explanation.layer}"
        )
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected {count}, one for each image, got {len(labels)}")


def _shortened(text, most):
    """The beginning of a text, at most ``most`` columns wide; Chinese characters take two columns."""
    widths = list(itertools.accumulate(1 + (unicodedata.east_asian_width(c) in "WF") for c in text))
    if not widths or widths[-1] <= most:
        return text
    return f"{text[: sum(width < most for width in widths)].rstrip()}\u2026"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, with its size in inches, outside pyplot's global state."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ImportError(
            "figures need matplotlib: pip install 'coda-fast[cli]' or pip install matplotlib"
        ) from None
    # h_pad in inches keeps the proof under a map apart from the title of the next
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07))


def colour_bar(
    figure: Figure,
    artist: AxesImage,
    axes: Axes | Sequence[Axes] | np.ndarray,
    label: str = "contribution to the logit, per pixel",
    location: str = "right",
) -> None:
    """Draw the colour bar of the scale that the maps of ``axes`` share."""
    bar = figure.colorbar(artist, ax=axes, location=location, shrink=0.8, aspect=25, pad=0.02, extend="both")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def render(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file in memory."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 150) -> None:
    """Write the figure (PNG, SVG or PDF by its ending), whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _bare(axes, title):
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
        spine.set_color("0.6")
    if title:
        text, families = drawable(title)
        # names of classes may contain dollar signs
        axes.set_title(text, fontsize=9, fontfamily=families, parse_math=False)
