"""Training data: uint8 to the device, everything random about it a function of (seed, epoch, step) or (seed, epoch, image).

Three sources. ``Arrays``: the whole set on the device. ``Folder``: image files, decoded by worker processes. ``Shards``: WebDataset tar
files, a stream for each process and worker. All give a ``Batch`` of uint8 images; ``augment`` and ``to_float`` go on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import random
import signal
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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


# -- sources --------------------------------------------------------------------------------------------------------------------------


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
        for index in torch.arange(place.rank, len(self), place.world, device=self.labels.device).split(batch_size):
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
        _of_one_size({tuple(some.shape[1:]) for some in images})
        return Arrays(torch.cat(images), torch.cat(labels), self.device), failures

    def _batches(self, plan, randomness):
        plan = [np.asarray(index).tolist() for index in plan]
        loader = torch.utils.data.DataLoader(
            _Files(self.files, self.decoder, randomness), batch_sampler=plan, num_workers=self.workers, collate_fn=_collate,
            worker_init_fn=_quiet_worker, pin_memory=torch.device(self.device).type == "cuda", prefetch_factor=4 if self.workers else None,
        )  # fmt: skip
        for decoded in loader:
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

    def training(self, seed, epoch, start, batch_size, place) -> Iterator[Batch]:
        """As many steps as ``len`` says. A run that goes on in the middle reads over what it has seen."""
        urls = [self.urls[i] for i in order(len(self.urls), seed, epoch)][place.rank :: place.world]
        workers = max(1, self.workers)
        if len(self.urls) // place.world < workers:  # the same answer in every process: none waits for others that have ended
            raise TrainingError(
                f"data: expected a shard at least for each of {place.world} processes x {workers} workers, got {len(self.urls)}; "
                f"make smaller shards or lower data.workers"
            )
        loader = self._loader(self._stream(urls, (seed, epoch, place.rank), start, batch_size // place.world))
        for _, decoded in zip(range(start, len(self) // batch_size), loader, strict=False):
            yield self._stack(decoded)

    def evaluation(self, batch_size, place) -> Iterator[Batch]:
        """Every sample of every shard once, over all processes."""
        urls = self.urls[place.rank :: place.world]
        if urls:
            for decoded in self._loader(self._stream(urls, None, 0, batch_size)):
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


# -- decoding -------------------------------------------------------------------------------------------------------------------------


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
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                if self.size is not None:
                    image.draft(None, (2 * (self.resize or self.size),) * 2)  # JPEG: smaller from the start, never below twice the need
                image = _eight_bits(image).convert("RGB" if self.channels == 3 else "L")
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=self._box(*image.size, generator))
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
    return RandAugment(operations, count)


class _Item(NamedTuple):
    """What a slot of a batch is made of; ``problem``: why it cannot be, where that is known already."""

    name: str
    file: str | bytes | None
    label: int
    problem: str | None = None


class _Files(torch.utils.data.Dataset):
    """Decoded batches by lists of indices, or the TrainingError that came instead."""

    def __init__(self, files, decoder, randomness):
        self.files, self.decoder, self.randomness = files, decoder, randomness

    def __len__(self):
        return len(self.files)

    def __getitems__(self, indices):
        generators = [None if self.randomness is None else np.random.default_rng((*self.randomness, 1, i)) for i in indices]
        items = [_Item(path, path, label) for path, label in (self.files[i] for i in indices)]
        try:
            return _decode_all(items, self.decoder, generators)
        except TrainingError as error:
            return error


def _collate(decoded):
    return decoded


def _decode_all(items, decoder, generators):
    """(images, labels, valid, failures); an image that cannot be read is black and not valid."""
    pictures, failures = [], []
    for item, generator in zip(items, generators, strict=True):
        try:
            if item.problem is not None:
                raise ValueError(item.problem)
            pictures.append(decoder(item.file, generator))
        except Exception as error:  # decoders raise whatever the damage leads them to
            pictures.append(None)
            failures.append((item.name, str(error).partition(" <_io.")[0] or type(error).__name__))  # no addresses of buffers
    shapes = {p.shape for p in pictures if p is not None}
    _of_one_size(shapes)
    shape = shapes.pop() if shapes else (decoder.channels, decoder.size or 1, decoder.size or 1)
    images = np.stack([np.zeros(shape, np.uint8) if p is None else p for p in pictures])
    valid = torch.tensor([p is not None for p in pictures])
    return torch.from_numpy(images), torch.tensor([item.label for item in items]), valid, failures


def _of_one_size(shapes):
    if len(shapes) > 1:
        raise TrainingError(f"data.size: expected a size to crop images to, as they have several: {sorted(shapes)[:3]}; got none")


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
                yield _decode_all(batch, self.decoder, [self._generator(item.name) for item in batch])
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
        yield _Item(name, None, 0, f"expected a whole tar file: {error}")


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
    return _Item(name, image, label, problem)


def _quiet_worker(_):
    """The signals that tell a process group to end are for the process that trains, which needs its workers to finish the step."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


# -- opening --------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Source:
    """Training and validation images, the names of the classes, and what could not be read on the way."""

    train: Arrays | Folder | Shards
    val: Arrays | Folder | Shards
    class_names: list[str] | None
    num_classes: int
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def facts(self) -> dict:
        """What a run that goes on must find again: numbers of images and classes, a checksum of names and labels (and some pixels)."""
        found = {"classes": self.num_classes, "class_names": self.class_names}
        for name, split in (("train", self.train), ("val", self.val)):
            found |= {f"{name}_{key}": value for key, value in split.facts().items()}
        return found


def open_data(spec: Data, channels: int, device="cpu", progress=None) -> Source:
    """The images of a recipe.

    Args:
        channels: 3 or 1, as the model takes.
        progress: called as ``progress(iterable, label)`` around what takes long.

    Raises:
        TrainingError: nothing there, an unknown layout, damaged files of numbers.
    """
    if spec.kind != "digits":
        if spec.path is None:
            raise TrainingError(f"data.path: expected where the images are, got none; add data.path=... ({_EXPECTED[spec.kind]})")
        if spec.kind != "webdataset" and not os.path.exists(spec.path):
            raise TrainingError(f"data.path: no such file or folder: {spec.path} ({_EXPECTED[spec.kind]})")
    if spec.kind in ("digits", "npz", "cifar10"):
        for key in ("resize", "size", "scale", "randaugment"):
            if (value := getattr(spec, key)) is not None:
                raise TrainingError(f"data.{key}: expected none for data.kind={spec.kind}, whose images are decoded already, got {value}")
    source = {"digits": _digits, "npz": _npz, "cifar10": _cifar10, "folder": _folder, "webdataset": _webdataset}[spec.kind]
    found = source(spec, channels, device, progress)
    for split in (found.train, found.val):
        if isinstance(split, Arrays):
            if split.images.shape[1] != channels:
                raise TrainingError(f"data: the model takes {channels} channels, the images have {split.images.shape[1]}")
            if not len(split):
                raise TrainingError("data: expected images to train with and to validate with, got none of one of them")
            least, most = int(split.labels.min()), int(split.labels.max())
            if not 0 <= least <= most < found.num_classes:
                raise TrainingError(f"data: expected labels 0 to {found.num_classes - 1}, got {least} to {most}")
    if isinstance(found.train, Arrays) and (train := found.train.images.shape[2:]) != (val := found.val.images.shape[2:]):
        raise TrainingError(f"data: expected images of one size, got {list(train)} to train with, {list(val)} to validate with")
    return found


_EXPECTED = {
    "npz": "an .npz file with train_images [N, H, W, C] uint8, train_labels, test_images, test_labels",
    "cifar10": "the folder of CIFAR-10's binary version, with data_batch_1.bin, or an .npz file",
    "folder": "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE",
    "webdataset": "shards such as /data/train-{0000..0146}.tar",
}


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _digits(spec, channels, device, progress):
    from coda_fast.demo import digits

    data = digits()
    images = [(255 * x).round().to(torch.uint8) for x in (data.train_images, data.test_images)]
    train, val = (Arrays(x, y, device) for x, y in zip(images, (data.train_labels, data.test_labels), strict=True))
    return Source(train, val, data.class_names, len(data.class_names))


def _npz(spec, channels, device, progress):
    try:
        with np.load(spec.path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # zipfile and NumPy raise whatever the damage leads them to
        raise TrainingError(f"data.path: {spec.path}: not an .npz file that NumPy can read: {error}") from None
    splits = []
    for split in ("train", "test"):
        if f"{split}_jpeg" in arrays:
            splits.append(Arrays(*_jpegs(arrays, split, spec.path, progress), device))
            continue
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None or labels is None:
            raise TrainingError(f"data.path: {spec.path}: expected {_EXPECTED['npz']}, got {', '.join(arrays) or 'nothing'}")
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
            raise TrainingError(
                f"data.path: {spec.path}: expected {split}_images [N, H, W, C] uint8 and as many labels, "
                f"got {images.dtype} {list(images.shape)} and {list(labels.shape)}"
            )
        images = images[..., None] if images.ndim == 3 else images
        splits.append(Arrays(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), _labels(labels, split, spec.path), device))
    names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    return Source(*splits, names, len(names) if names else 1 + max(int(split.labels.max()) for split in splits))


def _labels(labels, split, path):
    if labels.dtype.kind not in "iu" or not labels.size or int(labels.min()) < 0:
        got = f"{labels.dtype} from {labels.min()}" if labels.size else "none"
        raise TrainingError(f"data.path: {path}: expected labels of {split} that are integers from 0 on, got {got}")
    return torch.from_numpy(labels.astype(np.int64))


def _jpegs(arrays, split, path, progress):
    """JPEGs end to end, some replaced by pixels: the layout that ``coda-fast evaluate`` reads too."""
    from PIL import Image

    try:
        raw, offsets, labels = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offset"], arrays[f"{split}_label"]
        images, places = [], range(len(labels))
        for i in progress(places, f"reading {split}") if progress else places:
            images.append(np.asarray(Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]])).convert("RGB")))
        images = np.stack(images)
        if f"{split}_lossless_idx" in arrays:
            images[arrays[f"{split}_lossless_idx"]] = arrays[f"{split}_lossless_rgb"]
    except Exception as error:
        raise TrainingError(f"data.path: {path}: expected {split}_jpeg, {split}_offset and {split}_label that fit: {error}") from None
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), _labels(labels, split, path)


def _cifar10(spec, channels, device, progress):
    folder = Path(spec.path)
    if folder.is_file():
        found = _npz(spec, channels, device, progress)
        return dataclasses.replace(found, class_names=found.class_names or list(_CIFAR10), num_classes=10)
    folder = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
    files = sorted(folder.glob("data_batch_*.bin")), [folder / "test_batch.bin"]
    if not files[0] or not files[1][0].exists():
        if (folder / "data_batch_1").exists() or (folder / "cifar-10-batches-py").exists():
            raise TrainingError(
                f"data.path: {folder} holds the version of CIFAR-10 for Python, whose pickles could run any code; expected the binary "
                f"version (cifar-10-binary.tar.gz, from the same page)"
            )
        raise TrainingError(f"data.path: expected {_EXPECTED['cifar10']}, found none in {folder}")
    splits = []
    for some in files:
        records = np.concatenate([np.fromfile(file, np.uint8) for file in some])
        if len(records) % 3073 or not len(records):  # a label and 3 x 32 x 32 pixels, channels first
            raise TrainingError(f"data.path: {some[0]}: expected records of 3073 bytes, got {len(records)} bytes: truncated?")
        records = records.reshape(-1, 3073)
        images, labels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(records[:, 0].astype(np.int64))
        splits.append(Arrays(images, labels, device))
    meta = folder / "batches.meta.txt"
    names = meta.read_text().split() if meta.exists() else list(_CIFAR10)
    return Source(*splits, names, 10)


def _folder(spec, channels, device, progress):
    need("torchvision")
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    root = Path(spec.path)
    train_root, val_root = root / "train", Path(spec.val_path) if spec.val_path else root / "val"
    for folder in (train_root, val_root):
        if not folder.is_dir():
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no folder {folder}")
    names = _folders(train_root)
    if spec.classes is not None and len(names) < spec.classes:
        raise TrainingError(f"data.classes: expected at least {spec.classes} folders in {train_root}, found {len(names)}")
    index = {name: i for i, name in enumerate(names[: spec.classes])}
    annotations = val_root / "val_annotations.txt"  # Tiny-ImageNet keeps its validation images in one folder
    try:
        train = make_dataset(str(train_root), index, IMG_EXTENSIONS, allow_empty=True)
        if annotations.exists():
            rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
            if any(len(row) < 2 for row in rows):
                raise ValueError(f"{annotations.name}: expected a file, a tab and its class in every line")
            val = [(str(val_root / "images" / name), index[label]) for name, label, *_ in rows if label in index]
            val_names = {row[1] for row in rows}
        else:
            val = make_dataset(str(val_root), index, IMG_EXTENSIONS, allow_empty=True)
            val_names = _folders(val_root)
    except (OSError, ValueError) as error:
        raise TrainingError(f"data.path: {root}: {error}") from None
    for what, files in ((train_root, train), (val_root, val)):
        if not files:
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no image in {what}")
    if empty := sorted(set(range(len(index))) - {label for _, label in train}):
        raise TrainingError(f"data.path: expected images of every class in {train_root}, found none of {[names[i] for i in empty[:3]]}")
    if unknown := sorted(set(val_names) - set(names)):  # other names, or another set: an accuracy of the rest would mislead
        raise TrainingError(f"data.val_path: expected the classes of {train_root} in {val_root}, found others: {unknown[:3]}")
    plain, augmented = _decoders(spec, channels)
    if not spec.in_memory:
        return Source(Folder(train, augmented, spec.workers, device), Folder(val, plain, spec.workers, device), list(index), len(index))
    if spec.randaugment or spec.scale:
        raise TrainingError("data.in_memory: expected false beside data.scale and data.randaugment, which are part of decoding; got true")
    if spec.resize and spec.resize > spec.size:
        raise TrainingError(
            f"data.in_memory: expected false where data.resize is above data.size ({spec.resize}, {spec.size}): random crops are part of "
            f"decoding; got true"
        )
    splits, failures = [], []
    for name, files in (("train", train), ("val", val)):
        folder = Folder(files, plain, spec.workers, device)
        wrap = None if progress is None else functools.partial(progress, label=f"reading {name}", total=-(-len(files) // 256))
        arrays, failed = folder.in_memory(wrap)
        splits.append(arrays)
        failures += failed
    return Source(*splits, list(index), len(index), failures)


def _folders(root):
    """Names of classes: of the folders that are not hidden."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _webdataset(spec, channels, device, progress):
    for key in ("val_path", "classes", "size"):
        if getattr(spec, key) is None:
            raise TrainingError(f"data.{key}: expected a value for shards, got none")
    plain, augmented = _decoders(spec, channels)
    train = Shards(spec.path, augmented, spec.workers, spec.classes, device, spec.train_samples, spec.shuffle)
    len(train)  # refuses a missing number now
    return Source(train, Shards(spec.val_path, plain, spec.workers, spec.classes, device), None, spec.classes)


def _decoders(spec, channels):
    if spec.size is None and (spec.resize or spec.scale):
        raise TrainingError("data.size: expected the side of the crop, which data.resize and data.scale are for, got none")
    plain = Decoder(channels, spec.resize, spec.size)
    randaugment = None if spec.randaugment is None else (spec.randaugment.n, spec.randaugment.m)
    return plain, dataclasses.replace(plain, scale=spec.scale, randaugment=randaugment)
