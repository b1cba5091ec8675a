"""How a picture becomes the input of a network. The preprocessing is a part of the model, stored in its file,
and the same for every command.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from coda_fast._geometry import integer
from coda_fast.data.decode import MODES, check_pixels, decode, named
from coda_fast.data.errors import ImageError
from coda_fast.safety import MOST_PIXELS

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names; all but "nearest" are antialiased
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest")
LARGEST = 1 << 16  # the longest side in pixels: a model file that asks for more is damaged or hostile
LONGEST = 256  # the largest ratio of the sides of a picture that is enlarged as a whole
# If only the middle of a picture is used, a strip (a very long picture) is cut to at most this ratio of its
# sides before it is resized, because resizing all of it could take any amount of memory.
STRIP = 4
VALUE_RANGE = (0.0, 1.0)  # of the input of a CoDA-Net, which encodes it as [x, 1 - x]

_Pixels = TypeVar("_Pixels", "Image.Image", torch.Tensor)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Turns pictures into inputs of a network: resizes the shorter side, crops the middle, scales to [0, 1].
    ``model.transform`` is one.

    Called with a picture (a path, the bytes of a file, a Pillow image, an array [H, W(, C)] or a tensor [C,
    H, W]), it returns float32 [C, H, W]. Called with a tensor [..., C, H, W], it returns a tensor with as
    many dimensions, on the same device and, if the input is floating point, in the same dtype. Files are
    decoded by the rules of ``coda_fast.data.decode``. Pillow resizes 8-bit pixels, as in torchvision and
    timm. torch resizes floating-point tensors, which should be in [0, 1]; its result is the same up to the
    rounding to 8 bits, and differentiable.

    Args:
        channels: 3 for colour, 1 for grey.
        resize: the new length of the shorter side, in pixels; None: that of the crop, or the picture is not
            resized if there is no crop.
        crop: the side, in pixels, of the square that is cut from the middle; None: the whole picture.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        ValueError: a value is of the wrong kind, or the crop is larger than the resized picture.
        ImageError: when called, the picture cannot be used.
        TypeError: when called, the argument is not a picture.
        ImportError: when called, torchvision or Pillow is missing.

    >>> import torch
    >>> Preprocessing(resize=256, crop=240)(torch.zeros(3, 375, 500)).shape
    torch.Size([3, 240, 240])
    """

    channels: int = 3
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", _side(self.channels, "channels"))
        for name in ("resize", "crop"):
            object.__setattr__(
                self, name, None if getattr(self, name) is None else _side(getattr(self, name), name)
            )
        if self.resize is None:
            object.__setattr__(self, "resize", self.crop)
        if self.crop is not None and self.resize is not None and self.crop > self.resize:
            raise ValueError(
                f"preprocessing.crop: expected at most resize, {self.resize} pixels, got {self.crop}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"preprocessing.interpolation: expected one of {', '.join(INTERPOLATIONS)}, got "
                f"{str(self.interpolation)[:50]!r}"
            )

    @classmethod
    def of(
        cls, value: Preprocessing | Mapping | None, channels: int, image_size: int | None = None
    ) -> Preprocessing:
        """A preprocessing for a network with this number of channels, from another one or from a result of
        ``config``. None means to resize and crop to ``image_size``, if that is given.

        Raises:
            ValueError: ``value`` is anything else, keys are unknown, or values do not fit.
        """
        if value is None:
            return cls(channels, image_size, image_size)
        if isinstance(value, cls):
            return dataclasses.replace(value, channels=channels)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"preprocessing: expected resize, crop and interpolation, got {str(value)[:100]!r}"
            )
        known = {"resize", "crop", "interpolation", "value_range"}
        if unknown := sorted(str(key)[:50] for key in value.keys() - known):
            raise ValueError(
                f"preprocessing: expected {', '.join(sorted(known))}, got {', '.join(unknown[:5])}"
            )
        low_high = value.get("value_range", VALUE_RANGE)
        if not isinstance(low_high, list | tuple) or tuple(low_high) != VALUE_RANGE:
            raise ValueError(
                "preprocessing.value_range: expected [0, 1], which a CoDA-Net encodes as [x, 1 - x], got "
                f"{str(low_high)[:100]}"
            )
        return cls(
            channels, **{key: value[key] for key in ("resize", "crop", "interpolation") if key in value}
        )

    def config(self) -> dict:
        """The arguments as JSON values, without ``channels``, which the network knows."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.interpolation,
            "value_range": list(VALUE_RANGE),
        }

    def at(self, size: int | None, crop: bool = True) -> Preprocessing:
        """The preprocessing at another size.

        Args:
            size: the new length of the shorter side, in pixels; 0: the picture is not resized; None: this
                preprocessing itself.
            crop: whether to crop the square in the middle, or to use the whole picture.
        """
        if size is None:
            return self
        return dataclasses.replace(self, resize=size or None, crop=size or None if crop else None)

    def __call__(
        self, picture: str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor
    ) -> torch.Tensor:
        """The picture as the input of a network."""
        if isinstance(picture, torch.Tensor):
            return self._of_tensor(picture)
        if not isinstance(picture, str | os.PathLike | bytes | bytearray | np.ndarray) and not hasattr(
            picture, "getexif"
        ):
            raise TypeError(
                "picture: expected a path, bytes, a picture of Pillow, an array or a tensor, got "
                f"{type(picture).__name__}"
            )
        return torch.from_numpy(self.pixels(picture)).float().div_(255)

    def pixels(
        self, source: str | os.PathLike | bytes | np.ndarray | Image.Image, name: str | None = None
    ) -> np.ndarray:
        """The input before it is divided by 255, uint8 [C, H, W], for any picture but a tensor. It takes a
        quarter of the bytes to send to a device.
        """
        source = _of_array(source) if isinstance(source, np.ndarray) else source
        return as_array(self.apply(decode(source, self.channels, name=name), name or named(source)))

    def apply(self, image: _Pixels, name: str = "") -> _Pixels:
        """Resize and crop decoded pixels: a Pillow image, or a floating-point tensor [..., C, H, W]."""
        if self.resize is None:
            return image
        functional, modes = _torchvision()
        height, width = functional.get_size(image)
        if self.crop is not None:  # resize no more than the middle of a strip
            within = middle(width, height)
            image = image if within == (width, height) else functional.center_crop(image, within[::-1])
            width, height = within
        self._check_resized(width, height, name)
        if min(width, height) != self.resize:
            image = functional.resize(image, [self.resize], modes[self.interpolation.upper()], antialias=True)
        return image if self.crop is None else functional.center_crop(image, [self.crop, self.crop])

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the result for a picture of this size."""
        return (self.crop, self.crop) if self.crop is not None else self._resized(width, height)

    def keeps(self, width: int, height: int) -> bool:
        """Whether a picture of this size is neither resized nor cropped."""
        return self.resize is None or (
            min(width, height) == self.resize and self.size(width, height) == (width, height)
        )

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an upright picture of this size that the network sees: left, top, right and bottom, in
        pixels of the picture.
        """
        if self.crop is None:
            return 0.0, 0.0, float(width), float(height)
        kept = middle(width, height)
        resized, found = self._resized(*kept), []
        for whole, part, side in zip((width, height), kept, resized, strict=True):
            scale = part / side
            # where the strip begins, and where the crop begins within it
            first = round((whole - part) / 2.0) + scale * round((side - self.crop) / 2.0)
            found.append((first, first + scale * self.crop))
        return found[0][0], found[1][0], found[0][1], found[1][1]

    def _resized(self, width, height):
        if self.resize is None:
            return width, height
        shorter, longer = sorted((width, height))
        other = int(self.resize * longer / shorter)  # as torchvision rounds
        return (self.resize, other) if width <= height else (other, self.resize)

    def _check_resized(self, width, height, name):
        """Raise an ImageError if the resized picture would be too large."""
        if (
            self.crop is None
            and self.resize > min(width, height)
            and max(width, height) > LONGEST * min(width, height)
        ):
            raise ImageError(
                f"expected an image at most {LONGEST} times as long as wide to enlarge its shorter side to "
                f"{self.resize} pixels, "
                f"got {width} x {height}; size 0 takes it as it is",
                name,
            )
        resized = self._resized(width, height)
        if math.prod(resized) > MOST_PIXELS:
            check_pixels(
                *resized, f"{name}: {width} x {height} pixels scaled to {self.resize}".removeprefix(": ")
            )

    def _of_tensor(self, tensor):
        if tensor.dim() < 3 or not (tensor.dtype == torch.uint8 or tensor.dtype.is_floating_point):
            raise TypeError(
                f"picture: expected a tensor [..., C, H, W], uint8 or floating point, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        given, height, width = tensor.shape[-3:]
        if given not in MODES:
            raise ImageError(f"a picture has 1 or 3 channels, got a tensor [..., {given}, {height}, {width}]")
        check_pixels(width, height)
        if tensor.dtype == torch.uint8:
            pictures = tensor.cpu().reshape(-1, given, height, width).permute(0, 2, 3, 1).numpy()
            found = np.empty((len(pictures), self.channels, *self.size(width, height)[::-1]), np.uint8)
            for place, picture in zip(found, pictures, strict=True):
                place[:] = self.pixels(picture)
            return (
                torch.from_numpy(found)
                .reshape(*tensor.shape[:-3], *found.shape[1:])
                .to(tensor.device)
                .float()
                .div_(255)
            )
        functional, _ = _torchvision()
        if given != self.channels:
            tensor = (
                functional.rgb_to_grayscale(tensor)
                if self.channels == 1
                else tensor.expand(*tensor.shape[:-3], 3, height, width)
            )
        if self.resize is not None and self.interpolation in ("lanczos", "box", "hamming"):
            raise ImageError(
                f"torch has no {self.interpolation} interpolation of floating point; give uint8, or a "
                "picture of Pillow"
            )
        resized = self.apply(tensor)
        return resized if resized is tensor else resized.clamp(0, 1)


def as_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of mode "RGB" or "L" as uint8 [C, H, W]."""
    pixels = np.asarray(image, np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None].copy()


def middle(width: int, height: int) -> tuple[int, int]:
    """(width, height) of the middle part of a picture that is at most ``STRIP`` times as long as wide."""
    return min(width, STRIP * height), min(height, STRIP * width)


def _of_array(pixels):
    from PIL import Image

    if pixels.dtype != np.uint8 or not pixels.size or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise TypeError(
            f"picture: expected an array [H, W] or [H, W, C] of uint8, got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    return Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    )


def _torchvision():
    try:
        from torchvision.transforms.v2 import InterpolationMode, functional
    except ImportError as error:
        raise ImportError(
            f"resizing pictures needs torchvision: pip install 'coda-fast[cli]' ({error})"
        ) from None
    return functional, InterpolationMode


def _side(value, name):
    try:
        number = integer(value)
    except TypeError:
        number = 0
    if not 1 <= number <= LARGEST:
        raise ValueError(
            f"preprocessing.{name}: expected a positive int, at most {LARGEST}, got {str(value)[:50]}"
        )
    return number
