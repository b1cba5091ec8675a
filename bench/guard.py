"""Has coda_fast become slower? Ratios to a peer measured in the same run are compared with the stored ratios:
variations of the machine affect both alike, changes of the code do not. The result is advisory: it is
printed, and no test asserts it.
"""

from __future__ import annotations

from bench.providers import ALGEBRAIC, CODA, COMPILED
from bench.results import group_of

PEERS = (ALGEBRAIC + COMPILED, ALGEBRAIC)  # the first one that was measured both times is used


def compare(rows: list[dict], baseline: list[dict]) -> list[dict]:
    """For each group in both runs: {"group", "peer", "now": [p20, p50, p80], "stored": [...], "slower":
    whether the range of now lies below that of stored}.
    """
    stored = {group_of(row): row for row in baseline if row["provider"] == CODA and row.get("speedup")}
    found = []
    for row in rows:
        before = stored.get(group_of(row))
        if row["provider"] != CODA or not row.get("speedup") or not before:
            continue
        peer = next((p for p in PEERS if p in row["speedup"] and p in before["speedup"]), None)
        if peer:
            now, then = row["speedup"][peer], before["speedup"][peer]
            label = f"{row['op']} {row['mode']} {row['dtype']}"
            if row["op"].startswith("scaling"):
                label += f" {row['shape'][row['op'].split()[1]]}"
            found.append(
                {"group": label, "peer": peer, "now": now, "stored": then, "slower": now[2] < then[0]}
            )
    return found


def report(rows: list[dict], baseline: list[dict]) -> str:
    """A line for every group that has become slower, and the number of groups that have not."""
    found = compare(rows, baseline)
    if not found:
        return "no stored ratios for this device and these sizes"
    slower = [f for f in found if f["slower"]]
    lines = [
        f"{f['group']}: {_span(f['now'])} on {f['peer']}, stored "
        f"{_span(f['stored'])}{'  SLOWER' if f['slower'] else ''}"
        for f in found
    ]
    verdict = (
        f"{len(slower)} of {len(found)} ratios lie below the stored ones, spread (20 to 80 %) of both taken "
        "into account"
    )
    return "\n".join([*lines, verdict])


def _span(values):
    low, middle, high = values
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"
