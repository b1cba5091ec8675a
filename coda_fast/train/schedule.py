"""Learning rates: the schedules of recipes, on timm's."""

from __future__ import annotations

import torch

from coda_fast.train.errors import TrainingError, need
from coda_fast.train.recipes import Recipe


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int):
    """A timm Scheduler of the recipe; ``steps``: optimiser steps of an epoch."""
    need("timm")
    from timm.scheduler import CosineLRScheduler, StepLRScheduler
    from timm.scheduler.scheduler import Scheduler

    spec = recipe.schedule
    if spec.kind == "step":
        return StepLRScheduler(optimizer, decay_t=spec.every, decay_rate=1 / spec.divisor)
    if spec.kind == "cosine":
        warmup, rate = round(spec.warmup * steps), recipe.learning_rate()
        if warmup >= recipe.epochs * steps:
            raise TrainingError(f"schedule.warmup: expected less than the {recipe.epochs * steps} steps of the run, got {warmup} of them")
        options = {"lr_min": spec.last * rate, "warmup_t": warmup, "warmup_lr_init": rate / warmup if warmup else 0.0}
        return CosineLRScheduler(optimizer, recipe.epochs * steps - warmup, warmup_prefix=True, t_in_epochs=False, **options)

    class Pieces(Scheduler):
        """Linear pieces of the learning rate; "constant" has none."""

        def _get_lr(self, t):
            for first, epochs, start, end in spec.pieces or ():
                if first <= t < first + epochs:
                    rate = start + (end - start) * (t - first) / max(1, epochs - 1)
                    return [rate * recipe.scale() for _ in self.base_values]
            return list(self.base_values)

    return Pieces(optimizer, "lr")


def set_rate(schedule, epoch: int, updates: int) -> float:
    """Set and return the learning rate of a step."""
    schedule.step(epoch)
    schedule.step_update(updates)
    return schedule.optimizer.param_groups[0]["lr"]
