"""``coda-fast evaluate``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from coda_fast import pretrained, safety
from coda_fast.cli import _options
from coda_fast.explain import batch_within, check_explainable


@click.command("evaluate")
@_options.CHECKPOINT
@click.option(
    "--data",
    required=True,
    help="A folder with a folder of images for each class, an .npz file, or 'digits'.",
)
@click.option(
    "--metric",
    type=click.Choice(["localisation", "removal", "accuracy"]),
    default="localisation",
    show_default=True,
)
@click.option(
    "--methods",
    cls=_options.Methods,
    default="Ours",
    show_default=True,
    help="Names separated by commas, or 'all'.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("coda_evaluation"),
    show_default=True,
    help="Folder for the results.",
)
@click.option(
    "--side",
    type=click.IntRange(2, 10),
    default=3,
    show_default=True,
    help="Localisation: grids of side x side images.",
)
@click.option(
    "--grids",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Localisation: how many grids at most.",
)
@click.option("--protocol", type=click.Choice(["plain", "published"]), default="plain", show_default=True)
@click.option(
    "--order",
    type=click.Choice(["least", "most"]),
    default="least",
    show_default=True,
    help="Removal: which pixels go first.",
)
@click.option(
    "--insert", is_flag=True, help="Removal: begin without any pixel and insert, in the same order."
)
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.25,
    show_default=True,
    help="Removal: of the pixels.",
)
@click.option(
    "--points",
    type=click.IntRange(2, 10_000),
    default=129,
    show_default=True,
    help="Removal: points of the curve.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="METHOD.NAME=VALUE",
    help="A setting of a method (Occ9.size=13); repeatable.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Use this many images only (published, for removal: 1024)."
)
@click.option(
    "--size",
    type=click.IntRange(0, 4096),
    help="Squares of this many pixels; 0: images as they are. Default: as trained.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    help="Processes that decode files. Default: 4 for a GPU, 0 for the CPU.",
)
@_options.DEVICE
def command(
    checkpoint,
    data,
    metric,
    methods,
    output,
    limit,
    size,
    workers,
    device,
    changes,
    side,
    grids,
    protocol,
    **removal,
) -> None:
    """Measure how good explanations are, by the metrics of the paper, for any of its methods; or (accuracy)
    how good predictions are.

    Pictures go through the same resize and crop as in training, which the checkpoint holds. Writes
    results.json, results.csv, and the figure as PNG and SVG, of the methods that are named. Interrupted, or
    with more methods, the same command goes on where it stopped: what is in the output folder is not measured
    again.
    """
    from coda_fast.evaluation import runner

    model = pretrained.load(checkpoint, device=_options.usable_device(device)).eval()
    checkpoint = pretrained.find(checkpoint)
    settings = (
        None if metric == runner.ACCURACY else runner.Settings(metric, side, grids, protocol, **removal)
    )
    if data != "digits":
        safety.check_output_folder(output, [data])
    safety.check_output_folder(output)
    safety.check_outputs(runner.outputs(output, metric), [checkpoint, data])
    if settings is None and changes:
        raise click.UsageError(f"--set: expected a metric that measures methods, got {metric}")
    attributions = {} if settings is None else _attributions(model, methods, changes)
    across = side if metric == "localisation" else 1
    found, batch = _survey(model, data, across, size=size, limit=limit, workers=workers)
    accuracy = found.accuracy()
    description = {
        "checkpoint": _digest(checkpoint),
        "data": data,
        "data_digest": found.digest,
        "images": len(found.names),
    }
    description |= {
        "skipped": len(found.skipped),
        "preprocessing": model.transform.at(size).config(),
        "accuracy": accuracy,
    }
    if settings is None:
        paths = runner.write_accuracy(model, found, description, output)
    else:
        paths = _measure(model, found, attributions, settings, description, output, batch)
    five = f", {accuracy['top5']:.2%} among the first five classes" if model.num_classes >= 100 else ""
    click.echo(f"accuracy {accuracy['top1']:.2%}{five} of {accuracy['images']} images")
    if found.skipped:
        click.echo(
            f"{len(found.skipped)} of {len(found.skipped) + accuracy['images']} files could not be read and "
            "were skipped"
        )
    click.echo("\n".join(map(str, paths)))


def _survey(model, data, across, *, size, limit, workers):
    """The images with their predictions, and the number that the network can take at once. Methods will
    explain grids of ``across`` x ``across`` images.
    """
    from coda_fast.evaluation import data as source
    from coda_fast.evaluation import runner

    if workers is None:
        workers = 0 if next(model.parameters()).device.type == "cpu" else 4
    preprocessing = model.transform.at(size)
    listed = source.load(
        data, model, preprocessing=preprocessing, limit=limit, workers=workers, progress=_options.bar
    )
    if listed.note:
        click.echo(listed.note, err=True)
    height, width = source.first_size(listed)
    check_explainable(model, across * height, across * width, f"data: {data}", across**2)
    batch = batch_within(model, height, width, source.BATCH)
    found = source.survey(model, listed, batch_size=batch, progress=_options.bar)
    for path, reason in found.skipped.items():
        click.echo(safety.printable(f"skipped {path}: {reason}"), err=True)
    return found, batch_within(model, height, width, runner.Evaluation.batch_size)


def _attributions(model, methods, changes):
    """{name: method} for the requested methods; of two that are equal on a CoDA-Net, only one."""
    from coda_fast import baselines

    names = (
        list(baselines.METHODS)
        if methods == "all"
        else list(dict.fromkeys(name.strip() for name in methods.split(",")))
    )
    for name, twin in baselines.twins_on(model).items():
        if name in names and (methods == "all" or twin in names):
            names.remove(name)
            click.echo(f"{name} is left out: on a CoDA-Net it is {twin}, to rounding", err=True)
    settings = _method_settings(changes, names)
    return {name: baselines.create(name, model, **chosen) for name, chosen in settings.items()}


def _measure(model, found, attributions, settings, description, output, batch):
    """Print and write the metric of each method; return the paths of the files."""
    from coda_fast.evaluation import runner
    from coda_fast.evaluation.localisation import surest

    labels = found.labels.to(next(model.parameters()).device)
    confident = surest(found.labels, found.predictions, found.own)
    evaluation = runner.Evaluation(
        model, found.images, labels, settings, output, description, batch, confident
    )
    try:
        results = {
            name: evaluation.measure(name, method, method.settings, _options.bar)
            for name, method in attributions.items()
        }
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command goes on from what is in {output}", err=True)
        raise
    paths = evaluation.write(results, {name: method.settings for name, method in attributions.items()})
    click.echo(runner.markdown(results))
    if settings.metric == "localisation":
        side = settings.side
        click.echo(f"{len(evaluation.work())} grids of {side} x {side}, chance {1 / side**2:.3f}")
    return paths


def _method_settings(changes, names):
    """{method: {setting: number}} for the methods to measure."""
    found = {name: {} for name in names}
    for change in changes:
        key, _, value = change.partition("=")
        method, _, setting = key.partition(".")
        try:
            number = float(value)
        except ValueError:
            number = None
        if not setting or number is None or method not in found:
            raise click.UsageError(
                f"--set: expected METHOD.NAME=NUMBER with a method among {', '.join(names)}, got {change!r}"
            )
        found[method][setting] = int(number) if number.is_integer() and "." not in value else number
    return found


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
