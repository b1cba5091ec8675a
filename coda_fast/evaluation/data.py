"""Labelled pictures for evaluation, read when they are needed: folders of classes, .npz files, or
scikit-learn's digits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from coda_fast.data import arrays, listing
from coda_fast.data.decode import check_pixels
from coda_fast.data.digits import digits
from coda_fast.data.errors import DataError, ImageError
from coda_fast.data.preprocessing import Preprocessing
from coda_fast.data.sources import Arrays, Folder, of_one_size, to_float
from coda_fast.evaluation import _common as common
from coda_fast.models import CoDANet
from coda_fast.safety import need_memory

BATCH = 64  # the number of pictures that are read and classified at once


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A data set whose pictures are listed, but not yet read.

    Attributes:
        source: reads the pictures.
        skipped: the reason for each picture that is already known to be unreadable, by name.
        note: an assumption about the labels that the user should know, or empty.
    """

    source: Arrays | Folder
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.source)


def load(
    source: str | Path,
    model: CoDANet,
    *,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
    workers: int = 0,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Labelled:
    """The images of ``source`` as inputs of ``model``.

    Args:
        source: "digits" (scikit-learn, the test half of the demo); an .npz file with ``images`` [N, H, W(,
            C)] uint8 and ``labels`` [N] or [N, 1], or in the form that training reads (``test_images``,
            ``test_labels``, or JPEGs: ``coda_fast.data.arrays``); or a folder with a folder for each class,
            with image files at any depth. Folders are matched with ``model.class_names``, or assigned to
            classes in the order of their names.
        model: a CoDA-Net, or another model with its attributes for images and classes.
        preprocessing: makes inputs of pictures; None: ``model.transform``.
        limit: the most images: the first ones, or in a folder evenly from all classes.
        workers: the number of worker processes that decode files.
        progress: a wrapper like tqdm around the decoding of an .npz file, ``progress(iterable, label)``.

    Raises:
        DataError (a ValueError): there is no such source, it has no images, or it has classes that the model
            does not have.
    """
    path, wanted = Path(source), model.transform if preprocessing is None else preprocessing
    skipped: dict[str, str] = {}
    note = ""
    found: Arrays | Folder
    if str(source) == "digits":
        found = _fitted(digits()[1], wanted, limit)
    elif path.is_dir():
        files, note = _files(path, model, limit)
        found = Folder(files, wanted, workers)
    elif path.suffix == ".npz" and path.exists():
        try:
            split = _npz(path, model.image_channels, limit, progress)
        except DataError as error:
            raise DataError(f"data: {error}") from None
        found, skipped = _fitted(split.arrays, wanted), dict(split.failures)
    else:
        raise DataError(f"data: expected 'digits', an .npz file or a folder of classes, got {str(source)!r}")
    if not len(found):
        raise DataError(f"data: no images in {source}")
    labels = found.labels if isinstance(found, Arrays) else torch.tensor([label for _, label in found.files])
    if int(labels.max()) >= model.num_classes:
        raise DataError(
            f"data: the model has classes 0 to {model.num_classes - 1}, {source} has labels up to "
            f"{int(labels.max())}"
        )
    return Labelled(found, skipped, note)


def _npz(path, channels, limit, progress):
    options = dict(channels=channels, limit=limit, progress=progress)
    try:
        (split,), _ = arrays.read_arrays(path, [""], **options)
    except arrays.NoArrays:
        (split,), _ = arrays.read_arrays(path, ["test"], **options)
    return split


def _files(path, model, limit):
    """(path, class) of each picture in a folder of classes; and a note on how classes were assigned to
    folders, if the folders are not named after the model's classes.
    """
    try:
        found = listing.labelled_pictures(path)
    except OSError as error:
        raise DataError(f"data: {path}: {error.strerror or error}") from None
    if not found:
        raise DataError(f"data: expected a folder for each class in {path}, got none")
    names, note = model.class_names or [], ""
    unknown = [name for name in found if name not in names]
    if not unknown:
        labels = [names.index(name) for name in found]
    elif len(unknown) < len(found):  # a wrong assignment would silently give wrong results
        raise DataError(
            f"data: expected folders named after classes of the model, in {path} others are not: "
            f"{', '.join(unknown[:5])}"
        )
    elif len(found) > model.num_classes or (names and len(found) < model.num_classes):
        raise DataError(
            f"data: the model has {model.num_classes} classes, {path} has {len(found)} folders"
            + ", none of them named after a class" * bool(names)
        )
    else:
        labels, order = list(range(len(found))), list(found)
        note = (
            f"folders in the order of their names are taken for classes 0 ({order[0]}) to {len(order) - 1} "
            f"({order[-1]})"
        )
    return [(file, labels[place]) for place, _, file in _shares(list(found.values()), limit)], note


def _shares(classes, limit):
    """(number of the class, number in the class, file) of at most ``limit`` files: the first of every class,
    then the second of every class and so on; if the limit ends a round, evenly from all classes.
    """
    rounds = (
        [(k, i, files[i]) for k, files in enumerate(classes) if i < len(files)]
        for i in range(max(map(len, classes)))
    )
    found = []
    for entries in rounds:
        found += listing.evenly(entries, None if limit is None else limit - len(found))
        if len(found) == limit:
            break
    return sorted(found)


def _fitted(found, preprocessing, limit=None):
    """Arrays with the preprocessing that files of the same pictures would get."""
    images, labels = found.images[:limit], found.labels[:limit]
    channels, height, width = images.shape[1:]
    size = preprocessing.size(width, height)
    if channels == preprocessing.channels and preprocessing.keeps(width, height):
        return Arrays(images, labels)
    need_memory(
        f"data: {len(images)} images of {size[0]} x {size[1]} pixels",
        len(images) * preprocessing.channels * size[0] * size[1],
    )
    check_pixels(*size)
    fitted = np.empty((len(images), preprocessing.channels, *size[::-1]), np.uint8)
    for place, image in zip(fitted, images, strict=True):
        place[:] = preprocessing.pixels(image.permute(1, 2, 0).numpy())
    return Arrays(torch.from_numpy(fitted), labels)


def first_size(data: Labelled) -> tuple[int, int]:
    """(height, width) of the first readable picture; DataError if there is none."""
    for i in range(len(data)):
        batch = data.source.some([i])
        if not batch.failures:
            return tuple(batch.images.shape[2:])
    raise _none_of(len(data), dict(batch.failures))


def _none_of(count, skipped):
    first = next(iter(skipped.items()), None)
    return DataError(
        f"data: no readable image among {count}" + ("" if first is None else f": {first[0]}: {first[1]}")
    )


class Images:
    """Pictures of a data set as inputs of a network, [N, C, H, W], decoded when they are indexed:
    ``images[index]`` with a tensor of indices of any shape.

    Args:
        source: reads the pictures.
        places: the index in ``source`` of each picture, [N].
        size: C, H and W.
        like: a tensor with the dtype and device of the results.
    """

    def __init__(
        self, source: Arrays | Folder, places: torch.Tensor, size: tuple[int, int, int], like: torch.Tensor
    ):
        self.source, self.places, self.like = source, places, like
        self.shape = torch.Size((len(places), *size))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        index = torch.as_tensor(index).cpu()
        batch = self.source.some(self.places[index.flatten()].numpy())
        if batch.failures:
            name, reason = batch.failures[0]
            raise ImageError(f"could be read before: {reason}", name)
        return to_float(batch.images.to(self.like.device), self.like.dtype).unflatten(0, index.shape)


@dataclasses.dataclass(frozen=True)
class Survey:
    """The predictions of a network on a data set; N pictures that could be read.

    Attributes:
        images: [N, C, H, W], decoded again when they are indexed.
        names: of each picture, [N].
        labels: the class of each picture, [N].
        predictions: the most likely class of each picture, [N].
        own: log-odds of the label of each picture, [N].
        top5: whether the label is among the five most likely classes, [N].
        skipped: the reason for each picture that could not be read, by name.
        digest: a hash of all pixels and labels, by which data sets are compared.
    """

    images: Images
    names: list[str]
    labels: torch.Tensor
    predictions: torch.Tensor
    own: torch.Tensor
    top5: torch.Tensor
    skipped: dict[str, str]
    digest: str

    def accuracy(self) -> dict[str, float]:
        """The shares of pictures whose label is the most likely class and among the five most likely classes,
        and the number of pictures.
        """
        return {
            "top1": float((self.predictions == self.labels).double().mean()),
            "top5": float(self.top5.double().mean()),
            "images": len(self.labels),
        }


def survey(
    model: nn.Module,
    data: Labelled,
    *,
    batch_size: int = BATCH,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Survey:
    """The predictions of a model on a data set, in one pass. The memory that it needs does not depend on the
    number of pictures.

    Raises:
        DataError: no picture can be read, or they have several sizes. ValueError: logits that are not finite.
    """
    source, like = data.source, next(model.parameters())
    digests = hashlib.sha256(), hashlib.sha256()  # of pixels, and of labels
    skipped, rows, places, shapes, done = dict(data.skipped), [], [], set(), 0
    total = range(0, len(source), batch_size)
    batches = source.evaluation(batch_size)
    with torch.no_grad(), common.evaluated(model), contextlib.closing(batches):
        for _ in progress(total, "reading") if progress else total:
            batch = next(batches)
            skipped |= dict(batch.failures)
            valid = torch.ones_like(batch.labels, dtype=torch.bool) if batch.valid is None else batch.valid
            images, labels = batch.images[valid], batch.labels[valid]
            places.append(done + valid.nonzero()[:, 0])
            done += len(valid)
            if not len(labels):
                continue
            shapes.add(tuple(images.shape[1:]))
            of_one_size(shapes)
            for digest, tensor in zip(digests, (images, labels), strict=True):
                digest.update(tensor.numpy().tobytes())
            logits = common.log_odds(model, model(to_float(images.to(like.device), like.dtype))).cpu()
            if not torch.isfinite(logits).all():
                first = source.name(int(places[-1][~torch.isfinite(logits).all(1)][0]))
                raise ValueError(f"{first}: the network gives logits that are not finite")
            top = logits.topk(min(5, logits.shape[1])).indices
            rows.append(
                (labels, top[:, 0], logits.gather(1, labels[:, None])[:, 0], (top == labels[:, None]).any(1))
            )
    if not rows:
        raise _none_of(len(source), skipped)
    places, (shape,) = torch.cat(places), shapes
    digest = hashlib.sha256(str(shape).encode() + b"".join(part.digest() for part in digests))
    labels, predictions, own, top5 = (torch.cat(column) for column in zip(*rows, strict=True))
    names = [source.name(int(place)) for place in places]
    return Survey(
        Images(source, places, shape, like),
        names,
        labels,
        predictions,
        own,
        top5,
        skipped,
        digest.hexdigest()[:16],
    )
