"""Box plots of localisation and curves of pixel removal, in the style of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from coda_fast._files import atomic_path
from coda_fast.evaluation.localisation import Localisation
from coda_fast.evaluation.removal import Removal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which people with red-green colour blindness can tell apart. Further methods
# get the same colours with another line style.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def save(results: dict[str, Localisation | Removal], folder: Path, metric: str, order: str) -> list[Path]:
    """Write localisation.png and .svg, or removal.png and .svg; returns their paths."""
    if metric == "localisation":
        figure = boxes(cast("dict[str, Localisation]", results))
    else:
        figure = curves(cast("dict[str, Removal]", results), order)
    paths = [Path(folder) / f"{metric}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=200, format=path.suffix[1:])
    return paths


def boxes(results: dict[str, Localisation]) -> Figure:
    """A box plot for each method, in the order of their means (diamonds): quartiles, whiskers of at most 1.5
    times the interquartile range, no outliers. Lines show the scores of a perfect and of a uniform map.
    """
    from matplotlib.figure import Figure

    ordered = sorted(results.items(), key=lambda item: -float(item[1].scores.mean()))
    figure = Figure(figsize=(1.6 + 0.62 * len(ordered), 3.0), layout="constrained")
    axes = figure.subplots()
    drawn = axes.boxplot(
        [found.scores.flatten().numpy() for _, found in ordered],
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        widths=0.6,
        medianprops={"color": "black"},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 4},
    )
    for (name, _), box in zip(ordered, drawn["boxes"], strict=True):
        box.set_facecolor("#D55E00" if name == "Ours" else "0.85")
    cells = ordered[0][1].scores.shape[1]
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.axhline(1 / cells, color="0.4", linewidth=0.8, linestyle="--")
    axes.text(axes.get_xlim()[1], 1 / cells, " uniform", va="center", fontsize=7, color="0.4")
    axes.set_xticks(
        range(1, len(ordered) + 1), [name for name, _ in ordered], rotation=35, ha="right", fontsize=8
    )
    axes.set_ylim(-0.02, 1.04)
    side = round(cells**0.5)
    axes.set_ylabel(f"localisation, {side} x {side} grids", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(results: dict[str, Removal], order: str) -> Figure:
    """Mean probability of the target against the share of removed pixels; legend by decreasing area."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(results.items(), key=lambda item: -float(item[1].area().mean()))
    for i, (name, found) in enumerate(ordered):
        style: dict[str, Any] = dict(
            color=COLOURS[i % len(COLOURS)],
            linestyle=["-", "--"][i // len(COLOURS) % 2],
            linewidth=2.2 if name == "Ours" else 1.2,
        )
        axes.plot(
            100 * found.fractions.numpy(),
            found.curve().numpy(),
            label=f"{name} ({float(found.area().mean()):.3f})",
            **style,
        )
    axes.set_xlabel(f"pixels removed, {order} important first, %", fontsize=8)
    axes.set_ylabel("mean probability of the class", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(
        frameon=False,
        fontsize=7,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title="method (area)",
        title_fontsize=7,
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure
