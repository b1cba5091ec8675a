"""Forward + backward of the S-CoDA layers on a CPU: the factored backend beside the definition, in one run.

    python bench/cpu_layers.py            measure, write bench/results/cpu_layers.json, print the table
    python bench/cpu_layers.py --table    print the table of the stored results
    python bench/cpu_layers.py --readme   put that table between its markers in README.md

Time: the providers take turns, so that a drift of the machine hits all of them; quoted are medians, and the median and range of the
ratio turn by turn. "product": three plain matrix products of the layer's size, the least that forward + backward needs (the factored
backend recomputes one and so does four). Peak memory: the maximum resident set of a fresh process for each provider and layer, above
that of the process after imports and with parameters and inputs in place (Linux).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu_layers.json"
MARKERS = ("<!-- cpu_layers: begin -->", "<!-- cpu_layers: end -->")
PROVIDERS = ("reference", "factored")
NETWORK = "whole network"


def cases() -> dict[str, tuple | None]:
    """The nine layers of the published S-CoDA as (C, n, r, k, stride, input size), and the network (None)."""
    from coda_fast import create_model

    size, found = 32, {}
    for i, layer in enumerate(create_model("coda_s_cifar10", device="meta").layers):
        shape = (layer.in_channels, layer.out_channels, layer.rank, layer.kernel_size[0], layer.stride[0], size)
        found[f"layer {i + 1}"] = shape
        size, _ = layer.geometry.output_size(size, size)
    return {**found, NETWORK: None}


def setup(shape, batch, provider):
    """A function that runs forward + backward once."""
    from coda_fast import DAUConv2d, create_model

    torch.manual_seed(0)
    if shape is None:
        module, x = create_model("coda_s_cifar10", backend=provider), torch.rand(batch, 3, 32, 32)
        inputs = list(module.parameters())
    else:
        channels, units, rank, kernel, stride, size = shape
        if provider == "product":
            pixels, depth = batch * (-(-size // stride)) ** 2, channels * kernel**2
            a, b = torch.randn(pixels, depth), torch.randn(depth, units * rank)
            return lambda: [a @ b for _ in range(3)]
        module = DAUConv2d(channels, units, kernel, stride, (kernel - 1) // 2, rank=rank, backend=provider)
        x = torch.randn(batch, channels, size, size, requires_grad=True)
        inputs = [x, *module.parameters()]
    upstream = []

    def step():
        output = module(x)
        if not upstream:
            upstream.append(torch.randn_like(output))
        torch.autograd.grad(output, inputs, upstream[0])

    return step


def time_in_turn(functions, repeats):
    """Seconds of every function, [repeats] each, measured A B C A B C ..., after one warm-up round."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(case, batch, provider):
    """Measured by this script in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        case,
        "--batch",
        str(batch),
        "--provider",
        provider,
        "--threads",
        str(torch.get_num_threads()),
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=_environment()).stdout.split()[-1])


def measure(batch, repeats):
    """Rows of results."""
    stamp = {
        "batch": batch,
        "dtype": "float32",
        "mode": "forward + backward",
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for case, shape in cases().items():
        providers = (*PROVIDERS, "product") if shape else PROVIDERS
        seconds = time_in_turn({p: setup(shape, batch, p) for p in providers}, repeats)
        for provider in providers:
            ratios = [a / b for a, b in zip(seconds["reference"], seconds[provider], strict=True)]
            p20, p50, p80 = (_quantile(seconds[provider], q) for q in (0.2, 0.5, 0.8))
            rows.append(
                {
                    "op": case,
                    "shape": shape,
                    "provider": provider,
                    "p20": p20,
                    "p50": p50,
                    "p80": p80,
                    "speedup": statistics.median(ratios),
                    "speedup_range": [min(ratios), max(ratios)],
                    "peak_bytes": None if provider == "product" else peak_bytes(case, batch, provider),
                    **stamp,
                }
            )
        print(f"{case}: " + ", ".join(f"{r['provider']} {1e3 * r['p50']:.0f} ms" for r in rows[-len(providers) :]), flush=True)
    return rows


def table(rows) -> str:
    """Markdown."""
    by = {(r["op"], r["provider"]): r for r in rows}
    names = list(dict.fromkeys(r["op"] for r in rows))
    lines = [
        "| | C, n, r, k, stride, size | definition, ms | factored, ms | speed-up (range) | ceiling "
        "| peak memory, MiB: definition | factored | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    totals = {"reference": 0.0, "factored": 0.0, "product": 0.0}
    for name in names:
        slow, fast, product = (by.get((name, p)) for p in ("reference", "factored", "product"))
        low, high = fast["speedup_range"]
        ceiling = f"{product['speedup']:.1f}x" if product else ""
        if product:
            for r in (slow, fast, product):
                totals[r["provider"]] += r["p50"]
        memory = (slow["peak_bytes"] / 2**20, fast["peak_bytes"] / 2**20)
        shape = ", ".join(map(str, slow["shape"])) if slow["shape"] else "all, with pooling"
        lines.append(
            f"| {name} | {shape} | {1e3 * slow['p50']:.0f} | {1e3 * fast['p50']:.0f} | {fast['speedup']:.1f}x ({low:.1f}-{high:.1f}) "
            f"| {ceiling} | {memory[0]:.0f} | {memory[1]:.0f} | {memory[1] / memory[0]:.2f} |"
        )
    lines.insert(
        -1,
        f"| sum of the layers | | {1e3 * totals['reference']:.0f} | {1e3 * totals['factored']:.0f} "
        f"| {totals['reference'] / totals['factored']:.1f}x | {totals['reference'] / totals['product']:.1f}x | | | |",
    )
    r = rows[0]
    lines += [
        "",
        f"Forward + backward, batch {r['batch']}, {r['dtype']}; {r['device']}, {r['threads']} threads; torch {r['torch']}, "
        f"Python {r['python']}; commit {r['commit']}, {r['date']}.",
    ]
    return "\n".join(lines)


def _quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _processor():
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _report_peak(case, batch, provider):
    step = setup(cases()[case], batch, provider)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from the imports (Linux)
    before = _status("VmRSS")
    step()
    print(_status("VmHWM") - before)


def _status(key):
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _try_chunks(mib, batch, repeats):
    """Sum of the layers with chunks of ``mib`` beside the default, in turn."""
    from coda_fast.backends import factored

    default, ratios, total = factored.CHUNK_BYTES["cpu"], [], [0.0, 0.0]

    def with_chunks(size, step):
        factored.CHUNK_BYTES["cpu"] = int(size)
        step()

    for shape in filter(None, cases().values()):
        step = setup(shape, batch, "factored")
        sizes = {"default": default, "other": mib * 2**20}
        seconds = time_in_turn({name: functools.partial(with_chunks, size, step) for name, size in sizes.items()}, repeats)
        total = [t + statistics.median(seconds[name]) for t, name in zip(total, sizes, strict=True)]
        ratios.append(statistics.median(b / a for a, b in zip(seconds["default"], seconds["other"], strict=True)))
    print(f"{mib:g} MiB: {1e3 * total[1]:.0f} ms, default: {1e3 * total[0]:.0f} ms; ratios by layer {[round(r, 2) for r in ratios]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunk-mib", type=float, help="try another size of the factored backend's chunks; prints, stores nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results")
    parser.add_argument("--readme", action="store_true", help="put that table into README.md")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        return _report_peak(options.peak, options.batch, options.provider)
    if options.chunk_mib:
        return _try_chunks(options.chunk_mib, options.batch, options.repeats)
    if not (options.table or options.readme):
        rows = measure(options.batch, options.repeats)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    text = table(json.loads(RESULTS.read_text()))
    if options.readme:
        readme = ROOT / "README.md"
        head, rest = readme.read_text().split(MARKERS[0])
        tail = rest.split(MARKERS[1])[1]
        readme.write_text(f"{head}{MARKERS[0]}\n{text}\n{MARKERS[1]}{tail}")
    print(text)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    main()
