"""``coda-fast train``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from coda_fast import safety


@click.command("train")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run. Default: coda_runs/RECIPE.",
)
@click.option(
    "--resume",
    help="'auto': go on from the newest readable checkpoint of the folder, if there is one; or a checkpoint "
    "file.",
)
@click.option("--quiet", is_flag=True, help="No progress bar, no messages.")
@click.option("--show", is_flag=True, help="Print the recipe with all its values, and train nothing.")
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: str | None,
    quiet: bool,
    show: bool,
) -> int:
    """Train a CoDA-Net by RECIPE (a name or a .yaml file) with changes such as optimizer.lr=1e-3; without
    arguments: list the recipes.

    SIGTERM and SIGUSR1 write a checkpoint and end the program with exit code 75 (0 under torchrun, which
    would start it again otherwise).
    """
    from coda_fast import train as training
    from coda_fast.train.errors import SIGNALS, Stopped

    if recipe is None:
        click.echo("\n".join(f"{name:16} {about}" for name, about in training.list_recipes().items()))
        return 0
    chosen = training.load_recipe(recipe, overrides)
    if show:
        click.echo(chosen.to_yaml(), nl=False)
        return 0
    if output is None and (chosen.name in ("", ".", "..") or Path(chosen.name).name != chosen.name):
        raise click.UsageError(
            f"name: expected a recipe with a name for its folder, or --output, got {chosen.name!r}"
        )
    output = Path("coda_runs") / chosen.name if output is None else output
    own = Path(recipe)
    # a recipe that would be overwritten with identical content is allowed
    if own.is_file() and own.read_text(encoding="utf-8") != chosen.to_yaml():
        safety.check_outputs([output / name for name in training.FILES], [own])
    try:
        training.run(chosen, output, resume, progress=not quiet)
    except Stopped as stop:
        for number in SIGNALS:  # a second signal during the exit would change the exit code
            signal.signal(number, signal.SIG_IGN)
        click.echo(f"coda-fast: {stop}", err=True)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return training.STOPPED
    # Everything is written. Threads of gloo can abort the interpreter at its exit, whereupon torchrun's agent
    # would restart the run.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    return 0
