"""What commands refuse before they do any work: outputs that are inputs, files that are none, sizes that
this machine cannot hold.
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

MOST_PIXELS = 89_478_485  # of an image: Pillow's own bound, a quarter of a GiB of colours at 24 bits


class NotAFile(ValueError):
    """A pipe, a socket, a device or a folder where a file is expected."""


# -- reading
# ------------------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file, open for reading. A pipe would block the program until somebody writes, a device may
    never end: neither is opened.

    Raises:
        NotAFile: it is something else. OSError: it is missing, or may not be read.
    """
    _need_regular(path, os.stat(path).st_mode)
    # between the two calls it may be replaced: a pipe that is opened so does not block
    opener = lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    file = open(path, "rb", opener=opener)  # noqa: SIM115
    try:
        _need_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def kind_of(mode: int) -> str:
    """What a mode of ``os.stat`` is, in words."""
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
    """``os.walk`` through links, in which a folder that links lead back to counts once."""
    seen = set()
    for folder, below, names in os.walk(root, onerror=onerror, followlinks=True):
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
        ValueError: not such a file, damaged, arrays of Python objects, a header that claims another size than
        the file holds, or arrays that this machine cannot hold. OSError: it is missing, or may not be read.
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
        except Exception as error:  # zipfile and NumPy raise whatever the damage leads them to
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: not an .npz file that NumPy can read ({reason})") from None


def _claimed_bytes(member):
    """By the header of an array: the size of its file; None where it is no array, or one whose size is not
    in the header.
    """
    try:
        version = np.lib.format.read_magic(member)
    except ValueError:
        return None
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read is None:
        return None
    shape, _, dtype = read(member)
    count = 1
    for length in shape:
        count *= int(length)
    return None if dtype.hasobject else member.tell() + count * dtype.itemsize


def printable(text: object) -> str:
    """For a terminal, a page or a log: names of files and of members may hold what moves the cursor, and
    bytes that are no text.
    """
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


# -- writing
# ------------------------------------------------------------------------------------------------------------


def check_outputs(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """ValueError where a file that will be written is one of those that are read, by whatever name or
    link, or is no file at all.
    """
    read = {}
    for path in inputs:
        with contextlib.suppress(OSError, ValueError):  # whoever reads it says what is wrong
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
        if not stat.S_ISREG(mode):  # os.replace would put a file in the place of a device
            raise ValueError(f"output: expected a file at {path}, got {kind_of(mode)}")


def check_output_folder(folder: str | os.PathLike, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """ValueError where results would go into a folder that is read, or below it, by whatever name or link;
    or a file is in the way.
    """
    read = {}
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
    """A folder for results, made with those above it. If the block fails, those made and empty go again."""
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
    """More than this machine can hold; the message says what, how much it needs and how much there is."""


def machine_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process can have at most: of the GPU; or of the machine, its container and the
    limits of its shell.
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
    """TooLarge where ``what`` needs more bytes than there are."""
    if needed > (there := machine_memory(device)):
        raise TooLarge(
            f"{what}: expected what fits into the {_gib(there)} GiB of this machine, got what needs "
            f"{_gib(needed)} GiB"
        )


def explanation_memory(model, height: int, width: int, classes: int = 1) -> int:
    """About how many bytes an explanation of ``classes`` classes of one image takes at most at a time."""
    from coda_fast.explain import _bytes_per_image

    parameter = next(model.parameters())
    fixed, each = _bytes_per_image(
        model, torch.empty(1, model.image_channels, height, width, dtype=parameter.dtype, device="meta")
    )
    results = 3 * 2 * model.image_channels * height * width * max(4, parameter.element_size())
    return fixed + each + (classes - 1) * results  # on their way back, classes take turns


def check_explainable(model, height: int, width: int, name: str, classes: int = 1) -> None:
    """TooLarge where an explanation of ``classes`` classes of an image of this size does not fit;
    ValueError where a kernel does not.
    """
    try:
        needed = explanation_memory(model, height, width, classes)
    except ValueError as error:
        raise ValueError(f"{name}: {width} x {height} pixels: {error}") from None
    need_memory(
        f"{name}: an explanation of {width} x {height} pixels", needed, next(model.parameters()).device
    )


def batch_within(model, height: int, width: int, most: int, classes: int = 1) -> int:
    """How many images, at most ``most``, the network may take at once within the budget of ``explain``; at
    least one.
    """
    from coda_fast.explain import MEMORY_BUDGET

    return max(1, min(most, MEMORY_BUDGET // max(1, explanation_memory(model, height, width, classes))))


def _gib(size):
    return f"{size / 2**30:.3g}" if size < 2**70 else "over 1e12"
