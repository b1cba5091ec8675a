"""``coda-fast explain``."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import click
from tqdm import tqdm

from coda_fast import explain_files, safety
from coda_fast.cli import _options
from coda_fast.video import explain_video
from coda_fast.viewer import verdict


def _seconds(context, parameter, text):
    """Seconds from 5, 0:05 or 1:00:05."""
    if text is None:
        return None
    try:
        parts = [float(part) for part in text.split(":")]
        if not all(0 <= part < float("inf") for part in parts) or len(parts) > 3:
            raise ValueError
    except ValueError:
        raise click.BadParameter(
            f"expected a time such as 5, 2.5 or 0:05, got {text!r}", context, parameter
        ) from None
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


@click.command("explain")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@_options.ANY_CHECKPOINT
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Class to explain, by number or name; repeatable. Default: the two most likely.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("."),
    show_default=True,
    help="Folder for the figures.",
)
@_options.SIZE
@_options.DEVICE
@click.option("--start", callback=_seconds, help="Videos: begin at this time, in seconds or as M:SS.")
@click.option("--end", callback=_seconds, help="Videos: stop before this time.")
@click.option(
    "--crop", type=int, nargs=4, metavar="X Y W H", help="Videos: this box only, in pixels of the source."
)
@click.option(
    "--scale", type=float, help="Videos: end of the colour scale, in logits. Default: from all frames."
)
@click.option(
    "--format",
    "ending",
    type=click.Choice(["mp4", "gif"]),
    help="Videos: format written. Default: gif for a GIF, else mp4.",
)
def command(images, checkpoint, targets, output, size, device, start, end, crop, scale, ending) -> None:
    """Draw which pixels of each IMAGE speak for and against a class, and prove that nothing is missing.

    For IMAGE.png the figure is IMAGE_explained.png in the output folder: the picture that was given, with
    what the network saw of it, and the maps where they belong. Of a folder, all pictures in it are explained,
    into folders of the same names. A video or an animated GIF becomes a video (without sound) of its frames
    beside their contribution maps, for one class: by default that predicted for most frames.
    """
    networks = _options.Networks(checkpoint, _options.usable_device(device))
    classes = functools.cache(lambda name: [_options.class_index(t, networks.load(name)) for t in targets])
    if networks.given is not None:
        classes(networks.given)

    def means(path):
        name = networks.name(path)
        model = networks.load(name)
        preprocessing = model.transform.at(size, crop=False)
        return explain_files.Means(model, preprocessing, classes(name), networks.title(path))

    jobs = explain_files.plan(images, output, ending)
    videos = [job for job in jobs if job.video]
    pictures = [job for job in jobs if not job.video]
    options = dict(start=start, end=end, crop=crop, scale=scale, format=ending)
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given and pictures:
        raise click.UsageError(
            f"{', '.join(given)}: expected videos only, got {pictures[0].source}, a picture or a file that "
            "cannot be read"
        )
    if videos and len(targets) > 1:
        raise click.UsageError(
            f"--target: expected one class for a video ({videos[0].source}), got {len(targets)}"
        )
    safety.check_output_folder(output, [path for path in images if path.is_dir()])
    safety.check_outputs([job.result for job in jobs], [*(job.source for job in jobs), *networks.files()])

    def skip(error):
        click.echo(safety.printable(f"skipped {error}"), err=True)

    # before anything is written
    pictures = explain_files.readable(means, pictures, skip, _options.bar)
    with safety.new_folder(output):
        for job in videos:
            name = networks.name(job.source)
            target = next(iter(classes(name)), None)
            options = dict(start=start or 0.0, end=end, crop=crop, scale=scale, size=size, target=target)
            _explain_clip(networks.load(name), job, networks.title(job.source), **options)
        for job in pictures:
            try:
                found = explain_files.explain_picture(means(job.source), job.source, job.result)
            except ValueError as error:  # the file has changed since, or the logits are not finite
                if job.named:
                    raise
                skip(error)
            else:
                _say(job, means(job.source), found)


def _explain_clip(model, job, network, **options):
    with (
        warnings.catch_warnings(record=True) as caught,
        tqdm(desc=job.source.name, unit=" frames", disable=None) as bar,
    ):
        warnings.simplefilter("always")

        def advance(frames, total):
            bar.total = total
            bar.update(frames)

        result = explain_video(model, job.source, job.result, progress=advance, **options)
    for message in dict.fromkeys(str(w.message) for w in caught):
        click.echo(f"coda-fast: warning: {message}", err=True)
    click.echo(
        f"{safety.printable(job.source)}: {result.frames} frames, "
        f"{result.verdict(model.class_names, network)}, colours to {result.scale:.3g} logits, "
        f"completeness error {result.completeness_error:.1e} logits -> {safety.printable(job.result)}"
    )


def _say(job, means, explanation):
    """One line about a picture."""
    error = float(explanation.completeness_error.max())
    says = verdict(explanation.logits[0], means.model.class_names, means.name)
    click.echo(
        f"{safety.printable(job.source)}: {says}, completeness error {error:.1e} logits -> "
        f"{safety.printable(job.result)}"
    )
