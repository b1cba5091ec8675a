"""Signals that ask a run to stop. Lightning has handlers of them in its Trainer, not in Fabric."""

from __future__ import annotations

import contextlib
import signal

from coda_fast.train.errors import SIGNALS


class Signals:
    """A context in which SIGTERM and SIGUSR1 set ``asked`` instead of ending the process."""

    def __enter__(self):
        self.asked, self.replaced = False, {}
        for name in SIGNALS:
            with contextlib.suppress(ValueError):  # Python sets handlers in the main thread alone
                self.replaced[name] = signal.signal(name, self._note)
        return self

    def _note(self, number, frame):
        self.asked = True

    def __exit__(self, *error):
        for name, handler in self.replaced.items():
            signal.signal(name, handler)
