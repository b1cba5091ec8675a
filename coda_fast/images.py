"""Image files as tensors, with every way a file can be wrong named in one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch

from coda_fast.safety import MOST_PIXELS, NotAFile, open_file

LONGEST = 256  # times the shorter side: so long may the other side become where an image is enlarged


class ImageError(ValueError):
    """A file that is not a usable image; the message names the file, what was expected and what was found."""


def read_image(path: str | os.PathLike, channels: int = 3) -> torch.Tensor:
    """An image file as [channels, H, W] in [0, 1], float32, upright (EXIF orientation applied).

    Grey images serve as colour (three equal channels) and colour images whose channels are equal serve as grey. 16-bit files are
    scaled by 1/65535; floating-point files (TIFF) must lie in [0, 1]. Of an animation, the first frame is read.

    Raises:
        ImageError: missing, not a file (a pipe or a device is not opened), not an image, truncated, of more than ``MOST_PIXELS`` pixels,
        transparent, NaN, out of range, or colour where grey is needed.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    try:
        file = open_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"{path}: no such file") from None
    except NotAFile as error:
        raise ImageError(str(error).replace("expected a file", "expected an image file")) from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                check_pixels(*image.size, str(path))
                if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
                    raise UnidentifiedImageError
                image.load()
                image = ImageOps.exif_transpose(image)
        pixels = _to_array(image, path)  # [H, W] or [H, W, 3]
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: too large: {error}") from None
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{path}: too large: its pixels do not fit into the memory that is left") from None
    except Exception as error:  # decoders raise whatever the damage leads them to
        raise ImageError(f"{path}: damaged or truncated image: {error or type(error).__name__}") from None
    if channels == 3:
        pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    if channels != 1:
        raise ImageError(f"{path}: an image has 1 or 3 channels, the model expects {channels}")
    if pixels.ndim == 3:
        if np.ptp(pixels, axis=2).max() > 0:
            raise ImageError(f"{path}: expected a grey image (1 channel), got a colour image (3 channels); convert it first")
        pixels = pixels[..., 0]
    return torch.from_numpy(np.ascontiguousarray(pixels))[None]


def check_pixels(width: int, height: int, name: str = "image") -> None:
    """ImageError where an image has more than ``MOST_PIXELS`` pixels, or none."""
    if not 0 < width * height <= MOST_PIXELS:
        raise ImageError(f"{name}: too large: expected 1 to {MOST_PIXELS:,} pixels, got {width} x {height}")


def resize(image: torch.Tensor, size: int, name: str = "image") -> torch.Tensor:
    """``image`` [C, H, W] with its shorter side scaled to ``size`` pixels (bilinear, anti-aliased), aspect kept.

    Raises:
        ImageError: of what would have more than ``MOST_PIXELS`` pixels, or would grow to more than ``LONGEST`` times as long as wide;
        ``name``: of the image, for the message.
    """
    height, width = image.shape[1:]
    check_pixels(width, height, name)
    shorter, longer = sorted((height, width))
    if size > MOST_PIXELS:
        raise ImageError(f"{name}: expected a size of at most {MOST_PIXELS} pixels, got {size}")
    if size > shorter and longer > LONGEST * shorter:
        raise ImageError(
            f"{name}: expected an image at most {LONGEST} times as long as wide to enlarge its shorter side to {size} pixels, "
            f"got {width} x {height}; size 0 takes it as it is"
        )
    scale = size / shorter
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    if shape == (height, width):
        return image
    check_pixels(*shape[::-1], f"{name}: {width} x {height} pixels scaled to {size}")
    return torch.nn.functional.interpolate(image[None], shape, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _to_array(image, path):
    """float32 in [0, 1], [H, W] or [H, W, 3]."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        pixels = np.asarray(image).astype(np.float32)
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise ImageError(f"{path}: expected at most 16 bits for each channel, got values {pixels.min():g} to {pixels.max():g}")
        return pixels / 65535
    if mode == "F":
        pixels = np.array(image, np.float32)
        if not np.isfinite(pixels).all():
            raise ImageError(f"{path}: {int((~np.isfinite(pixels)).sum())} pixels are NaN or infinite")
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 1:
            raise ImageError(f"{path}: expected floating-point pixels in [0, 1], got {pixels.min():g} to {pixels.max():g}")
        return pixels
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            raise ImageError(f"{path}: expected an opaque image, got transparent pixels; flatten it on a background first")
        mode = "RGB"
    target = "L" if mode in ("1", "L") else "RGB"
    pixels = np.array(image.convert(target), np.float32)
    pixels /= 255
    return pixels
