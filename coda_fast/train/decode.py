"""Image files to uint8 of one size, and what became of those that cannot be read."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import random
import warnings
from typing import NamedTuple

import numpy as np
import torch

from coda_fast.images import check_pixels
from coda_fast.safety import open_file
from coda_fast.train.errors import TrainingError, need


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A file to uint8 [C, H, W]: shorter side to ``resize``, then a crop of ``size``: at random by the generator, else the middle."""

    channels: int
    resize: int | None
    size: int | None
    scale: tuple[float, float] | None = None
    randaugment: tuple[int, float] | None = None

    def __call__(self, data, generator: np.random.Generator | None) -> np.ndarray:
        """``data``: a path or the bytes of a file. Raises whatever the damage leads Pillow to."""
        return self.finish(self.read(data, generator), generator)

    def read(self, data, generator):
        """The crop, as Pillow's image."""
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with io.BytesIO(data) if isinstance(data, bytes) else open_file(data) as file, Image.open(file) as image:
                check_pixels(*image.size)
                if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
                    raise ValueError("not an image that Pillow can read")
                if self.size is not None:  # JPEG: smaller from the start, but twice the need, and the smallest crop not below ``size``
                    least = self.size / self.scale[0] ** 0.5 if self.scale is not None and generator is not None else 0
                    image.draft(None, (max(2 * (self.resize or self.size), math.ceil(least)),) * 2)
                image = _eight_bits(image).convert("RGB" if self.channels == 3 else "L")
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=self._box(*image.size, generator))
        return image

    def finish(self, image, generator):
        """RandAugment, and the pixels."""
        if self.randaugment is not None and generator is not None:
            image = _randaugment(image, self.randaugment, generator)
        pixels = np.asarray(image, np.uint8)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if pixels.ndim == 3 else pixels[None].copy()

    def _box(self, width, height, generator):
        """The part of the image, in its own pixels, that becomes the crop."""
        if generator is not None and self.scale is not None:  # Inception: a random share of the area, of aspect 3/4 to 4/3
            for _ in range(10):
                area, ratio = width * height * generator.uniform(*self.scale), np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
                w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
                if w <= width and h <= height:
                    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
                    return left, top, left + w, top + h
        side = min(width, height) * min(1.0, self.size / (self.resize or self.size))
        across, down = generator.uniform(size=2) if generator is not None else (0.5, 0.5)
        left, top = across * (width - side), down * (height - side)
        return left, top, left + side, top + side


def _eight_bits(image):
    """Grey of 16 bits as its upper 8, which is what Pillow reads of colours of 16 bits; by itself it cuts grey off at 255."""
    if image.mode == "F":
        raise ValueError("expected pixels that are integers, got floating point, which has no agreed white")
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) // 256).astype(np.uint8))


def _randaugment(image, parameters, generator):
    augmentation = _randaugment_transform(*parameters, 3 if image.mode == "RGB" else 1)
    before = random.getstate(), np.random.get_state()  # timm draws from the global generators
    seed = int(generator.integers(2**32))
    random.seed(seed), np.random.seed(seed)
    try:
        return augmentation(image)
    finally:
        random.setstate(before[0]), np.random.set_state(before[1])


@functools.cache
def _randaugment_transform(count, strength, channels):
    need("timm")
    from timm.data.auto_augment import RandAugment, rand_augment_ops

    fill = (128,) * 3 if channels == 3 else 128
    # timm: strength of 10; translation by a share of the side, at most 0.45: the paper's 100 of 224 pixels, for images of any size
    operations = rand_augment_ops(strength / 3, 1.0, {"translate_pct": 0.45, "img_mean": fill})
    for operation in operations:
        if operation.name.startswith("Posterize"):  # of low strengths timm keeps 0 bits, which Pillow refuses
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
    return RandAugment(operations, count)


def _posterize(operation, image, bits, **options):
    return operation(image, max(1, bits), **options)


class Item(NamedTuple):
    """What a slot of a batch is made of; ``problem``: why it cannot be, where that is known already."""

    name: str
    file: str | bytes | None
    label: int
    problem: str | None = None


def decode_all(items, decoder, generators):
    """(images, labels, valid, failures); an image that cannot be read is black and not valid."""
    pictures, failures = [], []
    for item, generator in zip(items, generators, strict=True):
        try:
            if item.problem is not None:
                raise ValueError(item.problem)
            image = decoder.read(item.file, generator)
        except Exception as error:  # decoders raise whatever the damage leads them to
            pictures.append(None)
            failures.append((item.name, str(error).partition(" <_io.")[0] or type(error).__name__))  # no addresses of buffers
            continue
        pictures.append(decoder.finish(image, generator))
    shapes = {p.shape for p in pictures if p is not None}
    of_one_size(shapes)
    shape = shapes.pop() if shapes else (decoder.channels, decoder.size or 1, decoder.size or 1)
    images = np.stack([np.zeros(shape, np.uint8) if p is None else p for p in pictures])
    valid = torch.tensor([p is not None for p in pictures])
    return torch.from_numpy(images), torch.tensor([item.label for item in items]), valid, failures


def of_one_size(shapes):
    if len(shapes) > 1:
        raise TrainingError(f"data.size: expected a size to crop images to, as they have several: {sorted(shapes)[:3]}; got none")
