"""Plots of how time and memory grow, drawn from rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bench.cases import AXES
from bench.peers import PEERS
from bench.providers import CODA

DOCS = Path(__file__).resolve().parent.parent / "docs"
LABELS = {"batch": "batch", "size": "image size, pixels", "rank": "rank r", "channels": "channels C = n"}


def styles() -> dict[str, tuple[str, str, str]]:
    """{provider: (colour, marker, label)} of all providers that are drawn."""
    peers = {name: peer.style for name, peer in PEERS.items() if peer.style}
    return {**peers, CODA: ("#000000", "o", "coda_fast")}


def scaling_path(rows_file: Path) -> Path:
    return DOCS / f"scaling-{rows_file.stem}.png"


def fingerprint(rows: list[dict]) -> str:
    """A digest of the numbers that a plot shows."""
    shown = [
        [r["op"], r["provider"], r["shape"], r["p20_us"], r["p50_us"], r["p80_us"], r["peak_bytes"]]
        for r in _scaling(rows)
    ]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _scaling(rows):
    """The scaling rows of the first dtype that was measured."""
    found = [r for r in rows if r["op"].startswith("scaling") and r["provider"] in styles()]
    return [r for r in found if r["dtype"] == found[0]["dtype"]]


def shows(path: Path, rows: list[dict]) -> bool:
    """Whether the image was drawn from these rows, according to its metadata."""
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("Rows") == fingerprint(rows)


def scaling(rows: list[dict], path: Path) -> Path:
    """Plot time (with its 20 to 80 % range) and peak memory of forward + backward against batch, size, rank
    and channels, on logarithmic axes.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = _scaling(rows)
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            2, len(AXES), figsize=(9.5, 4.6), sharex="col", sharey="row", layout="constrained"
        )
        for column, axis in enumerate(AXES):
            series = [r for r in found if r["op"] == f"scaling {axis}"]
            for provider, (colour, marker, label) in styles().items():
                points = sorted(
                    (r for r in series if r["provider"] == provider and r["p50_us"]),
                    key=lambda r: r["shape"][axis],
                )
                if not points:
                    continue
                x = [r["shape"][axis] for r in points]
                middle = [1e-3 * r["p50_us"] for r in points]
                spread = [
                    [1e-3 * (r["p50_us"] - r["p20_us"]) for r in points],
                    [1e-3 * (r["p80_us"] - r["p50_us"]) for r in points],
                ]
                style = dict(color=colour, marker=marker, markersize=3.5, linewidth=1.2)
                axes[0, column].errorbar(x, middle, yerr=spread, capsize=2, label=label, **style)
                axes[1, column].plot(x, [r["peak_bytes"] / 2**20 for r in points], label=label, **style)
            for row in range(2):
                axes[row, column].set_xscale("log", base=2)
                axes[row, column].set_yscale("log")
                axes[row, column].grid(color="0.9", linewidth=0.6)
            ticks = sorted({r["shape"][axis] for r in series})
            axes[1, column].set_xticks(ticks, [str(t) for t in ticks])
            axes[1, column].minorticks_off()
            axes[1, column].set_xlabel(LABELS[axis])
        axes[0, 0].set_ylabel("forward + backward, ms")
        axes[1, 0].set_ylabel("peak memory, MiB")
        axes[0, 0].legend(frameon=False)
        figure.suptitle(_title(found), fontsize=8)
        figure.savefig(path, dpi=200, metadata={"Rows": fingerprint(rows)})
        plt.close(figure)
    return path


def _title(rows):
    """The shape of the layer that all four series vary."""
    one = rows[0]
    common = {}
    for key in one["shape"]:
        values = [r["shape"][key] for r in rows]
        common[key] = max(set(values), key=values.count)
    shape = "C = n = {channels}, r = {rank}, k = {kernel}, {size} px, batch {batch}".format(**common)
    return (
        f"{shape}; one of them varied. {one['dtype']}, {one['device']}, torch {one['torch']}, commit "
        f"{one['commit']}"
    )
