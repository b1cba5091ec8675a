"""Random augmentation of training pictures: crops and RandAugment during decoding, flips and padded crops on
the device.

Pillow crops and resizes in one operation. timm's RandAugment draws from the global generators, which are
seeded for each picture and restored after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from coda_fast.data.decode import decode
from coda_fast.data.preprocessing import Preprocessing, as_array
from coda_fast.data.sources import Process
from coda_fast.train.errors import need
from coda_fast.train.schema import Data

if TYPE_CHECKING:
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Decodes a picture to uint8 [C, H, W] with a random crop, then RandAugment.

    Attributes:
        preprocessing: the preprocessing of the network; without a ``crop``, nothing is cropped.
        scale: the smallest and largest share of the picture's area that a crop covers, with an aspect ratio
            of 3/4 to 4/3; None: a crop is a random square of the resized picture, as large as the network's.
        randaugment: number and strength of the operations; None: no RandAugment.
    """

    preprocessing: Preprocessing
    scale: tuple[float, float] | None = None
    randaugment: tuple[int, float] | None = None

    def pixels(
        self,
        source: str | os.PathLike | bytes | Image.Image,
        generator: np.random.Generator,
        name: str | None = None,
    ) -> np.ndarray:
        """The augmented pixels of a picture that messages call ``name``; ImageError if it is unreadable."""
        from PIL.Image import Resampling

        wanted = self.preprocessing
        image = decode(source, wanted.channels, name=name, least=self._least())
        if wanted.crop is not None:
            method = Resampling[wanted.interpolation.upper()]
            box = self._part(image.width, image.height, generator)
            image = image.resize((wanted.crop, wanted.crop), method, box=box)
        if self.randaugment is not None:
            with _seeded(generator):
                image = _randaugment(*self.randaugment, wanted.channels)(image)
        return as_array(image)

    def _least(self):
        """The smallest side, in pixels, to which a JPEG may be decoded: twice the size after resizing, and
        large enough that the smallest crop is not enlarged.
        """
        wanted = self.preprocessing
        if wanted.crop is None:
            return None
        smallest = 0 if self.scale is None else wanted.crop / self.scale[0] ** 0.5
        return max(2 * wanted.resize, math.ceil(smallest))

    def _part(self, width, height, generator):
        """The part of the picture that becomes the crop, in pixels: left, top, right, bottom. torchvision's
        own function would use torch's global generator.
        """
        for _ in range(10 if self.scale is not None else 0):
            area, ratio = (
                width * height * generator.uniform(*self.scale),
                math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3))),
            )
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
                return left, top, left + w, top + h
        side = min(width, height) * self.preprocessing.crop / self.preprocessing.resize
        left, top = (
            place * (length - side)
            for place, length in zip(generator.uniform(size=2), (width, height), strict=True)
        )
        return left, top, left + side, top + side


@contextlib.contextmanager
def _seeded(generator):
    """A context in which the global generators, which libraries use, are seeded from ``generator``.
    Afterwards they are restored.
    """
    before, seed = (random.getstate(), np.random.get_state()), int(generator.integers(2**32))
    random.seed(seed), np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0]), np.random.set_state(before[1])


@functools.cache
def _randaugment(count, strength, channels):
    need("timm")
    from timm.data.auto_augment import RandAugment, rand_augment_ops

    fill = (128,) * 3 if channels == 3 else 128
    # The paper's strength is on a scale of 30, timm's on a scale of 10. The paper translates by at most 100
    # of 224 pixels, a share of 0.45 of the side, which suits images of any size.
    operations = rand_augment_ops(strength / 3, 1.0, {"translate_pct": 0.45, "img_mean": fill})
    for operation in operations:
        # at low strength timm posterizes to 0 bits, which Pillow refuses
        if operation.name.startswith("Posterize"):
            operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
    return RandAugment(operations, count)


def _posterize(operation, image, bits, **options):
    return operation(image, max(1, bits), **options)


def draw_flips(count: int, generator: torch.Generator) -> torch.Tensor:
    """Which images of a global batch are flipped, [count]."""
    return torch.rand(count, generator=generator) < 0.5


def augment(images: torch.Tensor, spec: Data, generator: torch.Generator, process: Process) -> torch.Tensor:
    """Flips and padded crops of uint8 images [N, C, H, W], on their device. The numbers are drawn for the
    global batch, of which these images are the slice of this process.
    """
    local, (height, width) = len(images), images.shape[2:]
    total = local * process.world_size
    own = process.slice(total)
    if spec.pad:
        offsets = torch.randint(2 * spec.pad + 1, (total, 2), generator=generator)[own].to(
            images.device, non_blocking=True
        )
        padded = F.pad(images, [spec.pad] * 4)
        rows = offsets[:, :1] + torch.arange(height, device=images.device)  # [N, H]
        columns = offsets[:, 1:] + torch.arange(width, device=images.device)
        n, c = torch.arange(local, device=images.device), torch.arange(images.shape[1], device=images.device)
        images = padded[
            n[:, None, None, None], c[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
    if spec.flip:
        flipped = draw_flips(total, generator)[own].to(images.device, non_blocking=True)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    return images
