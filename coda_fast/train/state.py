"""The state of a run, other than weights, optimiser and schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch


@dataclasses.dataclass
class State:
    """The position of a run and its metrics so far.

    Attributes:
        epoch: the number of complete epochs.
        step: the number of complete steps of the current epoch.
        updates: the number of complete steps of all epochs.
        history: a row of metrics for each epoch.
        best: the highest ``score`` of the history.
        sums: for the current epoch, float64 [3]: loss x images, correct predictions, images.
        seconds: the duration of the steps of the current epoch.
        unreadable: the reason for each image that could not be read, by name.
        last_good: the newest checkpoint.
        saved_at: the time when that was written, by the monotonic clock.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    history: list[dict] = dataclasses.field(default_factory=list)
    best: float | None = None
    sums: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    seconds: float = 0.0
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    last_good: Path | None = None
    saved_at: float = 0.0

    def end_epoch(self, row: dict) -> bool:
        """Append the row of the epoch, and return whether it is the best so far."""
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append(row)
        found = score(row)
        if found is None or (self.best is not None and found <= self.best):
            return False
        self.best = found
        return True

    def last_good_in_words(self) -> str:
        """Text about the newest checkpoint, for errors that end a run."""
        if self.last_good is None:
            return "no checkpoint was written before"
        return f"the last good checkpoint is {self.last_good}"


def score(row: dict) -> float | None:
    """The score by which epochs are compared: the validation accuracy, that of the moving average if there is
    one.
    """
    return row.get("ema_val_accuracy", row.get("val_accuracy"))
