"""timm's optimisers and learning-rate schedules, as the recipe specifies them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from coda_fast.train.errors import TrainingError, need
from coda_fast.train.schema import Recipe

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler


def make_optimizer(recipe: Recipe, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The timm optimiser that the recipe names.

    Raises:
        TrainingError: timm has no such optimiser, it does not have these settings, or the loop cannot run it.
    """
    need("timm")
    from timm.optim import create_optimizer_v2, list_optimizers

    options = {
        "opt": recipe.optimizer.name,
        "lr": recipe.learning_rate(),
        "weight_decay": recipe.optimizer.weight_decay,
    }
    if recipe.optimizer.eps is not None:
        options["eps"] = recipe.optimizer.eps
    parameters, betas = list(parameters), recipe.optimizer.betas
    try:
        optimizer = create_optimizer_v2(parameters, **options)
        if betas is not None:
            own = optimizer.param_groups[0]
            if not any("beta" in key for key in own) or len(own.get("betas", betas)) != len(betas):
                expected = f"as many as {own['betas']}" if "betas" in own else "none"
                raise TrainingError(
                    f"optimizer.betas: expected {expected} for {recipe.optimizer.name!r}, got {betas}"
                )
            optimizer = create_optimizer_v2(parameters, **options, betas=betas)
    except TrainingError:
        raise
    except (ValueError, AssertionError, TypeError) as error:
        known = list_optimizers()
        if (name := recipe.optimizer.name.removeprefix("lookahead_")) not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or "adam, adamw, sgd"
            raise TrainingError(
                f"optimizer.name: expected one of timm.optim.list_optimizers() ({near}, ...), got {name!r}"
            ) from None
        raise TrainingError(f"optimizer: {error}") from None
    settings = [type(value).__name__ for group in optimizer.param_groups for value in group.values()]
    if "dtype" in settings or getattr(optimizer, "is_second_order", False):
        why = (
            "holds what torch cannot keep in a checkpoint"
            if "dtype" in settings
            else "needs second derivatives in every step"
        )
        raise TrainingError(f"optimizer.name: expected another one, {recipe.optimizer.name!r} {why}")
    return optimizer


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """The timm scheduler for the recipe; an epoch has ``steps`` optimiser steps.

    Raises:
        TrainingError: the warm-up is as long as the run.
    """
    need("timm")
    from timm.scheduler import CosineLRScheduler, StepLRScheduler
    from timm.scheduler.scheduler import Scheduler

    spec = recipe.schedule
    if spec.kind == "step":
        assert spec.divisor is not None, "checked by the schema"
        return StepLRScheduler(optimizer, decay_t=spec.every, decay_rate=1 / spec.divisor)
    if spec.kind == "cosine":
        warmup, rate = round(spec.warmup * steps), recipe.learning_rate()
        if warmup >= recipe.epochs * steps:
            raise TrainingError(
                f"schedule.warmup: expected less than the {recipe.epochs * steps} steps of the run, got "
                f"{warmup} of them"
            )
        options = {
            "lr_min": spec.last * rate,
            "warmup_t": warmup,
            "warmup_lr_init": rate / warmup if warmup else 0.0,
        }
        return CosineLRScheduler(
            optimizer, recipe.epochs * steps - warmup, warmup_prefix=True, t_in_epochs=False, **options
        )

    class Pieces(Scheduler):
        """A piecewise linear learning rate, for which timm has no scheduler; "constant" has no pieces."""

        def _get_lr(self, t):
            for first, epochs, start, end in spec.pieces or ():
                if first <= t < first + epochs:
                    rate = start + (end - start) * (t - first) / max(1, epochs - 1)
                    return [rate * recipe.scale() for _ in self.base_values]
            return list(self.base_values)

    return Pieces(optimizer, "lr")


def set_rate(schedule: Scheduler, epoch: int, updates: int) -> float:
    """Set the learning rate of a step, and return it."""
    schedule.step(epoch)
    schedule.step_update(updates)
    return schedule.optimizer.param_groups[0]["lr"]
