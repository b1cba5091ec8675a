"""A run from start to end: processes, folder, set-up, the checkpoint to resume from, the loop. An error that
ends a run becomes a single message.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torch import distributed

from coda_fast.data.errors import DataError
from coda_fast.data.sources import seeded
from coda_fast.train import processes, random_state, resume
from coda_fast.train.agreement import Agreement
from coda_fast.train.errors import Stopped, TrainingError
from coda_fast.train.logger import Logger
from coda_fast.train.loop import Trainer
from coda_fast.train.run_folder import RunFolder
from coda_fast.train.schema import Recipe
from coda_fast.train.setup import set_up
from coda_fast.train.state import State
from coda_fast.train.unreadable import note_unreadable


def run(recipe: Recipe, output: str | os.PathLike, resume: str | None = None, progress: bool = True) -> dict:
    """Train by ``recipe``, with results in the folder ``output``, in this process or as one of many
    (torchrun, SLURM).

    Args:
        recipe: what to train, on which data, and how.
        output: the folder of the run; it is made if it is missing.
        resume: None: a new run; "auto": resume from the newest readable checkpoint of the folder, or begin a
            new run if there is none; or a checkpoint to resume from.
        progress: whether rank zero shows a bar and messages.

    Returns:
        The last row of the history: losses, accuracies, images/s.

    Raises:
        TrainingError: the run cannot start or go on. Stopped: a signal stopped the run, which can be resumed
            from a checkpoint.
        ImportError: packages of the extra "train" are missing.
    """
    state = State()
    with processes.left_as_found(), _failures_in_words(state):
        return _run(recipe, Path(output), resume, progress, state)


def _run(recipe, output, resume_from, progress, state):
    fabric = processes.make_fabric(recipe)
    fabric.launch()
    agreement = Agreement(fabric, state)
    logger = Logger(recipe, output, progress, agreement.is_rank_zero)
    with RunFolder(output, logger.say) as folder:
        # All checks come before the first write into the folder.
        agreement.on_rank_zero(lambda: folder.check(recipe))
        start = resume.find(folder, resume_from, agreement)
        setup = set_up(recipe, output, agreement, logger, start)
        # Models may use the global generators, which get a different seed in each process.
        random_state.seed_all(seeded(recipe.seed, 1, agreement.process.rank))
        if start is not None:
            resume.restore(setup, state, *start)
            start = None  # free the content of the checkpoint, which is as large as model and optimiser
        note_unreadable(setup, state, setup.source.failures)
        agreement.on_rank_zero(lambda: resume.begin(folder, recipe, state))
        try:
            row = Trainer(setup, state).train()
        except KeyboardInterrupt:
            logger.say(f"interrupted; {state.last_good_in_words()}")
            raise
        fabric.barrier()
        return row


@contextlib.contextmanager
def _failures_in_words(state):
    """A context that turns errors into one-line messages, and reports those of this process to torchrun."""
    try:
        yield
    except Stopped:
        raise
    except DataError as error:
        processes.report(problem := TrainingError(str(error)))
        raise problem from None
    except OSError as error:  # of files other than checkpoints, and of worker processes
        processes.report(problem := TrainingError(f"{error}; {state.last_good_in_words()}"))
        raise problem from None
    except Exception as error:
        if (reason := processes.lost_connection(error)) is None:
            processes.report(error)
            raise
        known = f"; {state.last_good_in_words()}"
        if not distributed.is_initialized():
            raise TrainingError(f"processes: cannot begin to talk to each other: {reason}{known}") from None
        raise TrainingError(
            f"processes: lost connection; if another process ended, its message says why ({reason}){known}"
        ) from None
