"""The pictures of a set that excite the channels of a stem most."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from coda_fast import _arguments, _files
from coda_fast._autocast import wide
from coda_fast._classes import as_classes, check_range
from coda_fast.data.errors import DataError
from coda_fast.data.sources import of_one_size, to_float
from coda_fast.dynamic_linear import need_network
from coda_fast.evaluation import _common as common
from coda_fast.safety import printable
from coda_fast.stems import Stem, checksum

_FORMAT = "coda_fast.Strongest"


@dataclasses.dataclass(frozen=True, eq=False)
class Strongest:
    """The S pictures of a set that excite each of K channels of a stem most, the strongest first, each once
    for a channel. Entry 0 of the first dimension is about the positive values of a channel, entry 1 about the
    negative ones, which an unsigned stem does not have (``coda_fast.stems.Stem``).

    Attributes:
        channels: their numbers, [K].
        values: the largest value of the channel in the picture, without its sign, [2, K, S]; 0 where fewer
            than S pictures excite the channel.
        places: the index of the picture in the set, its class (-1: not known), and the row and column of the
            value among the features at the joint, [2, K, S, 4]; all -1 where there is no picture.
        names: of these pictures, by index.
        size: height and width of all pictures, as the network sees them.
        seen: the number of pictures that were read.
        stem: in words, with a checksum of its weights and normalisation.
        data: what the source of the pictures says about itself; None: nothing.
        skipped: the reason for each picture that could not be read, by name.
    """

    channels: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor
    names: dict[int, str]
    size: tuple[int, int]
    seen: int
    stem: str
    data: str | None = None
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def check(self, model: torch.nn.Module, pictures: Any = None, name: str = "strongest") -> None:
        """Raise a ValueError, which begins with ``name``, unless this was found with the stem of ``model``
        and in the set ``pictures``, as far as both sets say what they are.
        """
        stem, data = _in_words(stem_of(model)), _facts(pictures)
        for own, wanted in ((self.stem, stem), (self.data, data)):
            if None not in (own, wanted) and own != wanted:
                got = printable(own)[:200]
                raise ValueError(f"{name}: expected strongest pictures of {wanted}, got those of {got}")

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a safetensors file that ``load`` reads, whole or not at all; OSError if that fails."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: facts.pop(name).contiguous() for name in ("channels", "values", "places")}
        header = {"format": _FORMAT, "facts": json.dumps(facts)}
        with _files.atomic_path(path) as temporary:
            temporary.write_bytes(_files.require_safetensors().torch.save(tensors, header))

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: torch.nn.Module | None = None, pictures: Any = None
    ) -> Strongest:
        """What ``save`` wrote, which is checked for ``model`` and ``pictures``, if these are given.

        Raises:
            FileNotFoundError: there is no such file. OSError: reading it is not permitted. ValueError: it is
                another or a damaged file, or is about another stem or set.
        """
        with _files.opened(path, kind="file") as file:
            try:
                header = file.metadata() or {}
                if header.get("format") != _FORMAT:
                    raise ValueError(f"format {header.get('format')!r}")
                facts = json.loads(header["facts"])
                facts["names"] = {int(index): str(name) for index, name in facts["names"].items()}
                facts["size"] = tuple(_arguments.positive_integer(side, "size") for side in facts["size"])
                found = cls(**{name: file.get_tensor(name) for name in file.keys()}, **facts)  # noqa: SIM118
                found._check_values()
            except Exception as error:  # a damaged file can make safetensors and json raise anything
                reason = _files.one_line(error)
                raise ValueError(
                    f"{path}: expected a file of Strongest.save, got another: {reason}"
                ) from None
        if model is not None:
            found.check(model, pictures, str(path))
        return found

    def _check_values(self):
        (two, channels, _, four), numbers = self.places.shape, as_classes(self.places, "places")[..., 0]
        check_range(numbers + 1, self.seen + 1, "pictures, from 1 on")
        if (
            (two, four, *self.channels.shape, *self.values.shape) != (2, 4, channels, *numbers.shape)
            or not {*self.names, -1}.issuperset(numbers.flatten().tolist())
            or len(self.size) != 2
        ):
            raise ValueError(f"values or names that do not fit places {list(self.places.shape)}")


def stem_of(model: torch.nn.Module) -> Stem:
    """The stem of a network; ValueError if it has none."""
    network = need_network(model)
    if (stem := getattr(network, "stem", None)) is None:
        raise ValueError(f"model: expected a hybrid network with a stem, got a {type(network).__name__}")
    return stem


def _in_words(stem):
    signed = " (signed)" if stem.signed else ""
    return f"the stem {stem.in_words()}{signed} with checksum {checksum(stem.state_dict())[:16]}"


def _facts(source):
    """What a source of pictures says about itself, as text; None: nothing."""
    made = getattr(source, "preprocessing", None)
    facts = source.facts() if hasattr(source, "facts") else None
    return facts and f"the set {json.dumps(facts | ({} if made is None else made.config()))}"


def strongest(
    model: torch.nn.Module,
    pictures: Any,
    channels: Sequence[int] | None = None,
    count: int = 8,
    batch_size: int = 64,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Strongest:
    """The pictures of a set that excite the channels of a stem most, found in one pass. The memory that it
    needs does not depend on the number of pictures.

    Args:
        model: a network with a stem, or a wrapper of one.
        pictures: a source of ``coda_fast.data`` (``coda_fast.evaluation.data.load(...).source``), or an
            iterable of batches: images [N, C, H, W] in [0, 1], or (images, classes). All have one size.
        channels: of the features; None: all.
        count: the number of pictures for each channel. Of equal ones, the first are taken.
        batch_size: the number of pictures of a source that are read at once.
        progress: a wrapper like tqdm around the batches, ``progress(iterable, label)``.

    Raises:
        ValueError, TypeError: the network has no stem, there are no such channels, images have another shape
            or several sizes, features are not finite, or no picture can be read (DataError).
    """
    stem, count = stem_of(model), _arguments.positive_integer(count, "count")
    chosen = torch.arange(stem.channels) if channels is None else torch.tensor(list(channels)).reshape(-1)
    check_range(chosen := as_classes(chosen, "channels"), stem.channels, "channels")
    like, seen = stem.mean, 0
    shapes: set[tuple[int, ...]] = set()
    skipped: dict[str, str] = {}
    # a value of 0 excites nothing: among equal ones, sorting keeps these first
    values = torch.zeros(2, len(chosen), count, dtype=wide(like).dtype)
    places = torch.full((*values.shape, 4), -1)
    batches = _batches(pictures, _arguments.positive_integer(batch_size, "batch_size"), skipped, progress)
    with torch.no_grad(), common.evaluated(model), contextlib.closing(batches):
        for index, images, labels in batches:
            need_network(model).check_images(images)
            shapes.add(tuple(images.shape[1:]))
            of_one_size(shapes)
            features = wide(stem(images.to(like)))[:, chosen.to(like.device)].cpu()
            features = features if stem.signed else features.clamp(min=0)  # as the network takes them
            if not torch.isfinite(features).all():
                raise ValueError(f"model: expected finite features, got others from picture {index[0]} on")
            high, low = features.flatten(2).max(2), features.flatten(2).min(2)
            cells, width = torch.stack((high.indices, low.indices)), features.shape[3]
            first = torch.stack((index, labels), 1)[None, :, None].expand(*cells.shape, 2)
            found = torch.cat((first, torch.stack((cells // width, cells % width), 3)), 3)
            values = torch.cat((values, torch.stack((high.values, -low.values)).transpose(1, 2)), 2)
            order = values.sort(dim=2, descending=True, stable=True).indices[..., :count, None]
            values = values.gather(2, order[..., 0])
            places = torch.cat((places, found.transpose(1, 2)), 2).gather(2, order.expand(-1, -1, -1, 4))
            seen += len(index)
    if not seen:
        why = next((f": {name}: {reason}" for name, reason in skipped.items()), "")
        raise DataError(f"data: no readable image among {len(skipped)}{why}")
    name = getattr(pictures, "name", str)
    names = {i: name(i) for i in sorted({*places[..., 0].flatten().tolist()} - {-1})}
    ((_, height, width),) = shapes
    about = (names, (height, width), seen, _in_words(stem), _facts(pictures), skipped)
    return Strongest(chosen, values, places, *about)


def _batches(pictures, batch_size, skipped, progress):
    """(index, images, classes) of the pictures that can be read, in batches."""
    source = pictures.evaluation(batch_size) if hasattr(pictures, "evaluation") else None
    steps = pictures if source is None else range(0, len(pictures), batch_size)
    start = 0
    with contextlib.closing(source or contextlib.ExitStack()):
        for batch in progress(steps, "reading") if progress else steps:
            if source is not None:
                batch = next(source)
                skipped |= dict(batch.failures)
                valid = (
                    torch.ones_like(batch.labels, dtype=torch.bool) if batch.valid is None else batch.valid
                )
                images, labels = to_float(batch.images, torch.float32), batch.labels
            else:
                images, labels = batch[:2] if isinstance(batch, tuple | list) else (batch, None)
                labels = torch.full((len(images),), -1) if labels is None else labels.reshape(-1)
                valid = torch.ones(len(images), dtype=torch.bool, device=labels.device)
            if valid.any():
                yield start + valid.nonzero()[:, 0].cpu(), images[valid], labels[valid].cpu()
            start += len(valid)
