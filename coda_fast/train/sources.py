"""Sources of images: ``Arrays``, the whole set on the device; ``Folder``, image files; ``Shards``, WebDataset tar files.

All give a ``Batch`` of uint8 images; ``augment`` and ``to_float`` go on from there, on the device. Everything random is a function of
(seed, epoch, step) or (seed, epoch, image).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import random
import signal
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from coda_fast.train.decode import Decoder, Item, decode_all, of_one_size
from coda_fast.train.errors import TrainingError, need
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
        return self._stack(_Files(self.files, self.decoder, None).__getitems__(index))

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
        loader = torch.utils.data.DataLoader(
            _Files(self.files, self.decoder, randomness), batch_sampler=plan, num_workers=self.workers, collate_fn=_collate,
            worker_init_fn=_quiet_worker, pin_memory=torch.device(self.device).type == "cuda", prefetch_factor=4 if self.workers else None,
        )  # fmt: skip
        for decoded in _decoded(loader):
            yield self._stack(decoded)

    def _stack(self, decoded):
        if isinstance(decoded, TrainingError):  # raised in a worker, the loader would put a traceback into its message
            raise decoded
        images, labels, valid, failures = decoded
        return Batch(images, labels, None if bool(valid.all()) else valid, failures).to(self.device)


class Shards:
    """WebDataset tar files with an image (jpg, jpeg, png, webp) and a class (cls: 0 to ``classes`` - 1) a sample. For training each process
    and worker cycles through its share of the shards, so that the images of a step, unlike those of the other sources, depend on the number
    of processes. A sample that cannot be read takes its place in a batch, and so does the rest of a broken shard.
    """

    def __init__(self, pattern, decoder: Decoder, workers: int, classes: int, device="cpu", samples: int | None = None, buffer: int = 5000):
        need("webdataset")
        from webdataset.shardlists import expand_urls

        self.urls = sorted(str(p) for p in Path(pattern).glob("*.tar")) if os.path.isdir(pattern) else expand_urls(pattern)
        if any(url.startswith("pipe:") for url in self.urls):
            raise TrainingError(f"data: expected shards that are files or addresses, got {pattern!r}: a recipe must not run commands")
        missing = [url for url in self.urls if "://" not in url and not os.path.exists(url)]
        if not self.urls or missing:
            raise TrainingError(f"data: expected shards {pattern!r}, found {len(self.urls) - len(missing)}; missing: {missing[:3]}")
        self.decoder, self.workers, self.classes = decoder, workers, classes
        self.device, self.samples, self.buffer = device, samples, buffer

    def __len__(self) -> int:
        if self.samples is None:
            raise TrainingError("data.train_samples: expected the number of images that an epoch of shards is, got none")
        return self.samples

    def facts(self) -> dict:
        """Number and checksum of the names of the shards."""
        return {"shards": len(self.urls), "checksum": zlib.crc32("\n".join(url.rpartition("/")[2] for url in self.urls).encode())}

    def need_enough(self, place) -> None:
        """TrainingError: a worker would be without a shard. The same in every process: none waits for others that have ended."""
        workers = max(1, self.workers)
        if len(self.urls) // place.world < workers:
            raise TrainingError(
                f"data: expected a shard at least for each of {place.world} processes x {workers} workers, got {len(self.urls)}; "
                f"make smaller shards or lower data.workers"
            )

    def training(self, seed, epoch, start, batch_size, place) -> Iterator[Batch]:
        """As many steps as ``len`` says. A run that goes on in the middle reads over what it has seen."""
        urls = [self.urls[i] for i in order(len(self.urls), seed, epoch)][place.rank :: place.world]
        loader = self._loader(self._stream(urls, (seed, epoch, place.rank), start, batch_size // place.world))
        for _, decoded in zip(range(start, len(self) // batch_size), _decoded(loader), strict=False):
            yield self._stack(decoded)

    def evaluation(self, batch_size, place) -> Iterator[Batch]:
        """Every sample of every shard once, over all processes."""
        urls = self.urls[place.rank :: place.world]
        if urls:
            for decoded in _decoded(self._loader(self._stream(urls, None, 0, batch_size))):
                yield self._stack(decoded)

    def sample(self, count: int) -> Batch:
        """The first few."""
        with contextlib.closing(iter(self._stream(self.urls, None, 0, count))) as stream:
            return self._stack(next(stream, _nothing_in(self.urls)))

    def _stream(self, urls, randomness, start, batch_size):
        return _Stream(urls, self.decoder, self.classes, randomness, start, batch_size, self.buffer)

    def _loader(self, stream):
        return torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=self.workers, collate_fn=_collate, worker_init_fn=_quiet_worker,
            prefetch_factor=4 if self.workers else None,
        )  # fmt: skip

    _stack = Folder._stack


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


def _collate(decoded):
    return decoded


def _decoded(loader):
    """What a loader gives. However that ends, its workers end with it: torch ends them by a signal that ours ignore (``_quiet_worker``), so
    that the program would for ever wait for one that waits itself, for a file, or for a lock of one that was killed.

    Raises:
        ChildProcessError: a worker was killed.
    """
    before = multiprocessing.active_children()
    results = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    with _deaf_to_children():
        try:
            while True:
                try:
                    decoded = next(results)
                except StopIteration:
                    return
                except Exception:  # an end of file, say, or torch's own error: depends on what the worker was at
                    _need_alive(workers, patience=1.0)
                    raise
                yield decoded
        finally:
            for worker in workers:
                worker.kill()
            if workers:
                results._shutdown_workers()


def _need_alive(workers, patience):
    """ChildProcessError if one was killed, or turns out to be within ``patience`` seconds."""
    end = time.monotonic() + patience
    while True:
        if killed := [worker for worker in workers if worker.exitcode not in (None, 0)]:
            code = killed[0].exitcode
            raise ChildProcessError(
                f"data: a process that reads images ended with code {code}, perhaps for want of memory (lower data.workers)"
            ) from None
        if time.monotonic() >= end:
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _deaf_to_children():
    """For every worker that is killed torch raises an error in whatever the program is at then; its loader sees it too, within 5 s."""
    if threading.current_thread() is not threading.main_thread():  # where Python has no handlers
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


class _Stream(torch.utils.data.IterableDataset):
    """Decoded batches of a process' shards, or the TrainingError that came instead. Batch j of the process is made by worker j modulo their
    number. ``randomness`` None: one pass in order, everything; else endless, shuffled by it, from batch ``start`` on.
    """

    def __init__(self, urls, decoder, classes, randomness, start, batch_size, buffer):
        self.urls, self.decoder, self.classes, self.randomness = urls, decoder, classes, randomness
        self.start, self.batch_size, self.buffer = start, batch_size, buffer

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        lane = (worker + self.start) % workers  # the loader asks worker 0 first, also for step ``start``
        seen = len(range(lane, self.start, workers))
        items = self._items(self.urls[lane::workers], lane)
        try:
            for _ in itertools.islice(items, seen * self.batch_size):
                pass
            while batch := list(itertools.islice(items, self.batch_size)):
                yield decode_all(batch, self.decoder, [self._generator(item.name) for item in batch])
        except TrainingError as error:
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
            for item in shuffle(self.buffer, rng=random.Random(seeded(*self.randomness, 3, lane, repeat)))(read()):
                good, problem = good + (item.problem is None), item.problem and f"; {item.name}: {item.problem}"
                yield item
            if not good:
                raise _nothing_in(urls, problem)

    def _generator(self, name):
        return None if self.randomness is None else np.random.default_rng((*self.randomness[:2], 1, zlib.crc32(name.encode())))


def _nothing_in(urls, problem=""):
    return TrainingError(f"data: no samples with an image and a class in {urls[:3]}{problem}")


class _Entry(tarfile.TarInfo):
    """Of a tar file that ends where it says so: tarfile takes a header that is damaged or missing, after the first, for the end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _shard(url, classes):
    """The items of a tar file; if it cannot be read to its end, the last stands for what is lost."""
    from webdataset.gopen import gopen

    name = url.rpartition("/")[2]
    try:
        with gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Entry, errors="backslashreplace") as tar:
            for key, files in _samples(tar):
                yield _item(f"{name}:{key}", files, classes)
    except Exception as error:  # tarfile and programs that fetch raise whatever the damage leads them to
        yield Item(name, None, 0, f"expected a whole tar file: {error}")


_IMAGES = ("jpg", "jpeg", "png", "webp")


def _samples(tar):
    """(key, {extension: content}) of files that follow one another, are named alike, and are an image or a class."""
    from webdataset.tariterators import base_plus_ext

    key, files = None, {}
    while (entry := tar.next()) is not None:
        tar.members = []  # or it keeps all of them
        base, extension = base_plus_ext(entry.name)
        if not entry.isreg() or base is None or extension.lower() not in (*_IMAGES, "cls"):
            continue
        if base != key or extension.lower() in files:
            if files:
                yield key, files
            key, files = base, {}
        files[extension.lower()] = tar.extractfile(entry).read()
    if files:
        yield key, files


def _item(name, files, classes):
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


def _quiet_worker(_):
    """The signals that tell a process group to end are for the process that trains, which needs its workers to finish the step."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
