"""The mark "verified" of a device, with which ``backend="auto"`` picks the kernels there (docs/gpu.md)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench.verify import Verdict
from tools.gpu_stages import Report

NEEDED = ("tests.json", "configurations.json", "large.json")
OPTIONAL = ("fallbacks.json", "warps.json")  # these need not run, but they must not fail


def mark_of(report: Report) -> dict | None:
    """The entry of the table that makes "auto" pick the kernels, or None if a required test has not passed
    here.
    """
    try:
        verdicts = {name: Verdict.load(report.output / name, **report.key) for name in NEEDED}
    except (OSError, ValueError, TypeError):
        return None
    others = {}
    for name in OPTIONAL:
        try:
            others[name] = Verdict.load(report.output / name, **report.key)
        except (OSError, ValueError, TypeError):
            others[name] = Verdict()
    good = all(v.passed for v in verdicts.values()) and not any(v.failures for v in others.values())
    if report.device != "cuda" or report.quick or not good:
        return None
    mark = {
        key: report.stamp[key] for key in ("device", "driver", "triton", "torch", "commit", "tree", "date")
    }
    # which tiles have been run on it: of every kernel and layer the one that is taken first; of those for
    # devices on which that one does not fit (they are taken with a warning), as many as a call with
    # --later has found to pass
    mark["tiles"] = {
        "first": verdicts["configurations.json"].passes,
        "fallbacks": others["fallbacks.json"].passes,
    }
    mark["warps_and_stages"] = others["warps.json"].passes
    return mark | {"skipped": {name: v.skipped for name, v in verdicts.items() if v.skipped}}


def propose_table(report: Report) -> Path | None:
    """Write sm_XX.json, the table of the package with the mark "verified"."""
    if (mark := mark_of(report)) is None:
        return None
    from coda_kernels import config

    major, minor = torch.cuda.get_device_capability()
    path = report.output / f"sm_{major}{minor}.json"
    shipped = config.TABLES / path.name
    table = json.loads(shipped.read_text(encoding="utf-8")) if shipped.exists() else {"tiles": []}
    path.write_text(json.dumps({**table, "verified": mark}, indent=1) + "\n", encoding="utf-8")
    return path
