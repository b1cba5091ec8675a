"""Tables of measured rows as Markdown: in the terminal at the end of a run, and in the documents
(tools/documents.py).
"""

from __future__ import annotations

from bench.cases import INFERENCE, LAYER_MODES, NETWORK_MODES, STEP, TRAINING
from bench.peers import ALGEBRAIC, COMPILED, MATERIALISING, PEERS
from bench.providers import CODA, COPY, PRODUCT

MIB = 2**20
PUBLISHED = (MATERIALISING, MATERIALISING + COMPILED)


# -- one device
# ------------------------------------------------------------------------------------------------------------


def variants(rows: list[dict]) -> list[list[dict]]:
    """Groups of rows that share a table: those of one dtype and one batch size, in the order of their first
    rows. Scaling series go to the first group of their dtype.
    """
    rows = [row for row in rows if row["op"] != COPY]
    scaling = {row["dtype"]: [] for row in rows}
    groups = {}
    for row in rows:
        if row["op"].startswith("scaling"):
            scaling[row["dtype"]].append(row)
        else:
            groups.setdefault(row["dtype"], {}).setdefault(row["shape"]["batch"], []).append(row)
    found = []
    for dtype, series in scaling.items():
        first, *others = groups.get(dtype, {None: []}).values()
        found += [first + series, *others]
    return found


def everything(rows: list[dict]) -> str:
    """All tables of these rows of one device."""
    copies = [r for r in rows if r["op"] == COPY]
    return "\n\n".join(_everything(variant, copies) for variant in variants(rows))


def _everything(rows, copies):
    parts = []
    for mode in LAYER_MODES:
        if found := _select(rows, mode, layers=True):
            parts += [
                f"Layers, {mode}: milliseconds (median)",
                "",
                times(found),
                "",
                f"Layers, {mode}: coda_fast beside them",
                "",
                gains(found),
                "",
            ]
    for name in _ordered(r["op"] for r in rows if r["mode"] in (STEP, INFERENCE)):
        parts += [network_title(rows, name), "", network(rows, name), ""]
    parts += [missing(rows), footer(rows, copies)]
    return "\n".join(part for i, part in enumerate(parts) if part or (i and parts[i - 1])).rstrip()


def times(rows: list[dict]) -> str:
    """A row for each layer and a column for each provider. The sum counts each shape as often as the networks
    have it.
    """
    by, providers = _by(rows), _ordered(r["provider"] for r in rows)
    table = [["layer", "C, n, r, k, stride, size", *providers]]
    for op in _ordered(r["op"] for r in rows):
        table.append([op, _shape(by, op), *(_ms(by.get((op, p))) for p in providers)])
    for letter in _ordered(r["op"][0] for r in rows):
        ops = _ordered(r["op"] for r in rows if r["op"][0] == letter)
        sums = [_sum(by, ops, p) for p in providers]
        table.append([f"all of {letter}", "", *(_digits(s) if s else "" for s in sums)])
    return _markdown(table)


def gains(rows: list[dict]) -> str:
    """Speed-up of coda_fast over the published formula and over the fastest other peer, memory, error, and
    share of the ceiling.
    """
    by = _by(rows)
    table = [
        [
            "layer",
            "speed-up on materialising",
            f"on the fastest {families()}",
            "which",
            "% of ceiling",
            "ceiling",
            "peak MiB: materialising",
            "algebraic",
            "coda_fast",
            "error: materialising",
            "algebraic",
            "coda_fast",
        ]
    ]
    for op in _ordered(r["op"] for r in rows):
        ours = by.get((op, CODA))
        if not ours:
            continue
        peer = fastest(by, op, others())
        three = [by.get((op, p)) for p in (MATERIALISING, ALGEBRAIC, CODA)]
        share = "" if not ours["ceiling"] else f"{100 * ours['ceiling']:.0f}"
        which = _which(by, op, peer)
        first = fastest(by, op, PUBLISHED)
        table.append(
            [op, _speedup(ours, first), _speedup(ours, peer), which, share, ours.get("bound") or ""]
            + [_mib(r) for r in three]
            + [_error(r) for r in three]
        )
    return _markdown(table)


def summary(rows: list[dict]) -> str:
    """The short table of docs/numbers.md: forward + backward with a row for each layer, then the training
    step of whole networks.
    """
    by = _by([r for r in rows if r["mode"] in (TRAINING, STEP)])
    table = [
        [
            "",
            "C, n, r, k, stride, size",
            "as published, ms",
            f"{families()}, ms",
            "coda_fast, ms",
            "speed-up on published",
            f"on {families()}",
            "which",
            "% of ceiling",
            "peak memory, MiB: as published",
            families(),
            "coda_fast",
        ]
    ]
    for op in _ordered(
        r["op"] for r in rows if r["mode"] in (TRAINING, STEP) and not r["op"].startswith("scaling")
    ):
        ours = by.get((op, CODA))
        if not ours:
            continue
        first, second = (fastest(by, op, PUBLISHED), fastest(by, op, others()))
        three = [by.get((op, p)) for p in (first, second, CODA)]
        share = f"{100 * ours['ceiling']:.0f}" if ours["ceiling"] else ""
        label = op if "channels" in ours["shape"] else f"{op}, training step"
        table.append(
            [
                label,
                _shape(by, op),
                *map(_ms, three),
                _speedup(ours, first),
                _speedup(ours, second),
                _which(by, op, second),
                share,
                *map(_mib, three),
            ]
        )
    return _markdown(table)


def network_title(rows, name):
    shape = next(r["shape"] for r in rows if r["op"] == name)
    return f"**{name}**, batch {shape['batch']}, {shape['size']} px"


def network(rows: list[dict], name: str) -> str:
    """A row for each provider and a column for each mode: its time relative to coda_fast, and its memory."""
    rows = [r for r in rows if r["op"] == name]
    by = {(r["provider"], r["mode"]): r for r in rows}
    table = [["provider"]]
    modes = [m for m in NETWORK_MODES if any(r["mode"] == m for r in rows)]
    for mode in modes:
        table[0] += [f"{mode}, ms", "coda_fast is faster by", "peak MiB"]
    for provider in _ordered(r["provider"] for r in rows):
        cells = [provider]
        for mode in modes:
            row, ours = by.get((provider, mode)), by.get((CODA, mode))
            cells += [_ms(row), _speedup(ours, provider) if ours else "", _mib(row)]
        table.append(cells)
    return _markdown(table)


def missing(rows: list[dict]) -> str:
    """What could not be measured, and why."""
    reasons = {}
    for row in rows:
        if row.get("missing"):
            reasons.setdefault((row["provider"], row["missing"]), []).append(f"{row['op']} {row['mode']}")
    return "\n".join(
        f"Not measured: {p} ({why}): {', '.join(_ordered(where))}." for (p, why), where in reasons.items()
    )


def footer(rows: list[dict], copies: list[dict] = ()) -> str:
    """Device, date and method of the measurement. ``copies``: the row of the copy, if there is one."""
    one = rows[0]
    commits = ", ".join(_ordered(f"{r['commit']} ({r['date']})" for r in rows))
    spreads = sorted((r["p80_us"] - r["p20_us"]) / r["p50_us"] for r in rows if r.get("p50_us"))
    spread = ""
    if spreads:
        spread = (
            f"20 to 80 % of a provider's samples span {100 * spreads[len(spreads) // 2]:.0f} % of their "
            "median (median over the rows), "
        )
        spread += f"{100 * spreads[-1]:.0f} % at worst. "
    layers = [r for r in rows if "channels" in r["shape"] and not r["op"].startswith("scaling")]
    batches = "".join(_ordered(f"; layers of {r['op'][0]}-CoDA: batch {r['shape']['batch']}" for r in layers))
    unverified = sorted({r["provider"] for r in rows if r.get("verified") is False})
    doubt = (
        f" No speed-up of {', '.join(unverified)} is shown: the op's own tests or its error failed here."
        if unverified
        else ""
    )
    driver = f", driver {one['driver']}" if one.get("driver") else f", {one.get('threads')} threads"
    bandwidth = "".join(
        f" A copy reads and writes {2e-3 * c['shape']['bytes'] / c['p50_us']:.0f} GB/s." for c in copies
    )
    return (
        f"{one['dtype']}{batches}.{bandwidth} Speed-ups: median of the ratios turn by turn (20 to 80 %). "
        f"{spread}{one['device']}{driver}; "
        f"torch {one['torch']}, Triton {one['triton']}, Python {one.get('python')}; commit {commits}.{doubt}"
    )


# -- cells
# ------------------------------------------------------------------------------------------------------------


def _select(rows, mode, layers):
    return [
        r
        for r in rows
        if r["mode"] == mode and ("channels" in r["shape"]) == layers and not r["op"].startswith("scaling")
    ]


def _by(rows):
    return {(r["op"], r["provider"]): r for r in rows}


def _ordered(values):
    return list(dict.fromkeys(values))


def others() -> list[str]:
    """The peers other than the published formula, each also compiled."""
    return [name + suffix for name in PEERS if name != MATERIALISING for suffix in ("", COMPILED)]


def families() -> str:
    """The families of these peers."""
    return " or ".join(_ordered(peer.family for name, peer in PEERS.items() if name != MATERIALISING))


def _which(by, op, peer):
    """The name of the fastest other peer, and a note if the strongest one on a GPU is missing."""
    unknown = by[op, CODA]["driver"] and fastest(by, op, (ALGEBRAIC + COMPILED,)) is None
    return f"{peer} (compiled not measured)" if peer and unknown else peer or ""


def fastest(by: dict, op: str, candidates) -> str | None:
    """The provider with the smallest median."""
    measured = [p for p in candidates if (op, p) in by and by[op, p]["p50_us"]]
    return min(measured, key=lambda p: by[op, p]["p50_us"], default=None)


def _sum(by, ops, provider):
    """Milliseconds over all layers, where layers of one shape are counted together, or None if one is
    missing.
    """
    rows = [by.get((op, provider)) for op in ops]
    if not all(r and r["p50_us"] for r in rows):
        return None
    return 1e-3 * sum(r["p50_us"] * len(op.split(", ")) for op, r in zip(ops, rows, strict=True))


def _shape(by, op):
    shape = next(r["shape"] for (o, _), r in by.items() if o == op)
    keys = ("channels", "units", "rank", "kernel", "stride", "size")
    return (
        ", ".join(str(shape[k]) for k in keys)
        if "channels" in shape
        else f"all, {shape['size']} px, batch {shape['batch']}"
    )


def _digits(value):
    """Three significant digits without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ms(row):
    if row is None:
        return ""
    return (
        _digits(1e-3 * row["p50_us"])
        if row["p50_us"]
        else "no memory"
        if row.get("missing") == "out of memory"
        else "n/a"
    )


def _mib(row):
    if row is None or row["peak_bytes"] is None:
        return ""
    return _digits(row["peak_bytes"] / MIB)


def _error(row):
    return "" if row is None or row["error"] is None else f"{row['error']:.0e}"


def _speedup(ours, peer):
    if peer is None or peer.removesuffix(COMPILED) == ours["provider"] or peer in (PRODUCT,):
        return ""
    if ours["speedup"] is None:
        return "not shown" if ours.get("verified") is False else ""
    if peer not in ours["speedup"]:
        return ""
    low, middle, high = ours["speedup"][peer]
    return (
        f"{middle:.2f}x ({low:.2f} to {high:.2f})"
        if middle < 10
        else f"{middle:.1f}x ({low:.1f} to {high:.1f})"
    )


def _markdown(table):
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
