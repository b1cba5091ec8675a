"""Every table and plot of measured results in README.md and docs/, from the rows in bench/results/
(``make tables``).

python -m tools.documents            write them
python -m tools.documents --check    exit status 1 if a document does not match the rows
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

from bench import plots, results
from bench.cases import STEP, TRAINING
from bench.peers import PEERS
from bench.providers import CODA
from bench.results import ROOT
from bench.tables import MIB, PUBLISHED, everything, fastest, footer, others, summary, variants
from bench.yardsticks import YARDSTICKS
from coda_fast import baselines
from coda_fast.baselines._registry import ENTRIES
from experiments import (
    evaluate_digits,
    evaluation_speed,
    golden,
    interpretable_depth,
    matrix_regulariser,
    pretrained,
    training,
)
from tools import aot_tables, launches


def devices(folder: Path = results.FOLDER) -> list[tuple[Path, list[dict]]]:
    """The files of rows and their rows, GPUs first."""
    found = [(path, results.read(path)) for path in sorted(folder.glob("*.jsonl"))]
    return sorted(
        (pair for pair in found if pair[1]), key=lambda pair: (pair[1][0]["driver"] is None, pair[0].name)
    )


def block(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of that name. Raises ValueError if the markers are
    missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} once each")
    return f"{text.partition(begin)[0]}{begin}\n{content}\n{end}{text.partition(end)[2]}"


def headline(folder: Path) -> str:
    """The block of README.md: the accuracy, and the time of a training step of S-CoDA at the published batch
    size of 16 on the first device that measured it.
    """
    stored = json.loads(golden.RESULTS.read_text(encoding="utf-8"))
    errors = [pair for row in stored["rows"] for pair in row["errors"].items()]
    worst = {dtype: max(e for name, e in errors if name.endswith(dtype)) for dtype in ("float64", "float32")}
    lines = [
        "| | | measured on |",
        "|---|---|---|",
        "| exact | largest relative error of outputs, gradients and explanations against the authors' "
        f"implementation in float64: {worst['float64']:.0e} in float64, {worst['float32']:.0e} in float32 | "
        f"{stored['device']}; torch {stored['torch']} |",
    ]
    op, batch = "coda_s_cifar10", 16
    for _, rows in devices(folder):
        steps = [r for r in rows if (r["op"], r["mode"]) == (op, STEP) and r["shape"]["batch"] == batch]
        by = {(op, r["provider"]): r for r in steps if r["dtype"] == steps[0]["dtype"]}
        published, other = fastest(by, op, PUBLISHED), fastest(by, op, others())
        ours = by.get((op, CODA), {})
        gains = {name: f"{ratios[1]:.2f} times" for name, ratios in (ours.get("speedup") or {}).items()}
        mib = {name: f"{row['peak_bytes'] / MIB:.0f}" for (_, name), row in by.items() if row["peak_bytes"]}
        leanest = min((p for p in others() if p in mib), key=lambda name: float(mib[name]), default=None)
        if not ({CODA, published, other} <= mib.keys() and {published, other, leanest} <= gains.keys()):
            continue  # some of it could not be measured on this device
        lines += [
            f"| small | a training step of S-CoDA (CIFAR-10, batch {batch}) takes {mib[CODA]} MiB; the "
            f"formula as published takes {mib[published]}; of the forms in library calls the "
            f"fastest ({other}) takes {mib[other]}, the leanest ({leanest}) {mib[leanest]} | "
            f"{ours['device']}, {ours['dtype']}; torch {ours['torch']} |",
            f"| fast | that step takes {1e-3 * ours['p50_us']:.0f} ms: {gains[published]} as fast as the "
            f"formula as published, {gains[other]} as fast as the fastest of the others, {gains[leanest]} as "
            "fast as the leanest | the same |",
        ]
        break
    return "\n".join(lines)


def short_tables(folder: Path) -> str:
    """The block of docs/numbers.md: training at the published batch size of 16 or a larger one, with a table
    for each device and dtype.
    """
    parts = []
    for _, rows in devices(folder):
        for variant in variants(rows):
            shown = [
                r for r in variant if r["mode"] in (TRAINING, STEP) and not r["op"].startswith("scaling")
            ]
            if shown and shown[0]["shape"]["batch"] >= 16:
                title = f"**{rows[0]['device']}, {shown[0]['dtype']}**"
                parts += [title, "", summary(shown), "", footer(shown), ""]
    return "\n".join(parts).rstrip()


def full_tables(folder: Path) -> str:
    """The block of docs/benchmark.md: everything that was measured, with a section for each device."""
    parts = []
    for path, rows in devices(folder):
        parts += [f"## {rows[0]['device']}", "", everything(rows), ""]
        if any(r["op"].startswith("scaling") for r in rows):
            parts += [f"![Scaling on {rows[0]['device']}]({plots.scaling_path(path).name})", ""]
    return "\n".join(parts).rstrip()


def methods() -> str:
    """The block of docs/evaluation.md: the registered attribution methods with their published settings."""
    lines = ["| method | what it is | settings |", "|---|---|---|"]
    for name, method in ENTRIES.items():
        settings = ", ".join(f"{key} {value:g}" for key, value in baselines.METHODS[name].items())
        twin = f" On a CoDA-Net, to rounding, {baselines.TWINS[name]}." if name in baselines.TWINS else ""
        lines.append(f"| `{name}` | {method.description}{twin} | {settings} |")
    return "\n".join(lines)


def peers() -> str:
    """The block of docs/benchmark.md: the registered peers of a layer and of a network."""
    found = {**PEERS, **YARDSTICKS}
    lines = ["| peer | what it is |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {each.description} |" for name, each in found.items())])


# {name of a block: network} of the networks that a run of ``coda-fast train`` on photographs made
PHOTOGRAPHS = {pretrained.short(name): name for name in pretrained.DATA if name != "coda_xs_digits"}

# {document: {name of a block: function that returns its text}}; functions of measured results take the folder
# of the rows
BLOCKS = {
    ROOT / "README.md": {"headline": headline},
    ROOT / "docs" / "numbers.md": {"bench": short_tables, "golden": golden.table},
    ROOT / "docs" / "benchmark.md": {"peers": peers, "bench": full_tables},
    ROOT / "docs" / "evaluation.md": {
        **{short: functools.partial(pretrained.card, name) for short, name in PHOTOGRAPHS.items()},
        "methods": methods,
        "digits": evaluate_digits.table,
        "matrix": matrix_regulariser.table,
        "speed": evaluation_speed.table,
    },
    **{
        ROOT / "coda_fast" / "weights" / f"{name}.md": {"card": functools.partial(pretrained.card, name)}
        for name in pretrained.DATA
    },
    ROOT / "docs" / "pretrained.md": {
        pretrained.short(name): functools.partial(pretrained.brief, name) for name in pretrained.DATA
    },
    ROOT / "docs" / "hybrid.md": {
        f"depth-{name}": functools.partial(interpretable_depth.table, name)
        for name in interpretable_depth.SETS
    },
    ROOT / "docs" / "training.md": {
        "training": training.table,
        **{short: functools.partial(pretrained.history, name) for short, name in PHOTOGRAPHS.items()},
    },
    ROOT / "docs" / "kernels.md": {"aot": aot_tables.tables, "launches": launches.tables},
}
OF_ROWS = (headline, short_tables, full_tables)


def documents(folder: Path = results.FOLDER) -> dict[Path, str]:
    """The text that each document should have."""
    found = {}
    for path, blocks in BLOCKS.items():
        text = path.read_text(encoding="utf-8")
        for name, make in blocks.items():
            text = block(text, name, make(folder) if make in OF_ROWS else make())
        found[path] = text
    return found


def stale() -> list[str]:
    """The documents and plots that do not match the rows."""
    found = [
        str(path.relative_to(ROOT))
        for path, text in documents().items()
        if path.read_text(encoding="utf-8") != text
    ]
    for path, rows in devices():
        if any(r["op"].startswith("scaling") for r in rows) and not plots.shows(
            plots.scaling_path(path), rows
        ):
            found.append(str(plots.scaling_path(path).relative_to(ROOT)))
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    if options.check:
        found = stale()
        print(
            "\n".join(f"stale: {name}" for name in found)
            or "all tables and plots show the rows of bench/results"
        )
        return int(bool(found))
    for path, rows in devices():
        if any(r["op"].startswith("scaling") for r in rows):
            print(plots.scaling(rows, plots.scaling_path(path)))
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
