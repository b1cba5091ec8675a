"""Signals that stop a run. Lightning handles them in its Trainer, but not in Fabric."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any

from coda_fast.train.errors import SIGNALS


class Signals:
    """A context in which SIGTERM and SIGUSR1 set ``asked`` instead of ending the process."""

    def __enter__(self) -> Signals:
        self.asked = False
        self.replaced: dict[signal.Signals, Any] = {}
        for name in SIGNALS:
            with contextlib.suppress(ValueError):  # Python allows handlers in the main thread only
                self.replaced[name] = signal.signal(name, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *error: object) -> None:
        for name, handler in self.replaced.items():
            signal.signal(name, handler)
