"""A run from its start to its end: processes, folder, set-up, the checkpoint to go on from, the loop; and
what ends it, in one message.
"""

from __future__ import annotations

import contextlib
import gc
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
    """Train by ``recipe`` into the folder ``output``, in this process or as one of many (torchrun, SLURM).

    Args:
        resume: None: a new run; "auto": from the newest readable checkpoint of the folder, or new if there is
            none; or a file.
        progress: show a bar and messages (of rank zero).

    Returns:
        The last row of the history: losses, accuracies, images/s.

    Raises:
        TrainingError: anything that keeps the run from starting or going on. Stopped: a signal; the run
            stands in a checkpoint.
        ImportError: packages of the extra "train" are missing.
    """
    state = State()
    try:
        with _failures_in_words(state):
            return _run(recipe, Path(output), resume, progress, state)
    finally:
        if distributed.is_available() and distributed.is_initialized():
            # first what sharded modules hold of the process groups: at the end of the process, their threads
            # abort it
            gc.collect()
            distributed.destroy_process_group()


def _run(recipe, output, resume_from, progress, state):
    fabric = processes.make_fabric(recipe)
    fabric.launch()
    agreement = Agreement(fabric, state)
    logger = Logger(recipe, output, progress, agreement.is_rank_zero)
    with RunFolder(output, logger.say) as folder:
        # everything that can be refused is refused before the folder is written to
        agreement.on_rank_zero(lambda: folder.check(recipe))
        start = resume.find(folder, resume_from, agreement)
        setup = set_up(recipe, output, agreement, logger)
        # for models that draw from the global generators: others in each process
        random_state.seed_all(seeded(recipe.seed, 1, agreement.process.rank))
        if start is not None:
            resume.restore(setup, state, *start)
            start = None  # as large as optimiser and model: not for the whole run
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
    """What ends a run becomes an error of one line; torchrun is told where this process is the cause."""
    try:
        yield
    except Stopped:
        raise
    except DataError as error:
        processes.report(problem := TrainingError(str(error)))
        raise problem from None
    except OSError as error:  # of files beside the checkpoints, and of processes that decode
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
            f"processes: lost touch; if another one of this run ended, its message says why ({reason}){known}"
        ) from None
