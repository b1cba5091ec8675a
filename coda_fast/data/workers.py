"""Worker processes of torch's DataLoader that decode images, and end when the program does.

Two private attributes of torch's loader are used, ``_workers`` and ``_shutdown_workers``, because there is no
public way to see which worker was killed, or to end one that hangs in a read.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

PATIENCE = 2.0  # seconds that workers have to end before they are killed


def read(dataset: torch.utils.data.Dataset, workers: int, **options: Any) -> Iterator:
    """Iterate over a DataLoader of ``dataset`` with this number of worker processes and these ``options``.

    However the iteration ends, the workers end with it. torch alone would wait forever for a worker that
    hangs in a read, or that waits for a lock of a killed worker: it sends SIGTERM, which these workers ignore
    (``_ignore_signals``).

    Raises:
        ChildProcessError: a worker was killed.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_signals,
        prefetch_factor=4 if workers else None,
        **options,
    )
    results = iter(loader)
    children = list(getattr(results, "_workers", ()))  # a loader without workers has none
    with _DefaultChildHandler():
        try:
            while True:
                try:
                    decoded = next(results)
                except StopIteration:
                    return
                # the error that a killed worker causes depends on what it was doing
                except Exception:
                    _need_alive(children, patience=1.0)
                    raise
                yield decoded
        finally:
            if children:
                _end(results, children)


def _end(results, children):
    """End the workers as torch does, which also frees their shared memory, but kill those that have not ended
    after ``PATIENCE`` seconds; torch waits longer.
    """
    timer = threading.Timer(PATIENCE, lambda: [child.kill() for child in children])
    timer.daemon = True
    timer.start()
    results._shutdown_workers()
    timer.cancel()


def _need_alive(children, patience):
    """Raise a ChildProcessError if a worker was killed, or turns out to be within ``patience`` seconds."""
    end = time.monotonic() + patience
    while children:
        if killed := [child for child in children if child.exitcode not in (None, 0)]:
            code = killed[0].exitcode
            raise ChildProcessError(
                f"data: a process that reads images ended with code {code}, perhaps for want of memory "
                "(lower data.workers)"
            ) from None
        if time.monotonic() >= end:
            return
        time.sleep(0.05)


class _DefaultChildHandler:
    """A context with the system's default handling of SIGCHLD. torch's handler raises an error for every
    killed worker, wherever the program happens to be at that moment; the loader notices the death by itself
    within 5 s. Readers are counted, because they need not end in the order in which they began.
    """

    readers, replaced = 0, None

    def __enter__(self):
        # Python can set handlers in the main thread only.
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            if not _DefaultChildHandler.readers:
                _DefaultChildHandler.replaced = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _DefaultChildHandler.readers += 1

    def __exit__(self, *error):
        if self.in_main_thread:
            _DefaultChildHandler.readers -= 1
            if not _DefaultChildHandler.readers and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, _DefaultChildHandler.replaced)


def _unchanged(decoded):
    return decoded


def _ignore_signals(_):
    """Make a worker ignore signals that are sent to the whole process group. They are meant for the training
    process, which needs its workers to finish the step.
    """
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
