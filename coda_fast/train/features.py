"""Features of a frozen stem, computed once and kept on disk: a head trains on them many times faster than on
images.

A file holds the features of all images of a split, and of their mirror images if the recipe flips. Its name
is a hash of the weights of the stem, its configuration, and the pictures, so that it is never used for
others. It is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import torch

from coda_fast._files import atomic_path, one_line
from coda_fast.data.decode import RULES
from coda_fast.data.sources import Arrays, Batch, Folder, Process, once, plan, seeded, to_float
from coda_fast.hybrid import HybridCoDANet
from coda_fast.network import Network
from coda_fast.stems import Stem, checksum
from coda_fast.train.agreement import Agreement
from coda_fast.train.augmentation import draw_flips
from coda_fast.train.data import Source
from coda_fast.train.errors import TrainingError
from coda_fast.train.schema import Recipe

VERSION = 2  # increased when the files change
BATCH = 64  # images that go through the stem at once
DTYPE = np.float16  # of the stored features
_COMPUTING = ".computing-"  # the name of a file that is being written begins so


_ALONE = Process()


class Features:
    """The features of a split, as a source of batches whose ``images`` are features [N, C, h, w].

    Args:
        stored: float16 [V, N, C, h, w], with V = 2 if the second are those of the mirror images.
        unreadable: the reason for each picture that could not be read, by index.
        split: the pictures.
    """

    def __init__(self, stored: np.ndarray, unreadable: dict[int, str], split: Arrays | Folder):
        self.stored, self.unreadable, self.split = stored, unreadable, split
        labels = split.labels if isinstance(split, Arrays) else [label for _, label in split.files]
        self.labels = torch.as_tensor(labels).cpu()

    def __len__(self) -> int:
        return len(self.labels)

    def facts(self) -> dict:
        """Those of the pictures."""
        return self.split.facts()

    def training(
        self, seed: int, epoch: int, start: int, batch_size: int, process: Process
    ) -> Generator[Batch, None, None]:
        """As ``Arrays.training``. The images that are flipped are those that ``augment`` would flip."""
        for step, index in enumerate(plan(len(self), seed, epoch, start, batch_size, process), start):
            mirrored: np.ndarray = np.zeros(len(index), np.int64)
            if len(self.stored) > 1:
                generator = torch.Generator().manual_seed(seeded(seed, epoch, step))
                mirrored = (
                    draw_flips(batch_size, generator)[process.slice(batch_size)].numpy().astype(np.int64)
                )
            yield self._batch(index, mirrored)

    def evaluation(self, batch_size: int, process: Process = _ALONE) -> Generator[Batch, None, None]:
        """As ``Arrays.evaluation``."""
        for index in once(len(self), batch_size, process):
            yield self._batch(index, np.zeros(len(index), np.int64))

    def sample(self, count: int) -> Batch:
        """As ``Arrays.sample``: pictures, not their features."""
        return self.split.sample(count)

    def some(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """As ``Arrays.some``: pictures, not their features."""
        return self.split.some(indices)

    def name(self, index: int) -> str:
        """As ``Arrays.name``."""
        return self.split.name(index)

    def _batch(self, index, mirrored):
        features = torch.from_numpy(np.ascontiguousarray(self.stored[mirrored, index]))
        failed = [i for i in index.tolist() if i in self.unreadable]
        valid = None if not failed else torch.tensor([i not in self.unreadable for i in index.tolist()])
        failures = [(self.name(i), self.unreadable[i]) for i in failed]
        return Batch(features, self.labels[index], valid, failures)


def check(recipe: Recipe, model: Network) -> None:
    """Raise a TrainingError unless the features of the recipe's images can be computed once."""
    if recipe.data.cache is None:
        return
    if not isinstance(model, HybridCoDANet):
        kind = type(model).__name__
        raise TrainingError(f"data.cache: expected none but for a HybridCoDANet with a stem, got a {kind}")
    stem = model.stem
    if stem is None or not stem.frozen:
        got = "a network without a stem" if stem is None else "model.frozen=false"
        raise TrainingError(
            f"data.cache: expected none unless a frozen stem gives features that do not change, got "
            f"{recipe.data.cache!r} with {got}"
        )
    if recipe.data.kind == "webdataset":
        raise TrainingError("data.cache: expected none for data.kind=webdataset, whose images have no order")
    if recipe.data.resize is not None and recipe.data.resize > (recipe.data.size or 0):
        raise TrainingError(
            f"data.cache: expected none where data.resize is above data.size ({recipe.data.resize}, "
            f"{recipe.data.size}), as random crops give other features in every epoch, got "
            f"{recipe.data.cache!r}"
        )
    for key in ("pad", "scale", "randaugment"):
        if value := getattr(recipe.data, key):
            raise TrainingError(
                f"data.{key}: expected none beside data.cache, as features are computed once for each image "
                f"and its mirror image, got {value}"
            )


def cached(
    recipe: Recipe,
    source: Source,
    stem: Stem,
    agreement: Agreement,
    reading: Callable,
    say: Callable[[str], None],
) -> Source:
    """``source`` with the features of its images, from the folder ``data.cache``, or computed and put there.
    All processes take part, each with its share of the images, in a folder that they share.

    Args:
        recipe: of the run, with ``data.cache``.
        source: the images.
        stem: frozen, on any device; it is used on that of the process.
        agreement: of the processes.
        reading: shows progress, ``reading(iterable, label, total=...)``.
        say: shows a line of text.

    Raises:
        TrainingError: the disk has no room, or features are not finite.
    """
    folder, device = Path(recipe.data.cache or ""), agreement.fabric.device
    agreement.on_rank_zero(lambda: folder.mkdir(parents=True, exist_ok=True))
    description = {
        "version": VERSION,
        "stem": stem.config() if stem.name else str(stem),
        "weights": checksum(stem.network.state_dict()),
        "preprocessing": source.preprocessing.config(),
        "precision": recipe.precision,
        "rules": RULES,
    }
    stem = stem.to(device)
    found = []
    for name, split, mirrored in (("train", source.train, recipe.data.flip), ("val", source.val, False)):
        assert isinstance(split, Arrays | Folder), "check refuses others"
        own = description | {"mirrored": mirrored, "pictures": _digest(split)}
        key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:24]
        path = folder / f"{name}-{key}.npy"
        there = agreement.on_rank_zero(path.is_file)
        if not there:
            _compute(path, split, stem, mirrored, recipe, agreement, reading, name)
        stored, unreadable = _read(path)
        say(
            f"features: {'read from' if there else 'written to'} {path}, {stored.nbytes / 2**20:.0f} MiB, "
            f"{' x '.join(map(str, stored.shape[2:]))} for each image"
        )
        found.append(Features(stored, unreadable, split))
    train, val = found
    return dataclasses.replace(source, train=train, val=val)


def _unreadable_path(path):
    return path.with_suffix(".json")


def _read(path):
    """The features in a file, and the pictures that could not be read."""
    try:
        with open(_unreadable_path(path), encoding="utf-8") as file:
            return np.load(path, mmap_mode="r"), {int(i): str(why) for i, why in json.load(file).items()}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise TrainingError(
            f"data.cache: expected features in {path}, got a damaged file ({one_line(error)}); delete it"
        ) from None


def _digest(split):
    """A hash of all pictures and labels."""
    digest = hashlib.sha256()
    if isinstance(split, Arrays):
        digest.update(str(tuple(split.images.shape)).encode())
        digest.update(split.images.cpu().numpy().tobytes() + split.labels.cpu().numpy().tobytes())
        return digest.hexdigest()
    for path, label in split.files:
        content = b""
        with contextlib.suppress(OSError):  # an unreadable file, which is counted as such later
            content = Path(path).read_bytes()
        digest.update(hashlib.sha256(content).digest() + str(label).encode())
    return digest.hexdigest()


def _compute(path, split, stem, mirrored, recipe, agreement, reading, name):
    """Write the file of a split, and that of the pictures that could not be read."""
    process, first = agreement.process, split.some([0]).images
    shape = (1 + mirrored, len(split), stem.channels, *stem.size(*first.shape[2:]))

    own = contextlib.ExitStack()  # of rank zero

    def begin():
        temporary = own.enter_context(_temporary(path.parent))
        size, free = math.prod(shape) * np.dtype(DTYPE).itemsize, shutil.disk_usage(path.parent).free
        if size > free:
            raise TrainingError(
                f"data.cache: expected {size / 2**30:.1f} GiB on the disk of {path.parent}, got "
                f"{free / 2**30:.1f}"
            )
        np.lib.format.open_memmap(temporary, "w+", DTYPE, shape).flush()
        return temporary

    with own:
        temporary = agreement.on_rank_zero(begin)
        stored, unreadable = np.lib.format.open_memmap(temporary, "r+"), {}
        batches, pictures = once(len(split), BATCH, process), split.evaluation(BATCH, process)
        with contextlib.closing(pictures):
            both = zip(batches, pictures, strict=True)
            for index, batch in reading(both, f"features of {name}", total=len(batches)):
                ok = np.ones(len(index), bool) if batch.valid is None else batch.valid.cpu().numpy()
                reasons = (reason for _, reason in batch.failures)
                unreadable |= dict(zip(index[~ok].tolist(), reasons, strict=True))
                for i, features in enumerate(_features(stem, batch, mirrored, recipe, agreement)):
                    if not np.isfinite(features[ok]).all():
                        raise TrainingError(
                            "data.cache: expected features that float16 can hold, got infinity or NaN; "
                            "train without data.cache, or with a stem whose features are smaller"
                        )
                    stored[i, index] = features
        stored.flush()
        gathered = agreement.gather(unreadable)
        agreement.on_rank_zero(lambda: _finish(path, temporary, gathered))


@contextlib.contextmanager
def _temporary(folder):
    """A name for a file that is written in this context, and deleted at its end if it is still there. Each
    run has its own, because another one may be computing the same features. Files of runs that were killed,
    which are as large as features, are deleted first: their locks ended with them.
    """
    for left in folder.glob(f"{_COMPUTING}*.npy"):
        with _locked(left) as is_ours:
            if is_ours:
                left.unlink(missing_ok=True)
    temporary = folder / f"{_COMPUTING}{uuid.uuid4().hex}.npy"
    with _locked(temporary):
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path):
    """Lock a temporary file, and say whether that was possible: not if a run that is going on has locked it,
    nor on a file system for which filelock has no lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except (Timeout, NotImplementedError, OSError):
        yield False
        return
    try:
        yield True
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _finish(path, temporary, gathered):
    """Give the file its name, after the one of unreadable pictures, when both are on the disk."""
    with atomic_path(_unreadable_path(path)) as beside, open(beside, "w", encoding="utf-8") as file:
        json.dump({i: why for each in gathered for i, why in each.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    with atomic_path(path) as beside:  # for its permissions
        os.replace(temporary, beside)


def _features(stem, batch, mirrored, recipe, agreement):
    """The features of a batch, and those of its mirror images, as float16 arrays."""
    device, dtype = agreement.fabric.device, stem.mean.dtype
    images = to_float(batch.images.to(device), dtype, recipe.channels_last)
    cast = recipe.precision == "bfloat16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if cast else contextlib.nullcontext():
        for each in (images, images.flip(3))[: 1 + mirrored]:
            yield stem(each).to(torch.float16).cpu().numpy()
