"""The first two minutes on a GPU: does it compile, is it right, how far from the ceilings is it (``make gpu-smoke``).

    python bench/gpu_smoke.py --output FOLDER --minutes 2.5

Stages, each leaving its results as it ends: ceilings; the golden values and the layer tests in sixteen processes; every layer of the two
networks in bfloat16 beside the same-shape matrix products, with the time that each kernel takes in it; a step of S-CoDA by kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402

from bench import cases, measure, providers, results, verify  # noqa: E402

TESTS = ("tests/test_golden.py", "tests/kernels/test_layer.py", "tests/kernels/test_operators.py")


def median_us(function, inputs, seconds=0.15):
    """Median over events around single calls, inputs in rotation."""
    for arguments in inputs[:3]:
        function(*arguments)
    torch.cuda.synchronize()
    times, start, i = [], time.monotonic(), 0
    while time.monotonic() - start < seconds or len(times) < 5:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # the host runs ahead: what is timed is the device
        before.record()
        function(*inputs[i % len(inputs)])
        after.record()
        after.synchronize()
        times.append(1e3 * before.elapsed_time(after))
        i += 1
    return sorted(times)[len(times) // 2]


def by_kernel(function, inputs):
    """{kernel: [microseconds, launches]} of one call, from the profiler."""
    function(*inputs[0])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for arguments in (inputs * 3)[:3]:
            function(*arguments)
        torch.cuda.synchronize()
    found = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            found[event.key[:90]] = [round(event.self_device_time_total / 3, 1), event.count / 3]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def ceilings(device) -> dict:
    """What nothing goes beyond: the product of two matrices of 8192 x 8192 in bfloat16, and a copy of 1 GiB, read and written."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return {
        "product_tflops": round(2 * 8192**3 / median_us(lambda: a @ b, [()]) / 1e6, 1),
        "copy_tb_s": round(2 * 2**30 / median_us(lambda: target.copy_(source), [()]) / 1e6, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    finish = start + 60 * options.minutes
    device = torch.device("cuda")
    options.output.mkdir(parents=True, exist_ok=True)
    found = {"of": {**results.environment(device), "commit": os.environ.get("CODA_FAST_COMMIT") or results.commit()}, "rows": []}

    def keep():
        (options.output / "smoke.json").write_text(json.dumps(found, indent=1) + "\n")

    print(found["of"], flush=True)
    found |= ceilings(device)
    print(found["product_tflops"], "TFLOP/s", found["copy_tb_s"], "TB/s", flush=True)
    keep()
    if not options.no_tests:
        now = time.monotonic()
        tests = verify.collect(*TESTS, "-m", "not slow", timeout=60)
        verdict = verify.shards(tests, min(16, os.cpu_count() or 1), start + 0.6 * (finish - start), options.output / "logs")
        verdict.write(options.output / "smoke_tests.json", **found["of"])
        print(f"{len(tests)} tests, {time.monotonic() - now:.0f} s: {verdict}", flush=True)
        for out in (options.output / "logs").glob("*.out"):
            lines = [line for line in out.read_text().splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))]
            print("\n".join(line[:300] for line in lines[:12]), flush=True)
    layers = {case.name: case for case in cases.distinct(cases.layers({"S": 256, "L": 64}))}
    for name in sorted(layers, key=lambda n: ("S7" not in n, "L7" not in n, n)):
        case = layers[name]
        for mode in (cases.FORWARD, cases.TRAINING):
            if time.monotonic() > finish - 12:
                break
            row = {"layer": name, "mode": mode, "shape": case.shape}
            try:
                inputs, product = providers.setup(providers.PRODUCT, case, mode, torch.bfloat16, device)
                row["product_us"] = round(median_us(product, inputs, 0.05), 1)
                for provider in (providers.CODA, providers.ALGEBRAIC):
                    inputs, function = providers.setup(provider, case, mode, torch.bfloat16, device)
                    row[f"{provider}_us"] = round(median_us(function, inputs), 1)
                    if provider == providers.CODA:
                        row["kernels"] = by_kernel(function, inputs)
            except Exception as error:
                row["error"] = measure.reason(error)
                traceback.print_exc()
            found["rows"].append(row)
            keep()
            print({key: value for key, value in row.items() if key not in ("shape", "kernels")}, flush=True)
            torch.cuda.empty_cache()
    for network, batch, size in (("coda_s_cifar10", 256, 32), ("coda_l_imagenet100", 64, 240)):
        if time.monotonic() > finish - 8:
            break
        inputs, step = providers.setup(providers.CODA, cases.Network(network, batch, size), cases.STEP, torch.bfloat16, device)
        found[network] = {"step_us": median_us(step, inputs, 0.5), "kernels": by_kernel(step, inputs)}
        print(network, found[network]["step_us"], flush=True)
        keep()
    print(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
