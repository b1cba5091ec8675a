"""``coda-fast demo``."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("coda_demo"),
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 10**6),
    default=30,
    show_default=True,
    help="Passes over the training images, for each T.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def command(output: Path, epochs: int, seed: int) -> None:
    """Train small CoDA-Nets on scans of digits, at a low and a high temperature, and draw why they decide as
    they do.

    Takes about a minute on two cores. Writes a figure, a checkpoint and the numbers.
    """
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
