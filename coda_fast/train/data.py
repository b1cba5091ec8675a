"""The images of a recipe: digits, arrays, CIFAR-10, folders, shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coda_fast.data import arrays, listing
from coda_fast.data.digits import digits
from coda_fast.data.errors import DataError
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.data.shards import Shards
from coda_fast.data.sources import Arrays, Folder
from coda_fast.train.augmentation import Augmentation
from coda_fast.train.errors import TrainingError, need
from coda_fast.train.schema import Data

if TYPE_CHECKING:
    from coda_fast.train.features import Features


@dataclasses.dataclass
class Source:
    """Training and validation images.

    Attributes:
        train: training images.
        val: validation images.
        class_names: the names of the classes, or None if they are not known.
        num_classes: the number of classes.
        preprocessing: turns pictures into such images; it becomes the network's ``transform``.
        failures: (name, reason) of the images that could not be read while the data was opened.
    """

    train: Arrays | Folder | Shards | Features
    val: Arrays | Folder | Shards | Features
    class_names: list[str] | None
    num_classes: int
    preprocessing: Preprocessing
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def facts(self) -> dict:
        """Facts that must be the same when a run is resumed: numbers of images and classes, a checksum of
        names and labels (and some pixels), and the version of the rules by which files are decoded.
        """
        found = {"classes": self.num_classes, "class_names": self.class_names}
        for name, split in (("train", self.train), ("val", self.val)):
            found |= {f"{name}_{key}": value for key, value in split.facts().items()}
        return found


def open_data(
    spec: Data, channels: int, device: torch.device | str = "cpu", progress: Callable | None = None
) -> Source:
    """The images of a recipe.

    Args:
        spec: the section ``data`` of the recipe.
        channels: of the model, 3 or 1.
        device: where images are sent.
        progress: a wrapper like tqdm, ``progress(iterable, label)``.

    Raises:
        TrainingError: there are no images, the layout is unknown, or files are damaged.
    """
    _check_keys(spec)
    readers = {
        "digits": _digits,
        "npz": _npz,
        "cifar10": _cifar10,
        "folder": _folder,
        "webdataset": _webdataset,
    }
    try:
        found = readers[spec.kind](spec, channels, device, progress)
    except DataError as error:
        raise TrainingError(str(error)) from None
    if isinstance(found.train, Arrays):
        _check_arrays(found, channels)
    return found


def _check_keys(spec):
    """Raise a TrainingError if a key is missing, or one is given that this kind of data does not use."""
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


def _check_arrays(found, channels):
    """Raise a TrainingError unless a network with ``channels`` can train with these images in memory."""
    for split in (found.train, found.val):
        if split.images.shape[1] != channels:
            raise TrainingError(
                f"data: the model takes {channels} channels, the images have {split.images.shape[1]}"
            )
        if not len(split):
            raise TrainingError("data: expected training and validation images, got none for one of the two")
        least, most = int(split.labels.min()), int(split.labels.max())
        if not 0 <= least <= most < found.num_classes:
            raise TrainingError(f"data: expected labels 0 to {found.num_classes - 1}, got {least} to {most}")
    train, val = (list(split.images.shape[2:]) for split in (found.train, found.val))
    if train != val:
        raise TrainingError(
            f"data: expected images of one size, got {train} to train with, {val} to validate with"
        )


_EXPECTED = {
    "npz": arrays.LAYOUTS,
    "cifar10": arrays.BINARY,
    "folder": "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE",
    "webdataset": "shards such as /data/train-{0000..0146}.tar",
}


def _whole(images, channels):
    """The preprocessing that resizes pictures to the size of these images, if that is square."""
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
    """A context in which errors are prefixed with the key ``data.path``."""
    try:
        yield
    except DataError as error:
        raise TrainingError(f"data.path: {error}") from None


def _folder(spec, channels, device, progress):
    names, *splits = _labelled_files(spec)
    plain, augmentation = _decoders(spec, channels)
    if spec.in_memory:
        return _folder_in_memory(spec, channels, device, progress, names, splits, plain)
    train = Folder(splits[0], plain, spec.workers, device, augmentation)
    val = Folder(splits[1], plain, spec.workers, device)
    # without a crop, all images must have the size of the first
    if plain.crop is None and (image := _first_readable(train)) is not None:
        train.shape = val.shape = tuple(image.shape[1:])
        plain = _whole(image, channels)
    return Source(train, val, names, len(names), plain)


def _labelled_files(spec):
    """The names of the classes, and (file, class) of the training and validation pictures."""
    root = Path(spec.path)
    train_root, val_root = root / "train", Path(spec.val_path) if spec.val_path else root / "val"
    for folder in (train_root, val_root):
        if not folder.is_dir():
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no folder {folder}")
    try:
        train, val = listing.labelled_pictures(train_root), listing.labelled_pictures(val_root)
    except (OSError, DataError) as error:
        raise TrainingError(f"data.path: {root}: {error}") from None
    if not train:
        raise TrainingError(
            f"data.path: expected {_EXPECTED['folder']}, found no folder of a class in {train_root}"
        )
    if spec.classes is not None and len(train) < spec.classes:
        raise TrainingError(
            f"data.classes: expected at least {spec.classes} folders in {train_root}, found {len(train)}"
        )
    names = list(train)[: spec.classes]
    index = {name: i for i, name in enumerate(names)}
    splits = [
        [(path, index[name]) for name, paths in found.items() if name in index for path in paths]
        for found in (train, val)
    ]
    for folder, files in zip((train_root, val_root), splits, strict=True):
        if not files:
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no image in {folder}")
    if empty := [name for name in names if not train[name]]:
        raise TrainingError(
            f"data.path: expected images of every class in {train_root}, found none of {empty[:3]}"
        )
    # Leaving out the images of other classes would make the validation accuracy misleading.
    if unknown := sorted(set(val) - set(train)):
        raise TrainingError(
            f"data.val_path: expected the classes of {train_root} in {val_root}, found others: {unknown[:3]}"
        )
    return names, *splits


def _folder_in_memory(spec, channels, device, progress, names, splits, plain):
    if spec.randaugment or spec.scale:
        raise TrainingError(
            "data.in_memory: expected false beside data.scale and data.randaugment, which are part of "
            "decoding; got true"
        )
    if spec.resize and spec.resize > spec.size:
        raise TrainingError(
            f"data.in_memory: expected false where data.resize is above data.size ({spec.resize}, "
            f"{spec.size}): random crops are part of decoding; got true"
        )
    decoded, failures = [], []
    for name, files in zip(("train", "val"), splits, strict=True):
        shown = None
        if progress is not None:
            shown = functools.partial(progress, label=f"reading {name}", total=-(-len(files) // 256))
        found, failed = Folder(files, plain, spec.workers, device).in_memory(shown)
        decoded.append(found)
        failures += failed
    plain = plain if plain.crop is not None else _whole(decoded[0].images, channels)
    return Source(*decoded, names, len(names), plain, failures)


def _first_readable(folder):
    """The first readable picture, [1, C, H, W]; None if none of the first hundred is."""
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
    len(train)  # raises if the number of images is not given
    return Source(
        train, Shards(spec.val_path, plain, spec.workers, spec.classes, device), None, spec.classes, plain
    )


def _decoders(spec, channels):
    """The decoders of validation pictures and of training pictures."""
    need("torchvision")
    if spec.size is None and (spec.resize or spec.scale):
        raise TrainingError(
            "data.size: expected the side of the crop, which data.resize and data.scale are for, got none"
        )
    plain = Preprocessing(channels, spec.resize, spec.size, spec.interpolation)
    randaugment = None if spec.randaugment is None else (spec.randaugment.n, spec.randaugment.m)
    return plain, Augmentation(plain, spec.scale, randaugment)
