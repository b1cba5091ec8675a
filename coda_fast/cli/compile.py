"""``coda-fast compile``."""

from __future__ import annotations

import click
import torch
from tqdm import tqdm

from coda_fast import checkpoints


@click.command("compile")
@click.argument("network")
@click.option(
    "--size",
    type=click.IntRange(1, 16384),
    help="Height and width of the images. Default: that of the network.",
)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True
)
@click.option(
    "--arch",
    help="Compute capability as 80, 90 or 100, or gfx942. Default: that of the GPU at hand; another one "
    "needs no GPU.",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes. Default: one for each processor.")
def command(network: str, size: int | None, dtype: str, arch: str | None, workers: int | None) -> None:
    """Compile all fused kernels of NETWORK (a name or a checkpoint) ahead of the first step, in parallel,
    into Triton's cache.
    """
    from coda_fast import compile_kernels, create_model, list_models

    try:
        model = create_model(network) if network in list_models() else checkpoints.load(network)
    except FileNotFoundError as error:
        raise click.UsageError(f"{error}, and no network of that name (list_models)") from None
    model = model.to(memory_format=torch.channels_last)
    if (side := size or model.image_size) is None:
        raise click.UsageError(f"--size: expected the height and width of the images, {network} names none")
    shape = (16, model.image_channels, side, side)
    target = int(arch) if arch and arch.isdigit() else arch
    with tqdm(desc=network, unit=" kernels", disable=None) as bar:

        def advance(done, total):
            bar.total = total
            bar.update(done - bar.n)

        options = {
            "workers": workers,
            "arch": target,
            "memory_format": torch.channels_last,
            "progress": advance,
        }
        count = compile_kernels(model, shape, getattr(torch, dtype), **options)
    click.echo(f"{count} kernels of {network} in {dtype} are in Triton's cache")
