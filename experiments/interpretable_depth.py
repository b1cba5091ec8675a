"""How deep an exact explanation can reach (arXiv:2109.13004): accuracy and localisation of hybrid networks
against the stage of a conventional network at which their DAU layers begin.

python -m experiments.interpretable_depth run cifar10 --data cifar10.npz --output FOLDER
python -m experiments.interpretable_depth run imagenette --data FOLDER_OF_IMAGENETTE --output FOLDER
    trains the conventional network by its recipe, then a hybrid for each of its stages on the frozen stem,
    and measures all of them; what is in the output folder already is not done again. Hours on a CPU.
python -m experiments.interpretable_depth collect cifar10 --output FOLDER
    writes the rows to bench/results/depth_cifar10.json, and draws docs/depth-cifar10.png; of imagenette, also
    example photographs and channels (docs/hybrid.png, docs/channels.png)
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import coda_fast
from bench import results
from coda_fast import channels, plot
from coda_fast.data.decode import decode
from coda_fast.data.photographs import example_photographs
from coda_fast.data.sources import Arrays
from experiments import pretrained

ROWS, DOCS = results.FOLDER, results.ROOT / "docs"
SETS = ("cifar10", "imagenette")
TITLES = {"cifar10": "CIFAR-10", "imagenette": "Imagenette, 64 x 64 pixels"}
GRIDS = 100
# methods beside the own maps: of a conventional network and of every hybrid
METHODS = ("Ours", "GCam", "IxG")
CONVENTIONAL = "conventional"
EXAMPLES = 1  # the joint of the network that explains example photographs


def stem(name: str) -> tuple[list[str], list[int], list[int]]:
    """The stages of the conventional network of a data set, and their widths and strides."""
    from coda_fast.train.recipes import load_recipe

    recipe = load_recipe(f"{name}-cnn")
    options = recipe.model.stem_options or {}
    made = coda_fast.create_model(recipe.model.name, stem="convolutions", stem_options=options, device="meta")
    widths = [stage[0].out_channels for stage in made.stem.network]
    return made.stem.stages, widths, [stage[0].stride[0] for stage in made.stem.network]


def layers(strides: list[int], at: int) -> list[str]:
    """The DAU layers above a joint at the stage ``at``, as overrides of a recipe: one in place of each
    further stage, with its stride; one more; and the classifier.
    """
    further = strides[at + 1 :]
    channels = [*(32 * 2 ** min(1, i) for i in range(len(further))), 64, 10]
    return [
        f"model.out_channels={channels}",
        f"model.ranks={[8] * len(channels)}",
        f"model.kernel_sizes={[3] * (len(channels) - 1) + [1]}",
        f"model.strides={[*further, 1, 1]}",
    ]


def run(name: str, data: str, output: Path, overrides: list[str]) -> None:
    """Train and measure what is not there yet."""
    stages, _, strides = stem(name)
    conventional = output / CONVENTIONAL
    train(f"{name}-cnn", conventional, [f"data.path={data}", "log.tensorboard=false"])
    weights = model_file(conventional)
    for at in reversed(range(len(stages))):  # the fastest first
        options = [f"data.path={data}", f"model.stem_weights={weights}", f"model.at={at}"]
        options += [f"data.cache={output / 'features'}", "log.tensorboard=false"]
        train(f"{name}-hybrid", output / f"at_{at}", [*options, *layers(strides, at), *overrides])
    for folder in (conventional, *(output / f"at_{at}" for at in range(len(stages)))):
        measure(folder, data)


def train(recipe: str, folder: Path, overrides: list[str]) -> None:
    """Train by a recipe, or go on with a run that was interrupted."""
    if not (folder / "model.safetensors").exists():
        command = ["train", recipe, "--output", str(folder), "--resume", "auto", *overrides]
        subprocess.run([sys.executable, "-m", "coda_fast", *command], check=True)


def measure(folder: Path, data: str) -> None:
    """Accuracy and localisation of the network of a run."""
    root = Path(data)
    common = ["--checkpoint", str(model_file(folder)), "--data", str(root / "val" if root.is_dir() else root)]
    for metric, options in (
        ("accuracy", []),
        ("localisation", ["--methods", ",".join(METHODS), "--grids", str(GRIDS)]),
    ):
        command = ["evaluate", *common, "--metric", metric, *options, "--output", str(folder / metric)]
        subprocess.run([sys.executable, "-m", "coda_fast", *command], check=True)


def model_file(folder: Path) -> Path:
    """The network of a run: its moving average, if it has one."""
    averaged = folder / "model_ema.safetensors"
    return averaged if averaged.exists() else folder / "model.safetensors"


def collect(name: str, output: Path) -> None:
    """Write the rows of finished runs, and draw their figure."""
    stages, widths, strides = stem(name)
    found = {
        "data": TITLES[name],
        **results.environment(torch.device("cpu")),
        "stages": stages,
        "widths": widths,
        "strides": strides,
        CONVENTIONAL: of_run(output / CONVENTIONAL),
        "joints": {
            at: of_run(output / f"at_{at}")
            for at in range(len(stages))
            if (output / f"at_{at}" / "localisation" / "results.json").exists()  # not, if it was stopped
        },
    }
    rows(name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(name, DOCS / f"depth-{name}.png")
    if name == "imagenette":
        draw_examples(model_file(output / f"at_{EXAMPLES}"))


def of_run(folder: Path) -> dict:
    """The facts about a run and its measurements."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    model = coda_fast.load(model_file(folder))
    stored = json.loads((folder / "localisation" / "results.json").read_text(encoding="utf-8"))
    localisation = {}
    measured = pretrained.of_evaluation(folder / "localisation" / "results.csv")
    for method, result in measured.items():
        means = pretrained.group_means(result)
        localisation[method] = {
            "mean": float(means.mean()),
            "standard_error": pretrained.standard_error(means),
            "grids": len(means),
        }
    return {
        "epochs": len(history),
        "images_per_second": sorted(float(row["images_per_second"]) for row in history)[len(history) // 2],
        "dau_layers": len(model.dau_layers()),
        "temperature": model.temperature,
        "parameters_of_head": sum(p.numel() for p in model.parameters())
        - sum(p.numel() for p in model.stem.parameters()),
        "accuracy": stored["accuracy"]["top1"],
        "images": stored["accuracy"]["images"],
        "completeness_error": stored["completeness_error"],
        "localisation": localisation,
    }


def rows(name: str) -> Path:
    """The file with the measured results of a data set."""
    return ROWS / f"depth_{name}.json"


def table(name: str) -> str:
    """Markdown for docs/hybrid.md: a row for the conventional network, and one for each joint."""
    found = json.loads(rows(name).read_text(encoding="utf-8"))
    reference = json.loads(pretrained.rows(f"coda_xs_{name}").read_text(encoding="utf-8"))
    lines = [
        f"**{found['data']}**: {found[CONVENTIONAL]['images']} images, localisation on "
        f"{found[CONVENTIONAL]['localisation']['Ours']['grids']} grids of 3 x 3 (chance 0.111)",
        "",
        "| joint after | pixels per feature | DAU layers | accuracy | own map | Grad-CAM | "
        "Input x Gradient | images/s in training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    stride, strides = 1, []
    for step in found["strides"]:
        stride *= step
        strides.append(stride)
    for at, row in sorted(found["joints"].items(), key=lambda pair: int(pair[0])):
        lines.append(_line(f"stage {found['stages'][int(at)]}", strides[int(at)], row))
    lines.append(_line("none: conventional", strides[-1], found[CONVENTIONAL]))
    own = reference["localisation"]["Ours"]
    lines += [
        "",
        f"For comparison, without a stem: `coda_xs_{name}` of the package has "
        f"{reference['accuracy']['top1']:.1%} and {own['mean']:.3f} ± {own['standard_error']:.3f}. "
        f"{found['device']}, which other work shared (speeds are lower limits), torch {found['torch']}, "
        f"commit {found['commit'][:7]}.",
    ]
    return "\n".join(lines)


def _line(stage, stride, row):
    cells = []
    for method in METHODS:
        result = row["localisation"].get(method)
        cells.append(f"{result['mean']:.3f} ± {result['standard_error']:.3f}" if result else "")
    return (
        f"| {stage} | {stride} | {row['dau_layers']} | {row['accuracy']:.1%} | {' | '.join(cells)} | "
        f"{row['images_per_second']:.0f} |"
    )


def draw(name: str, path: Path) -> None:
    """Accuracy and localisation against the joint."""
    found = json.loads(rows(name).read_text(encoding="utf-8"))
    joints = sorted(found["joints"].items(), key=lambda pair: int(pair[0]))
    figure = plot.new_figure(7.2, 2.9)
    left, right = figure.subplots(1, 2)
    places = range(len(joints))
    left.plot(places, [100 * row["accuracy"] for _, row in joints], "o-", color="0.2", label="hybrid")
    left.axhline(
        100 * found[CONVENTIONAL]["accuracy"], color="0.6", linestyle="--", label="conventional network"
    )
    left.set_ylabel("accuracy (%)")
    styles = {"Ours": ("own map", "o-", "C3"), "GCam": ("Grad-CAM", "s--", "C0")}
    styles |= {"IxG": ("Input x Gradient", "^:", "C7")}
    for method, (label, style, colour) in styles.items():
        measured = [row["localisation"].get(method) for _, row in joints]
        if not all(measured):
            continue
        means, errors = (
            [each[key] for each in measured if each is not None] for key in ("mean", "standard_error")
        )
        right.errorbar(places, means, errors, fmt=style, color=colour, label=label, markersize=4)
    right.axhline(1 / 9, color="0.8", linewidth=0.8)
    right.text(0, 1 / 9 - 0.02, "chance", fontsize=7, color="0.5", va="top")
    right.set(ylabel="localisation", ylim=(0, 1))
    for axes in (left, right):
        axes.set_xticks(list(places), [f"stage {found['stages'][int(at)]}" for at, _ in joints])
        axes.set_xlabel("joint after")
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(found["data"], fontsize=10)
    figure.savefig(path, dpi=200)


def draw_examples(path: Path) -> None:
    """Example photographs with their maps, and the channels that decide about one of them with the tiles of
    all photographs that excite these most. (The licence of Imagenette's pictures does not allow to show
    them.)
    """
    model = coda_fast.load(path, class_names=pretrained.IMAGENETTE).eval()
    photographs = {p.path.stem: p.path for p in example_photographs()}
    shown = [photographs[stem] for stem in ("china", "rocket")]
    images = torch.stack([model.transform(photograph) for photograph in shown])
    views = [plot.View.of(decode(photograph), model.transform) for photograph in shown]
    explained = model.explain(images, model(images).topk(2).indices)
    figure = plot.explanation_figure(images, explained, model.logit_bias, pretrained.IMAGENETTE, views=views)
    figure.savefig(DOCS / "hybrid.png", dpi=110)
    tiles = Arrays(torch.cat([_tiles(p, model.transform) for p in photographs.values()]), torch.tensor(0))
    tiles.labels = torch.full((len(tiles.images),), -1)
    found = channels.strongest(model, tiles)
    figure = channels.channel_figure(model, explained, found, tiles, count=4, view=views[0])
    figure.savefig(DOCS / "channels.png", dpi=110)


def _tiles(path, preprocessing, side=96):
    """The squares of a photograph as inputs of a network, uint8 [N, C, H, W]."""
    picture = np.asarray(decode(path))
    places = itertools.product(*(range(0, length - side + 1, side) for length in picture.shape[:2]))
    squares = (picture[top : top + side, left : left + side] for top, left in places)
    return torch.from_numpy(np.stack([preprocessing.pixels(square) for square in squares]))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    running, collecting = verbs.add_parser("run"), verbs.add_parser("collect")
    for verb in (running, collecting):
        verb.add_argument("name", choices=SETS)
        verb.add_argument("--output", type=Path, required=True)
    running.add_argument("--data", required=True)
    running.add_argument(
        "--set", dest="overrides", action="append", default=[], help="key=value for the hybrids (epochs=2)"
    )
    arguments = parser.parse_args(argv)
    if arguments.verb == "run":
        run(arguments.name, arguments.data, arguments.output, arguments.overrides)
    collect(arguments.name, arguments.output)


if __name__ == "__main__":
    main()
