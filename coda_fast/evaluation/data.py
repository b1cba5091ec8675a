"""Labelled images to evaluate on: folders of classes, .npz files, or scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from coda_fast.images import ImageError, check_pixels, read_image, resize
from coda_fast.safety import need_memory, read_npz

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """images [N, C, H, W] in [0, 1]; labels [N]; what was skipped, and why, by file; ``note``: what to know of the labels."""

    images: torch.Tensor
    labels: torch.Tensor
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def digest(self) -> str:
        """Of pixels and labels: the same data, the same digest."""
        found = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


def load(
    source: str | Path,
    model,
    *,
    limit: int | None = None,
    size: int | None = None,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Labelled:
    """The images of ``source`` as ``model`` takes them, the first ``limit`` in order (of a folder: evenly from all classes).

    Args:
        source: "digits" (scikit-learn, the test half of the demo); an .npz file with ``images`` [N, H, W(, C)] uint8 and ``labels``
            [N] or [N, 1] (or ``test_images``, ``test_labels``), or with ``test_jpeg``, ``test_offset``, ``test_label`` (JPEGs end to end;
            ``test_lossless_idx``, ``test_lossless_rgb`` replace some); or a folder with a folder of image files for each class, in the
            order of the names or by ``model.class_names``.
        size: scale the shorter side and crop the middle to this many pixels, square; None: all images must have one size.

    Raises:
        ValueError: nothing there, no images, mixed sizes, classes that the model does not have. A file that cannot be read among others
        that can is skipped and named in ``skipped``.
    """
    path = Path(source)
    if str(source) == "digits":
        from coda_fast.demo import digits

        data = digits()
        found = _cropped(Labelled(data.test_images[:limit], data.test_labels[:limit]), size)
    elif path.is_dir():
        found = _folder(path, model, limit, size, progress)
    elif path.suffix == ".npz" and path.exists():
        found = _cropped(_npz(path, model, limit, progress), size)
    else:
        raise ValueError(f"data: expected 'digits', an .npz file or a folder of classes, got {str(source)!r}")
    if not len(found.images):
        raise ValueError(f"data: no images in {source}")
    if found.images.shape[1] != model.image_channels:
        raise ValueError(f"data: the model takes {model.image_channels} channels, the images of {source} have {found.images.shape[1]}")
    if int(found.labels.max()) >= model.num_classes or int(found.labels.min()) < 0:
        raise ValueError(f"data: the model has classes 0 to {model.num_classes - 1}, {source} has labels up to {int(found.labels.max())}")
    return found


def _folder(path, model, limit, size, progress):
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise ValueError(f"data: expected a folder for each class in {path}, got none")
    names, note = model.class_names or [], ""
    unknown = [c.name for c in classes if c.name not in names]
    if not unknown:
        labels = [names.index(c.name) for c in classes]
    elif len(unknown) < len(classes):  # a wrong guess would give wrong numbers without a word
        raise ValueError(f"data: expected folders named after classes of the model, in {path} others are not: {', '.join(unknown[:5])}")
    elif len(classes) > model.num_classes or (names and len(classes) < model.num_classes):
        raise ValueError(
            f"data: the model has {model.num_classes} classes, {path} has {len(classes)} folders"
            + ", none of them named after a class" * bool(names)
        )
    else:
        labels = list(range(len(classes)))
        note = f"folders in the order of their names are taken for classes 0 ({classes[0].name}) to {len(classes) - 1} ({classes[-1].name})"
    files = [sorted(p for p in c.iterdir() if p.suffix.lower() in SUFFIXES) for c in classes]
    if limit is not None:
        share = -(-limit // len(classes))
        files = [some[:share] for some in files]
    pairs = [(file, label) for some, label in zip(files, labels, strict=True) for file in some][:limit]
    images, kept, skipped, sizes = [], [], {}, {}
    for file, label in progress(pairs, "reading") if progress else pairs:
        try:
            image = read_image(file, model.image_channels)
            image = image if size is None else _square(image, size, str(file))
        except ImageError as error:
            skipped[str(file)] = str(error)
            continue
        if not images:
            need_memory(f"data: {len(pairs)} images of {image.shape[2]} x {image.shape[1]} pixels", 2 * len(pairs) * image.nbytes)
        sizes.setdefault(tuple(image.shape[1:]), file)
        images.append(image)
        kept.append(label)
    if len(sizes) > 1:
        some = ", ".join(f"{h} x {w} ({file.name})" for (h, w), file in list(sizes.items())[:3])
        raise ValueError(f"data: expected images of one size (or --size to crop them), got {len(sizes)} sizes: {some}")
    if not images:
        raise ValueError(
            f"data: no readable image among {len(pairs)} files in {path}" + (f": {next(iter(skipped.values()))}" if skipped else "")
        )
    return Labelled(torch.stack(images), torch.tensor(kept), skipped, note)


def _cropped(found, size):
    if size is None or not len(found.images):
        return found
    count, channels = found.images.shape[:2]
    need_memory(f"data: {count} images of {size} x {size} pixels", 2 * 4 * count * channels * size**2)
    return dataclasses.replace(found, images=torch.stack([_square(image, size) for image in found.images]))


def _square(image, size, name="image"):
    image = resize(image, size, name)
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]


def _npz(path, model, limit, progress):
    try:
        arrays = read_npz(path, lambda key: not key.startswith("train_"))
    except ValueError as error:
        raise ValueError(f"data: {error}") from None
    for names in (("images", "labels"), ("test_images", "test_labels")):
        if not set(names) <= arrays.keys():
            continue
        images, labels = (np.atleast_1d(arrays[name])[:limit] for name in names)
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # as MedMNIST has them
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels) or not _are_classes(labels):
            raise ValueError(
                f"data: {path}: expected images [N, H, W, C] uint8 and as many labels, got {images.dtype} {list(images.shape)}"
            )
        images = images[..., None] if images.ndim == 3 else images
        return Labelled(_to_tensor(images), torch.from_numpy(labels.astype(np.int64)))
    if {"test_jpeg", "test_offset", "test_label"} <= arrays.keys():
        return _jpegs(arrays, path, limit, progress)
    expected = "images and labels, test_images and test_labels, or test_jpeg, test_offset and test_label"
    raise ValueError(f"data: {path}: expected {expected}, got {', '.join(arrays)}")


def _jpegs(arrays, path, limit, progress):
    from PIL import Image, UnidentifiedImageError

    labels, offsets = arrays["test_label"], arrays["test_offset"]
    index, pixels = arrays.get("test_lossless_idx", np.zeros(0, int)), arrays.get("test_lossless_rgb", np.zeros((0, 1, 1, 3), np.uint8))
    if (
        not all(map(_are_classes, (labels, offsets, index)))
        or len(offsets) <= len(labels)
        or pixels.shape != (len(index), *pixels.shape[1:3], 3)
    ):
        raise ValueError(
            f"data: {path}: expected test_label [N], test_offset [N + 1], test_lossless_idx [K], all integers, and "
            f"test_lossless_rgb [K, H, W, 3], got {list(labels.shape)}, {list(offsets.shape)}, {list(index.shape)} and {list(pixels.shape)}"
        )
    count = len(labels) if limit is None else min(len(labels), limit)
    lossless = {int(i): place for place, i in enumerate(index)}
    raw, images, kept, skipped = arrays["test_jpeg"].tobytes(), [], [], {}
    for i in progress(range(count), "reading") if progress else range(count):
        if i in lossless:
            images.append(pixels[lossless[i]])
        else:
            try:
                with Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]])) as image:
                    check_pixels(*image.size)
                    images.append(np.asarray(image.convert("RGB")))
            except Exception as error:  # decoders raise whatever the damage leads them to
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
                skipped[f"{path}, test_jpeg {i}"] = reason
                continue
        kept.append(i)
    if len(sizes := {image.shape[:2] for image in images}) > 1:
        some = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
        raise ValueError(f"data: expected images of one size in {path}, got {len(sizes)} sizes: {some}")
    if not images:
        raise ValueError(f"data: no readable image among {count} in {path}")
    return Labelled(_to_tensor(np.stack(images)), torch.from_numpy(labels[kept].astype(np.int64)), skipped)


def _are_classes(array):
    """Integers, or what 64 bits hold of them as floating point."""
    whole = array.dtype.kind == "f" and bool(((array == np.rint(array)) & (abs(array) < 2**53)).all())
    return array.ndim == 1 and (array.dtype.kind in "iu" or whole)


def _to_tensor(images):
    need_memory(f"data: {len(images)} images of {images.shape[2]} x {images.shape[1]} pixels", 2 * 4 * images.size)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
