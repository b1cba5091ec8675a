"""Sources of images: ``Arrays``, the whole set on the device; ``Folder``, image files. (In ``shards``: ``Shards``, tar files.)

All give a ``Batch`` of uint8 images; ``augment`` and ``to_float`` go on from there, on the device. Everything random is a function of
(seed, epoch, step) or (seed, epoch, image).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from coda_fast.train import workers
from coda_fast.train.decode import Decoder, Item, decode_all, of_one_size
from coda_fast.train.errors import TrainingError
from coda_fast.train.recipes import Data


@dataclasses.dataclass
class Batch:
    """images [N, C, H, W] uint8; labels [N]; valid [N], False where an image could not be read (None: all); failures: (file, reason)."""

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor | None = None
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def to(self, device) -> Batch:
        valid = None if self.valid is None else self.valid.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), valid, self.failures)


def batch_of(decoded, device) -> Batch:
    """What ``decode_all`` gave, on ``device``; or the TrainingError that came instead: raised in a worker, the loader would put a traceback
    into its message.
    """
    if isinstance(decoded, TrainingError):
        raise decoded
    images, labels, valid, failures = decoded
    return Batch(images, labels, None if bool(valid.all()) else valid, failures).to(device)


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many."""

    rank: int = 0
    world: int = 1

    def slice(self, count: int) -> slice:
        """Its part of ``count`` things, the same number for each process."""
        share = count // self.world
        return slice(self.rank * share, (self.rank + 1) * share)


def seeded(*numbers: int) -> int:
    """One seed of several numbers, all bits mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch."""
    return np.random.default_rng((seed, epoch, 0)).permutation(count)


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


def to_float(images: torch.Tensor, dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    """uint8 -> [0, 1]: all the normalisation that a CoDA-Net takes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(dtype, memory_format=layout).div_(255)


class Arrays:
    """A set in memory, on ``device``: images uint8 [N, C, H, W], labels [N]."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, device="cpu"):
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def facts(self) -> dict:
        """Number, and checksum of all labels and 64 of the images."""
        some = self.images[:: max(1, len(self) // 64)].cpu().numpy()
        return {"images": len(self), "checksum": zlib.crc32(some.tobytes(), zlib.crc32(self.labels.cpu().numpy().tobytes()))}

    def training(self, seed: int, epoch: int, start: int, batch_size: int, place: Place) -> Iterator[Batch]:
        """The process' slice of every global batch of the epoch, from step ``start`` on; the incomplete last batch is left out."""
        for index in _plan(len(self), seed, epoch, start, batch_size, place):
            index = torch.from_numpy(index).to(self.labels.device)
            yield Batch(self.images[index], self.labels[index])

    def evaluation(self, batch_size: int, place: Place) -> Iterator[Batch]:
        """Every sample once, over all processes."""
        for index in torch.arange(len(self), device=self.labels.device)[place.rank :: place.world].split(batch_size):
            yield Batch(self.images[index], self.labels[index])

    def sample(self, count: int) -> Batch:
        """A few, evenly from the whole set, always the same."""
        index = torch.linspace(0, len(self) - 1, min(count, len(self)), device="cpu").long()
        return Batch(self.images[index.to(self.images.device)], self.labels[index.to(self.labels.device)])


class Folder:
    """Image files, decoded in worker processes to uint8 of one size."""

    def __init__(self, files: Sequence[tuple[str, int]], decoder: Decoder, workers: int, device="cpu"):
        self.files, self.decoder, self.workers, self.device = list(files), decoder, workers, device

    def __len__(self) -> int:
        return len(self.files)

    def facts(self) -> dict:
        """Number, and checksum of names (class and file) and labels."""
        names = "\n".join(f"{'/'.join(Path(path).parts[-2:])} {label}" for path, label in self.files)
        return {"images": len(self), "checksum": zlib.crc32(names.encode(errors="surrogateescape"))}

    def training(self, seed, epoch, start, batch_size, place) -> Iterator[Batch]:
        """As ``Arrays.training``; crops and RandAugment are drawn for (seed, epoch, image)."""
        yield from self._batches(_plan(len(self), seed, epoch, start, batch_size, place), (seed, epoch))

    def evaluation(self, batch_size, place) -> Iterator[Batch]:
        """As ``Arrays.evaluation``."""
        own = np.arange(place.rank, len(self), place.world)
        yield from self._batches([own[i : i + batch_size] for i in range(0, len(own), batch_size)], None)

    def sample(self, count: int) -> Batch:
        """As ``Arrays.sample``."""
        index = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return batch_of(_Files(self.files, self.decoder, None).__getitems__(index), self.device)

    def in_memory(self, progress=None) -> tuple[Arrays, list]:
        """All of it decoded once, and what could not be read."""
        batches, failures = [np.arange(i, min(i + 256, len(self))) for i in range(0, len(self), 256)], []
        images, labels = [], []
        for batch in progress(self._batches(batches, None)) if progress else self._batches(batches, None):
            failures += batch.failures
            good = slice(None) if batch.valid is None else batch.valid
            if len(batch.labels[good]):  # where none could be read, the black ones have a size of their own
                images.append(batch.images[good].cpu()), labels.append(batch.labels[good].cpu())
        if not images:
            raise TrainingError(f"data: expected images, could read none of {len(self)}; {failures[-1][0]}: {failures[-1][1]}")
        of_one_size({tuple(some.shape[1:]) for some in images})
        return Arrays(torch.cat(images), torch.cat(labels), self.device), failures

    def _batches(self, plan, randomness):
        plan = [np.asarray(index).tolist() for index in plan]
        dataset = _Files(self.files, self.decoder, randomness)
        pinned = torch.device(self.device).type == "cuda"
        for decoded in workers.read(dataset, self.workers, batch_sampler=plan, pin_memory=pinned):
            yield batch_of(decoded, self.device)


def _plan(count, seed, epoch, start, batch_size, place):
    permutation = order(count, seed, epoch)
    for step in range(start, count // batch_size):
        yield permutation[step * batch_size : (step + 1) * batch_size][place.slice(batch_size)]


class _Files(torch.utils.data.Dataset):
    """Decoded batches by lists of indices, or the TrainingError that came instead."""

    def __init__(self, files, decoder, randomness):
        self.files, self.decoder, self.randomness = files, decoder, randomness

    def __len__(self):
        return len(self.files)

    def __getitems__(self, indices):
        generators = [None if self.randomness is None else np.random.default_rng((*self.randomness, 1, i)) for i in indices]
        items = [Item(path, path, label) for path, label in (self.files[i] for i in indices)]
        try:
            return decode_all(items, self.decoder, generators)
        except TrainingError as error:
            return error
