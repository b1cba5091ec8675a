"""Unreadable images: they are counted over all processes, named once, and limited in number."""

from __future__ import annotations

from coda_fast.train.errors import TrainingError
from coda_fast.train.setup import Setup
from coda_fast.train.state import State


def note_unreadable(setup: Setup, state: State, failures: list[tuple[str, str]]) -> None:
    """Add each process' ``failures``, (name, reason), to the state.

    Raises:
        TrainingError: there are more than ``data.max_corrupt``; raised in every process.
    """
    for failure in setup.agreement.gather(failures):
        for name, reason in failure:
            if name not in state.unreadable:
                state.unreadable[name] = reason
                setup.logger.say(f"skipped {name}: {reason}")
    if len(state.unreadable) > (limit := setup.recipe.data.max_corrupt):
        some = "; ".join(f"{name}: {reason}" for name, reason in list(state.unreadable.items())[-3:])
        raise TrainingError(
            f"data: expected at most {limit} images that cannot be read (data.max_corrupt), got "
            f"{len(state.unreadable)}: {some}; {state.last_good_in_words()}"
        )
