"""The command line: ``coda-fast demo|train|explain|evaluate|report|info``. Bad input: one line, exit code 2, no file written."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import torch

from coda_fast import backends, checkpoints, plot
from coda_fast._version import __version__

try:
    import click
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"coda-fast: the command line needs {error.name}: pip install 'coda-fast[cli]'") from None

BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
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
        # what the library raises for bad input, each with one clear line; anything else is a bug and keeps its traceback
        _fail(str(error))
    raise SystemExit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coda-fast")
def cli() -> None:
    """Convolutional Dynamic Alignment Networks: image classifiers that explain themselves."""


@cli.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("coda_demo"), show_default=True, help="Folder for the results.")
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True, help="Passes over the training images, for each T.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def demo(output: Path, epochs: int, seed: int) -> None:
    """Train small CoDA-Nets on scans of digits, at a low and a high temperature, and draw why they decide as they do.

    Takes about a minute on two cores. Writes a figure, a checkpoint and the numbers.
    """
    from coda_fast import demo as demonstration

    result = demonstration.run(output, epochs=epochs, seed=seed, progress=lambda it, label: tqdm(it, desc=label, unit="epoch"))
    chance = result.numbers["chance_localisation"]
    click.echo(f"{'T':>6} {'accuracy':>9} {'completeness error':>19} {'localisation':>13}   (2x2 grids, chance {chance})")
    for row in result.numbers["results"]:
        score = demonstration.score_text(row["localisation"])
        click.echo(f"{row['temperature']:6g} {row['accuracy']:9.1%} {row['relative_completeness_error']:19.1e} {score:>13}")
    click.echo(f"figure      {result.figure}\ncheckpoint  {result.checkpoint}\nnumbers     {result.numbers_file}")
    click.echo(f"explain your own image: coda-fast explain IMAGE --checkpoint {result.checkpoint}")


@cli.command()
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder of the run. Default: coda_runs/RECIPE.")
@click.option("--resume", help="'auto': go on from the newest readable checkpoint of the folder, if there is one; or a checkpoint file.")
@click.option("--quiet", is_flag=True, help="No progress bar, no messages.")
@click.option("--show", is_flag=True, help="Print the recipe with all its values, and train nothing.")
def train(recipe: str | None, overrides: tuple[str, ...], output: Path | None, resume: str | None, quiet: bool, show: bool) -> int:
    """Train a CoDA-Net by RECIPE (a name or a .yaml file) with changes such as optimizer.lr=1e-3; without arguments: list the recipes.

    SIGTERM and SIGUSR1 write a checkpoint and end the program with exit code 75 (0 under torchrun, which would start it again otherwise).
    """
    from coda_fast import train as training
    from coda_fast.train.errors import Stopped

    if recipe is None:
        click.echo("\n".join(f"{name:16} {about}" for name, about in training.list_recipes().items()))
        return 0
    chosen = training.load_recipe(recipe, overrides)
    if show:
        click.echo(chosen.to_yaml(), nl=False)
        return 0
    try:
        training.run(chosen, Path("coda_runs") / chosen.name if output is None else output, resume, progress=not quiet)
    except Stopped as stop:
        click.echo(f"coda-fast: {stop}", err=True)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return training.STOPPED
    if "TORCHELASTIC_RUN_ID" in os.environ:  # all is written; threads of gloo can abort the interpreter's end, and the agent would restart
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    return 0


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A file written by coda_fast.save or the demo.")
@click.option("--target", "targets", multiple=True, help="Class to explain, by number or name; repeatable. Default: the two most likely.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("."), show_default=True, help="Folder for the figures.")
@click.option("--size", type=click.IntRange(0, 4096), help="Scale the shorter side to this many pixels; 0: as it is. Default: the model's.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def explain(images: tuple[Path, ...], checkpoint: Path, targets: tuple[str, ...], output: Path, size: int | None, device: str) -> None:
    """Draw which pixels of each IMAGE speak for and against a class, and prove that nothing is missing.

    For IMAGE.png the figure is IMAGE_explained.png in the output folder.
    """
    from coda_fast.images import read_image, resize

    model = checkpoints.load(checkpoint, device=_device(device))
    classes = [_class_index(t, model) for t in targets]
    size = model.image_size if size is None else size
    # everything is read and checked before anything is written
    tensors = [read_image(path, model.image_channels) for path in images]
    if size:
        tensors = [resize(tensor, size) for tensor in tensors]
    figures = [output / f"{path.stem}_explained.png" for path in images]
    twice = {f for f in figures if figures.count(f) > 1}
    if twice:
        raise click.UsageError(f"several images would be written to {', '.join(map(str, sorted(twice)))}; explain them one by one")
    parameter = next(model.parameters())
    rendered = []
    for path, tensor in zip(images, tensors, strict=True):
        batch = tensor[None].to(parameter)
        with torch.no_grad():
            logits = model(batch)
        if not torch.isfinite(logits).all():
            raise click.UsageError(f"{path}: the network of {checkpoint} gives logits that are not finite: {logits.flatten().tolist()[:4]}")
        chosen = torch.tensor([classes]) if classes else logits.topk(min(2, model.num_classes)).indices
        explanation = model.explain(batch, chosen)
        picture = plot.render(plot.explanation_figure(batch, explanation, model.logit_bias, model.class_names))
        rendered.append((picture, explanation, path))
    output.mkdir(parents=True, exist_ok=True)
    for target, (picture, explanation, path) in zip(figures, rendered, strict=True):
        with checkpoints.atomic_path(target) as temporary:
            temporary.write_bytes(picture)
        best = int(explanation.logits[0].argmax())
        sure = plot.probability(float(explanation.logits[0, best].sigmoid()))
        error = float(explanation.completeness_error.max())
        click.echo(f"{path}: {_class_name(best, model)} ({sure}), completeness error {error:.1e} logits -> {target}")


@cli.command()
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A file written by coda_fast.save or the demo.")
@click.option("--data", required=True, help="A folder with a folder of images for each class, an .npz file, or 'digits'.")
@click.option("--metric", type=click.Choice(["localisation", "removal"]), default="localisation", show_default=True)
@click.option("--methods", default="Ours", show_default=True, help="Names separated by commas (Ours,Grad,IxG,...), or 'all'.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("coda_evaluation"), show_default=True, help="Folder for the results."
)
@click.option("--side", type=click.IntRange(2, 10), default=3, show_default=True, help="Localisation: grids of side x side images.")
@click.option("--grids", type=click.IntRange(min=1), default=500, show_default=True, help="Localisation: how many grids at most.")
@click.option("--protocol", type=click.Choice(["plain", "published"]), default="plain", show_default=True)
@click.option("--order", type=click.Choice(["least", "most"]), default="least", show_default=True, help="Removal: which pixels go first.")
@click.option("--limit", type=click.IntRange(min=1), help="Use this many images only (published, for removal: 1024).")
@click.option("--size", type=click.IntRange(1, 4096), help="Scale and crop images to squares of this many pixels.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def evaluate(checkpoint, data, metric, methods, output, side, grids, protocol, order, limit, size, device) -> None:
    """Measure how good explanations are, by the metrics of the paper, for any of its methods.

    Writes results.json, results.csv, and the figure as PNG and SVG. Interrupted, the same command goes on where it stopped.
    """
    from coda_fast import baselines
    from coda_fast.evaluation import data as source
    from coda_fast.evaluation import runner

    model = checkpoints.load(checkpoint, device=_device(device)).eval()
    names = list(baselines.METHODS) if methods == "all" else list(dict.fromkeys(name.strip() for name in methods.split(",")))
    attributions = {name: baselines.create(name, model) for name in names}
    bar = lambda items, label: tqdm(items, desc=label, disable=None)  # noqa: E731
    found = source.load(data, model, limit=limit, size=size, progress=bar)
    for path, reason in found.skipped.items():
        click.echo(f"skipped {path}: {reason}", err=True)
    settings = runner.Settings(metric, side, grids, protocol, order=order)
    description = {"checkpoint": _digest(checkpoint), "data": data, "data_digest": found.digest(), "images": len(found.images)}
    images, labels = found.images.to(next(model.parameters())), found.labels.to(next(model.parameters()).device)
    evaluation = runner.Evaluation(model, images, labels, settings, output, description)
    results = {name: evaluation.measure(name, a, a.settings, bar) for name, a in attributions.items()}
    paths = evaluation.write(results, {name: a.settings for name, a in attributions.items()})
    click.echo(runner.markdown(results))
    if metric == "localisation":
        click.echo(f"{len(evaluation.work())} grids of {side} x {side}, chance {1 / side**2:.3f}")
    if found.skipped:
        click.echo(f"{len(found.skipped)} of {len(found.skipped) + len(images)} files could not be read and were skipped")
    click.echo("\n".join(map(str, paths)))


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="A file written by coda_fast.save or the demo.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("coda_report.html"), show_default=True, help="The page.")
@click.option("--classes", type=click.IntRange(min=1), default=3, show_default=True, help="Maps of this many most likely classes.")
@click.option("--methods", default="", help="Other methods beside the network's own maps, separated by commas (Grad,IxG,Occ5,...).")
@click.option("--size", type=click.IntRange(0, 4096), help="Scale the shorter side to this many pixels; 0: as it is. Default: the model's.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def report(images, checkpoint, output, classes, methods, size, device) -> None:
    """Write one HTML file that shows predictions and their contribution maps for IMAGES (files, or folders of them).

    The page loads nothing from elsewhere. Files that cannot be read are named on it.
    """
    from coda_fast import report as page
    from coda_fast.evaluation.data import SUFFIXES
    from coda_fast.images import ImageError, read_image, resize

    model = checkpoints.load(checkpoint, device=_device(device)).eval()
    size = model.image_size if size is None else size
    files = [f for path in images for f in (sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path])]
    read, names, skipped = [], [], []
    for path in files:
        try:
            image = read_image(path, model.image_channels)
        except ImageError as error:
            if path in images:  # asked for by name
                raise
            skipped.append(str(error))
            continue
        read.append(resize(image, size) if size else image)
        names.append(path.name)
    if not read:
        raise click.UsageError(
            f"IMAGES: expected at least one image that can be read, got {len(files)} files" + "".join(f"; {s}" for s in skipped[:1])
        )
    others = [name.strip() for name in methods.split(",") if name.strip()]
    bar = lambda items, label: tqdm(items, desc=label, disable=None)  # noqa: E731
    text = page.render(model, read, names, classes=min(classes, model.num_classes), methods=others, skipped=skipped, progress=bar)
    output.parent.mkdir(parents=True, exist_ok=True)
    page.write(output, text)
    click.echo(f"{len(read)} images{f', {len(skipped)} that could not be read' if skipped else ''} -> {output}")


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


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
        known = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "") if names else f"numbers from 0 to {model.num_classes - 1}"
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
        raise click.UsageError(f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _fail(message):
    click.echo("coda-fast: " + " ".join(message.split()), err=True)
    raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main())
