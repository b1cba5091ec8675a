"""Finding pictures and their classes, by the same rules for all commands.

A picture's name ends in one of ``SUFFIXES``, in upper or lower case. Files and folders whose name begins with
a dot are hidden and not read (macOS puts ``._name.png`` beside ``name.png``). Folders are read at any depth,
through links, and each only once, even if links form a circle. The order is by folder, then by name.
"""

from __future__ import annotations

import os
from pathlib import Path

from coda_fast.data.errors import DataError
from coda_fast.safety import walk

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
# Tiny-ImageNet has its validation images in one folder, and their classes in this file.
ANNOTATIONS = "val_annotations.txt"


def pictures(root: str | os.PathLike) -> list[Path]:
    """The pictures below a folder; OSError if a folder cannot be read."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, below, names in walk(root, onerror=refuse):
        # If several links lead to one folder, walk follows the first; sorting makes that always the same one.
        below[:] = sorted(name for name in below if not name.startswith("."))
        shown = (name for name in sorted(names) if not name.startswith("."))
        found.append((folder, [name for name in shown if name.lower().endswith(SUFFIXES)]))
    return [Path(folder, name) for folder, names in sorted(found) for name in names]


def class_folders(root: str | os.PathLike) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones."""
    entries = os.scandir(os.fspath(root))
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def labelled_pictures(root: str | os.PathLike) -> dict[str, list[str]]:
    """The pictures of each class, with the classes in the order of their names. The pictures of a class lie
    below the folder that is named after it, or the file ``ANNOTATIONS`` lists them.

    Raises:
        DataError: the annotations are damaged, or name files in other folders. OSError: a file or folder
            cannot be read.
    """
    root = Path(root)
    annotations = root / ANNOTATIONS
    if not annotations.is_file():
        return {name: [os.fspath(path) for path in pictures(root / name)] for name in class_folders(root)}
    found: dict[str, list[str]] = {}
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
    """At most ``count`` items of a list, evenly spaced over it."""
    return (
        items
        if count is None or len(items) <= count
        else [items[i * len(items) // count] for i in range(count)]
    )
