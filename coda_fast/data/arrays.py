"""Labelled pictures that are stored in a few files: .npz files of arrays or of JPEGs, and the binary version
of CIFAR-10.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from coda_fast.data.decode import RULES
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.data.sources import Arrays
from coda_fast.safety import need_memory, read_npz

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LAYOUTS = (
    "an .npz file with train_images [N, H, W, C] uint8, train_labels, test_images, test_labels (or _jpeg, "
    "_offset and _label of both)"
)
BINARY = "the folder of CIFAR-10's binary version, with data_batch_1.bin, or an .npz file"


class NoArrays(DataError):
    """A file holds none of the wanted splits."""


@dataclasses.dataclass
class Split:
    """uint8 images in memory, and (name, reason) of each image that could not be read."""

    arrays: Arrays
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def read_arrays(
    path: str | os.PathLike,
    splits: Iterable[str] = ("train", "test"),
    *,
    channels: int = 3,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> tuple[list[Split], list[str] | None]:
    """Splits of an .npz file, and the names of the classes, if the file holds them (``class_names``).

    A split is ``{split}_images`` uint8 [N, H, W(, C)] and ``{split}_labels`` [N] or [N, 1] (``images`` and
    ``labels`` for the split ""). Or it is ``{split}_jpeg``, the bytes of JPEGs one after another, which begin
    at ``{split}_offset`` [N + 1], with ``{split}_label`` [N]. In the latter case, ``{split}_lossless_rgb``
    [K, H, W, 3] replaces the pictures with the indices ``{split}_lossless_idx`` [K].

    Args:
        path: the file.
        splits: their names.
        channels: of the network; grey pictures become colour and colour ones grey, as in files.
        limit: the most pictures of each split; the first ones are taken.
        device: where the images are kept.
        progress: a wrapper like tqdm around the decoding of JPEGs, ``progress(iterable, label)``.

    Raises:
        DataError: the file is not such a file or damaged, its arrays do not fit each other, or its images
            have several sizes.
    """
    splits = tuple(splits)
    keys = {_key(split, name) for split in splits for name in _KEYS} | {"class_names"}
    try:
        with_names = read_npz(path, lambda key: key in keys)
        if not any(_key(split, kind) in with_names for split in splits for kind in ("images", "jpeg")):
            found = ", ".join(read_npz(path)) or "nothing"
            raise NoArrays(f"{path}: expected {LAYOUTS}, got {found}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from None
    names = (
        [str(name) for name in np.atleast_1d(with_names["class_names"])]
        if "class_names" in with_names
        else None
    )
    return [_split(with_names, split, path, channels, limit, device, progress) for split in splits], names


_KEYS = ("images", "labels", "jpeg", "offset", "label", "lossless_idx", "lossless_rgb")


def _key(split, name):
    return f"{split}_{name}" if split else name


def _split(arrays, split, path, channels, limit, device, progress):
    if _key(split, "jpeg") in arrays:
        return _jpegs(arrays, split, path, channels, limit, device, progress)
    images, labels = arrays.get(_key(split, "images")), arrays.get(_key(split, "labels"))
    if images is None or labels is None:
        raise DataError(f"{path}: expected {LAYOUTS}, got {', '.join(arrays) or 'nothing'}")
    images, labels = np.atleast_1d(images), np.atleast_1d(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # as MedMNIST stores them
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or labels.shape != images.shape[:1]
        or 0 in images.shape[1:]
    ):
        raise DataError(
            f"{path}: expected {_key(split, 'images')} [N, H, W, C] uint8 and as many labels, "
            f"got {images.dtype} {list(images.shape)} and {list(labels.shape)}"
        )
    labels = _classes(labels, split, path)
    images = images[:limit, ..., None] if images.ndim == 3 else images[:limit]
    if images.shape[3] not in (1, 3):
        raise DataError(f"{path}: expected {_key(split, 'images')} of 1 or 3 channels, got {images.shape[3]}")
    return Split(Arrays(_of_channels(images, channels), labels[:limit], device))


def _of_channels(images, channels):
    """uint8 [N, H, W, C] as [N, channels, H, W]."""
    if images.shape[3] == channels:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    from PIL import Image

    if channels == 3:
        return torch.from_numpy(np.repeat(images.transpose(0, 3, 1, 2), 3, 1))
    grey = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
    return (
        torch.from_numpy(np.stack(grey)[:, None])
        if grey
        else torch.empty(0, 1, *images.shape[1:3], dtype=torch.uint8)
    )


def _classes(labels, split, path):
    """Labels as int64, from integers or integer-valued floating-point numbers, all at least 0."""
    if (
        labels.dtype.kind == "f"
        and labels.size
        and bool(((labels == np.rint(labels)) & (abs(labels) < 2**53)).all())
    ):
        labels = labels.astype(np.int64)
    if (
        labels.dtype.kind not in "iu"
        or not labels.size
        or int(labels.min()) < 0
        or int(labels.max()) >= 2**63
    ):
        numbers = labels.dtype.kind in "iufb"
        got = (
            "none"
            if not labels.size
            else f"{labels.dtype} from {labels.min()} to {labels.max()}"
            if numbers
            else str(labels.dtype)
        )
        of = f" of {split}" if split else ""
        raise DataError(f"{path}: expected labels{of} that are integers from 0 on, got {got}")
    return torch.from_numpy(labels.astype(np.int64))


def _jpegs(arrays, split, path, channels, limit, device, progress):
    raw, offsets, labels, index, pixels = (
        arrays.get(_key(split, name)) for name in ("jpeg", "offset", "label", *_KEYS[-2:])
    )
    index = np.zeros(0, int) if index is None else index
    pixels = np.zeros((len(index), 1, 1, 3), np.uint8) if pixels is None else pixels
    problem = _misfit(raw, offsets, labels, index, pixels)
    if problem:
        raise DataError(
            f"{path}: expected {_key(split, 'jpeg')}, {_key(split, 'offset')} and {_key(split, 'label')} "
            "that fit "
            f"(and {_key(split, 'lossless_idx')} with {_key(split, 'lossless_rgb')}): {problem}"
        )
    classes = _classes(labels, split, path)[:limit]
    transform, raw, lossless = (
        Preprocessing(channels),
        raw.tobytes(),
        {int(i): place for place, i in enumerate(index)},
    )
    places, images, kept, failures = range(len(classes)), [], [], []
    for i in progress(places, f"reading {split}") if progress else places:
        name = f"{path}, {_key(split, 'jpeg')} {i}"
        try:
            if i in lossless:
                images.append(_of_channels(pixels[lossless[i]][None], channels)[0].numpy())
            else:
                images.append(transform.pixels(raw[int(offsets[i]) : int(offsets[i + 1])], name=name))
            kept.append(i)
        except ImageError as error:
            failures.append((name, error.reason))
        if len(images) == 1:
            need_memory(f"{path}: {len(places)} images", len(places) * images[0].nbytes)
    if len(sizes := {image.shape[1:] for image in images}) > 1:
        some = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
        raise DataError(f"{path}: expected images of one size, got {len(sizes)} sizes: {some}")
    if not images:
        raise DataError(
            f"{path}: no readable image among {len(places)}"
            + (f"; {failures[0][0]}: {failures[0][1]}" if failures else "")
        )
    return Split(Arrays(torch.from_numpy(np.stack(images)), classes[kept], device, RULES), failures)


def _misfit(raw, offsets, labels, index, pixels):
    """Text that says how the arrays of concatenated JPEGs do not fit each other; None if they do."""
    if any(array is None for array in (raw, offsets, labels)):
        return "one is missing"
    if raw.ndim != 1 or raw.dtype != np.uint8:
        return f"expected bytes, got {raw.dtype} {list(raw.shape)}"
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or labels.ndim != 1 or len(offsets) <= len(labels):
        return (
            f"expected [N + 1] offsets of [N] labels, got {offsets.dtype} {list(offsets.shape)} and "
            f"{list(labels.shape)}"
        )
    used = offsets[: len(labels) + 1].astype(np.int64)
    if (np.diff(used) < 0).any() or int(used[0]) < 0 or int(used[-1]) > len(raw):
        return f"expected offsets that ascend from 0 to {len(raw)}, got {int(used[0])} to {int(used[-1])}"
    if (
        index.ndim != 1
        or index.dtype.kind not in "iu"
        or pixels.dtype != np.uint8
        or pixels.shape != (len(index), *pixels.shape[1:3], 3)
    ):
        return (
            f"expected [K] places and [K, H, W, 3] uint8, got {index.dtype} {list(index.shape)} and "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(labels):
        return f"expected places from 0 to {len(labels) - 1}, got {int(index.min())} to {int(index.max())}"
    return None


def read_cifar10(
    folder: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[list[Arrays], list[str]]:
    """Training and test images from the folder of the binary version, and the names of the classes.

    Raises:
        DataError: files are missing or truncated, or belong to the Python version, which consists of pickles.
    """
    folder = Path(folder)
    folder = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
    files = sorted(folder.glob("data_batch_*.bin")), [folder / "test_batch.bin"]
    if not files[0] or not files[1][0].exists():
        if (folder / "data_batch_1").exists() or (folder / "cifar-10-batches-py").exists():
            raise DataError(
                f"{folder} holds the version of CIFAR-10 for Python, whose pickles could run any code; "
                "expected the binary "
                f"version (cifar-10-binary.tar.gz, from the same page)"
            )
        raise DataError(f"expected {BINARY}, found none in {folder}")
    if odd := [file for file in (*files[0], *files[1]) if not file.is_file()]:
        raise DataError(f"expected {BINARY}, got no file: {odd[0]}")
    try:
        need_memory(f"{folder}", sum(file.stat().st_size for some in files for file in some))
    except ValueError as error:
        raise DataError(str(error)) from None
    splits = []
    for some in files:
        records = np.concatenate([np.fromfile(file, np.uint8) for file in some])
        if len(records) % 3073 or not len(records):  # a label and 3 x 32 x 32 pixels, channels first
            raise DataError(
                f"{some[0]}: expected records of 3073 bytes, got {len(records)} bytes: truncated?"
            )
        records = records.reshape(-1, 3073)
        images, labels = (
            torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()),
            torch.from_numpy(records[:, 0].astype(np.int64)),
        )
        splits.append(Arrays(images, labels, device))
    meta = folder / "batches.meta.txt"
    names = meta.read_text(errors="replace").split() if meta.is_file() else list(CIFAR10)
    if len(names) != 10:
        raise DataError(f"{meta}: expected the names of 10 classes, got {len(names)}")
    return splits, names
