"""The trained networks that the package contains: files in ``coda_fast/weights/``, in half precision, each
with a model card beside it and a checksum in ``SHA256SUMS`` (which ``sha256sum -c`` reads, too).

>>> from coda_fast import pretrained
>>> list(pretrained.names())
['coda_xs_cifar10', 'coda_xs_digits', 'coda_xs_imagenette']
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from coda_fast import checkpoints
from coda_fast.data.decode import picture_size
from coda_fast.network import Network

FOLDER = Path(__file__).resolve().parent / "weights"
SUMS = FOLDER / "SHA256SUMS"
# Pictures with a shorter side of at most so many pixels are given to this network; larger ones to the last.
_BY_SIDE = ((16, "coda_xs_digits"), (48, "coda_xs_cifar10"))
_OTHERWISE = "coda_xs_imagenette"


def names() -> tuple[str, ...]:
    """The names of the networks, which ``create_model(name, pretrained=True)`` takes."""
    return tuple(sorted(checksums()))


def path(name: str) -> Path:
    """The file of a network, after its checksum was compared.

    Raises:
        ValueError: there is no such network in the package. CheckpointError: the file is missing or is not
            the one that was shipped.
    """
    sums = checksums()
    if name not in sums:
        raise ValueError(f"pretrained: expected one of {', '.join(sorted(sums))}, got {name!r}")
    file = FOLDER / f"{name}.safetensors"
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError:
        found = "no file"
    if found != sums[name]:
        raise checkpoints.CheckpointError(
            f"{file}: expected the file that coda_fast ships, with the SHA-256 checksum {sums[name][:12]}, "
            f"got {found[:12]}; install coda_fast again"
        )
    return file


def find(name_or_path: str | os.PathLike) -> Path:
    """The file of a network that the package contains, by its name; anything else is a path already.

    Raises:
        CheckpointError: as ``path``.
    """
    name = os.fspath(name_or_path)
    return path(name) if name in checksums() else Path(name)


def load(name_or_path: str | os.PathLike, **options: Any) -> Network:
    """A network of the package by its name, in float32, or that of a file, as ``coda_fast.load`` reads it
    with the same ``options``.

    Raises:
        FileNotFoundError: neither such a name nor such a file. CheckpointError, OSError: as
            ``coda_fast.load``.
    """
    if os.fspath(name_or_path) in checksums():
        return create(os.fspath(name_or_path), **options)
    try:
        return checkpoints.load(name_or_path, **options)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{os.fspath(name_or_path)}: no such checkpoint, and no network of the package "
            f"({', '.join(names())})"
        ) from None


def create(
    name: str, *, rank: int | None = None, dtype: torch.dtype | None = None, **options: Any
) -> Network:
    """What ``coda_fast.create_model(name, pretrained=True, ...)`` returns.

    Args:
        name: one of ``names()``.
        rank: None; the weights have theirs.
        dtype: of the weights; None: float32.
        options: of ``coda_fast.load``.

    Raises:
        ValueError: the package contains no such network, or a rank is given. CheckpointError, ImportError: as
            ``coda_fast.load``.
    """
    if rank is not None:
        raise ValueError(f"rank: expected none beside pretrained weights, which have theirs, got {rank}")
    return checkpoints.load(path(name), **options).to(dtype or torch.float32)


def for_picture(height: int, width: int) -> str:
    """The name of the network for a picture of so many pixels, by its shorter side: scans of digits up to 16,
    CIFAR-10 up to 48, photographs above.
    """
    side = min(height, width)
    return next((name for most, name in _BY_SIDE if side <= most), _OTHERWISE)


def for_file(source: str | os.PathLike | bytes) -> str:
    """``for_picture`` by the header of a picture's file, or of its content; of a file that is no picture, the
    network for photographs.
    """
    size = picture_size(source)
    return _OTHERWISE if size is None else for_picture(*size)


def card(name: str) -> str:
    """The model card of a network, as Markdown. ValueError: there is no such network in the package."""
    return path(name).with_suffix(".md").read_text(encoding="utf-8")


def checksums() -> dict[str, str]:
    """{name of a network: SHA-256 checksum of its file}."""
    lines = (line.split() for line in SUMS.read_text(encoding="ascii").splitlines() if line)
    return {file.removesuffix(".safetensors"): checksum for checksum, file in lines}
