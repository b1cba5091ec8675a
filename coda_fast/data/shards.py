"""WebDataset shards: tar files of images and classes, for many processes on many nodes.

They are read with Python's ``tarfile`` instead of webdataset's own iterator, which takes a damaged header for
the end of a shard, and reads entries of any size into memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import tarfile
import zlib
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch

from coda_fast.data import workers
from coda_fast.data.decode import RULES
from coda_fast.data.errors import DataError
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.data.sources import Batch, Item, Process, RandomDecoder, batch_of, decode_all, order, seeded
from coda_fast.safety import open_file

MOST_SHARDS = 10**6
LARGEST = 2**28  # bytes of an image in a shard
LARGEST_TEXT = 2**20  # bytes of a class, and of a long name or attributes in a tar header


class Shards:
    """WebDataset tar files, in which each sample is an image (jpg, jpeg, png, webp) and a class (cls).

    In training each process and worker cycles through its share of the shards, so that the images of a step,
    unlike those of the other sources, depend on the number of processes. An unreadable sample is an invalid
    image of its batch, and so is the unreadable rest of a damaged shard.

    Args:
        pattern: a folder, or paths or addresses with braces, such as ``train-{0000..0146}.tar``.
        preprocessing: decodes images.
        workers: the number of worker processes; 0: images are decoded in this process.
        classes: the number of classes; those of the samples are from 0 to ``classes - 1``.
        device: where batches are sent.
        samples: the number of images of a training epoch.
        buffer: the number of samples in the shuffle buffer, from which the next training sample is drawn.
        augmentation: decodes images for training; None: as ``preprocessing`` does.

    Raises:
        DataError: there are no shards or too many, some are missing, or the pattern holds commands
            (``pipe:``). ImportError: webdataset is missing.
    """

    def __init__(
        self,
        pattern: str,
        preprocessing: Preprocessing,
        workers: int,
        classes: int,
        device: torch.device | str = "cpu",
        samples: int | None = None,
        buffer: int = 5000,
        augmentation: RandomDecoder | None = None,
    ):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise ImportError(f"shards need {error.name}: pip install 'coda-fast[train]'") from None

        if _count(pattern) > MOST_SHARDS:
            raise DataError(
                f"data: expected a pattern of at most {MOST_SHARDS} shards, got one of more: "
                f"{pattern[:200]!r}"
            )
        self.urls = (
            sorted(str(p) for p in Path(pattern).glob("*.tar"))
            if os.path.isdir(pattern)
            else expand_urls(pattern)
        )
        if any(url.lower().startswith("pipe:") for url in self.urls):
            raise DataError(
                f"data: expected shards that are files or addresses, got {pattern!r}: a recipe must not run "
                "commands"
            )
        missing = [url for url in self.urls if "://" not in url and not os.path.isfile(url)]
        if not self.urls or missing:
            raise DataError(
                f"data: expected shards {pattern!r}, found {len(self.urls) - len(missing)}; missing: "
                f"{missing[:3]}"
            )
        self.preprocessing, self.augmentation, self.workers, self.classes = (
            preprocessing,
            augmentation,
            workers,
            classes,
        )
        self.device, self.samples, self.buffer = device, samples, buffer

    def __len__(self) -> int:
        if self.samples is None:
            raise DataError(
                "data.train_samples: expected the number of images of an epoch of shards, got none"
            )
        return self.samples

    def facts(self) -> dict:
        """The number of shards, a checksum of their names, and the version of the decoding rules."""
        names = "\n".join(url.rpartition("/")[2] for url in self.urls)
        return {"shards": len(self.urls), "checksum": zlib.crc32(names.encode()), "rules": RULES}

    def need_enough(self, process: Process) -> None:
        """Raise a DataError if some process has fewer shards than workers. All processes raise it, so that
        none waits for others that have ended.
        """
        workers = max(1, self.workers)
        if len(self.urls) // process.world_size < workers:
            raise DataError(
                f"data: expected a shard at least for each of {process.world_size} processes x {workers} "
                f"workers, got {len(self.urls)}; make smaller shards or lower data.workers"
            )

    def training(
        self, seed: int, epoch: int, start: int, batch_size: int, process: Process
    ) -> Generator[Batch, None, None]:
        """The ``len(self)`` images of an epoch, from step ``start`` on. The images of earlier steps are read
        and skipped.
        """
        rank, world_size = process.rank, process.world_size
        urls = [self.urls[i] for i in order(len(self.urls), seed, epoch)][rank::world_size]
        results = self._read(self._stream(urls, (seed, epoch, rank), start, batch_size // world_size))
        with contextlib.closing(results):  # the iterator is endless, and its workers must be stopped
            for _, decoded in zip(range(start, len(self) // batch_size), results, strict=False):
                yield batch_of(decoded, self.device)

    def evaluation(self, batch_size: int, process: Process) -> Generator[Batch, None, None]:
        """Batches that contain every sample of every shard once, over all processes."""
        urls = self.urls[process.rank :: process.world_size]
        if urls:
            for decoded in self._read(self._stream(urls, None, 0, batch_size)):
                yield batch_of(decoded, self.device)

    def sample(self, count: int) -> Batch:
        """The first ``count`` images."""
        with contextlib.closing(iter(self._stream(self.urls, None, 0, count))) as stream:
            return batch_of(next(stream, _nothing_in(self.urls)), self.device)

    def _stream(self, urls, randomness, start, batch_size):
        decoder = self.augmentation if randomness and self.augmentation is not None else self.preprocessing
        return _Stream(urls, decoder, self.classes, randomness, start, batch_size, self.buffer)

    def _read(self, stream):
        return workers.read(stream, self.workers, batch_size=None)


class _Stream(torch.utils.data.IterableDataset):
    """Decoded batches from a process' shards; a DataError is yielded as a value: see ``batch_of``.

    Worker ``j`` modulo the number of workers makes batch j of the process. Without ``randomness`` all samples
    come once, in order. With it, the stream is shuffled, endless, and begins with batch ``start``.
    """

    def __init__(self, urls, decoder, classes, randomness, start, batch_size, buffer):
        self.urls, self.decoder, self.classes, self.randomness = urls, decoder, classes, randomness
        self.start, self.batch_size, self.buffer = start, batch_size, buffer

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        lane = (worker + self.start) % workers  # the loader takes the first batch, ``start``, from worker 0
        seen = len(range(lane, self.start, workers))
        items = self._items(self.urls[lane::workers], lane)
        try:
            for _ in itertools.islice(items, seen * self.batch_size):
                pass
            while batch := list(itertools.islice(items, self.batch_size)):
                yield decode_all(batch, self.decoder, self._generators(batch))
        except DataError as error:
            yield error

    def _items(self, urls, lane):
        def read():
            return (item for url in urls for item in _shard(url, self.classes))

        if self.randomness is None:
            yield from read()
            return
        from webdataset import shuffle

        for repeat in itertools.count():
            good, problem = 0, ""
            for item in shuffle(self.buffer, rng=random.Random(seeded(*self.randomness, 3, lane, repeat)))(
                read()
            ):
                good, problem = (
                    good + (item.problem is None),
                    item.problem and f"; {item.name}: {item.problem}",
                )
                yield item
            if not good:
                raise _nothing_in(urls, problem)

    def _generators(self, batch):
        # a Preprocessing uses no random numbers
        if self.randomness is None or not hasattr(self.decoder, "preprocessing"):
            return None
        return [
            np.random.default_rng((*self.randomness[:2], 1, zlib.crc32(item.name.encode()))) for item in batch
        ]


def _nothing_in(urls, problem=""):
    return DataError(f"data: no samples with an image and a class in {urls[:3]}{problem}")


class _Entry(tarfile.TarInfo):
    """The header of a tar entry; a damaged one raises an error. tarfile by itself takes a damaged or missing
    header after the first one for the end of the file.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        found = super().frombuf(buf, encoding, errors)
        # tarfile would read all of it into memory
        if found.type in _TEXT_TYPES and found.size > LARGEST_TEXT:
            raise tarfile.ReadError(
                f"expected a name or attributes of at most {LARGEST_TEXT} bytes, got {found.size}"
            )
        return found

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class _Ending:
    """A stream that raises an error when it is read many times after its end, as tarfile does, for hours, to
    skip an entry whose header claims terabytes.
    """

    def __init__(self, stream):
        self.stream, self.left = stream, 100

    def read(self, size=-1):
        content = self.stream.read(size)
        self.left -= not content
        if self.left < 0:
            raise tarfile.ReadError("unexpected end of data")
        return content


def _shard(url, classes):
    """The items of a tar file. If it cannot be read to its end, a last item stands for the rest."""
    from webdataset.gopen import gopen

    name = url.rpartition("/")[2]
    try:
        with (
            gopen(url) if "://" in url else open_file(url) as stream,
            tarfile.open(
                fileobj=_Ending(stream), mode="r|*", tarinfo=_Entry, errors="backslashreplace"
            ) as tar,
        ):
            for key, files in _samples(tar):
                yield _item(f"{name}:{key}", files, classes)
    except Exception as error:  # damaged files and failed downloads can raise any exception
        yield Item(name, None, 0, f"expected a whole tar file: {error}")


_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXT_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _samples(tar):
    """(key, {extension: content}) of consecutive files with the same name, an image and its class. In place
    of the content there may be a string that says why the file is not read.
    """
    from webdataset.tariterators import base_plus_ext

    key, files = None, {}
    while (entry := tar.next()) is not None:
        tar.members = []  # tarfile would keep the headers of all entries in memory
        base, extension = base_plus_ext(entry.name)
        if not entry.isreg() or base is None or extension.lower() not in (*_IMAGES, "cls"):
            continue
        if base != key or extension.lower() in files:
            if files:
                yield key, files
            key, files = base, {}
        most = LARGEST_TEXT if extension.lower() == "cls" else LARGEST
        if entry.issparse() or entry.size > most:  # a sparse entry of a few bytes may have holes of terabytes
            files[extension.lower()] = (
                f"{extension}: expected a file of at most {most} bytes without holes, got {entry.size} bytes"
            )
        else:
            files[extension.lower()] = tar.extractfile(entry).read()
    if files:
        yield key, files


def _count(pattern):
    """An upper bound of the number of shards that a pattern stands for. Its braces are not expanded, because
    the list might not fit in memory.
    """
    total, alternatives = 1, []
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
        total *= abs(int(last) - int(first)) + 1 if max(len(first), len(last)) < 20 else MOST_SHARDS + 1
    for character in pattern:
        if character == "{":
            alternatives.append(1)
        # overestimates for nested braces, which an upper bound may
        elif character == "," and alternatives:
            alternatives = [number + 1 for number in alternatives]
        elif character == "}" and alternatives:
            total *= alternatives.pop()
    return total


def _item(name, files, classes):
    if refused := next((content for content in files.values() if isinstance(content, str)), None):
        return Item(name, None, 0, refused)
    image = next((files[extension] for extension in _IMAGES if extension in files), None)
    text = files.get("cls", b"").decode(errors="replace").strip()
    label = int(text) if text.isdecimal() and len(text) < 10 else -1
    problem = None
    if not 0 <= label < classes:
        label, got = 0, f"got {text[:20]!r}" if "cls" in files else "found none"
        problem = f"cls: expected a class from 0 to {classes - 1}, {got}"
    elif image is None:
        problem = "no image"
    return Item(name, image, label, problem)
