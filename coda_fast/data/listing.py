"""Which files are pictures, and of which class: one answer for all commands.

A picture has one of ``SUFFIXES``, in any case. What begins with a dot is hidden and never read, neither files
(macOS puts ``._name.png`` beside ``name.png``) nor folders. Folders are read at any depth, through links; one
that links lead back to counts once. The order is that of folders, then names.
"""

from __future__ import annotations

import os
from pathlib import Path

from coda_fast.data.errors import DataError
from coda_fast.safety import walk

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
# Tiny-ImageNet keeps its validation images in one folder, and their classes in this file
ANNOTATIONS = "val_annotations.txt"


def pictures(root: str | os.PathLike) -> list[Path]:
    """The pictures below a folder. OSError: a folder that cannot be read."""

    def refuse(error):
        raise error

    found = []
    for folder, below, names in walk(root, onerror=refuse):
        # of two names of one folder the first counts
        below[:] = sorted(name for name in below if not name.startswith("."))
        found.append(
            (
                folder,
                [
                    name
                    for name in sorted(names)
                    if name.lower().endswith(SUFFIXES) and not name.startswith(".")
                ],
            )
        )
    return [Path(folder, name) for folder, names in sorted(found) for name in names]


def class_folders(root: str | os.PathLike) -> list[str]:
    """Names of the folders in a folder, those that are not hidden, in order."""
    return sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )


def labelled_pictures(root: str | os.PathLike) -> dict[str, list[str]]:
    """The pictures of each class: below the folder that is named after it, or by ``ANNOTATIONS``; classes in
    the order of their names.

    Raises:
        DataError: annotations that are torn, or name files elsewhere. OSError: what cannot be read.
    """
    root = Path(root)
    annotations = root / ANNOTATIONS
    if not annotations.is_file():
        return {name: [os.fspath(path) for path in pictures(root / name)] for name in class_folders(root)}
    found = {}
    for line in annotations.read_text(errors="surrogateescape").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        label, _, _ = rest.partition("\t")
        if not label or name in ("", "..") or Path(name).name != name:
            raise DataError(
                f"{annotations.name}: expected the name of a file in images/, a tab and its class in every "
                "line"
            )
        found.setdefault(label, []).append(os.fspath(root / "images" / name))
    return dict(sorted(found.items()))


def evenly(items: list, count: int | None) -> list:
    """At most ``count`` of a list, evenly from all of it."""
    return (
        items
        if count is None or len(items) <= count
        else [items[i * len(items) // count] for i in range(count)]
    )
