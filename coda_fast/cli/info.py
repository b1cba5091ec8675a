"""``coda-fast info``."""

from __future__ import annotations

import platform

import click
import torch

from coda_fast import backends
from coda_fast._version import __version__


@click.command("info")
def command() -> None:
    """Versions, devices and backends, and why each backend does or does not run here."""
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "not installed"
    rows = {
        "coda_fast": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "Triton": triton,
        "CUDA": f"{torch.version.cuda or 'not in this build of torch'}, {torch.cuda.device_count()} devices",
    }
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        devices.append(torch.device("cuda", index))
    for name, text in rows.items():
        click.echo(f"{name:10} {text}")
    for device in devices:
        click.echo(str(backends.backend_info(device)))
