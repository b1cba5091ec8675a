"""Errors of every backend against the values of the published implementation: ``python bench/golden.py``
measures them and stores bench/results/golden.json; ``make tables`` puts them into docs/numbers.md.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "golden.json"


def measure() -> dict:
    """The worst of all compared tensors of each golden file, a backend and dtype a column."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # the fused kernels on the CPU
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    from support import LAYERS, Golden
    from test_golden import CASES, layer_errors

    from bench import results

    rows = []
    for name in LAYERS:
        m = Golden(name).meta
        shape = f"{m['C']}, {m['n']}, {m['r']}, {m['k']}, {m['s']}, {m['p']}, {m['norm']}" + (
            "" if m["bias"] else ", no bias"
        )
        errors = {
            f"{b}, {str(d).removeprefix('torch.')}": float(f"{max(layer_errors(name, d, b).values()):.2g}")
            for d, b in CASES
        }
        rows.append({"layer": shape, "errors": errors})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"torch": torch.__version__, "triton": results.environment(device)["triton"]}
    versions["device"] = results.device_name(device) + (
        ", triton under its interpreter" if device.type == "cpu" else ""
    )
    return {**versions, "commit": results.commit(), "date": datetime.date.today().isoformat(), "rows": rows}


def table() -> str:
    """Markdown of what is stored."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    columns = list(found["rows"][0]["errors"])
    lines = [
        "| layer (C, n, r, k, stride, padding, norm) | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    lines += [
        f"| {row['layer']} | " + " | ".join(f"{row['errors'][c]:.0e}" for c in columns) + " |"
        for row in found["rows"]
    ]
    device = found.get("device", "CPU, triton under its interpreter")
    where = (
        f"torch {found['torch']}, Triton {found['triton']}, {device}; commit {found['commit']}, "
        f"{found['date']}."
    )
    return "\n".join([*lines, "", f"{where} The tests allow 1e-10 in float64 and 1e-5 in float32."])


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(table())
