"""What chance does to the pictures of a training step: crops and RandAugment as they are decoded, flips and padded crops on the device.

Crops are torchvision's, RandAugment is timm's. Both draw from the global generators of Python, NumPy and torch, which are seeded for one
picture and put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from coda_fast.data.decode import decode
from coda_fast.data.preprocessing import Preprocessing, as_array, middle
from coda_fast.data.sources import Place
from coda_fast.train.errors import need
from coda_fast.train.recipes import Data


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A picture to uint8 [C, H, W], by the generator of one picture: a random square of the size of the network's crop, from all of the
    picture once it is resized, or (``scale``) a random share of its area, of aspect 3/4 to 4/3; then RandAugment.
    """

    preprocessing: Preprocessing
    scale: tuple[float, float] | None = None
    randaugment: tuple[int, float] | None = None

    def pixels(self, source, generator: np.random.Generator, name: str | None = None) -> np.ndarray:
        """``source``: as of ``Preprocessing.pixels``. ImageError: it cannot be read."""
        wanted = self.preprocessing
        image = decode(source, wanted.channels, name=name, least=self._least())
        with _seeded(int(generator.integers(2**32))):
            if wanted.crop is not None:
                image = self._crop(image, name)
            if self.randaugment is not None:
                image = _randaugment(*self.randaugment, wanted.channels)(image)
        return as_array(image)

    def _least(self):
        """Pixels of a side below which a JPEG is not decoded: twice the need, and the smallest crop not below the size that it gets."""
        wanted = self.preprocessing
        if wanted.crop is None:
            return None
        smallest = 0 if self.scale is None else wanted.crop / self.scale[0] ** 0.5
        return max(2 * wanted.resize, math.ceil(smallest))

    def _crop(self, image, name):
        wanted = self.preprocessing
        if self.scale is not None:
            return _random_part(wanted.crop, self.scale, wanted.interpolation)(image)
        if (within := middle(*image.size)) != image.size:  # of a strip, no more is resized than is of use
            image = _random_square(within[::-1])(image)
        image = dataclasses.replace(wanted, crop=None).apply(image, name or "")
        return _random_square((wanted.crop, wanted.crop))(image)


@functools.cache
def _random_part(side, scale, interpolation):
    from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

    return RandomResizedCrop(side, scale, interpolation=InterpolationMode[interpolation.upper()])


@functools.lru_cache(1024)
def _random_square(sides):
    from torchvision.transforms.v2 import RandomCrop

    return RandomCrop(sides)


@contextlib.contextmanager
def _seeded(seed):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed), np.random.seed(seed), torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])


@functools.cache
def _randaugment(count, strength, channels):
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


def augment(images: torch.Tensor, spec: Data, generator: torch.Generator, place: Place) -> torch.Tensor:
    """Flips and padded crops of uint8 images [N, C, H, W], on their device. Draws for the global batch, of which these are a slice."""
    local, height, width = len(images), *images.shape[2:]
    total = local * place.world
    mine = place.slice(total)
    if spec.pad:
        offsets = torch.randint(2 * spec.pad + 1, (total, 2), generator=generator)[mine].to(images.device)
        padded = F.pad(images, [spec.pad] * 4)
        rows = offsets[:, :1] + torch.arange(height, device=images.device)  # [N, H]
        columns = offsets[:, 1:] + torch.arange(width, device=images.device)
        n, c = torch.arange(local, device=images.device), torch.arange(images.shape[1], device=images.device)
        images = padded[n[:, None, None, None], c[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    if spec.flip:
        flipped = (torch.rand(total, generator=generator) < 0.5)[mine].to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    return images
