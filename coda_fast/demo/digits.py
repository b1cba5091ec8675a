"""The two-minute demonstration: train small CoDA-Nets on real images, at a low and a high temperature, and
look inside.

It shows the paper's main finding: a higher temperature T makes the layers align more, so that contribution
maps locate the class better (grid pointing game) at equal accuracy. Data: the 1,797 scans of handwritten
digits that scikit-learn ships.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from coda_fast import checkpoints, plot
from coda_fast._version import __version__
from coda_fast.data.digits import Digits, digit_tensors
from coda_fast.evaluation.localisation import canvases, confident_images, draw_grids, localisation
from coda_fast.models import CoDANet, create_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data, digits = Digits, digit_tensors  # the names that examples use: demo.digits()
MODEL = "coda_xs_digits"
TEMPERATURES = (1.0, 40.0)
GRID = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """The paths of the files that the demonstration wrote, and its numbers."""

    figure: Path
    checkpoint: Path
    numbers_file: Path
    numbers: dict


def run(
    folder: str | os.PathLike, *, epochs: int = 30, seed: int = 0, progress: Callable | None = None
) -> Result:
    """Train at both ``TEMPERATURES``, evaluate, and write figure, checkpoint (of the higher T) and numbers
    into ``folder``.

    Args:
        epochs: passes over the 1,347 training images for each temperature.
        progress: called as ``progress(iterable, label)`` around the epochs, like tqdm; None: silent.

    Raises:
        ImportError: scikit-learn, matplotlib or safetensors is not installed. OSError: the folder cannot be
            written.
    """
    folder, data = Path(folder), digit_tensors(seed)
    plot.new_figure(1, 1), checkpoints.require_safetensors()  # a missing package fails before the work
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass  # and so does a folder that cannot be written
    models, rows = [], []
    for temperature in TEMPERATURES:
        torch.manual_seed(seed)
        model = create_model(MODEL, temperature=temperature, class_names=data.class_names)
        start = time.perf_counter()
        train(model, data, epochs=epochs, seed=seed, progress=progress)
        seconds = time.perf_counter() - start
        models.append(model)
        rows.append(
            {"temperature": temperature, "train_seconds": round(seconds, 1), **evaluate(model, data, seed)}
        )
    numbers = {
        "model": MODEL,
        "data": "scikit-learn digits, 8x8",
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "epochs": epochs,
        "seed": seed,
        "grid": f"{GRID}x{GRID}",
        "chance_localisation": 1 / GRID**2,
        "results": rows,
        "coda_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    result = Result(
        folder / "coda_demo.png", folder / "coda_demo.safetensors", folder / "coda_demo.json", numbers
    )
    plot.save_figure(figure(models, data, rows, seed), result.figure)
    checkpoints.save(models[-1], result.checkpoint, {"data": numbers["data"], **rows[-1]})
    with checkpoints.atomic_path(result.numbers_file) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    return result


def train(
    model: CoDANet, data: Digits, *, epochs: int, seed: int = 0, progress: Callable | None = None
) -> None:
    """Minimise binary cross-entropy with Adam, a cosine schedule and batches of 64."""
    batch, generator = 64, torch.Generator().manual_seed(seed)
    targets = F.one_hot(data.train_labels, model.num_classes).to(data.train_images.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = epochs * -(-len(targets) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    label = f"training at T = {model.temperature:g}"
    for _ in progress(range(epochs), label) if progress else range(epochs):
        for index in torch.randperm(len(targets), generator=generator).split(batch):
            loss = F.binary_cross_entropy_with_logits(model(data.train_images[index]), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def evaluate(model: CoDANet, data: Digits, seed: int = 0) -> dict:
    """Accuracy, the worst completeness error over all test images, and the localisation score."""
    explanation = model.explain(data.test_images)
    chosen = explanation.logits.gather(1, explanation.target)
    correct = explanation.target[:, 0] == data.test_labels
    score, grids = localisation_score(model, data, explanation.logits, seed)
    return {
        "accuracy": round(float(correct.double().mean()), 4),
        "completeness_error": float(explanation.completeness_error.max()),
        "relative_completeness_error": float(
            (explanation.completeness_error / chosen.abs().clamp_min(1)).max()
        ),
        "localisation": None if score is None else round(score, 4),
        "localisation_grids": grids,
    }


def localisation_score(
    model: nn.Module, data: Digits, logits: torch.Tensor, seed: int
) -> tuple[float | None, int]:
    """Mean score of the grid pointing game and the number of grids; (None, 0) if fewer than four classes
    have images that the model classifies confidently.
    """
    if len(confident_images(logits, data.test_labels)) < GRID**2:
        return None, 0
    found = localisation(
        model, data.test_images, data.test_labels, side=GRID, grids=100, seed=seed, logits=logits
    )
    return found.summary()["mean"], len(found.scores)


def score_text(score: float | None) -> str:
    """A localisation score as text."""
    return "unknown" if score is None else f"{score:.3f}"


def figure(models: list[CoDANet], data: Digits, rows: list[dict], seed: int) -> Figure:
    """Three test digits and one grid at both temperatures, each map with the proof that it is complete."""
    shown = torch.stack([torch.nonzero(data.test_labels == c).flatten()[0] for c in (3, 7, 0)])
    images = data.test_images[shown]
    cells = torch.from_numpy(
        draw_grids(
            {c: torch.nonzero(data.test_labels == c).flatten().tolist() for c in range(10)}, GRID**2, 1, seed
        )
    )
    grid, classes = canvases(data.test_images[cells], GRID), data.test_labels[cells]
    of_digits = [m.explain(images, m(images).topk(2).indices) for m in models]
    of_grid = [m.explain(grid, classes) for m in models]
    # logits differ in size between the networks, so each has one colour scale for all its maps
    scales = [
        plot.symmetric_scale(torch.cat((d.contribution_map.flatten(), g.contribution_map.flatten())))
        for d, g in zip(of_digits, of_grid, strict=True)
    ]
    page = plot.new_figure(width=11.5, height=2.55 * 5 + 1.0)
    axes = page.subplots(5, 5, squeeze=False)
    artists = _draw_digits(axes[:3], models, of_digits, scales, data.test_labels[shown])
    for row, model, explained, scale in zip(axes[3:], models, of_grid, scales, strict=True):
        _draw_grid(row, model, explained, scale, data.test_images.shape[2])
    for artist, model, below in zip(artists, models, (axes[-1, :2], axes[-1, 2:]), strict=True):
        label = f"contribution to the logit, per pixel, T = {model.temperature:g}"
        plot.colour_bar(page, artist, below, label, location="bottom")
    found = ";  ".join(
        f"T = {r['temperature']:g}: accuracy {r['accuracy']:.1%}, localisation "
        f"{score_text(r['localisation'])}"
        for r in rows
    )
    page.suptitle(
        f"{found}  (chance {1 / GRID**2:.2f}).  Red speaks for the class, blue against it.", fontsize=10
    )
    return page


def _draw_digits(axes, models, explanations, scales, labels):
    """Draw a row for each digit: the image, a map of the predicted class from both networks, one of the
    second class, and a weight. Return a matplotlib artist of one map of each network, for its colour bar.
    """
    artists = [None, None]
    for i, row in enumerate(axes):
        plot.show_image(row[0], explanations[0].images[i], f"scan of a {int(labels[i])}")
        for column, which, k in ((1, 0, 0), (2, 1, 0), (3, 1, 1)):
            model, explained = models[which], explanations[which]
            target = int(explained.target[i, k])
            why = "why" if k == 0 else "why not"
            sure = plot.probability(float(explained.logits[i, target].sigmoid()))
            title = f"T = {model.temperature:g}: {why} {target}  ({sure})"
            artists[which] = plot.show_map(
                row[column], explained.contribution_map[i, k], scales[which], title
            )
            row[column].set_xlabel(plot.proof(explained, i, k, model.logit_bias), fontsize=7)
        high = explanations[1]
        title = f"T = {models[1].temperature:g}: its weight for {int(high.target[i, 0])}"
        plot.show_weight(row[4], high.dynamic_weight[i, 0], high.contribution_map[i, 0], title)
    return artists


def _draw_grid(axes, model, explained, scale, size):
    """Draw an image of four digits, ``size`` pixels wide each, and where the network sees each of them."""
    plot.show_image(axes[0], explained.images[0], "four scans in one image")
    for k, panel in enumerate(axes[1:]):
        title = f"T = {model.temperature:g}: where is the {int(explained.target[0, k])}?"
        plot.show_map(panel, explained.contribution_map[0, k], scale, title)
        panel.set_xlabel(plot.proof(explained, 0, k, model.logit_bias), fontsize=7)
        for line in (panel.axhline, panel.axvline):
            line(size - 0.5, color="0.5", linewidth=0.7)
