"""The loop over epochs and steps, which can stop after any step and be resumed there.

A step is one optimiser update over ``recipe.batch_size`` images. Each process computes its slice in
micro-batches of equal size, so that the mean over processes and micro-batches is the mean over the global
batch. Processes communicate for the gradient, and every ``log.every`` steps (or every ``HEARTBEAT`` seconds
if steps are slow) with one sum of metrics. It also contains what all processes must know: whether a signal
asks to stop, a checkpoint is due, or images could not be read.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from coda_fast.compile import compile_for
from coda_fast.data.sources import Batch, seeded, to_float
from coda_fast.train import checkpoints, evaluation, results
from coda_fast.train.agreement import Heartbeat
from coda_fast.train.augmentation import augment, draw_flips
from coda_fast.train.errors import Stopped, TrainingError
from coda_fast.train.logger import STEP_FIELDS
from coda_fast.train.optimization import set_rate
from coda_fast.train.setup import Setup
from coda_fast.train.signals import Signals
from coda_fast.train.state import State
from coda_fast.train.unreadable import note_unreadable


class Message(NamedTuple):
    """Sums over the processes: metrics since the last row, requests (positive if any process makes one), and
    ``waited``, the seconds since the last message by the clock of rank zero.
    """

    losses: float
    correct: float
    images: float
    penalties: float
    steps: float
    failures: float
    stop: float
    save: float
    waited: float


class Trainer:
    """Trains a ``Setup``, beginning at a ``State``."""

    def __init__(self, setup: Setup, state: State):
        self.setup, self.state, self.signals = setup, state, Signals()
        self.fabric, self.agreement = setup.agreement.fabric, setup.agreement
        self.is_compiled = False

    def train(self) -> dict:
        """Train for the remaining epochs and write the resulting files. Returns the last row of the history.

        Raises:
            Stopped: a signal stopped the run. TrainingError: the run cannot go on.
        """
        setup, state, epochs = self.setup, self.state, self.setup.recipe.epochs
        with self.signals, setup.logger.open(state.updates, setup.steps):
            state.saved_at = time.monotonic()
            if state.history and not state.step:
                self.agreement.on_rank_zero(self.show_if_missing)
            while state.epoch < epochs:
                row = self.train_epoch()
                if self.evaluates():
                    row |= evaluation.evaluate(setup, state, self.signals)
                is_best = state.end_epoch(row | {"unreadable": len(state.unreadable)})
                checkpoints.save(setup, state, is_best)
                self.agreement.on_rank_zero(self.show)
                if self.agreement.any(self.signals.asked) and state.epoch < epochs:
                    raise Stopped(state.last_good)
            self.agreement.on_rank_zero(
                lambda: setup.logger.finish(state.history, results.write_models(setup, state))
            )
        return state.history[-1]

    def evaluates(self) -> bool:
        """Whether the current epoch ends with an evaluation."""
        recipe, epoch = self.setup.recipe, self.state.epoch + 1
        return epoch % recipe.evaluation.every == 0 or epoch == recipe.epochs

    def train_epoch(self) -> dict:
        """Train for the remaining steps of the current epoch. Returns the row of the epoch."""
        setup, state, recipe = self.setup, self.state, self.setup.recipe
        setup.module.train()
        if state.step == 0:
            state.sums, state.seconds = torch.zeros(3, dtype=torch.float64), 0.0
        # If the epoch has no step left, the row still needs the rate of the last one.
        self.rate = set_rate(setup.schedule, state.epoch, state.updates - (state.step > 0))
        if state.step < setup.steps:
            position = recipe.seed, state.epoch, state.step
            batches = setup.source.train.training(*position, recipe.batch_size, setup.process)
            with contextlib.closing(batches):
                self.train_steps(batches)
        loss, correct, images = state.sums.tolist()
        if not images:
            raise TrainingError(
                f"data: expected training images, could read none of them; {state.last_good_in_words()}"
            )
        return {
            "epoch": state.epoch + 1,
            "updates": state.updates,
            "learning_rate": self.rate,
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "images_per_second": setup.steps * recipe.batch_size / max(state.seconds, 1e-9),
            "unreadable": len(state.unreadable),
        }

    def train_steps(self, batches: Iterator[Batch]) -> None:
        """Train to the end of the epoch, and exchange messages with the other processes."""
        setup, state, recipe = self.setup, self.state, self.setup.recipe
        every, heartbeat, failures = recipe.checkpoint.every_steps, Heartbeat(), []
        sums, begun = torch.zeros(5, dtype=setup.sum_dtype, device=setup.device), heartbeat.last
        for batch in batches:
            self.rate = set_rate(setup.schedule, state.epoch, state.updates)
            sums += self.step(batch)
            failures += batch.failures
            state.step, state.updates = state.step + 1, state.updates + 1
            is_last = state.step == setup.steps
            save = bool(every) and state.updates % every == 0
            row_is_due = is_last or save or state.step % recipe.log.every == 0
            if not (heartbeat.is_due() or row_is_due):
                continue
            message = self.exchange(sums, len(failures), is_last, heartbeat)
            if message.failures:
                note_unreadable(setup, state, failures)
                failures = []
            if not (row_is_due or message.stop or message.save):
                continue
            now = time.perf_counter()
            self.log(message, now - begun)
            begun = now
            sums.zero_()
            if message.stop or message.save or (save and not is_last):
                checkpoints.save(setup, state)
                if message.stop:
                    raise Stopped(state.last_good)

    def exchange(self, sums: torch.Tensor, failures: int, is_last: bool, heartbeat: Heartbeat) -> Message:
        """Sum metrics and requests over the processes, in one operation."""
        is_zero = self.agreement.is_rank_zero
        asked = [
            failures,
            self.signals.asked,
            is_zero and self.checkpoint_is_due(is_last),
            is_zero and heartbeat.waited(),
        ]
        message = torch.cat([sums, sums.new_tensor([float(number) for number in asked])])
        message = Message(*self.agreement.sum(message).tolist())
        heartbeat.restart(message.waited)
        return message

    def log(self, message: Message, seconds: float) -> None:
        """Add the metrics since the last row to the epoch, and write the row."""
        state = self.state
        steps = round(message.steps / self.setup.process.world_size)
        loss = message.losses / max(1, message.images) + message.penalties / max(1, message.steps)
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss: expected a finite number, got {loss} in epoch {state.epoch + 1} between steps "
                f"{state.step - steps} and {state.step} (learning rate {self.rate:.3g}; try a lower one, or "
                f"optimizer.clip=1; {self.setup.objective.weights_in_words()}); "
                f"{state.last_good_in_words()}"
            )
        sums = [loss * message.images, message.correct, message.images]
        state.sums += torch.tensor(sums, dtype=torch.float64)
        state.seconds += seconds
        if self.agreement.is_rank_zero:
            accuracy = message.correct / max(1, message.images)
            speed = steps * self.setup.recipe.batch_size / max(seconds, 1e-9)
            row = state.epoch + 1, state.step, state.updates, loss, accuracy, self.rate, speed
            self.setup.logger.step(dict(zip(STEP_FIELDS, row, strict=True)))

    def checkpoint_is_due(self, is_last: bool) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed, or an evaluation comes next and the last
        checkpoint is older than a minute.
        """
        minutes, passed = self.setup.recipe.checkpoint.every_minutes, time.monotonic() - self.state.saved_at
        return passed > 60 * minutes > 0 or (is_last and passed > 60 and self.evaluates())

    def step(self, batch: Batch) -> torch.Tensor:
        """Make one optimiser update. Returns sums on the device, [5]: losses, correct predictions, readable
        images, penalties, and 1 for the step.
        """
        setup, state, recipe = self.setup, self.state, self.setup.recipe
        batch = batch.to(setup.device)
        generator = torch.Generator().manual_seed(seeded(recipe.seed, state.epoch, state.step))
        if recipe.data.cache is None:
            images = setup.inputs(augment(batch.images, recipe.data, generator, setup.process))
        else:
            images = setup.inputs(batch.images)
            if recipe.data.flip:  # drawn already, but the generator must go on behind them
                draw_flips(recipe.batch_size, generator)
        if not self.is_compiled:
            self.compile_ahead(images)
        rows = setup.objective.draw_rows(batch.labels, generator, setup.process)
        parts = setup.local_batch // setup.micro_batch
        sums = torch.zeros(4, dtype=setup.sum_dtype, device=setup.device)
        for part in range(parts):
            some = slice(part * setup.micro_batch, (part + 1) * setup.micro_batch)
            labels, valid = batch.labels[some], None if batch.valid is None else batch.valid[some]
            with self.fabric.no_backward_sync(setup.module, enabled=part < parts - 1):
                logits, losses, penalty = setup.module(
                    images[some], labels, None if rows is None else rows[some], valid
                )
                # an unreadable image is black and has weight zero
                losses = losses if valid is None else losses * valid
                self.fabric.backward((losses.mean() + penalty) / parts)
            correct = logits.detach().argmax(1) == labels
            read = torch.ones_like(correct) if valid is None else valid
            found = losses.detach().sum(), (correct & read).sum(), read.sum(), penalty.detach() / parts
            sums = sums + torch.stack([number.to(setup.sum_dtype) for number in found])
        if recipe.optimizer.clip:
            clip = dict(max_norm=recipe.optimizer.clip, error_if_nonfinite=False)
            self.fabric.clip_gradients(setup.module, setup.optimizer, **clip)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        if setup.ema is not None:
            setup.ema.update(setup.objective, state.updates)
        return torch.cat([sums, sums.new_ones(1)])

    def compile_ahead(self, images: torch.Tensor) -> None:
        """Compile the fused kernels of the network in parallel, once on each host; the first step would
        compile them one after the other.
        """
        self.is_compiled = True
        # A sharded network cannot be compiled here, because each process has only a part of the weights.
        if self.setup.device.type != "cuda" or self.setup.is_sharded:
            return
        if self.fabric.local_rank == 0:
            objective, begun = self.setup.objective, time.perf_counter()
            dtype = torch.bfloat16 if objective.autocast else self.setup.dtype
            try:
                if count := compile_for(objective.network, images, dtype, ("training", "inference")):
                    seconds = time.perf_counter() - begun
                    self.setup.logger.say(f"{count} fused kernels compiled in {seconds:.0f} s")
            except RuntimeError as error:  # a step tries smaller tiles instead
                self.setup.logger.say(f"not compiled ahead: {error}")
        self.fabric.barrier()

    def show_if_missing(self) -> None:
        """Show the last epoch of a resumed run, if the run ended before showing it. Rank zero calls this."""
        if not self.setup.logger.shows(self.state.epoch):
            self.show()

    def show(self) -> None:
        """Show the epoch that has ended, and contribution maps by the weights of the last checkpoint. Rank
        zero calls this.
        """
        logger, source, model = self.setup.logger, self.setup.source, self.setup.whole_model
        logger.epoch(self.state.history)
        if model is not None and logger.maps_are_due(self.state.epoch):
            sample = source.val.sample(self.setup.recipe.log.maps).to(self.setup.device)
            images = to_float(sample.images, self.setup.dtype)
            position = self.state.epoch, self.state.updates
            logger.maps(model, images, sample.labels, *position)
