"""The output of a run other than checkpoints: progress bar, messages, CSV files, TensorBoard, contribution
maps, and the summary at the end.

Files in the output folder: ``steps.csv`` (a row every ``log.every`` steps), ``metrics.csv`` (a row per
epoch), ``tensorboard/``, ``maps/epoch_0001.png``, ``curve.png``. A resumed run removes the rows of steps
after its checkpoint and appends its own.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from coda_fast import plot
from coda_fast._files import atomic_path
from coda_fast.models import CoDANet
from coda_fast.safety import printable
from coda_fast.train.errors import TrainingError, need
from coda_fast.train.schema import Recipe
from coda_fast.train.summary import curve, summary

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STEP_FIELDS = ("epoch", "step", "updates", "loss", "accuracy", "learning_rate", "images_per_second")


class Logger:
    """The logger of a process. Rank zero writes the files and, with ``progress``, shows the bar and messages;
    other ranks do neither.
    """

    def __init__(self, recipe: Recipe, folder: Path, progress: bool, is_rank_zero: bool):
        self.recipe, self.folder, self.is_rank_zero = recipe, folder, is_rank_zero
        self.shows_progress = progress and is_rank_zero
        self.bar: Any = None  # a tqdm
        self.board: SummaryWriter | None = None
        self.steps_file: TextIO | None = None

    def say(self, text: str) -> None:
        """Show a line of text above the bar."""
        if self.shows_progress:
            need("tqdm", "cli").tqdm.write(printable(text), file=sys.stderr)

    def reading(self, items: Iterable, label: str, total: int | None = None) -> Iterable:
        """Show a bar while ``items`` are read, before the first step."""
        return need("tqdm", "cli").tqdm(
            items, desc=label, total=total, disable=not self.shows_progress, leave=False
        )

    @contextlib.contextmanager
    def open(self, updates: int, steps: int) -> Iterator[None]:
        """A context in which files and bar are open. ``updates`` is the number of steps already done,
        ``steps`` the number in an epoch.
        """
        if not self.is_rank_zero:
            yield
            return
        images, hook = self.recipe.batch_size, threading.excepthook
        tqdm = need("tqdm", "cli").tqdm
        try:
            self._open_steps(updates)
            if self.recipe.log.tensorboard:
                need("tensorboard")
                from torch.utils.tensorboard import SummaryWriter

                threading.excepthook = functools.partial(_pass_on, hook)
                try:
                    self.board = SummaryWriter(self.folder / "tensorboard", purge_step=updates + 1)
                except OSError as error:
                    self._lose_board(error)
            total = self.recipe.epochs * steps * images
            self.bar = tqdm(
                total=total,
                initial=updates * images,
                unit="img",
                unit_scale=True,
                disable=not self.shows_progress,
                smoothing=0.1,
            )
            yield
        finally:
            for thing in (self.bar, self.steps_file):
                if thing is not None:
                    thing.close()
            self._on_board("close")
            threading.excepthook = hook

    def step(self, row: dict) -> None:
        """Write a row with the fields ``STEP_FIELDS``."""
        self.bar.set_description(f"epoch {row['epoch']}/{self.recipe.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}", refresh=False)
        self.bar.update(row["updates"] * self.recipe.batch_size - self.bar.n)
        self.rows.writerow({key: _short(row[key]) for key in STEP_FIELDS})
        if self.steps_file is not None:
            self.steps_file.flush()
        for key in ("loss", "accuracy", "learning_rate", "images_per_second"):
            self._on_board("add_scalar", f"step/{key}", row[key], row["updates"])

    def epoch(self, history: list[dict]) -> None:
        """Write the last row of the history, that of the epoch that has just ended."""
        self._write_metrics(history)
        row = history[-1]
        for key, value in row.items():
            if key not in ("epoch", "updates"):
                self._on_board("add_scalar", f"epoch/{key}", value, row["updates"])
        self._on_board("flush")
        found = [f"{label} {row[key]:.2%}" for key, label in _ACCURACIES.items() if key in row]
        self.say(
            f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, accuracy {', '.join(found)}, "
            f"{row['images_per_second']:.0f} images/s"
        )

    def _on_board(self, method, *arguments, **options):
        if self.board is None:
            return
        try:
            getattr(self.board, method)(*arguments, **options)
        except OSError as error:  # also errors of TensorBoard's thread, which a later call raises
            self._lose_board(error)

    def _lose_board(self, error):
        """Go on without TensorBoard, because steps.csv, metrics.csv and maps/ hold the same."""
        self.board = None  # not closed: its thread has ended, and closing would raise the error again
        self.say(
            f"TensorBoard: {self.folder / 'tensorboard'} cannot be written: {error.strerror or error}; the "
            "run goes on without it"
        )

    def maps_are_due(self, epoch: int) -> bool:
        """Whether maps are drawn after the epoch of this number."""
        log = self.recipe.log
        return bool(log.maps) and (epoch % log.maps_every == 0 or epoch == self.recipe.epochs)

    def shows(self, epoch: int) -> bool:
        """Whether the row of this epoch has been written, and its maps if they are due. A run may have ended
        after the checkpoint of an epoch and before these.
        """
        try:
            with open(self.folder / "metrics.csv", newline="", encoding="utf-8") as file:
                epochs = [row.get("epoch") for row in csv.DictReader(file)]
        except (OSError, ValueError):
            return False
        return str(epoch) in epochs and (not self.maps_are_due(epoch) or self._map(epoch).exists())

    def _map(self, epoch):
        return self.folder / "maps" / f"epoch_{epoch:04d}.png"

    def maps(
        self, model: CoDANet, images: torch.Tensor, labels: torch.Tensor, epoch: int, updates: int
    ) -> None:
        """Draw the contribution maps of ``images`` for their two most likely classes, after this epoch."""
        with torch.no_grad():
            classes = model(images).topk(min(2, model.num_classes)).indices
        figure = plot.explanation_figure(
            images, model.explain(images, classes), model.logit_bias, model.class_names, labels.tolist()
        )
        self._map(epoch).parent.mkdir(exist_ok=True)
        plot.save_figure(figure, self._map(epoch), dpi=100)
        self._on_board("add_figure", "maps", figure, updates, close=False)

    def finish(self, history: list[dict], written: list[Path]) -> None:
        """Draw the curve, and print the summary and the paths of the files ``written``."""
        self._write_metrics(history)
        plot.save_figure(curve(history, self.recipe), self.folder / "curve.png")
        if self.bar is not None:
            self.bar.close()
        if self.shows_progress:
            print(summary(history))
            print("\n".join(map(str, [*written, self.folder / "curve.png", self.folder / "metrics.csv"])))

    def _open_steps(self, updates):
        path, kept = self.folder / "steps.csv", []
        if path.exists():
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    kept = [
                        row
                        for row in csv.DictReader(file)
                        if None not in row.values() and int(row["updates"]) <= updates
                    ]
            except (KeyError, ValueError):
                raise TrainingError(
                    f"{path}: expected the steps of a run, found another file; move it away"
                ) from None
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, STEP_FIELDS)
            writer.writeheader()
            writer.writerows(kept)
        self.steps_file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open for the whole training
        self.rows = csv.DictWriter(self.steps_file, STEP_FIELDS)

    def _write_metrics(self, history):
        fields = list(dict.fromkeys(key for row in history for key in row))
        with (
            atomic_path(self.folder / "metrics.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows({key: _short(value) for key, value in row.items()} for row in history)


def _pass_on(hook, arguments):
    """Call ``hook`` for errors of all threads except TensorBoard's, which its next call raises."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        hook(arguments)


_ACCURACIES = {
    "train_accuracy": "training",
    "val_accuracy": "validation",
    "ema_val_accuracy": "moving average",
}


def _short(value):
    return f"{value:.9g}" if isinstance(value, float) else value
