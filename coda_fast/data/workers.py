"""Processes that read and decode images: torch's, which end when the program does."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import torch

PATIENCE = 2.0  # seconds that workers have to end


def read(dataset: torch.utils.data.Dataset, workers: int, **options) -> Iterator:
    """What a torch loader of ``dataset`` gives, with its ``options``, by as many worker processes. However it
    ends, they end with it: torch ends them by a signal that ours ignore (``_quiet``), so that the program
    would for ever wait for one that waits itself, for a file, or for a lock of one that was killed.

    Raises:
        ChildProcessError: a worker was killed.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_quiet,
        prefetch_factor=4 if workers else None,
        **options,
    )
    results = iter(loader)
    # of a loader with workers, which has no public name for them
    children = list(getattr(results, "_workers", ()))
    with _DeafToChildren():
        try:
            while True:
                try:
                    decoded = next(results)
                except StopIteration:
                    return
                # an end of file, say, or torch's own error: depends on what the worker was at
                except Exception:
                    _need_alive(children, patience=1.0)
                    raise
                yield decoded
        finally:
            if children:
                _end(results, children)


def _end(results, children):
    """As torch ends them, so that they leave nothing behind; who has not gone after PATIENCE (torch waits
    longer) is killed.
    """
    impatience = threading.Timer(PATIENCE, lambda: [child.kill() for child in children])
    impatience.daemon = True
    impatience.start()
    results._shutdown_workers()
    impatience.cancel()


def _need_alive(children, patience):
    """ChildProcessError if one was killed, or turns out to be within ``patience`` seconds."""
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


class _DeafToChildren:
    """For every worker that is killed torch raises an error in whatever the program is at then; its loader
    sees it too, within 5 s. Deaf as long as anything is read: loaders need not end in the order in which they
    began.
    """

    readers, handler = 0, None

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()  # elsewhere Python has no handlers
        if self.main:
            if not _DeafToChildren.readers:
                _DeafToChildren.handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _DeafToChildren.readers += 1

    def __exit__(self, *error):
        if self.main:
            _DeafToChildren.readers -= 1
            if not _DeafToChildren.readers and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, _DeafToChildren.handler)


def _as_it_is(decoded):
    return decoded


def _quiet(_):
    """The signals that tell a process group to end are for the process that trains, which needs its
    workers to finish the step.
    """
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
