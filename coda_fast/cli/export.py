"""``coda-fast export``."""

from __future__ import annotations

from pathlib import Path

import click

from coda_fast import pretrained, safety
from coda_fast.cli import _options


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "pt2"]),
    default="onnx",
    show_default=True,
    help="pt2: AOTInductor's package.",
)
@click.option(
    "--explain",
    "explained",
    is_flag=True,
    help="Also the contribution map of a class that is given with the images.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The file. Default: the name of CHECKPOINT with the new ending, here.",
)
@click.option("--size", type=click.IntRange(1, 4096), help="Height and width of the images. Default: any.")
@click.option(
    "--device", default="cpu", show_default=True, help="pt2: where the package will run: cpu, cuda ..."
)
def command(
    checkpoint: Path, kind: str, explained: bool, output: Path | None, size: int | None, device: str
) -> None:
    """Write the network of CHECKPOINT (a file, or a name of the package), and its exact explanation, as a
    file that runs without coda_fast: in onnxruntime, or compiled.

    Images are [N, C, H, W], float32 in [0, 1]. The file names its inputs, outputs and classes:
    docs/export.md.
    """
    from coda_fast import export as exporter

    output = Path(f"{checkpoint.stem}.{kind}") if output is None else output
    safety.check_outputs([output], [pretrained.find(checkpoint)])
    safety.check_output_folder(output.parent)
    write = exporter.export_onnx if kind == "onnx" else exporter.export_pt2
    model = pretrained.load(checkpoint, device=_options.usable_device(device))
    try:
        write(model, output, explain=explained, size=size)
    except exporter.ExportError as error:
        raise click.ClickException(str(error)) from None
    what = "logits and contribution map" if explained else "logits"
    sizes = f"{size} x {size} pixels" if size else "any size"
    bytes_written = output.stat().st_size
    click.echo(
        f"{safety.printable(checkpoint)}: {what} of images of {sizes}, {bytes_written / 1e6:.1f} MB -> "
        f"{safety.printable(output)}"
    )
