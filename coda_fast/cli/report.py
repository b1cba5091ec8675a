"""``coda-fast report``."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from tqdm import tqdm

from coda_fast import safety
from coda_fast.cli import _options


@click.command("report")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@_options.ANY_CHECKPOINT
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("coda_report.html"),
    show_default=True,
    help="The page.",
)
@click.option(
    "--classes",
    type=click.IntRange(min=1),
    help="Maps of this many most likely classes. Default: as many as take a megabyte for each picture, 3 to "
    "20.",
)
@click.option(
    "--methods",
    cls=_options.Methods,
    help="Names separated by commas, beside the network's own maps, or 'none'. Default: IxG,IntGrad,GCam "
    "where captum is installed.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Of what folders hold, show this many, evenly.",
)
@_options.SIZE
@_options.DEVICE
def command(images, checkpoint, output, classes, methods, limit, size, device) -> None:
    """Write one HTML file that shows predictions and their contribution maps for IMAGES: files, or folders of
    them and of such folders.

    On the page, one chooses classes, reads contributions of pixels, and compares maps. It loads nothing from
    elsewhere. Files of a folder that cannot be read are named on it; of those that are given by name, all
    must be readable.
    """
    from coda_fast import report as page
    from coda_fast.explain_files import Means

    networks = _options.Networks(checkpoint, _options.usable_device(device))
    if output.exists():
        everything, _ = page.find_images(images, sys.maxsize)
        safety.check_outputs([output], [*networks.files(), *(path for path, *_ in everything)])
    safety.check_output_folder(output.parent)
    files, found = page.find_images(images, limit)
    if not files:
        raise click.UsageError("IMAGES: expected at least one image that can be read, got 0 files")
    chosen = {networks.title(path): networks(path) for path, *_ in files}
    count = None if classes is None else min(classes, *(model.num_classes for model in chosen.values()))
    skipped: list[str] = []
    others = (
        None
        if methods is None
        else [name for name in map(str.strip, methods.split(",")) if name and name.lower() != "none"]
    )
    notes = []
    if found > limit:
        notes.append(
            f"Folders hold {found} image files: {limit} of them are taken, evenly; --limit sets how many."
        )

    def means(path):
        model = networks(path)
        return Means(model, model.transform.at(size, crop=False), name=networks.title(path))

    text = page.stream(
        chosen,
        page.read_pictures(means, files, count, skipped),
        classes=count,
        methods=others,
        notes=notes,
        skipped=skipped,
        progress=lambda items, label: tqdm(items, desc=label, total=len(files), disable=None),
    )
    with safety.new_folder(output.parent):
        page.write(output, text)
    for note in notes:
        click.echo(note)
    lost = f", {len(skipped)} that could not be read" if skipped else ""
    by = safety.printable(", ".join(chosen))
    click.echo(f"{len(files) - len(skipped)} images{lost}, explained by {by} -> {safety.printable(output)}")
