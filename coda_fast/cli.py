"""The command line: ``coda-fast demo|train|explain|evaluate|report|compile|export|info``. Bad input: one
line, exit code 2, no file.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import os
import platform
import signal
import sys
import warnings
from pathlib import Path

import torch

from coda_fast import backends, checkpoints, plot, safety
from coda_fast._version import __version__
from coda_fast.explain import PixelRangeWarning

try:
    import click
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"coda-fast: the command line needs {error.name}: pip install 'coda-fast[cli]'"
    ) from None

BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    warnings.showwarning = _warn
    try:
        code = cli.main(arguments, prog_name="coda-fast", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(BAD_INPUT) from None
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        raise SystemExit(130) from None
    except (ValueError, ImportError, OSError, backends.BackendUnavailable) as error:
        # what the library raises for bad input, each with one clear line; anything else is a bug and keeps
        # its traceback
        _fail(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        _fail(f"not enough memory: {error or 'of this machine'}")
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what torch says on a CPU
            raise
        _fail(f"not enough memory: {str(error).partition('DefaultCPUAllocator: ')[2] or error}")
    raise SystemExit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coda-fast")
def cli() -> None:
    """Convolutional Dynamic Alignment Networks: image classifiers that explain themselves."""


@cli.command()
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
def demo(output: Path, epochs: int, seed: int) -> None:
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


class _Methods(click.Option):
    """An option whose help ends with the names of all attribution methods that are registered."""

    def get_help_record(self, context):
        from coda_fast import baselines

        named = copy.copy(self)
        named.help = f"{self.help} Methods: {', '.join(baselines.METHODS)}."
        return super(_Methods, named).get_help_record(context)


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


@cli.command()
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
def train(
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
    # written over with itself, it stays as it is
    if own.is_file() and own.read_text(encoding="utf-8") != chosen.to_yaml():
        safety.check_outputs([output / name for name in training.FILES], [own])
    try:
        training.run(chosen, output, resume, progress=not quiet)
    except Stopped as stop:
        for number in SIGNALS:  # a second one, on the way out, would take the exit code
            signal.signal(number, signal.SIG_IGN)
        click.echo(f"coda-fast: {stop}", err=True)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return training.STOPPED
    # all is written; threads of gloo can abort the interpreter's end, and the agent would restart
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    return 0


_SIZE = click.option(
    "--size",
    type=click.IntRange(0, 4096),
    help="Whole pictures, their shorter side scaled to this many pixels; 0: as they are. Default: resized "
    "and cropped as in training.",
)


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="A model file: of coda_fast.save, train or demo.",
)
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
@_SIZE
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
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
def explain(images, checkpoint, targets, output, size, device, start, end, crop, scale, ending) -> None:
    """Draw which pixels of each IMAGE speak for and against a class, and prove that nothing is missing.

    For IMAGE.png the figure is IMAGE_explained.png in the output folder: the picture that was given, with
    what the network saw of it, and the maps where they belong. Of a folder, all pictures in it are explained,
    into folders of the same names. A video or an animated GIF becomes a video (without sound) of its frames
    beside their contribution maps, for one class: by default that predicted for most frames.
    """
    from coda_fast.data import listing
    from coda_fast.video import explain_video, is_video

    model = checkpoints.load(checkpoint, device=_device(device)).eval()
    classes = [_class_index(t, model) for t in targets]
    preprocessing = model.transform.at(size, crop=False)
    files = []  # path, and where its result goes, below the output folder
    for path in images:
        found = listing.pictures(path) if path.is_dir() else []
        if path.is_dir() and not found:
            raise click.UsageError(f"IMAGES: expected pictures in {path}, found none")
        files += (
            [(file, file.relative_to(path).parent) for file in found] if path.is_dir() else [(path, Path())]
        )
    videos = [(path, place) for path, place in files if path in images and path.is_file() and is_video(path)]
    pictures = [entry for entry in files if entry not in videos]
    given = dict(start=start, end=end, crop=crop, scale=scale, format=ending)
    given = [f"--{name}" for name, value in given.items() if value is not None]
    if given and pictures:
        raise click.UsageError(
            f"{', '.join(given)}: expected videos only, got {pictures[0][0]}, a picture or a file that "
            "cannot be read"
        )
    if videos and len(classes) > 1:
        raise click.UsageError(
            f"--target: expected one class for a video ({videos[0][0]}), got {len(classes)}"
        )
    safety.check_output_folder(output, [path for path in images if path.is_dir()])
    clips = [
        output / f"{path.stem}_explained.{ending or ('gif' if path.suffix.lower() == '.gif' else 'mp4')}"
        for path, _ in videos
    ]
    figures = _figures(output, pictures, named=set(images))
    results = collections.Counter(figures + clips)
    if twice := sorted(path for path, count in results.items() if count > 1):
        raise click.UsageError(
            f"several images would be written to {', '.join(map(str, twice[:5]))}; explain them one by one"
        )
    safety.check_outputs(figures + clips, [*(path for path, _ in files), checkpoint])

    def skip(path, error):
        """What is not asked for by name is passed over, and named."""
        if path in images:
            raise error
        click.echo(safety.printable(f"skipped {error}"), err=True)

    # every picture is read and checked before anything is written, and again when its turn comes: a set need
    # not fit into memory
    readable = []
    for (path, _), figure in zip(
        _bar(pictures, "reading") if len(pictures) > 1 else pictures, figures, strict=True
    ):
        try:
            _as_network_sees(model, path, preprocessing, classes)
            readable.append((path, figure))
        except ValueError as error:
            skip(path, error)
    if pictures and not readable:
        raise click.UsageError(
            f"IMAGES: expected at least one image that can be read, got {len(pictures)} files"
        )
    new_folders = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        for (path, _), clip in zip(videos, clips, strict=True):
            options = dict(
                start=start or 0.0,
                end=end,
                crop=crop,
                scale=scale,
                size=size,
                target=classes[0] if classes else None,
            )
            _explain_clip(explain_video, model, path, clip, options)
        for path, figure in readable:
            try:
                _explain_picture(model, path, figure, preprocessing, classes)
            except ValueError as error:  # it is not what it was, or the network has no finite answer to it
                skip(path, error)
    except BaseException:
        _remove_empty(new_folders)
        raise


def _figures(output, pictures, named):
    """Where the figure of each picture goes; of several in one folder that differ in their endings, these
    stay in the names.
    """
    counts = collections.Counter((place, path.stem) for path, place in pictures)
    several = lambda path, place: counts[place, path.stem] > 1 and path not in named
    return [
        output / place / f"{path.name if several(path, place) else path.stem}_explained.png"
        for path, place in pictures
    ]


def _as_network_sees(model, path, preprocessing, classes):
    """[C, H, W]. ValueError: a picture that cannot be read, or whose explanation this machine cannot hold."""
    tensor = preprocessing(path)
    safety.check_explainable(model, *tensor.shape[1:], str(path), len(classes) or min(2, model.num_classes))
    return tensor


def _explain_clip(explain_video, model, path, clip, options):
    with (
        warnings.catch_warnings(record=True) as caught,
        tqdm(desc=path.name, unit=" frames", disable=None) as bar,
    ):
        warnings.simplefilter("always")

        def advance(frames, total):
            bar.total = total
            bar.update(frames)

        result = explain_video(model, path, clip, progress=advance, **options)
    for message in dict.fromkeys(str(w.message) for w in caught):
        click.echo(f"coda-fast: warning: {message}", err=True)
    click.echo(
        f"{safety.printable(path)}: {result.frames} frames, {_class_name(result.target, model)}, colours to "
        f"{result.scale:.3g} logits, "
        f"completeness error {result.completeness_error:.1e} logits -> {safety.printable(clip)}"
    )


def _explain_picture(model, path, figure, preprocessing, classes):
    from coda_fast.data import decode

    batch = _as_network_sees(model, path, preprocessing, classes)[None].to(next(model.parameters()))
    with torch.no_grad():
        logits = model(batch)
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{path}: the network gives logits that are not finite: {logits.flatten().tolist()[:4]}"
        )
    chosen = torch.tensor([classes]) if classes else logits.topk(min(2, model.num_classes)).indices
    explanation = model.explain(batch, chosen)
    views = [plot.View.of(decode(path), preprocessing)]
    drawn = plot.render(
        plot.explanation_figure(batch, explanation, model.logit_bias, model.class_names, views=views)
    )
    figure.parent.mkdir(parents=True, exist_ok=True)
    with checkpoints.atomic_path(figure) as temporary:
        temporary.write_bytes(drawn)
    best = int(explanation.logits[0].argmax())
    sure = plot.probability(float(explanation.logits[0, best].sigmoid()))
    error = float(explanation.completeness_error.max())
    names = safety.printable(path), safety.printable(figure)
    click.echo(
        f"{names[0]}: {_class_name(best, model)} ({sure}), completeness error {error:.1e} logits -> "
        f"{names[1]}"
    )


def _bar(items, label):
    return tqdm(items, desc=label, disable=None)


@cli.command()
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="A model file: of coda_fast.save, train or demo.",
)
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
    "--methods", cls=_Methods, default="Ours", show_default=True, help="Names separated by commas, or 'all'."
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
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def evaluate(
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
    from coda_fast import baselines
    from coda_fast.evaluation import data as source
    from coda_fast.evaluation import runner
    from coda_fast.evaluation.localisation import surest

    model = checkpoints.load(checkpoint, device=_device(device)).eval()
    settings = (
        None if metric == runner.ACCURACY else runner.Settings(metric, side, grids, protocol, **removal)
    )
    if data != "digits":
        safety.check_output_folder(output, [data])
    safety.check_output_folder(output)
    safety.check_outputs(runner.outputs(output, metric), [checkpoint, data])
    names = (
        list(baselines.METHODS)
        if methods == "all"
        else list(dict.fromkeys(name.strip() for name in methods.split(",")))
    )
    if settings is None:
        names = []
        if changes:
            raise click.UsageError(f"--set: expected a metric that measures methods, got {metric}")
    for name, twin in baselines.TWINS.items():
        if name in names and (methods == "all" or twin in names):
            names.remove(name)
            click.echo(f"{name} is left out: on a CoDA-Net it is {twin}, to rounding", err=True)
    attributions = {
        name: baselines.create(name, model, **chosen)
        for name, chosen in _method_settings(changes, names).items()
    }
    workers = (0 if model.layers[0].weight.device.type == "cpu" else 4) if workers is None else workers
    listed = source.load(
        data, model, preprocessing=model.transform.at(size), limit=limit, workers=workers, progress=_bar
    )
    if listed.note:
        click.echo(listed.note, err=True)
    height, width = source.first_size(listed)
    across, classes = (side, side**2) if metric == "localisation" else (1, 1)
    safety.check_explainable(model, across * height, across * width, f"data: {data}", classes)
    found = source.survey(
        model, listed, batch_size=safety.batch_within(model, height, width, source.BATCH), progress=_bar
    )
    for path, reason in found.skipped.items():
        click.echo(safety.printable(f"skipped {path}: {reason}"), err=True)
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
        together = safety.batch_within(model, height, width, runner.Evaluation.batch_size)
        labels, confident = (
            found.labels.to(next(model.parameters()).device),
            surest(found.labels, found.predictions, found.own),
        )
        evaluation = runner.Evaluation(
            model, found.images, labels, settings, output, description, together, confident
        )
        try:
            results = {
                name: evaluation.measure(name, a, a.settings, _bar) for name, a in attributions.items()
            }
        except KeyboardInterrupt:
            click.echo(f"interrupted; the same command goes on from what is in {output}", err=True)
            raise
        paths = evaluation.write(results, {name: a.settings for name, a in attributions.items()})
        click.echo(runner.markdown(results))
        if metric == "localisation":
            click.echo(f"{len(evaluation.work())} grids of {side} x {side}, chance {1 / side**2:.3f}")
    five = f", {accuracy['top5']:.2%} among the first five classes" if model.num_classes >= 100 else ""
    click.echo(f"accuracy {accuracy['top1']:.2%}{five} of {accuracy['images']} images")
    if found.skipped:
        click.echo(
            f"{len(found.skipped)} of {len(found.skipped) + accuracy['images']} files could not be read and "
            "were skipped"
        )
    click.echo("\n".join(map(str, paths)))


def _method_settings(changes, names):
    """{method: {setting: number}} of the methods that are measured."""
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


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="A model file: of coda_fast.save, train or demo.",
)
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
    default=3,
    show_default=True,
    help="Maps of this many most likely classes.",
)
@click.option(
    "--methods",
    cls=_Methods,
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
@_SIZE
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def report(images, checkpoint, output, classes, methods, limit, size, device) -> None:
    """Write one HTML file that shows predictions and their contribution maps for IMAGES: files, or folders of
    them and of such folders.

    The page loads nothing from elsewhere. Files that cannot be read are named on it.
    """
    from coda_fast import report as page
    from coda_fast.data import decode

    model = checkpoints.load(checkpoint, device=_device(device)).eval()
    count = min(classes, model.num_classes)
    preprocessing = model.transform.at(size, crop=False)
    if output.exists():
        everything, _ = page.find_images(images, sys.maxsize)
        safety.check_outputs([output], [checkpoint, *(path for path, *_ in everything)])
    safety.check_output_folder(output.parent)
    files, found = page.find_images(images, limit)
    skipped, shown = [], 0

    def pictures():
        nonlocal shown
        for path, name, in_folder in files:
            try:
                tensor, view = (
                    _as_network_sees(model, path, preprocessing, [0] * count),
                    plot.View.of(decode(path), preprocessing),
                )
            except ValueError as error:
                if not in_folder:  # asked for by name
                    raise
                skipped.append(str(error))
                continue
            shown += 1
            yield page.Picture(name, tensor, view)
        if not shown:
            raise click.UsageError(
                f"IMAGES: expected at least one image that can be read, got {len(files)} files"
                + "".join(f"; {s}" for s in skipped[:1])
            )

    others = (
        None
        if methods is None
        else [name for name in map(str.strip, methods.split(",")) if name and name.lower() != "none"]
    )
    notes = (
        [f"Folders hold {found} image files: {limit} of them are taken, evenly; --limit sets how many."]
        if found > limit
        else []
    )
    options = dict(classes=count, methods=others, notes=notes, skipped=skipped)
    text = page.stream(
        model,
        pictures(),
        progress=lambda items, label: tqdm(items, desc=label, total=len(files), disable=None),
        **options,
    )
    new_folders = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        page.write(output, text)
    except BaseException:
        _remove_empty(new_folders)
        raise
    for note in notes:
        click.echo(note)
    click.echo(
        f"{shown} images{f', {len(skipped)} that could not be read' if skipped else ''} -> "
        f"{safety.printable(output)}"
    )


def _remove_empty(folders):
    """Of folders that were made for results that did not come, those that are empty."""
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@cli.command()
@click.argument("network")
@click.option(
    "--size",
    type=click.IntRange(1, 16384),
    help="Height and width of the images. Default: that of the network.",
)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True
)
@click.option(
    "--arch",
    help="Compute capability as 80, 90 or 100, or gfx942. Default: that of the GPU at hand; another one "
    "needs no GPU.",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes. Default: one for each processor.")
def compile(network: str, size: int | None, dtype: str, arch: str | None, workers: int | None) -> None:
    """Compile all fused kernels of NETWORK (a name or a checkpoint) ahead of the first step, in parallel,
    into Triton's cache.
    """
    from coda_fast import compile_kernels, create_model, list_models

    model = create_model(network) if network in list_models() else checkpoints.load(network)
    model = model.to(memory_format=torch.channels_last)
    if (side := size or model.image_size) is None:
        raise click.UsageError(f"--size: expected the height and width of the images, {network} names none")
    shape = (16, model.image_channels, side, side)
    target = int(arch) if arch and arch.isdigit() else arch
    with tqdm(desc=network, unit=" kernels", disable=None) as bar:

        def advance(done, total):
            bar.total = total
            bar.update(done - bar.n)

        options = {
            "workers": workers,
            "arch": target,
            "memory_format": torch.channels_last,
            "progress": advance,
        }
        count = compile_kernels(model, shape, getattr(torch, dtype), **options)
    click.echo(f"{count} kernels of {network} in {dtype} are in Triton's cache")


@cli.command()
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
def export(
    checkpoint: Path, kind: str, explained: bool, output: Path | None, size: int | None, device: str
) -> None:
    """Write the network of CHECKPOINT, and its exact explanation, as a file that runs without coda_fast: in
    onnxruntime, or compiled.

    Images are [N, C, H, W], float32 in [0, 1]. The file names its inputs, outputs and classes:
    docs/export.md.
    """
    from coda_fast import export as exporter

    output = Path(f"{checkpoint.stem}.{kind}") if output is None else output
    safety.check_outputs([output], [checkpoint])
    safety.check_output_folder(output.parent)
    write = exporter.export_onnx if kind == "onnx" else exporter.export_pt2
    model = checkpoints.load(checkpoint, device=_device(device))
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


@cli.command()
def info() -> None:
    """Versions, devices and backends, and why each backend does or does not run here."""
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "not installed"
    rows = {
        "coda_fast": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "Triton": triton,
        "CUDA": f"{torch.version.cuda or 'not in this build of torch'}, {torch.cuda.device_count()} devices",
    }
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        devices.append(torch.device("cuda", index))
    for name, text in rows.items():
        click.echo(f"{name:10} {text}")
    for device in devices:
        click.echo(str(backends.backend_info(device)))


def _class_index(text, model):
    """A class by number or by name."""
    names = model.class_names or []
    if text in names:
        return names.index(text)
    try:
        index = int(text)
    except ValueError:
        known = (
            ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            if names
            else f"numbers from 0 to {model.num_classes - 1}"
        )
        raise click.UsageError(f"--target: expected a class ({known}), got {text!r}") from None
    if not 0 <= index < model.num_classes:
        raise click.UsageError(f"--target: expected a class from 0 to {model.num_classes - 1}, got {index}")
    return index


def _class_name(index, model):
    return model.class_names[index] if model.class_names else f"class {index}"


def _device(name):
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.UsageError(
            f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device


def _warn(message, category, filename, lineno, file=None, line=None):
    """Ours in one line; those of libraries as Python shows them."""
    if (
        issubclass(category, PixelRangeWarning)
        or Path(filename).parent.parent.name == "coda_fast"
        or Path(filename).parent.name == "coda_fast"
    ):
        click.echo("coda-fast: warning: " + " ".join(str(message).split()), err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _fail(message):
    click.echo("coda-fast: " + safety.printable(" ".join(message.split())), err=True)
    raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main())
