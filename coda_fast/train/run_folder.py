"""The folder of a run: the run reads no data from it, and no other run writes to it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from coda_fast import safety
from coda_fast._files import atomic_path
from coda_fast.train import weights
from coda_fast.train.errors import FILES, TrainingError
from coda_fast.train.schema import Recipe

PATIENCE = 100.0  # seconds; an NFS server keeps the locks of a lost host for 90 s
# the errors that file systems without locks give
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class RunFolder(contextlib.ExitStack):
    """The folder of a run, locked from the call of ``lock`` to the end of the context. ``say`` is called with
    messages.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        super().__init__()
        self.path, self.checkpoints, self.say, self.is_locked = path, path / "checkpoints", say, False

    def check(self, recipe: Recipe) -> None:
        """Raise a TrainingError if the run would write into its own data, or over its weights."""
        data = recipe.data
        read: list[str | Path] = [path for path in (data.path, data.val_path) if path is not None]
        if recipe.model.weights is not None:
            read.append(weights.find(recipe.model.weights))
        classes = []
        if data.kind == "folder" and data.path is not None:
            classes = [os.path.join(data.path, "train"), data.val_path or os.path.join(data.path, "val")]
        try:
            safety.check_output_folder(self.path, classes)
            safety.check_outputs([self.path / name for name in FILES], read)
        except ValueError as error:
            raise TrainingError(str(error)) from None

    def lock(self) -> None:
        """Make the folder and lock it; further calls do nothing. The lock is a file, because runs may be on
        hosts that share nothing but the file system. If the file system has no locks, a message says so.

        Raises:
            TrainingError: the folder cannot be written to, or another process trains there.
        """
        if self.is_locked:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise TrainingError(
                f"{self.path}: expected a folder that can be written to (--output): {error.strerror}"
            ) from None
        self.is_locked = True

    def _lock(self):
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:  # the lock of a killed run may remain for a while
                self.say(f"waiting up to {PATIENCE:.0f} s for the run that holds {self.path}")
                lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise TrainingError(
                f"{self.path}: another process trains there; choose another folder (--output), or remove "
                f"{lock.lock_file} if there is none"
            ) from None
        except (NotImplementedError, OSError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            self.say(f"{self.path} cannot be locked: see to it that no other run writes there")
        self.callback(lock.release)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.yaml, with all values."""
        with atomic_path(self.path / "recipe.yaml") as temporary:
            temporary.write_text(recipe.to_yaml(), encoding="utf-8")
