"""The images of a recipe: digits, arrays, CIFAR-10 in its forms, trees of folders, shards."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from pathlib import Path

import numpy as np
import torch

from coda_fast.images import check_pixels
from coda_fast.safety import need_memory, read_npz, walk
from coda_fast.train.decode import Decoder
from coda_fast.train.errors import TrainingError, need
from coda_fast.train.recipes import Data
from coda_fast.train.shards import Shards
from coda_fast.train.sources import Arrays, Folder


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
        arrays = read_npz(spec.path)
    except (ValueError, OSError) as error:
        raise TrainingError(f"data.path: {error}") from None
    splits = []
    for split in ("train", "test"):
        if f"{split}_jpeg" in arrays:
            splits.append(Arrays(*_jpegs(arrays, split, spec.path, progress), device))
            continue
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None or labels is None:
            raise TrainingError(f"data.path: {spec.path}: expected {_EXPECTED['npz']}, got {', '.join(arrays) or 'nothing'}")
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # as MedMNIST has them
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1] or 0 in images.shape[1:]:
            raise TrainingError(
                f"data.path: {spec.path}: expected {split}_images [N, H, W, C] uint8 and as many labels, "
                f"got {images.dtype} {list(images.shape)} and {list(labels.shape)}"
            )
        images = images[..., None] if images.ndim == 3 else images
        splits.append(Arrays(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), _labels(labels, split, spec.path), device))
    names = [str(name) for name in np.atleast_1d(arrays["class_names"])] if "class_names" in arrays else None
    return Source(*splits, names, len(names) if names else 1 + max(int(split.labels.max()) for split in splits))


def _labels(labels, split, path):
    if labels.dtype.kind not in "iu" or not labels.size or int(labels.min()) < 0 or int(labels.max()) >= 2**63:
        got = f"{labels.dtype} from {labels.min()} to {labels.max()}" if labels.size else "none"
        raise TrainingError(f"data.path: {path}: expected labels of {split} that are integers from 0 on, got {got}")
    return torch.from_numpy(labels.astype(np.int64))


def _jpegs(arrays, split, path, progress):
    """JPEGs end to end, some replaced by pixels: the layout that ``coda-fast evaluate`` reads too."""
    from PIL import Image

    try:
        raw, offsets, labels = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offset"], arrays[f"{split}_label"]
        images, places = [], range(len(labels))
        for i in progress(places, f"reading {split}") if progress else places:
            with Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]])) as image:
                check_pixels(*image.size)
                images.append(np.asarray(image.convert("RGB")))
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
    if odd := [file for file in (*files[0], *files[1]) if not file.is_file()]:
        raise TrainingError(f"data.path: expected {_EXPECTED['cifar10']}, got no file: {odd[0]}")
    need_memory(f"data.path: {folder}", sum(file.stat().st_size for some in files for file in some))
    for some in files:
        records = np.concatenate([np.fromfile(file, np.uint8) for file in some])
        if len(records) % 3073 or not len(records):  # a label and 3 x 32 x 32 pixels, channels first
            raise TrainingError(f"data.path: {some[0]}: expected records of 3073 bytes, got {len(records)} bytes: truncated?")
        records = records.reshape(-1, 3073)
        images, labels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(records[:, 0].astype(np.int64))
        splits.append(Arrays(images, labels, device))
    meta = folder / "batches.meta.txt"
    names = meta.read_text(errors="replace").split() if meta.is_file() else list(_CIFAR10)
    if len(names) != 10:
        raise TrainingError(f"data.path: {meta}: expected the names of 10 classes, got {len(names)}")
    return Source(*splits, names, 10)


def _folder(spec, channels, device, progress):
    need("torchvision")
    from torchvision.datasets.folder import IMG_EXTENSIONS

    root = Path(spec.path)
    train_root, val_root = root / "train", Path(spec.val_path) if spec.val_path else root / "val"
    for folder in (train_root, val_root):
        if not folder.is_dir():
            raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no folder {folder}")
    names = _folders(train_root)
    if not names:
        raise TrainingError(f"data.path: expected {_EXPECTED['folder']}, found no folder of a class in {train_root}")
    if spec.classes is not None and len(names) < spec.classes:
        raise TrainingError(f"data.classes: expected at least {spec.classes} folders in {train_root}, found {len(names)}")
    index = {name: i for i, name in enumerate(names[: spec.classes])}
    annotations = val_root / "val_annotations.txt"  # Tiny-ImageNet keeps its validation images in one folder
    try:
        train = _images_of(train_root, index, IMG_EXTENSIONS)
        if annotations.is_file():
            rows = [line.split("\t") for line in annotations.read_text(errors="surrogateescape").splitlines() if line.strip()]
            if any(len(row) < 2 or row[0] in ("", "..") or Path(row[0]).name != row[0] for row in rows):
                raise ValueError(f"{annotations.name}: expected the name of a file in images/, a tab and its class in every line")
            val = [(str(val_root / "images" / name), index[label]) for name, label, *_ in rows if label in index]
            val_names = {row[1] for row in rows}
        else:
            val = _images_of(val_root, index, IMG_EXTENSIONS)
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


def _images_of(root, index, endings):
    """Paths and classes of the images below root/CLASS, at any depth, in the order of torchvision's ImageFolder; but a folder that links
    lead back to counts once.
    """

    def refuse(error):
        raise error

    found = []
    for name, label in sorted(index.items()):
        for folder, _, names in sorted(walk(root / name, onerror=refuse) if (root / name).is_dir() else ()):
            found += [(os.path.join(folder, file), label) for file in sorted(names) if file.lower().endswith(endings)]
    return found


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
