"""``coda-fast channels``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from coda_fast import explain_files, plot, pretrained, safety
from coda_fast.cli import _options
from coda_fast.data import decode
from coda_fast.explain import batch_within

FILE = "strongest.safetensors"  # in the output folder


@click.command("channels")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@_options.CHECKPOINT
@click.option(
    "--data",
    required=True,
    help="The set of pictures that may excite channels: a folder with a folder of images for each class, an "
    ".npz file, or 'digits'.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use this many pictures of the data only.")
@click.option(
    "--count", type=click.IntRange(1, 20), default=5, show_default=True, help="How many channels to show."
)
@click.option("--target", help="Class to explain, by number or name. Default: the most likely.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("coda_channels"),
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--size",
    type=click.IntRange(0, 4096),
    help="Squares of this many pixels; 0: images as they are. Default: as trained.",
)
@_options.DEVICE
def command(images, checkpoint, data, limit, count, target, output, size, device) -> None:
    """Draw which channels of a hybrid network's stem decide about each IMAGE, and which pictures of a set
    excite these channels most.

    For IMAGE.png the figure is IMAGE_channels.png in the output folder. The contributions of all channels add
    up to the logit, exactly; the pictures only show what excites a channel. They are found in one pass over
    the data, which strongest.safetensors keeps: the same command with other images does not repeat it.
    """
    from coda_fast import channels
    from coda_fast.evaluation import data as source

    model = pretrained.load(checkpoint, device=_options.usable_device(device)).eval()
    channels.stem_of(model)
    preprocessing = model.transform.at(size)
    classes = [] if target is None else [_options.class_index(target, model)]
    means = explain_files.Means(model, preprocessing, classes)
    jobs = explain_files.plan(images, output)
    if videos := [job.source for job in jobs if job.video]:
        raise click.UsageError(f"IMAGES: expected pictures, got a video: {videos[0]}")
    jobs = [dataclasses.replace(job, result=_renamed(job.result)) for job in jobs]
    kept = output / FILE
    safety.check_output_folder(output, [path for path in [*images, Path(data)] if path.is_dir()])
    inputs = [*(job.source for job in jobs), pretrained.find(checkpoint), data]
    safety.check_outputs([*(job.result for job in jobs), kept], inputs)

    def skip(error):
        click.echo(safety.printable(f"skipped {error}"), err=True)

    listed = source.load(data, model, preprocessing=preprocessing, limit=limit, progress=_options.bar)
    if listed.note:
        click.echo(listed.note, err=True)
    found = None
    if kept.exists():
        try:
            found = channels.Strongest.load(kept, model, listed.source)
        except ValueError as error:
            raise ValueError(f"{error}; delete it, or choose another --output") from None
    jobs = explain_files.readable(lambda path: means, jobs, skip, _options.bar)
    with safety.new_folder(output):
        if found is None:
            height, width = source.first_size(listed)
            batch = batch_within(model, height, width, source.BATCH)
            found = channels.strongest(model, listed.source, batch_size=batch, progress=_options.bar)
            for name, reason in found.skipped.items():
                click.echo(safety.printable(f"skipped {name}: {reason}"), err=True)
            found.save(kept)
        for job in _options.bar(jobs, "drawing") if len(jobs) > 1 else jobs:
            image = means.read(job.source)[None].to(next(model.parameters()))
            explanation = model.explain(image, *classes)
            view = plot.View.of(decode(job.source), preprocessing)
            figure = channels.channel_figure(model, explanation, found, listed.source, count=count, view=view)
            job.result.parent.mkdir(parents=True, exist_ok=True)
            plot.save_figure(figure, job.result)
            click.echo(_line(job, explanation, channels.leading(explanation, count=count)))


def _renamed(path):
    return path.with_name(path.name.removesuffix("_explained.png") + "_channels.png")


def _line(job, explanation, found):
    """One line about a picture, whose numbers add up to its logit."""
    bias, *terms, rest, logit = found.amounts()
    parts = [f"channel {term.channel} {amount}" for term, amount in zip(found.terms, terms, strict=True)]
    others = f"{found.others} others" if found.others else "rounding"
    name = explanation.name(int(explanation.target[0, 0]))
    return safety.printable(
        f"{job.source}: {name}: bias {bias}, {', '.join(parts)}, {others} {rest}: logit {logit} "
        f"-> {job.result}"
    )
