"""The tables of docs/kernels.md about the machine code of the kernels, from the results of tools/aot.py."""

from __future__ import annotations

import collections
import json

from bench.results import FOLDER


def tables() -> str:
    """Markdown of all stored results: the worst value of each kernel over the layers, with a row for each
    architecture and dtype.
    """
    parts = []
    for path in sorted(FOLDER.glob("aot_triton*.json"), reverse=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        groups = collections.defaultdict(list)
        for row in found["rows"]:
            groups[row["kernel"], str(row["arch"]), row["dtype"]].append(row)
        faults = sum(bool(row["faults"]) for row in found["rows"])
        serialised = sum(bool(row["serialised"]) for row in found["rows"])
        parts.append(
            f"Triton {found['triton']}, commit {found['commit']}, {found['date']}: {len(found['rows'])} "
            f"compilations, {faults} faults, "
            f"{serialised} with serialised wgmma. Ranges over the layers of both networks.\n\n"
            "| kernel | for | dtype | n | registers | spills | stack | shared, KiB | programs an SM | "
            "instructions / tensor clock |\n"
            "|---|---|---|---|---|---|---|---|---|---|"
        )
        for (kernel, arch, dtype), rows in sorted(groups.items()):
            span = lambda key, rows=rows, scale=1: _span(
                [row[key] / scale for row in rows if row[key] is not None]
            )
            parts.append(
                f"| {kernel} | {arch if arch.startswith('gfx') else f'sm_{arch}'} | {dtype} | {len(rows)} | "
                f"{span('registers')} | "
                f"{span('spills')} | {span('stack_bytes')} | {span('shared_bytes', scale=1024)} | "
                f"{span('occupancy')} | "
                f"{span('loop_ratio')} |"
            )
        parts.append("")
    return "\n".join(parts).strip()


def _span(values):
    if not values:
        return ""
    texts = list(dict.fromkeys(f"{v:.2f}".rstrip("0").rstrip(".") for v in (min(values), max(values))))
    return " to ".join(texts)
