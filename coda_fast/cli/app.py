"""``coda-fast app``."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from coda_fast import pretrained
from coda_fast.cli import _options
from coda_fast.network import Network


@click.command("app")
@click.option(
    "--checkpoint",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A model file (of coda_fast.save, train or demo), or the name of a network that the package "
    "contains. May be repeated; the page then has a choice. Default: all networks of the package.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address of this computer at which the page is served. With 0.0.0.0, other computers reach it.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@_options.DEVICE
def command(files, host, port, device) -> None:
    """Serve a web page to look at explanations of pictures and short videos, until Ctrl-C.

    The page asks for nothing outside this computer. Pictures are deleted with their answer.
    """
    from coda_fast import app

    device = _options.usable_device(device)
    networks: dict[str, Network] = {}
    for file in files or map(Path, reversed(pretrained.names())):  # that for photographs comes first
        name = file.stem if file.stem not in networks else str(file)
        networks[name] = pretrained.load(file, device=device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which deletes the temporary folder, too
    app.serve(
        networks, host=host, port=port, ready=lambda address: click.echo(f"{address}   (Ctrl-C ends it)")
    )
