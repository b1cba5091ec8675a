"""The figure and the table that summarise the history of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coda_fast import plot
from coda_fast.train.schema import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve(history: list[dict], recipe: Recipe) -> Figure:
    """A figure of loss and accuracy against epochs."""
    figure = plot.new_figure(width=9, height=3.4)
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, label in (
            ("train", "training"),
            ("val", "validation"),
            ("ema_val", "validation, moving average"),
        ):
            rows = [row for row in history if f"{prefix}_{what}" in row]
            if rows:
                x, y = [row["epoch"] for row in rows], [row[f"{prefix}_{what}"] for row in rows]
                axes.plot(x, y, label=label, marker="o" if len(x) < 30 else None, markersize=3)
        axes.set(xlabel="epoch", ylabel="binary cross-entropy" if what == "loss" else "accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    own = recipe.model.out_channels  # a network with layers of its own is not the one that the recipe names
    network = recipe.model.name if own is None else f"layers of {', '.join(map(str, own))} channels"
    if recipe.model.weights is not None:
        network = f"started from {Path(recipe.model.weights).name}"
    title, families = plot.drawable(f"{recipe.name}: {network}, batch {recipe.batch_size}")
    figure.suptitle(title, fontsize=10, fontfamily=families, parse_math=False)  # names may contain dollars
    return figure


def summary(history: list[dict]) -> str:
    """A table of the best and the last epoch."""
    scored = [row for row in history if "val_accuracy" in row]
    best = max(scored, key=lambda row: row.get("ema_val_accuracy", row["val_accuracy"]), default=history[-1])
    columns = (
        "epoch",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "val_top5",
        "ema_val_accuracy",
        "images_per_second",
    )
    shown = [key for key in columns if key in history[-1]]
    cells = [["", *(key.replace("_", " ").replace(" per ", "/") for key in shown)]]
    for label, row in (("best", best), ("last", history[-1])):
        values = [row.get(key, "") for key in shown]
        cells.append(
            [label, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )
