"""Training steps within a time limit. The number of steps that fit is measured after the first ones."""

from __future__ import annotations

import collections
import json
import math
import time

import torch

from experiments.fast_training.images import TrainingProblem
from experiments.fast_training.judgement import accuracy
from experiments.fast_training.trainer import Trainer, batches_of, rate_of

MARGIN = 0.98  # share of the remaining time that steps may use, because evaluations need some of it


class Clock:
    """The number of planned steps: ``steps``, or as many as fit until ``finish`` (time.monotonic)."""

    def __init__(self, trainer: Trainer, finish: float, steps: int | None):
        self.trainer, self.finish, self.fixed = trainer, finish, steps is not None
        self.planned, self.first = steps or 1 << 40, trainer.done
        self.cut_off = False
        self.waiting = collections.deque()
        # the number of steps that are not timed, because they compile and allocate, and the start of the
        # timed ones
        self.uncounted, self.since = 0, time.monotonic()

    @property
    def passed(self) -> int:
        return self.trainer.done - self.first

    def after_step(self) -> float:
        """Update ``planned`` and ``cut_off``, and return the current time."""
        if self.trainer.cuda:  # the host is at most two steps ahead, so that it measures the time
            self.waiting.append(torch.cuda.Event())
            self.waiting[-1].record()
            if len(self.waiting) > 2:
                self.waiting.popleft().synchronize()
        now = time.monotonic()
        if self.passed == 5:
            self.uncounted, self.since = self.passed, now
        if not self.fixed and self.passed >= 25 and self.passed % 25 == 0:
            rate = (self.passed - self.uncounted) / max(now - self.since, 1e-9)
            self.planned = self.trainer.done + max(0, int(MARGIN * (self.finish - now) * rate))
        self.cut_off = not self.fixed and now >= self.finish
        return now

    def step_seconds(self) -> float:
        if self.trainer.cuda:
            torch.cuda.synchronize()
        return (time.monotonic() - self.since) / max(1, self.passed - self.uncounted)


def train(
    trainer: Trainer, recipe: dict, finish: float, *, steps: int | None, test, keep, every: float, say=print
) -> dict:
    """Train until ``finish`` (time.monotonic), or for exactly ``steps``. ``keep(trainer, row)`` is called
    every ``every`` seconds.
    """
    count, batch = len(trainer.images), trainer.batch
    if count < batch:
        raise TrainingProblem(f"--data: expected at least {batch} training images, a batch, got {count}")
    batches = batches_of(count, batch, recipe.get("seed", 0))
    drawn = lambda: next(batches)[1].to(trainer.device, non_blocking=True)
    epoch_steps = count // batch
    warmup = round(recipe["schedule"].get("warmup", 0) * epoch_steps)
    begun = time.monotonic()
    first = [drawn() for _ in range(3)] if trainer.cuda else []
    reason = trainer.capture(first, rate_of(recipe, batch, 0, 1 << 30, max(1, warmup)))
    took = time.monotonic() - begun
    say(f"steps one by one: {reason}" if reason else f"step captured in a CUDA graph ({took:.1f} s)")
    clock, history = Clock(trainer, finish, steps), []
    last = clock.since
    while trainer.done < clock.planned and not clock.cut_off:
        warm = min(warmup, clock.planned // 10)
        trainer.step(drawn(), rate_of(recipe, batch, trainer.done, clock.planned, warm))
        now = clock.after_step()
        if now - last >= every and not clock.cut_off:
            history.append(_row(trainer, epoch_steps, now - begun, test))
            keep(trainer, history[-1])
            say(json.dumps(history[-1]))
            last = time.monotonic()
            clock.since += last - now  # the time of an evaluation is not part of the time of a step
            if not math.isfinite(loss := history[-1]["train_loss"]):
                raise TrainingProblem(
                    f"loss: expected a finite number, got {loss} before step {trainer.done}"
                )
    seconds = clock.step_seconds()
    if not history or history[-1]["step"] != trainer.done:
        history.append(_row(trainer, epoch_steps, time.monotonic() - begun, test))
        say(json.dumps(history[-1]))
    return {
        "steps": trainer.done,
        "batch": batch,
        "images": count,
        "epochs": round(trainer.done / epoch_steps, 2),
        "step_ms": 1e3 * seconds,
        "captured": reason is None,
        "why_not_captured": reason,
        "cut_off": clock.cut_off,
        "parameters": sum(p.numel() for p in trainer.parameters),
        "history": history,
    }


def _row(trainer, epoch_steps, seconds, test):
    loss, correct, seen = trainer.sums.tolist()
    trainer.sums.zero_()
    row = {"seconds": round(seconds, 1), "step": trainer.done, "epoch": round(trainer.done / epoch_steps, 2)}
    row |= {"train_loss": loss / max(1, seen), "train_accuracy": correct / max(1, seen)}
    return row | {
        "test_accuracy": accuracy(trainer.averaged(torch.float32), *test, trainer.device, trainer.half)
    }
