"""``coda-fast demo``."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from coda_fast import safety


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("coda_demo"),
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--train",
    is_flag=True,
    help="Instead train small networks on scans of digits, at a low and a high temperature (a minute).",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 10**6),
    help="With --train: passes over the training images, for each T.  [default: 30]",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="With --train.  [default: 0]")
def command(output: Path, train: bool, epochs: int | None, seed: int | None) -> None:
    """Explain example photographs with the networks that the package contains, and draw a figure: what speaks
    for a class, for the next one, and for the one rather than the other.

    With --train: train on scans of digits and draw why the networks decide as they do; writes a figure, a
    checkpoint and the numbers.
    """
    safety.check_output_folder(output)
    if train:
        _train(output, epochs or 30, seed or 0)
        return
    if given := [name for name, value in (("--epochs", epochs), ("--seed", seed)) if value is not None]:
        raise click.UsageError(f"{', '.join(given)}: expected --train beside it")
    from coda_fast.demo import photographs

    result = photographs.run(output, lambda it, label: tqdm(it, desc=label, disable=None))
    click.echo("\n".join(result.lines))
    if result.note:
        click.echo(result.note)
    click.echo(f"figure  {safety.printable(result.figure)}")
    click.echo("explain your own pictures: coda-fast explain IMAGE ...; in a browser: coda-fast app")


def _train(output, epochs, seed):
    from coda_fast import demo as demonstration

    result = demonstration.run(
        output, epochs=epochs, seed=seed, progress=lambda it, label: tqdm(it, desc=label, unit="epoch")
    )
    chance = result.numbers["chance_localisation"]
    click.echo(
        f"{'T':>6} {'accuracy':>9} {'completeness error':>19} {'localisation':>13}   (2x2 grids, chance "
        f"{chance})"
    )
    for row in result.numbers["results"]:
        score = demonstration.score_text(row["localisation"])
        click.echo(
            f"{row['temperature']:6g} {row['accuracy']:9.1%} {row['relative_completeness_error']:19.1e} "
            f"{score:>13}"
        )
    click.echo(
        f"figure      {result.figure}\ncheckpoint  {result.checkpoint}\nnumbers     {result.numbers_file}"
    )
    click.echo(f"explain your own image: coda-fast explain IMAGE --checkpoint {result.checkpoint}")
