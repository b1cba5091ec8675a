"""Checkpoints of a run: each is one file of torch.save, which is written whole or not at all and read with
``weights_only=True``. Fabric's own checkpoints would be left half written by a full disk or a killed process.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from coda_fast._files import atomic_path
from coda_fast._version import __version__
from coda_fast.models import CoDANet
from coda_fast.train import random_state
from coda_fast.train.errors import TrainingError
from coda_fast.train.setup import Setup
from coda_fast.train.state import State, score

FORMAT = "coda_fast.train"
_NAME = re.compile(r"epoch_(\d+)_step_(\d+)\.pt")
_KEYS: dict[str, type | tuple[type, ...]] = {
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
    "origin": (dict, type(None)),
}
_ORIGIN = {"name": str, "sha256": str, "network": str, "config": dict}  # made by weights.Weights.origin


def save(setup: Setup, state: State, is_best: bool = False) -> None:
    """Write a checkpoint. All processes take part; rank zero writes."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = get_model_state_dict(setup.objective, options=whole)
    ema = get_model_state_dict(setup.ema.module, options=whole) if setup.ema is not None else None
    optimizer = get_optimizer_state_dict(setup.objective, setup.optimizer.optimizer, options=whole)
    random_states = setup.agreement.gather(random_state.get_state())

    def write():
        if broken := next((name for name, t in model.items() if not torch.isfinite(t).all()), None):
            raise TrainingError(
                f"weights: expected finite numbers, got others in {broken}; {state.last_good_in_words()}"
            )
        path = setup.checkpoints / f"epoch_{state.epoch:04d}_step_{state.step:07d}.pt"
        content = {
            "recipe": setup.recipe.model_dump(mode="json"),
            "data": setup.facts,
            "world": setup.process.world_size,
            "epoch": state.epoch,
            "step": state.step,
            "updates": state.updates,
            "model": model,
            "ema": ema,
            "optimizer": optimizer,
            "schedule": setup.schedule.state_dict(),
            "rng": random_states,
            "history": state.history,
            "best": state.best,
            "sums": state.sums if state.step else None,
            "seconds": state.seconds,
            "bad": dict(state.unreadable),
            "origin": setup.origin,
        }
        _write(path, content, state)
        state.last_good = path
        if is_best:
            link_best(path, setup.checkpoints / "best.pt")
        prune(path, setup.recipe.checkpoint.keep)
        load_whole_model(setup, ema or model)
        return str(path)

    state.last_good = Path(setup.agreement.on_rank_zero(write))
    state.saved_at = time.monotonic()


def _write(path, content, state):
    """Write, sync, rename, sync the folder. If that fails (a full disk), no file changes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": __version__, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer wraps errors of the system
        causes = (error, error.__cause__, error.__context__)
        reason = next((str(e) for e in causes if isinstance(e, OSError)), str(error).split("\n")[0])
        raise TrainingError(
            f"cannot write the checkpoint {path}: {reason}; {state.last_good_in_words()}"
        ) from None


def _sync_folder(folder):
    """Make a rename survive a loss of power, on file systems that allow it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_whole_model(setup: Setup, weights: dict) -> CoDANet:
    """Load the weights of a checkpoint into ``setup.whole_model``, which is returned. Rank zero calls it."""
    model = setup.whole_model
    assert model is not None, "no rank but zero has the whole model"
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model


def read(path: str | os.PathLike) -> dict:
    """The content of a checkpoint, on the CPU; TrainingError if it is missing, damaged, or another kind of
    file.
    """
    path = Path(path)
    if not path.exists():
        raise TrainingError(f"{path}: no such checkpoint")
    if not path.is_file():
        raise TrainingError(f"{path}: expected a checkpoint file or 'auto', got a folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch's own message suggests reading it without weights_only, which could run any code
    except pickle.UnpicklingError:
        raise TrainingError(f"{path}: not a readable checkpoint (truncated, or of another program)") from None
    except Exception as error:  # a damaged file can raise any exception
        reason = str(error).split("\n")[0] or type(error).__name__
        raise TrainingError(
            f"{path}: not a readable checkpoint (truncated, or of another program): {reason[:200]}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainingError(f"{path}: expected a checkpoint of coda-fast train, got {_what(content)}")
    content.setdefault("origin", None)  # of a release whose runs could not start from weights
    if missing := sorted(_KEYS.keys() - content.keys()):
        raise TrainingError(
            f"{path}: a checkpoint of coda-fast train {content.get('version')} without {', '.join(missing)}"
        )
    for key, kind in _KEYS.items():
        value = content[key]
        if not isinstance(value, kind) or (kind is int and int(content[key]) < 0):
            raise TrainingError(
                f"{path}: not a readable checkpoint: {key} is a {type(value).__name__} that cannot be"
            )
    if not all(isinstance(row, dict) for row in content["history"]):
        raise TrainingError(f"{path}: not a readable checkpoint: history: expected rows")
    origin = content["origin"]
    if origin is not None and any(not isinstance(origin.get(key), kind) for key, kind in _ORIGIN.items()):
        raise TrainingError(f"{path}: not a readable checkpoint: origin: expected {', '.join(_ORIGIN)}")
    return content


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest position first."""
    return sorted(
        (path for path in Path(folder).glob("*.pt") if _NAME.fullmatch(path.name)), key=position, reverse=True
    )


def epoch_of(path: Path) -> int | None:
    """The epoch of a checkpoint, by its content; None if it cannot be read."""
    try:
        return read(path)["epoch"]
    except TrainingError:
        return None


def position(path: Path) -> tuple[int, int]:
    """Epoch and step of a checkpoint, by its name."""
    if (match := _NAME.fullmatch(path.name)) is None:
        raise ValueError(f"path: expected epoch_EPOCH_step_STEP.pt, got {path.name}")
    return int(match[1]), int(match[2])


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest readable checkpoint and its content; None if the folder has no checkpoints. ``warn`` is
    called with a message for each that cannot be read.

    Raises:
        TrainingError: there are checkpoints, but none can be read. A new run would overwrite them.
    """
    there = listed(folder)
    best = Path(folder) / "best.pt"
    for path in [*there, *([best] if best.exists() else [])]:
        try:
            content = read(path)
        except TrainingError as error:
            warn(f"skipped {error}")
            continue
        # The best checkpoint is later than this one if the checkpoints between them were removed.
        if best.exists() and not best.samefile(path) and (epoch_of(best) or 0) > content["epoch"]:
            return best, read(best)
        return path, content
    if there:
        raise TrainingError(
            f"{folder}: none of the {len(there)} checkpoints can be read; move them away to begin anew"
        )
    return None


def link_best(path: Path, best: Path) -> None:
    """Make ``best`` a hard link to ``path``, or a copy of it if the file system has no links."""
    import shutil

    with atomic_path(best) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def name_best(folder: Path, state: State) -> None:
    """Link best.pt to the best epoch of this run. The link is missing if a run ended before it was made, or
    is resumed in another folder.
    """
    best = folder / "best.pt"
    if state.best is None or state.last_good is None or read_best(best, state):
        return
    for path in (state.last_good, state.last_good.parent / "best.pt"):
        if read_best(path, state):
            folder.mkdir(parents=True, exist_ok=True)
            link_best(path, best)
            return


def read_best(path: Path, state: State) -> dict | None:
    """The content of the checkpoint if it is that of the best epoch in this run's history, else None."""
    try:
        found = read(path)
    except TrainingError:
        return None
    first = next(i for i, row in enumerate(state.history) if score(row) == state.best)
    return None if found["step"] or found["history"] != state.history[: first + 1] else found


def prune(written: Path, keep: int) -> None:
    """Delete checkpoints older than ``written``, so that ``keep`` remain including it, and temporary files of
    interrupted writers. ``best.pt`` stays, and so do later checkpoints, which could not be read when the run
    was resumed.
    """
    for path in [path for path in listed(written.parent) if position(path) <= position(written)][keep:]:
        path.unlink(missing_ok=True)
    for path in written.parent.glob(".writing-*"):
        path.unlink(missing_ok=True)


def _what(content):
    if isinstance(content, dict):
        return f"a file with {', '.join(map(repr, list(content)[:4]))}"
    return type(content).__name__
