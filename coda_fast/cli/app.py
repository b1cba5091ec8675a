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
    help=f"{_options.MODEL_FILE} May be repeated: the page has a choice. Default: all of these.",
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
    for file in files or map(Path, pretrained.names()):
        name = str(file) if file.stem in networks else file.stem
        networks[name] = pretrained.load(file, device=device)
    photographs = None if files else pretrained.for_picture(480, 640)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which deletes the temporary folder, too
    app.serve(
        networks,
        photographs,
        host=host,
        port=port,
        ready=lambda address: click.echo(f"{address}   (Ctrl-C ends it)"),
    )
