"""The images of a recipe: digits, arrays, CIFAR-10 in its forms, trees of folders, shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from pathlib import Path

from coda_fast.data import arrays, listing
from coda_fast.data.digits import digits
from coda_fast.data.errors import DataError
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.data.shards import Shards
from coda_fast.data.sources import Arrays, Folder
from coda_fast.train.augmentation import Augmentation
from coda_fast.train.errors import TrainingError, need
from coda_fast.train.recipes import Data


@dataclasses.dataclass
class Source:
    """Training and validation images, the names of the classes, how pictures become such images (``channels``
    aside, it is the network's ``transform``), and what could not be read on the way.
    """

    train: Arrays | Folder | Shards
    val: Arrays | Folder | Shards
    class_names: list[str] | None
    num_classes: int
    preprocessing: Preprocessing
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def facts(self) -> dict:
        """What a run that goes on must find again: numbers of images and classes, a checksum of names and
        labels (and some pixels), and the rules by which files are decoded.
        """
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
            raise TrainingError(
                "data.path: expected where the images are, got none; add data.path=... "
                f"({_EXPECTED[spec.kind]})"
            )
        if spec.kind != "webdataset" and not os.path.exists(spec.path):
            raise TrainingError(f"data.path: no such file or folder: {spec.path} ({_EXPECTED[spec.kind]})")
    if spec.kind in ("digits", "npz", "cifar10"):
        for key in ("resize", "size", "scale", "randaugment"):
            if (value := getattr(spec, key)) is not None:
                raise TrainingError(
                    f"data.{key}: expected none for data.kind={spec.kind}, whose images are decoded "
                    f"already, got {value}"
                )
    source = {
        "digits": _digits,
        "npz": _npz,
        "cifar10": _cifar10,
        "folder": _folder,
        "webdataset": _webdataset,
    }[spec.kind]
    try:
        found = source(spec, channels, device, progress)
    except DataError as error:
        raise TrainingError(str(error)) from None
    for split in (found.train, found.val):
        if isinstance(split, Arrays):
            if split.images.shape[1] != channels:
                raise TrainingError(
                    f"data: the model takes {channels} channels, the images have {split.images.shape[1]}"
                )
            if not len(split):
                raise TrainingError(
                    "data: expected images to train with and to validate with, got none of one of them"
                )
            least, most = int(split.labels.min()), int(split.labels.max())
            if not 0 <= least <= most < found.num_classes:
                raise TrainingError(
                    f"data: expected labels 0 to {found.num_classes - 1}, got {least} to {most}"
                )
    if isinstance(found.train, Arrays) and (train := found.train.images.shape[2:]) != (
        val := found.val.images.shape[2:]
    ):
        raise TrainingError(
            f"data: expected images of one size, got {list(train)} to train with, {list(val)} to validate "
            "with"
        )
    return found


_EXPECTED = {
    "npz": arrays.LAYOUTS,
    "cifar10": arrays.BINARY,
    "folder": "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE",
    "webdataset": "shards such as /data/train-{0000..0146}.tar",
}


def _whole(images, channels):
    """How a picture becomes such as these, which lie in memory: square ones by size, others are taken as
    they are.
    """
    height, width = images.shape[2:]
    return Preprocessing(channels, height, height) if height == width else Preprocessing(channels)


def _digits(spec, channels, device, progress):
    train, val, names = digits()
    splits = [Arrays(split.images, split.labels, device) for split in (train, val)]
    return Source(*splits, names, len(names), _whole(train.images, 1))


def _npz(spec, channels, device, progress):
    with _of_the_path():
        splits, names = arrays.read_arrays(spec.path, channels=channels, device=device, progress=progress)
    train, val = (split.arrays for split in splits)
    count = len(names) if names else 1 + max(int(split.labels.max()) for split in (train, val))
    return Source(
        train,
        val,
        names,
        count,
        _whole(train.images, channels),
        [f for split in splits for f in split.failures],
    )


def _cifar10(spec, channels, device, progress):
    if Path(spec.path).is_file():
        found = _npz(spec, channels, device, progress)
        return dataclasses.replace(
            found, class_names=found.class_names or list(arrays.CIFAR10), num_classes=10
        )
    with _of_the_path():
        (train, val), names = arrays.read_cifar10(spec.path, device)
    return Source(train, val, names, 10, _whole(train.images, channels))


@contextlib.contextmanager
def _of_the_path():
    """Errors that begin with the key of a recipe that they are about."""
    try:
        yield
    except DataError as error:
        raise TrainingError(f"data.path: {error}") from None


def _folder(spec, channels, device, progress):
    root = Path(spec.path)
    train_root, val_root = root / "train", Path(spec.val_path) if spec.val_path else root / "val"
    for folder in (train_root, val_root):
        if not folder.is_dir():
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no folder {folder}")
    try:
        train, val = listing.labelled_pictures(train_root), listing.labelled_pictures(val_root)
    except (OSError, DataError) as error:
        raise TrainingError(f"data.path: {root}: {error}") from None
    names = list(train)
    if not names:
        raise TrainingError(
            f"data.path: expected {_EXPECTED['folder']}, found no folder of a class in {train_root}"
        )
    if spec.classes is not None and len(names) < spec.classes:
        raise TrainingError(
            f"data.classes: expected at least {spec.classes} folders in {train_root}, found {len(names)}"
        )
    index = {name: i for i, name in enumerate(names[: spec.classes])}
    splits = [
        [(path, index[name]) for name, paths in found.items() if name in index for path in paths]
        for found in (train, val)
    ]
    for what, files in zip((train_root, val_root), splits, strict=True):
        if not files:
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no image in {what}")
    if empty := sorted(set(range(len(index))) - {label for _, label in splits[0]}):
        raise TrainingError(
            f"data.path: expected images of every class in {train_root}, found none of "
            f"{[names[i] for i in empty[:3]]}"
        )
    # other names, or another set: an accuracy of the rest would mislead
    if unknown := sorted(set(val) - set(names)):
        raise TrainingError(
            f"data.val_path: expected the classes of {train_root} in {val_root}, found others: {unknown[:3]}"
        )
    plain, augmentation = _decoders(spec, channels)
    if not spec.in_memory:
        folders = (
            Folder(splits[0], plain, spec.workers, device, augmentation),
            Folder(splits[1], plain, spec.workers, device),
        )
        seen = plain
        # all files must have the size of the first
        if plain.crop is None and (first := _first(folders[0])) is not None:
            seen = _whole(first, channels)
            for folder in folders:
                folder.shape = tuple(first.shape[1:])
        return Source(*folders, list(index), len(index), seen)
    if spec.randaugment or spec.scale:
        raise TrainingError(
            "data.in_memory: expected false beside data.scale and data.randaugment, which are part of "
            "decoding; got true"
        )
    if spec.resize and spec.resize > spec.size:
        raise TrainingError(
            f"data.in_memory: expected false where data.resize is above data.size ({spec.resize}, "
            f"{spec.size}): random crops are part of "
            f"decoding; got true"
        )
    decoded, failures = [], []
    for name, files in zip(("train", "val"), splits, strict=True):
        folder = Folder(files, plain, spec.workers, device)
        wrap = (
            None
            if progress is None
            else functools.partial(progress, label=f"reading {name}", total=-(-len(files) // 256))
        )
        found, failed = folder.in_memory(wrap)
        decoded.append(found)
        failures += failed
    seen = plain if plain.crop is not None else _whole(decoded[0].images, channels)
    return Source(*decoded, list(index), len(index), seen, failures)


def _first(folder):
    """The first picture that can be read, [1, C, H, W]; None: not one of the first hundred."""
    batches = (folder.some([i]) for i in range(min(len(folder), 100)))
    return next((batch.images for batch in batches if batch.valid is None), None)


def _webdataset(spec, channels, device, progress):
    need("webdataset")
    for key in ("val_path", "classes", "size"):
        if getattr(spec, key) is None:
            raise TrainingError(f"data.{key}: expected a value for shards, got none")
    plain, augmentation = _decoders(spec, channels)
    options = dict(samples=spec.train_samples, buffer=spec.shuffle, augmentation=augmentation)
    train = Shards(spec.path, plain, spec.workers, spec.classes, device, **options)
    len(train)  # refuses a missing number now
    return Source(
        train, Shards(spec.val_path, plain, spec.workers, spec.classes, device), None, spec.classes, plain
    )


def _decoders(spec, channels):
    """How pictures are read to validate with, and to train with."""
    need("torchvision")
    if spec.size is None and (spec.resize or spec.scale):
        raise TrainingError(
            "data.size: expected the side of the crop, which data.resize and data.scale are for, got none"
        )
    plain = Preprocessing(channels, spec.resize, spec.size, spec.interpolation)
    randaugment = None if spec.randaugment is None else (spec.randaugment.n, spec.randaugment.m)
    return plain, Augmentation(plain, spec.scale, randaugment)
