"""Fill Triton's cache in many processes at once, before kernels are timed or tested one by one:
compilation is most of the time of a first run.

python -m tools.warm --networks coda_s_cifar10 --dtype bfloat16 --workers 16
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

import coda_fast
from coda_fast.compile import PASSES

NETWORKS = ("coda_s_cifar10", "coda_l_imagenet100")
BATCH = 16  # any batch size: the kernels do not depend on it


def warm(wanted, device: str, workers: int, passes=PASSES) -> list[str]:
    """Compile every kernel of ``wanted``, a list of (network, dtype), with channels last where that is usual
    on the device. Returns the failures as text.

    Without a GPU, as a rehearsal, the kernels are compiled for an H100.
    """
    problems = []
    for network, dtype in wanted:
        try:
            model = coda_fast.create_model(network).to(memory_format=torch.channels_last)
            shape = (BATCH, model.image_channels, model.image_size, model.image_size)
            options = {
                "workers": workers,
                "passes": passes,
                "memory_format": torch.channels_last,
                "arch": None if device == "cuda" else 90,
            }
            coda_fast.compile_kernels(model, shape, getattr(torch, dtype), **options)
        except Exception as error:
            problems.append(f"failed: {network} {dtype}: {type(error).__name__}: {error}")
    return problems


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"]
    )
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("warm: needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    start = time.monotonic()
    problems = warm(
        [(network, dtype) for network in options.networks for dtype in options.dtype],
        options.device,
        options.workers,
    )
    print("\n".join([*problems, f"{time.monotonic() - start:.0f} s"]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
