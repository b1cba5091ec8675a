"""Checkpoints of a run: one file of torch.save each, written whole or not at all, read with
``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from coda_fast._version import __version__
from coda_fast.checkpoints import atomic_path
from coda_fast.train.errors import TrainingError

FORMAT = "coda_fast.train"
PATIENCE = 100.0  # seconds; servers of NFS keep locks of a host that was lost for 90
# what file systems without locks say
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_NAME = re.compile(r"epoch_(\d+)_step_(\d+)\.pt")
_KEYS = {
    "recipe": dict,
    "data": dict,
    "world": int,
    "epoch": int,
    "step": int,
    "updates": int,
    "model": dict,
    "ema": (dict, type(None)),
    "optimizer": dict,
    "schedule": dict,
    "rng": list,
    "history": list,
    "best": (int, float, type(None)),
    "bad": dict,
    "seconds": (int, float),
    "sums": (torch.Tensor, type(None)),
}


def write(path: Path, state: dict, last_good: Path | None) -> None:
    """Write, sync, rename, sync the folder. TrainingError (disk full ...) leaves everything as it was and
    names the last good one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": __version__, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer wraps what the system says
        reason = next(
            (str(e) for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)),
            str(error).split("\n")[0],
        )
        raise TrainingError(f"cannot write the checkpoint {path}: {reason}; {named(last_good)}") from None


def sync_folder(folder: Path) -> None:
    """So that a rename survives a loss of power."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def named(last_good: Path | None) -> str:
    return (
        "no checkpoint was written before"
        if last_good is None
        else f"the last good checkpoint is {last_good}"
    )


def read(path: str | os.PathLike) -> dict:
    """A checkpoint, on the CPU. TrainingError: missing, truncated, or of something else."""
    path = Path(path)
    if not path.exists():
        raise TrainingError(f"{path}: no such checkpoint")
    if not path.is_file():
        raise TrainingError(f"{path}: expected a checkpoint file or 'auto', got a folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch's own message advises to read it without weights_only, which could run any code
    except pickle.UnpicklingError:
        raise TrainingError(f"{path}: not a readable checkpoint (truncated, or of another program)") from None
    except Exception as error:  # damage leads to any exception
        reason = str(error).split("\n")[0] or type(error).__name__
        raise TrainingError(
            f"{path}: not a readable checkpoint (truncated, or of another program): {reason[:200]}"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path}: expected a checkpoint of coda-fast train, got {_what(state)}")
    if missing := sorted(_KEYS.keys() - state.keys()):
        raise TrainingError(
            f"{path}: a checkpoint of coda-fast train {state.get('version')} without {', '.join(missing)}"
        )
    if odd := [
        key
        for key, kind in _KEYS.items()
        if not isinstance(state[key], kind) or (kind is int and state[key] < 0)
    ]:
        raise TrainingError(
            f"{path}: not a readable checkpoint: {odd[0]} is a {type(state[odd[0]]).__name__} that cannot be"
        )
    if not all(isinstance(row, dict) for row in state["history"]):
        raise TrainingError(f"{path}: not a readable checkpoint: history: expected rows")
    return state


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest position first."""
    return sorted(
        (path for path in Path(folder).glob("*.pt") if _NAME.fullmatch(path.name)), key=position, reverse=True
    )


def epoch_of(path: Path) -> int | None:
    """How far a checkpoint of any name is; None: it cannot be read."""
    try:
        return read(path)["epoch"]
    except TrainingError:
        return None


def position(path: Path) -> tuple[int, int]:
    """Epoch and step of the checkpoint of this name."""
    epoch, step = _NAME.fullmatch(path.name).groups()
    return int(epoch), int(step)


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest readable one; others are named to ``warn``. TrainingError where there are some and none can
    be read: a run that silently began anew would write over them.
    """
    there = listed(folder)
    best = Path(folder) / "best.pt"
    for path in [*there, *([best] if best.exists() else [])]:
        try:
            state = read(path)
        except TrainingError as error:
            warn(f"skipped {error}")
            continue
        # later ones were taken away
        if best.exists() and not best.samefile(path) and (epoch_of(best) or 0) > state["epoch"]:
            return best, read(best)
        return path, state
    if there:
        raise TrainingError(
            f"{folder}: none of the {len(there)} checkpoints can be read; move them away to begin anew"
        )
    return None


def path_for(folder: Path, epoch: int, step: int) -> Path:
    return Path(folder) / f"epoch_{epoch:04d}_step_{step:07d}.pt"


def link_best(path: Path, best: Path) -> None:
    """``best`` becomes another name of ``path`` (a copy where the file system has no links)."""
    import shutil

    with atomic_path(best) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


@contextlib.contextmanager
def locked(output: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold the folder of a run. What was just killed may hold it for some time more: PATIENCE.

    Raises:
        TrainingError: another process trains there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(output / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting up to {PATIENCE:.0f} s for the run that holds {output}")
            lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise TrainingError(
            f"{output}: another process trains there; choose another folder (--output), or remove "
            f"{lock.lock_file} if there is none"
        ) from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
            raise
        say(f"{output} cannot be locked: see to it that no other run writes there")
    try:
        yield True
    finally:
        lock.release()


def prune(written: Path, keep: int) -> None:
    """Only ``written`` and those before it, ``keep`` in all, stay (and ``best.pt``, and those after it, which
    could not be read and are not counted); what an interrupted writer left goes.
    """
    for path in [path for path in listed(written.parent) if position(path) <= position(written)][keep:]:
        path.unlink(missing_ok=True)
    for path in written.parent.glob(".writing-*"):
        path.unlink(missing_ok=True)


def seed_all(seed: int) -> None:
    """All global generators of this process."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict:
    """Of all global generators of this process, as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(gauss)],
    }
    state["python"] = [version, list(numbers), next_gauss]
    state["cuda"] = (
        torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )
    return state


def set_rng_state(state: dict) -> None:
    """What ``rng_state`` gave."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers), next_gauss))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _what(state):
    if isinstance(state, dict):
        return f"a file with {', '.join(map(repr, list(state)[:4]))}"
    return type(state).__name__
