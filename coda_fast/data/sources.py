"""Sources of labelled pictures: ``Arrays`` holds a whole data set on the device, ``Folder`` reads files;
``Shards``, in ``coda_fast.data.shards``, reads tar files.

All of them give batches of uint8 images, which ``to_float`` turns into the input of a network on the device.
Files are decoded by a ``Preprocessing`` or, for training, by a ``RandomDecoder``. All random numbers are
functions of (seed, epoch, step) or (seed, epoch, image).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from coda_fast.data import workers
from coda_fast.data.decode import RULES
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.preprocessing import Preprocessing


@dataclasses.dataclass
class Batch:
    """Images and their classes.

    Attributes:
        images: uint8 [N, C, H, W]; an unreadable image is black.
        labels: [N].
        valid: [N], False for unreadable images; None: all could be read.
        failures: (name, reason) of the images that could not be read.
    """

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor | None = None
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``."""
        valid = None if self.valid is None else self.valid.to(device, non_blocking=True)
        return Batch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            valid,
            self.failures,
        )


class Item(NamedTuple):
    """An image of a batch before it is decoded; ``problem`` says why that is impossible, if it is known."""

    name: str
    file: str | bytes | None
    label: int
    problem: str | None = None


class RandomDecoder(Protocol):
    """Decodes a picture with random augmentation: ``coda_fast.train.augmentation.Augmentation``."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing without augmentation, whose results have the same shape."""

    def pixels(self, source: str | bytes, generator: np.random.Generator) -> np.ndarray:
        """The picture as uint8 [C, H, W]; ImageError if it cannot be read."""


# images, labels, valid and failures of a ``Batch``, on the CPU
Decoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[str, str]]]


def decode_all(
    items: Sequence[Item],
    decoder: Preprocessing | RandomDecoder,
    generators: Sequence[np.random.Generator] | None,
) -> Decoded:
    """Decode a batch. An unreadable image is black and not valid.

    Args:
        items: the images.
        decoder: a ``Preprocessing``, or a ``RandomDecoder`` with ``generators``.
        generators: one for each item; None: nothing is random.

    Raises:
        DataError: the images have several sizes.
    """
    pictures: list[np.ndarray | None] = []
    failures = []
    for i, item in enumerate(items):
        try:
            if item.problem is not None or item.file is None:
                raise ImageError(item.problem or "no image")
            pictures.append(decoder.pixels(item.file, *(() if generators is None else (generators[i],))))
        except ImageError as error:
            pictures.append(None)
            failures.append((item.name, error.reason))
    shapes = {p.shape for p in pictures if p is not None}
    of_one_size(shapes)
    wanted = decoder if isinstance(decoder, Preprocessing) else decoder.preprocessing
    shape = shapes.pop() if shapes else (wanted.channels, wanted.crop or 1, wanted.crop or 1)
    images = np.stack([np.zeros(shape, np.uint8) if p is None else p for p in pictures])
    valid = torch.tensor([p is not None for p in pictures])
    return torch.from_numpy(images), torch.tensor([item.label for item in items]), valid, failures


def of_one_size(shapes: set) -> None:
    """Raise a DataError if there are several shapes [C, H, W]."""
    if len(shapes) > 1:
        some = ", ".join(f"{height} x {width}" for _, height, width in sorted(shapes)[:3])
        raise DataError(
            "data: expected images of one size, or a size to crop them to (data.size in a recipe, --size), "
            f"got {some}"
        )


def batch_of(decoded: Decoded | DataError, device: torch.device | str) -> Batch:
    """A result of ``decode_all`` as a batch on ``device``.

    A worker process returns a DataError as a value, which is raised here, because torch's loader would put
    the worker's traceback into its message.
    """
    if isinstance(decoded, DataError):
        raise decoded
    images, labels, valid, failures = decoded
    return Batch(images, labels, None if bool(valid.all()) else valid, failures).to(device)


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the processes that share the batches of a run, given by its rank."""

    rank: int = 0
    world_size: int = 1

    def slice(self, count: int) -> slice:
        """The part of ``count`` things that belongs to this process; all processes get the same number."""
        share = count // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)


def seeded(*numbers: int) -> int:
    """A single seed that depends on all bits of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the ``count`` images in an epoch, as a permutation."""
    return np.random.default_rng((seed, epoch, 0)).permutation(count)


def to_float(images: torch.Tensor, dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    """uint8 images as floating point in [0, 1], the only normalisation that a CoDA-Net expects."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(dtype, memory_format=layout).div_(255)


class Arrays:
    """A data set in memory, on ``device``: images uint8 [N, C, H, W], labels [N]. ``rules``: the version of
    the decoding rules (``RULES``), if the images come from files.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        device: torch.device | str = "cpu",
        rules: int | None = None,
    ):
        self.images, self.labels, self.rules = images.to(device), labels.to(device), rules

    def __len__(self) -> int:
        return len(self.labels)

    def facts(self) -> dict:
        """The number of images, a checksum of all labels and about 64 images, and the version of the decoding
        rules, if there is one.
        """
        some = self.images[:: max(1, len(self) // 64)].cpu().numpy()
        checksum = zlib.crc32(some.tobytes(), zlib.crc32(self.labels.cpu().numpy().tobytes()))
        return {"images": len(self), "checksum": checksum} | (
            {} if self.rules is None else {"rules": self.rules}
        )

    def training(
        self, seed: int, epoch: int, start: int, batch_size: int, process: Process
    ) -> Generator[Batch, None, None]:
        """This process' slice of every global batch of the epoch, from step ``start`` on. An incomplete last
        batch is left out.
        """
        for index in plan(len(self), seed, epoch, start, batch_size, process):
            yield self.some(index)

    def evaluation(self, batch_size: int, process: Process = Process()) -> Generator[Batch, None, None]:
        """Batches that contain every image once, over all processes."""
        for index in once(len(self), batch_size, process):
            yield self.some(index)

    def sample(self, count: int) -> Batch:
        """``count`` images, evenly spaced over the data set, and always the same ones."""
        return self.some(_spread(len(self), count))

    def some(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The images of these indices [n]."""
        index = torch.from_numpy(np.asarray(indices)).to(self.labels.device)
        return Batch(self.images[index], self.labels[index])

    def name(self, index: int) -> str:
        """The name of an image, for messages and tables."""
        return str(index)


class Folder:
    """Image files and their labels, decoded in worker processes to uint8 of one size.

    Args:
        files: path and class of each image.
        preprocessing: decodes images.
        workers: the number of worker processes; 0: images are decoded in this process.
        device: where batches are sent.
        augmentation: decodes images for training; None: as ``preprocessing`` does.
        shape: the shape [C, H, W] that every image must have; None: all images of a batch must have the same.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        preprocessing: Preprocessing,
        workers: int = 0,
        device: torch.device | str = "cpu",
        augmentation: RandomDecoder | None = None,
        shape: tuple[int, ...] | None = None,
    ):
        self.files, self.preprocessing, self.augmentation = list(files), preprocessing, augmentation
        self.workers, self.device, self.shape = workers, device, shape

    def __len__(self) -> int:
        return len(self.files)

    def facts(self) -> dict:
        """The number of images, a checksum of names and labels, and the version of the decoding rules."""
        names = "\n".join(f"{'/'.join(Path(path).parts[-2:])} {label}" for path, label in self.files)
        return {
            "images": len(self),
            "checksum": zlib.crc32(names.encode(errors="surrogateescape")),
            "rules": RULES,
        }

    def training(
        self, seed: int, epoch: int, start: int, batch_size: int, process: Process
    ) -> Generator[Batch, None, None]:
        """As ``Arrays.training``; the augmentation of an image depends on (seed, epoch, image)."""
        randomness = None if self.augmentation is None else (seed, epoch)
        yield from self._batches(plan(len(self), seed, epoch, start, batch_size, process), randomness)

    def evaluation(self, batch_size: int, process: Process = Process()) -> Generator[Batch, None, None]:
        """As ``Arrays.evaluation``."""
        yield from self._batches(once(len(self), batch_size, process), None)

    def sample(self, count: int) -> Batch:
        """As ``Arrays.sample``."""
        return self.some(_spread(len(self), count))

    def some(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """As ``Arrays.some``, decoded in this process."""
        return batch_of(
            _Files(self.files, self.preprocessing, None, self.shape).__getitems__(
                np.asarray(indices).tolist()
            ),
            self.device,
        )

    def name(self, index: int) -> str:
        """As ``Arrays.name``: the path of the file."""
        return self.files[index][0]

    def in_memory(
        self, progress: Callable[[Iterable], Iterable] | None = None
    ) -> tuple[Arrays, list[tuple[str, str]]]:
        """All images, decoded once, and (name, reason) of those that could not be read. ``progress`` is a
        wrapper like tqdm around the batches.

        Raises:
            DataError: no image can be read, or images have several sizes.
        """
        images, labels = [], []
        failures: list[tuple[str, str]] = []
        batches = self.evaluation(256)
        for batch in progress(batches) if progress else batches:
            failures += batch.failures
            good = slice(None) if batch.valid is None else batch.valid
            if len(batch.labels[good]):  # a batch of unreadable images only may have another size
                images.append(batch.images[good].cpu())
                labels.append(batch.labels[good].cpu())
        if not images:
            raise DataError(
                f"data: expected images, could read none of {len(self)}; {failures[-1][0]}: {failures[-1][1]}"
            )
        of_one_size({tuple(some.shape[1:]) for some in images})
        return Arrays(torch.cat(images), torch.cat(labels), self.device, RULES), failures

    def _batches(self, batches, randomness):
        batches = [np.asarray(index).tolist() for index in batches]
        dataset = _Files(
            self.files,
            self.preprocessing if randomness is None else self.augmentation,
            randomness,
            self.shape,
        )
        pinned = torch.device(self.device).type == "cuda"
        for decoded in workers.read(dataset, self.workers, batch_sampler=batches, pin_memory=pinned):
            yield batch_of(decoded, self.device)


def once(count: int, batch_size: int, process: Process) -> list[np.ndarray]:
    """The indices of a process' share of a data set, in batches."""
    own = np.arange(process.rank, count, process.world_size)
    return [own[i : i + batch_size] for i in range(0, len(own), batch_size)]


def _spread(count, wanted):
    return np.linspace(0, count - 1, min(wanted, count)).astype(int)


def plan(
    count: int, seed: int, epoch: int, start: int, batch_size: int, process: Process
) -> Iterator[np.ndarray]:
    """The indices of this process' slice of every global batch of an epoch, from step ``start`` on."""
    permutation = order(count, seed, epoch)
    for step in range(start, count // batch_size):
        yield permutation[step * batch_size : (step + 1) * batch_size][process.slice(batch_size)]


class _Files(torch.utils.data.Dataset):
    """Decoded batches for lists of indices. A DataError is returned as a value: see ``batch_of``."""

    def __init__(self, files, decoder, randomness, shape=None):
        self.files, self.decoder, self.randomness, self.shape = files, decoder, randomness, shape

    def __len__(self):
        return len(self.files)

    def __getitems__(self, indices):
        chance = self.randomness
        generators = None if chance is None else [np.random.default_rng((*chance, 1, i)) for i in indices]
        items = [Item(path, path, label) for path, label in (self.files[i] for i in indices)]
        try:
            decoded = decode_all(items, self.decoder, generators)
            if self.shape is not None and bool(decoded[2].any()):
                of_one_size({self.shape, tuple(decoded[0].shape[1:])})
            return decoded
        except DataError as error:
            return error
