"""A frame of an explained video: the picture beside its contribution map, with a caption below."""

from __future__ import annotations

import functools
import os

import numpy as np

from coda_fast import fonts, plot

SIDE = 256  # the smallest length in pixels of a panel's shorter side


@functools.lru_cache
def _font(size, file=None):
    """The font in ``file``, by default that of the figures, which covers most alphabets."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        file or os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def side_by_side(image, contribution, scale, name, sure, view=None):
    """The frame and its map side by side, with the class, its probability and the colour scale below them:
    [H, W, 3] uint8, with an even height and width.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    colours = colormaps[plot.COLOURS]
    left = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    right = colours((contribution.float().numpy() / scale).clip(-1, 1) / 2 + 0.5, bytes=True)[..., :3]
    if view is not None:
        left, right = view.with_crop(left, SIDE), view.with_map(right, SIDE)
    factor = max(1, -(-SIDE // min(left.shape[:2]))) if view is None or not view.cropped else 1
    left, right = (panel.repeat(factor, 0).repeat(factor, 1) for panel in (left, right))
    height, width = left.shape[:2]
    unit = max(1, width // SIDE)  # the text grows with the panels
    gap, strip = 8 * unit, 36 * unit
    # Chroma subsampling (4:2:0) needs an even height and width.
    picture = Image.new("RGB", (2 * width + gap, height + strip + height % 2), "white")
    start = width + gap  # of the map
    picture.paste(Image.fromarray(left), (0, 0))
    picture.paste(Image.fromarray(right), (start, 0))
    draw = ImageDraw.Draw(picture)
    # a frame around the map, whose border may be white
    draw.line([(start - 1, 0), (start - 1, height), (start + width, height)], "#999999")
    draw.line([(0, height), (width - 1, height)], "#999999")

    def caption(kept):  # as pieces of one font each, because Pillow draws a text in a single font
        text = f"{name}: {sure}" if kept == len(name) else f"{name[:kept].rstrip()}\u2026: {sure}"
        return [(piece, _font(14 * unit, file)) for piece, file in fonts.pieces(text)]

    kept = len(name)
    while sum(font.getlength(piece) for piece, font in caption(kept)) > width - 8 * unit and kept:
        kept -= 1
    ascent, descent = _font(14 * unit).getmetrics()
    x, baseline = 4 * unit, height + strip // 2 + (ascent - descent) // 2
    for piece, font in caption(kept):
        draw.text((x, baseline), piece, "black", font, anchor="ls")
        x += font.getlength(piece)

    bar = colours(np.linspace(0, 1, width - 2 * gap), bytes=True)[None, :, :3].repeat(8 * unit, 0)
    picture.paste(Image.fromarray(bar), (start + gap, height + 6 * unit))
    draw.rectangle(
        (start + gap - 1, height + 6 * unit - 1, start + width - gap, height + 14 * unit), outline="#999999"
    )
    font, line = _font(11 * unit), height + 26 * unit
    draw.text((start + gap, line), f"\u2212{scale:.2g}", "black", font, anchor="lm")
    draw.text((start + width // 2, line), "logit per pixel", "black", font, anchor="mm")
    draw.text((start + width - gap, line), f"+{scale:.2g}", "black", font, anchor="rm")
    return np.asarray(picture)
