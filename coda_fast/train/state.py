"""Where a run stands, beside its weights: what changes from step to step, and what checkpoints keep of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch


@dataclasses.dataclass
class State:
    """The position of a run, in epochs and steps that are complete, and what it has measured.

    Attributes:
        updates: steps of all epochs.
        history: a row of metrics for each epoch.
        best: the highest score (``score``) of the history.
        sums: of the present epoch, float64 [3]: loss x images, correct answers, images.
        seconds: that the steps of the present epoch took.
        unreadable: images that could not be read, and why.
        last_good: the newest checkpoint; ``saved_at``: when it was written, on the monotonic clock.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    history: list[dict] = dataclasses.field(default_factory=list)
    best: float | None = None
    sums: torch.Tensor | None = None
    seconds: float = 0.0
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    last_good: Path | None = None
    saved_at: float = 0.0

    def end_epoch(self, row: dict) -> bool:
        """Append the row of the epoch; whether it is the best so far."""
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append(row)
        is_best = score(row) is not None and (self.best is None or score(row) > self.best)
        if is_best:
            self.best = score(row)
        return is_best

    def last_good_in_words(self) -> str:
        """For messages about what ends a run."""
        if self.last_good is None:
            return "no checkpoint was written before"
        return f"the last good checkpoint is {self.last_good}"


def score(row: dict) -> float | None:
    """By what an epoch is the best: the validation accuracy, of the moving average if there is one."""
    return row.get("ema_val_accuracy", row.get("val_accuracy"))
