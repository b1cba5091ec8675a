"""Writing files whole or not at all, and reading safetensors files from untrusted sources."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coda_fast.safety import NotAFile, kind_of, open_file, printable


class CheckpointError(ValueError):
    """A file or state dict that is not a usable checkpoint; the message names what was expected and what
    was found.
    """


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it if the block succeeds and is deleted if it fails.
    It does not wait for the disk: a caller whose file must survive a power failure calls ``os.fsync``.

    Raises:
        OSError: ``path`` exists and is not a regular file (a folder, a pipe, a device), or the file cannot be
            written.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(mode := path.stat().st_mode):
            raise OSError(errno.EEXIST, f"expected a file or nothing, got {kind_of(mode)}", str(path))
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    except OSError as error:  # users know the file, not the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # a user expects the usual permissions, not mkstemp's 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def regular_file(path, kind="checkpoint") -> Iterator:
    """A regular file, open for reading."""
    try:
        file = open_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such {kind}") from None
    except ValueError as error:  # NotAFile, or a name with a zero byte
        raise CheckpointError(
            str(error) if isinstance(error, NotAFile) else f"{path!r}: expected the name of a file: {error}"
        ) from None
    with file:
        yield file


@contextlib.contextmanager
def opened(path, device="cpu", kind="checkpoint") -> Iterator:
    """An open safetensors file, whose header has been checked against the length of the file."""
    safetensors = require_safetensors()
    with regular_file(path, kind) as file:
        zipped = file.read(2) == b"PK"  # as files of torch.save begin
    try:
        opened = safetensors.safe_open(path, framework="pt", device=str(device))
    except Exception as error:  # safetensors raises bare exceptions of its own
        hint = "; of a checkpoint of coda-fast train, take the model.safetensors of its run" if zipped else ""
        raise CheckpointError(f"{path}: not a safetensors file: {one_line(error)}{hint}") from None
    with opened as file:
        yield file


def one_line(error):
    """Another library's message as one line of at most 300 characters, without control characters."""
    text = " ".join(printable(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def some(values):
    """The first five entries of a list as text, each cut to at most 80 characters."""
    shown = [text if len(text := repr(value)) <= 80 else f"{text[:77]}..." for value in values[:5]]
    return f"[{', '.join(shown)}{', ...' * (len(values) > 5)}]"


def several(problems):
    return "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")


def require_safetensors():
    """The safetensors module, or an ImportError that says what to install."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "checkpoints need safetensors: pip install 'coda-fast[cli]' or pip install safetensors"
        ) from None
    return safetensors
