"""What commands check before they do any work: outputs must not replace inputs, paths must be regular files,
and sizes must fit in this machine's memory.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

MOST_PIXELS = 89_478_485  # of an image; Pillow's limit: a quarter of a GiB at 24 bits per pixel


class NotAFile(ValueError):
    """A pipe, a socket, a device or a folder where a file is expected."""


# -- reading
# ------------------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file, open for reading. Nothing else is opened: a pipe would block the program until someone
    writes to it, and a device may never end.

    Raises:
        NotAFile: the path is not a regular file. OSError: it is missing, or reading it is not permitted.
    """
    _need_regular(path, os.stat(path).st_mode)
    # The file may be replaced after the check. Opening a pipe in this way does not block.
    opener = lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    file = open(path, "rb", opener=opener)  # noqa: SIM115
    try:
        _need_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def kind_of(mode: int) -> str:
    """The type of file, in words, of a mode that ``os.stat`` returns."""
    kinds = {
        stat.S_ISREG: "a file",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    return next((name for test, name in kinds.items() if test(mode)), "a device")


def _need_regular(path, mode):
    if not stat.S_ISREG(mode):
        raise NotAFile(f"{path}: expected a file, got {kind_of(mode)}")


def walk(
    root: str | os.PathLike, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` that follows links and visits every folder once, even if links form a circle."""
    seen = set()
    for folder, below, names in os.walk(os.fspath(root), onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield folder, below, names


def read_npz(
    path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file whose names are ``wanted``.

    Raises:
        ValueError: the file is not an .npz file, is damaged, holds arrays of Python objects, has a header
            that claims another size than the file holds, or holds arrays that do not fit in memory.
        OSError: it is missing, or reading it is not permitted.
    """
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if wanted(name.removesuffix(".npy"))]
                sizes = {name: archive.getinfo(name).file_size for name in names}
                need_memory(f"{path}: arrays", sum(sizes.values()))
                for name in names:
                    with archive.open(name) as member:
                        claimed = _claimed_bytes(member)
                    if claimed is not None and claimed != sizes[name]:
                        raise ValueError(f"{name} claims {claimed} bytes, the file holds {sizes[name]}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files if wanted(key)}
            if odd := [key for key, array in found.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{odd[0]}: expected an array, got other bytes")
            return found
        except TooLarge:
            raise
        except Exception as error:  # damage makes zipfile and NumPy raise errors of any class
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: not an .npz file that NumPy can read ({reason})") from None


def _claimed_bytes(member):
    """The size of an array's file according to its header; None if it is not an array, or its header does not
    give the size.
    """
    try:
        version = np.lib.format.read_magic(member)
    except ValueError:
        return None
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        return None
    shape, _, dtype = readers[version](member)
    count = 1
    for length in shape:
        count *= int(length)
    return None if dtype.hasobject else member.tell() + count * dtype.itemsize


def printable(text: object) -> str:
    """``text`` for a terminal, a page or a log, with control characters and undecodable bytes as escapes;
    file names may contain both.
    """
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


# -- writing
# ------------------------------------------------------------------------------------------------------------


def check_outputs(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """Check that no file that will be written is also read, under any name or link.

    Raises:
        ValueError: one of ``outputs`` is one of ``inputs``, or exists and is not a regular file.
    """
    read: dict[tuple[int, int], str | os.PathLike] = {}
    for path in inputs:
        with contextlib.suppress(OSError, ValueError):  # reading it will report the error
            read.setdefault(_identity(path), path)
    for path in outputs:
        try:
            mode, identity = os.stat(path).st_mode, _identity(path)
        except FileNotFoundError:
            continue
        if identity in read:
            raise ValueError(
                f"output: expected another file than those that are read, got {path}, which is "
                f"{read[identity]}"
            )
        if not stat.S_ISREG(mode):  # os.replace would replace even a device by a file
            raise ValueError(f"output: expected a file at {path}, got {kind_of(mode)}")


def check_output_folder(folder: str | os.PathLike, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Check that results do not go into a folder that is read, or below one, under any name or link.

    Raises:
        ValueError: ``folder`` is one of ``inputs`` or lies in one, or there is a file in its place.
    """
    read: dict[tuple[int, int], str | os.PathLike] = {}
    for path in inputs:
        with contextlib.suppress(OSError, ValueError):
            if os.path.isdir(path):
                read.setdefault(_identity(path), path)
    real = Path(os.path.realpath(folder))
    there = [place for place in (real, *real.parents) if place.exists()]
    if there and not there[0].is_dir():
        raise ValueError(f"output: expected a folder at {folder}, got a file: {there[0]}")
    for place in there:
        if (found := read.get(_identity(place))) is not None:
            raise ValueError(f"output: expected a folder outside of {found}, which is read, got {folder}")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder for results, made with its parents. If the block fails, new empty folders are removed."""
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        for place in made:
            if place.exists() and not any(place.iterdir()):
                place.rmdir()
        raise


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


# -- memory
# ------------------------------------------------------------------------------------------------------------


class TooLarge(ValueError):
    """Something needs more memory than this machine has; the message names what, its need and the memory."""


def machine_memory(device: torch.device | str = "cpu") -> int:
    """The most bytes that this process can use: the memory of the GPU, or for a CPU the smallest of the
    machine's memory, the limit of its container and the limits of its shell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text()))
    with contextlib.suppress(ImportError):
        import resource

        for name in ("RLIMIT_AS", "RLIMIT_DATA"):
            soft = resource.getrlimit(getattr(resource, name))[0]
            limits += [] if soft == resource.RLIM_INFINITY else [soft]
    return min((limit for limit in limits if limit > 0), default=sys.maxsize)


def need_memory(what: str, needed: int, device: torch.device | str = "cpu") -> None:
    """Raise TooLarge if ``what`` needs more bytes than the machine or GPU has."""
    if needed > (there := machine_memory(device)):
        raise TooLarge(
            f"{what}: expected what fits into the {_gib(there)} GiB of this machine, got what needs "
            f"{_gib(needed)} GiB"
        )


def _gib(size):
    return f"{size / 2**30:.3g}" if size < 2**70 else "over 1e12"
