"""Errors of every backend against the values of the published implementation, as tests/test_golden.py
computes them.

python -m experiments.golden     bench/results/golden.json; "make tables" puts them into docs/numbers.md
"""

from __future__ import annotations

import datetime
import json
import math
import tempfile
from pathlib import Path

import torch

from bench import results, verify

RESULTS = results.FOLDER / "golden.json"


def measure() -> dict:
    """The largest error over all compared tensors of each golden file, with a column for each backend and
    dtype.
    """
    with tempfile.TemporaryDirectory() as folder:
        tests = verify.collect("tests/test_golden.py", "-k", "test_layer")
        verify.shards(tests, 1, math.inf, Path(folder))
        outcomes = verify.outcomes(Path(folder))
    rows = {}
    for test in tests:
        found = outcomes[test]["properties"]
        m = found["layer"]
        shape = f"{m['C']}, {m['n']}, {m['r']}, {m['k']}, {m['s']}, {m['p']}, {m['norm']}" + (
            "" if m["bias"] else ", no bias"
        )
        errors = rows.setdefault(shape, {"layer": shape, "errors": {}})["errors"]
        errors[found["case"]] = float(f"{max(found['errors'].values()):.2g}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"torch": torch.__version__, "triton": results.environment(device)["triton"]}
    versions["device"] = results.device_name(device) + (
        ", triton under its interpreter" if device.type == "cpu" else ""
    )
    stamp = {"commit": results.commit(), "date": datetime.date.today().isoformat()}
    return {**versions, **stamp, "rows": list(rows.values())}


def table() -> str:
    """Markdown of the stored results."""
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
