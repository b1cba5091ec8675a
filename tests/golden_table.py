"""The README's table of errors against the golden files: python tests/golden_table.py [--readme]"""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the fused kernels on the CPU

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- golden: begin -->", "<!-- golden: end -->")


def table() -> str:
    """Markdown: the worst of all compared tensors of each file."""
    from support import LAYERS, Golden
    from test_golden import CASES as columns
    from test_golden import layer_errors

    lines = [
        "| layer (C, n, r, k, stride, padding, norm) | " + " | ".join(f"{b}, {str(d).removeprefix('torch.')}" for d, b in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in LAYERS:
        m = Golden(name).meta
        shape = f"{m['C']}, {m['n']}, {m['r']}, {m['k']}, {m['s']}, {m['p']}, {m['norm']}" + ("" if m["bias"] else ", no bias")
        lines.append(f"| {shape} | " + " | ".join(f"{max(layer_errors(name, *c).values()):.0e}" for c in columns) + " |")
    return "\n".join(
        [*lines, "", f"torch {torch.__version__}, CPU, triton under its interpreter. The tests allow 1e-10 in float64 and 1e-5 in float32."]
    )


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    text = table()
    print(text)
    if "--readme" in sys.argv[1:]:
        readme = ROOT / "README.md"
        head, rest = readme.read_text().split(MARKERS[0])
        readme.write_text(f"{head}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")
