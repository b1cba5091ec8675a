"""The figure that ``coda-fast demo`` draws of example photographs with a network that the package contains:
what speaks for a class, for the next one, and for the one rather than the other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coda_fast import baselines, plot, pretrained, safety
from coda_fast._classes import class_name
from coda_fast.data import decode
from coda_fast.data.photographs import Photograph, example_photographs
from coda_fast.explanation import Explanation
from coda_fast.network import Network
from coda_fast.viewer import verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beside the network's own maps; both are captum's.
METHODS = ("GCam", "IntGrad")
# The photographs that are drawn, by file, and the networks that explain them: two whose subject is one of the
# network's classes, and two whose subject is not.
SHOWN = {
    "chelsea.png": "coda_xs_cifar10",
    "china.jpg": "coda_xs_imagenette",
    "rocket.jpg": "coda_xs_imagenette",
    "coffee.png": "coda_xs_imagenette",
}


@dataclasses.dataclass(frozen=True)
class Explained:
    """A photograph, what a network says of it, and the maps of the other methods for its most likely class.

    Attributes:
        view: the photograph, and the part that the network saw.
        network: the network's name.
        model: the network.
        explanation: of the two most likely classes.
        others: {method: map [H, W]}.
        credit: whose photograph it is.
    """

    view: plot.View
    network: str
    model: Network
    explanation: Explanation
    others: dict[str, torch.Tensor]
    credit: str


def explain_photograph(
    photograph: Photograph, network: str, model: Network, methods: Sequence[str]
) -> Explained:
    """Explain the two most likely classes of a photograph, by the network and by other ``methods``.

    Raises:
        ValueError: the photograph cannot be read. ImportError: a method needs captum, which is missing.
    """
    image = model.transform(photograph.path)[None]
    with torch.no_grad():
        top = model(image).topk(2).indices
    return Explained(
        plot.View.of(decode(photograph.path), model.transform),
        network,
        model,
        model.explain(image, top),
        {method: baselines.attribute(method, model, image, top[:, :1])[0, 0] for method in methods},
        photograph.credit,
    )


def figure(rows: Sequence[Explained]) -> Figure:
    """A row for each photograph: the picture; the maps of the most likely class, of the next one, and their
    difference, on one scale; and the map of each other method, on a scale of its own.
    """
    methods = list(rows[0].others)
    columns = 4 + len(methods)
    aspects = [row.view.picture.shape[0] / row.view.picture.shape[1] for row in rows]
    page = plot.new_figure(2.25 * columns + 0.7, sum(2.1 * min(1.4, a) + 0.75 for a in aspects))
    grid: Any = page.add_gridspec(len(rows), columns, height_ratios=[min(1.4, a) for a in aspects])
    for i, row in enumerate(rows):
        axes = [page.add_subplot(grid[i, j]) for j in range(columns)]
        artist = _draw(axes, row, methods)
        plot.colour_bar(page, artist, axes[3], "logits per pixel")
    return page


def _draw(axes, row, methods):
    e, names = row.explanation, [class_name(row.model.class_names, int(c)) for c in row.explanation.target[0]]
    maps = e.contribution_map[0]
    difference = maps[0] - maps[1]
    scale = plot.symmetric_scale(torch.stack((*maps, difference)))
    sigmoid = e.logits[0].sigmoid()
    subject, _, by = row.credit.partition(": ")
    plot.show_view(axes[0], row.view, subject)
    axes[0].set_xlabel(f"{plot.explained_by(e.logits[0], row.network)}\n{by}", fontsize=7)
    for k in range(2):
        title = f"why {names[k]}: " if k == 0 else f"why {names[k]}? "
        sure = plot.probability(float(sigmoid[e.target[0, k]]))
        artist = plot.show_map(axes[1 + k], maps[k], scale, title + sure, row.view)
        axes[1 + k].set_xlabel(plot.proof(e, 0, k, row.model.logit_bias), fontsize=7)
    plot.show_map(axes[3], difference, scale, f"{names[0]}, not {names[1]}", row.view)
    logits = e.logits[0, e.target[0]].double()
    total = float(difference.double().sum())
    axes[3].set_xlabel(
        f"sum {total:+.2f}: difference of the logits {float(logits[0] - logits[1]):+.2f}", fontsize=7
    )
    for axis, method in zip(axes[4:], methods, strict=True):
        found = row.others[method]
        plot.show_map(axis, found, plot.symmetric_scale(found), f"{method}: {names[0]}", row.view)
        axis.set_xlabel("a scale of its own", fontsize=7)
    return artist


@dataclasses.dataclass(frozen=True)
class Result:
    """The figure that ``run`` wrote, a line about each photograph, and what is missing in the figure, if
    anything is.
    """

    figure: Path
    lines: list[str]
    note: str = ""


def run(folder: str | os.PathLike, progress: Callable[[Iterable, str], Iterable] | None = None) -> Result:
    """Explain the example photographs ``SHOWN`` that are installed, and write the figure into ``folder``.

    Args:
        folder: is made if it is missing.
        progress: called as ``progress(iterable, label)``, like tqdm; None: silent.

    Raises:
        ImportError: a package of the extra "cli" is missing. OSError: the folder cannot be written.
    """
    folder, networks, rows, lines = Path(folder), {}, [], []
    plot.new_figure(1, 1)  # a missing package fails before the work
    methods: tuple[str, ...] = METHODS
    note = ""
    if importlib.util.find_spec("captum") is None:
        methods, note = (), "no other methods are drawn: pip install 'coda-fast[evaluation]'"
    found = {photograph.path.name: photograph for photograph in example_photographs()}
    photographs = [found[file] for file in SHOWN if file in found]
    if not photographs:
        raise ImportError("the demo needs the photographs of scikit-learn: pip install 'coda-fast[cli]'")
    for photograph in progress(photographs, "photographs") if progress else photographs:
        name = SHOWN[photograph.path.name]
        if name not in networks:
            networks[name] = pretrained.load(name).eval()
        rows.append(explain_photograph(photograph, name, networks[name], methods))
        lines.append(f"{photograph.path.name}: {sentence(rows[-1])}")
    with safety.new_folder(folder):
        path = folder / "coda_demo.png"
        plot.save_figure(figure(rows), path)
    return Result(path, lines, note)


def sentence(found: Explained) -> str:
    """What the network says of a photograph, and how complete its explanation is."""
    e = found.explanation
    error = float(e.completeness_error.max())
    says = verdict(e.logits[0], found.model.class_names, found.network)
    return f"{says}, completeness error {error:.0e} logits"
