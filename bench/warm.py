"""Fill Triton's cache in many processes at once, before what is timed or tested one by one: compiling is most of a first run's time.

python bench/warm.py --networks coda_s_cifar10 --dtype bfloat16 --workers 16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402

import coda_fast  # noqa: E402
from bench import verify  # noqa: E402

BATCH = 16  # Triton compiles anew for sizes that are no multiple of 16
LETTERS = {"coda_s_cifar10": "S", "coda_l_imagenet100": "L"}


def warm(wanted, device: str, workers: int, until: float, folder: Path, layers: int | None = None) -> list[str]:
    """Every kernel of ``wanted``, (network, dtype) each, compiled: forward, backward and explanation. What failed, in words.

    Args:
        until: ``time.monotonic`` of the end, also of processes that have not come to theirs.
        layers: only so many of each network, for a rehearsal.
    """
    if device == "cuda" and hasattr(coda_fast, "compile_kernels"):
        return _by_the_package(wanted, workers)
    from bench import cases

    jobs = []
    for network, dtype in wanted:
        jobs += [[case.name, dtype] for case in cases.distinct(cases.layers({LETTERS[network]: BATCH}))[:layers]]
    folder.mkdir(parents=True, exist_ok=True)
    running, environment = [], verify.environment(folder / "warm.jsonl")
    for i, part in enumerate(jobs[i::workers] for i in range(min(workers, len(jobs)))):
        command = [sys.executable, __file__, "--device", device, "--part", json.dumps(part)]
        with open(folder / f"warm{i}.out", "w") as out:
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True))
    problems = []
    for i, status in enumerate(verify.wait(running, until)):
        if status == 1:
            lines = (folder / f"warm{i}.out").read_text(encoding="utf-8").strip().splitlines()
            problems += [line[:300] for line in lines if line.startswith("failed: ")] or [f"worker {i}: {lines[-1][:300] if lines else ''}"]
        elif status:
            problems.append(f"worker {i} ended with status {status}")
        elif status is None:
            problems.append(f"worker {i} did not come to an end")
    return problems


def _by_the_package(wanted, workers):
    problems = []
    for network, dtype in wanted:
        try:
            model = coda_fast.create_model(network, device="cuda", backend="triton")
            shape = (BATCH, model.image_channels, model.image_size, model.image_size)
            coda_fast.compile_kernels(model, shape, getattr(torch, dtype), workers=workers)
        except Exception as error:
            problems.append(f"failed: {network} {dtype}: {type(error).__name__}: {error}")
    return problems


def part(jobs, device: str) -> int:
    """The work of one process: these layers once in every mode. Exit status 1 if one of them failed, with a line that says how."""
    from bench import cases, measure, providers

    status = 0
    found = {case.name: case for letter in "SL" for case in cases.distinct(cases.layers({letter: BATCH}))}
    if device == "cpu":  # a rehearsal: the interpreter takes its time for every pixel
        found = {name: cases.dataclasses.replace(case, batch=1, size=8, units=min(case.units, 8)) for name, case in found.items()}
    for name, dtype in jobs:
        for mode in cases.LAYER_MODES:
            try:
                inputs, function = providers.setup(providers.CODA, found[name], mode, getattr(torch, dtype), torch.device(device))
                function(*inputs[0])
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                status = 1
                print(f"failed: {name} {dtype} {mode} {found[name].shape}: {measure.reason(error)}", flush=True)
    return status


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=LETTERS, default=list(LETTERS))
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("warm: needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    if options.part:
        return part(json.loads(options.part), options.device)
    start = time.monotonic()
    folder = ROOT / "bench" / "results" / "report" / "logs" / "warm"
    wanted = [(network, dtype) for network in options.networks for dtype in options.dtype]
    problems = warm(wanted, options.device, options.workers, start + 60 * options.minutes, folder)
    print("\n".join([*problems, f"{time.monotonic() - start:.0f} s"]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
