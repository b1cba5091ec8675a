"""The 8-bit pixels of a picture from a file, bytes or Pillow, by the same rules for all commands
(docs/data.md lists them in a table).

A picture is turned upright by its EXIF orientation; transparency is flattened on white; 16 bits are scaled to
8; an animation gives its first picture; Pillow converts CMYK, palettes and other colour modes; ICC profiles
are not used. Colour becomes grey by ITU-R 601, grey becomes colour as three equal channels.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from typing import TYPE_CHECKING

import numpy as np

from coda_fast.data.errors import ImageError
from coda_fast.safety import MOST_PIXELS, NotAFile, open_file

if TYPE_CHECKING:
    from PIL import Image

# The version of the rules of this module. A training run that began under another version saw other pixels,
# and cannot be resumed under this one. Version 1 stands for the rules of releases before this module.
RULES = 2
MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's mode


def decode(
    source: str | os.PathLike | bytes | Image.Image,
    channels: int = 3,
    *,
    name: str | None = None,
    least: int | None = None,
) -> Image.Image:
    """The uint8 pixels of a picture, as a Pillow image of mode "RGB" or "L".

    Args:
        source: a path, the bytes of a file, or a Pillow image, which is not changed if it is already loaded.
        channels: 3 or 1.
        name: of the picture, for messages; None: its path.
        least: the length of each side, in pixels, that suffices: a JPEG may be decoded at an eighth, a
            quarter or half of its size, as long as no side is shorter than this; None: always whole.

    Raises:
        ImageError: the file is missing, is not a regular file (a pipe or a device is not opened), is not a
            picture, is truncated, has more than ``MOST_PIXELS`` pixels or more than 16 bits, or holds
            floating-point numbers that are NaN or outside [0, 1].
    """
    from PIL import Image, UnidentifiedImageError

    name = named(source) if name is None else name
    if channels not in MODES:
        raise ImageError(f"a picture has 1 or 3 channels, the model expects {channels}", name)
    try:
        with _QUIET:
            if isinstance(source, Image.Image):
                found = _converted(source, channels, least, name)
                return _plain(found.copy() if found is source else found)
            with _opened(source, name) as file, Image.open(file) as image:
                return _plain(_converted(image, channels, least, name))
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow can read", name) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}", name) from None
    except MemoryError:
        raise ImageError("too large: its pixels do not fit into the memory that is left", name) from None
    except ImageError:
        raise
    except Exception as error:  # a damaged file can make decoders raise any exception
        reason = str(error).partition(" <_io.")[0]  # without memory addresses
        raise ImageError(f"damaged or truncated image: {reason or type(error).__name__}", name) from None


def picture_size(source: str | os.PathLike | bytes) -> tuple[int, int] | None:
    """(height, width) that the header of a picture gives, before its orientation is applied; None if the file
    or its content is nothing that Pillow recognises. No pixel is decoded.
    """
    from PIL import Image

    try:
        with _QUIET, _opened(source, named(source)) as file, Image.open(file) as image:
            return image.height, image.width
    except Exception:  # a damaged file can make decoders raise any exception; ``decode`` says what is wrong
        return None


def named(source: object) -> str:
    """The name of a picture in messages: its path, or empty if it has none."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else ""


class _Quiet:
    """A context in which Pillow's warnings (about damaged EXIF and the like) are not shown.

    Python's warning filters are global, so all threads share one change of them, which the last thread
    undoes. If each thread saved and restored them by itself, it could restore those of another.
    """

    def __init__(self):
        self.lock, self.inside, self.filters = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self.inside += 1

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.filters.__exit__(*error)


_QUIET = _Quiet()


def _plain(image):
    """The image without metadata: orientation and transparency have been applied, and must not be again."""
    image.info = {}
    return image


def _opened(source, name):
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    try:
        return open_file(source)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("no such file", name) from None
    except NotAFile as error:
        kind = str(error).rpartition("got ")[2]
        raise ImageError(f"expected an image file, got {kind}", name) from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}", name) from None


def check_pixels(width: int, height: int, name: str = "") -> None:
    """Raise an ImageError if an image has more than ``MOST_PIXELS`` pixels, or none."""
    if not 0 < width * height <= MOST_PIXELS:
        raise ImageError(f"too large: expected 1 to {MOST_PIXELS:,} pixels, got {width} x {height}", name)


def _converted(image, channels, least, name):
    from PIL import Image, UnidentifiedImageError

    check_pixels(*image.size, name)
    if image.format == "EPS":  # a PostScript program, which Pillow would run in Ghostscript
        raise UnidentifiedImageError
    if least is not None and image.format == "JPEG":
        image.draft(None, (least, least))
    image.load()
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, name)
    elif image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _upright(image):
    """The image turned upright by its EXIF orientation, if that can be read. Pillow's own function fails for
    damaged EXIF, because it also writes EXIF.
    """
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF can make Pillow raise any exception; the pixels are unaffected
        return image
    turns = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
             Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)  # fmt: skip
    return image.transpose(turns[orientation - 2]) if orientation in range(2, 9) else image


def _eight_bits(image, name):
    """A grey image of 16 bits (0 to 65535) or floating point (0 to 1), rounded to 8 bits. Pillow's own
    conversion would clip both at 255.
    """
    from PIL import Image

    pixels = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(pixels).all():
            raise ImageError(f"{int((~np.isfinite(pixels)).sum())} pixels are NaN or infinite", name)
        if pixels.min() < 0 or pixels.max() > 1:
            raise ImageError(
                f"expected floating-point pixels in [0, 1], got {pixels.min():g} to {pixels.max():g}", name
            )
        return Image.fromarray(np.rint(255 * pixels.astype(np.float64)).astype(np.uint8))
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ImageError(
            f"expected at most 16 bits for each channel, got values {pixels.min():g} to {pixels.max():g}",
            name,
        )
    pixels = pixels.astype(np.int64)
    clear = image.info.get("transparency")  # in a grey PNG, the value of transparent pixels
    if isinstance(clear, int):
        pixels = np.where(pixels == clear, 65535, pixels)
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
