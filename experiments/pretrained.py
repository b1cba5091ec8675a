"""The networks that the package contains: from a finished run to the file, its checksum and the numbers of
its model card.

python -m experiments.pretrained ship NAME --run FOLDER
    from a run of ``coda-fast train``: coda_fast/weights/NAME.safetensors in half precision, its line in
    SHA256SUMS, recipe and history in bench/results/pretrained_NAME.json, and docs/training-NAME.png
python -m experiments.pretrained digits
    the same for coda_xs_digits: the demo's network, trained here (half a minute)
python -m experiments.pretrained collect NAME --results FOLDER [FOLDER ...]
    replaces the measurements in these rows by the results of ``coda-fast evaluate --checkpoint NAME --output
    FOLDER``, and draws docs/localisation-NAME.png and docs/removal-NAME.png; of a method that several folders
    hold, the one with the most grids or images
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch

import coda_fast
from bench import results
from coda_fast import checkpoints, demo, pretrained
from coda_fast.data.photographs import example_photographs
from coda_fast.evaluation import Localisation, Removal, figures
from coda_fast.evaluation.runner import summary

ROWS, DOCS = results.FOLDER, results.ROOT / "docs"
# WordNet's names of the synsets that Imagenette takes from ImageNet, in the order of its folders
IMAGENETTE = [
    "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
    "gas pump", "golf ball", "parachute",
]  # fmt: skip
DATA = {
    "coda_xs_digits": "scikit-learn digits",
    "coda_xs_cifar10": "CIFAR-10 (JPEG)",
    "coda_xs_imagenette": "Imagenette",
}
# what the images are called that a network has not seen, where they are not the test images
HELD_OUT = {"Imagenette": "validation"}


def rows(name: str) -> Path:
    """The file with the measured results of a network."""
    return ROWS / f"pretrained_{name}.json"


def ship(name: str, model: coda_fast.CoDANet, facts: dict) -> None:
    """Write a network into the package, and the facts about it to its rows."""
    stamp = results.environment(torch.device("cpu"))  # before the working tree changes
    if name == "coda_xs_imagenette":
        model.class_names = IMAGENETTE
    file = pretrained.FOLDER / f"{name}.safetensors"
    checkpoints.save(model.half(), file, {"data": DATA[name]})
    known = pretrained.checksums() | {name: hashlib.sha256(file.read_bytes()).hexdigest()}
    lines = (f"{checksum}  {key}.safetensors\n" for key, checksum in sorted(known.items()))
    pretrained.SUMS.write_text("".join(lines), encoding="ascii")
    found = {
        "name": name,
        "data": DATA[name],
        "parameters": sum(p.numel() for p in model.parameters()),
        "temperature": model.temperature,
        "bytes": file.stat().st_size,
        "logits": logits(name),
        **stamp,
        **facts,
    }
    rows(name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def logits(name: str) -> dict[str, list[float]]:
    """The logits of the shipped weights for example photographs, computed in float64 by the definition."""
    model = pretrained.load(name, backend="reference").double().eval()
    found = {}
    for photograph in example_photographs():
        with torch.no_grad():
            values = model(model.transform(photograph.path)[None].double())[0]
        found[photograph.path.name] = [round(float(value), 6) for value in values]
    return found


def of_run(folder: Path) -> tuple[coda_fast.CoDANet, dict]:
    """The network of a finished run, its moving average if it has one, with the recipe and the curve."""
    import yaml

    file = next(
        path for path in (folder / "model_ema.safetensors", folder / "model.safetensors") if path.exists()
    )
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as stored:
        history = [
            {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stored)
        ]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["data"]["path"] = None
    return coda_fast.load(file), {"weights": file.stem, "recipe": recipe, "history": history}


def of_demo() -> tuple[coda_fast.CoDANet, dict]:
    """The network that ``coda-fast demo --train`` trains at the higher temperature."""
    with tempfile.TemporaryDirectory() as folder:
        result = demo.run(folder)
        return coda_fast.load(result.checkpoint), {"demo": result.numbers}


def collect(name: str, folders: list[Path]) -> None:
    """Replace the measurements in the rows of a network by those of evaluations, and draw their figures."""
    found = json.loads(rows(name).read_text(encoding="utf-8"))
    found["collected"] = results.environment(torch.device("cpu"))  # before the working tree changes
    accuracies, errors = [], []
    measured: dict[str, dict[str, list[Localisation | Removal]]] = {}
    settings: dict[str, dict] = {}
    for folder in folders:
        stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        metric = stored["settings"]["metric"]
        if metric == "accuracy":
            accuracies.append(stored["accuracy"])
            continue
        errors.append(stored["completeness_error"])
        for method, result in of_evaluation(folder / "results.csv").items():
            used = stored["methods"][method]["settings"]
            label = f"Occ{used['size']}" if "size" in used else method  # the window that was used
            settings[label] = used
            measured.setdefault(metric, {}).setdefault(label, []).append(result)
    accuracies.sort(key=lambda accuracy: -accuracy["images"])  # of all images, and of the first (--limit)
    for key, accuracy in zip(("accuracy", "accuracy_of_first"), accuracies, strict=False):
        found[key] = accuracy
    if errors:
        found["completeness_error"] = max(errors, key=lambda error: error["images"])
    for metric, every in measured.items():
        found[metric] = {}
        for label, candidates in every.items():
            result = max(candidates, key=amount)
            row = {"settings": settings[label], **summary(result)}
            row["standard_error"] = standard_error(group_means(result))
            if label != "Ours":
                lead = group_means(same(every["Ours"], result)) - group_means(result)
                row["lead_of_ours"] = {"mean": float(lead.mean()), "standard_error": standard_error(lead)}
            found[metric][label] = row
        draw(metric, every, DOCS / f"{metric}-{short(name)}.png")
    rows(name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def draw(metric: str, measured: dict[str, list[Localisation | Removal]], path: Path) -> None:
    """The figure of all methods on the grids or images that were given to every one of them."""
    fewest = min((max(candidates, key=amount) for candidates in measured.values()), key=amount)
    common = {label: same(candidates, fewest) for label, candidates in measured.items()}
    figure = figures.boxes(common) if metric == "localisation" else figures.curves(common, "least")
    figure.savefig(path, dpi=200)


def same(candidates: list, wanted: Localisation | Removal) -> Localisation | Removal:
    """The results of one method on the grids or images of ``wanted``: the first ones of a larger evaluation.
    Methods are compared on the same ones, since the first grids have the most confident images, in which most
    methods locate the class better. ValueError: there are none.
    """
    count = amount(wanted)
    for found in candidates:
        if isinstance(found, Localisation):
            part = Localisation(found.scores[:count], found.images[:count], found.targets[:count])
            fits = torch.equal(part.images, wanted.images)
        else:  # results.csv does not name the images, but they begin with the same probabilities
            part = Removal(found.fractions, found.probabilities[:count])
            starts = part.probabilities[:, 0], wanted.probabilities[:, 0]
            fits = starts[0].shape == starts[1].shape and torch.allclose(*starts, rtol=0, atol=1e-4)
        if fits:
            return part
    raise ValueError(f"expected an evaluation of the same {count} grids or images, got none")


def of_evaluation(table: Path) -> dict[str, Localisation | Removal]:
    """The results of each method, from results.csv."""
    with open(table, newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    found: dict[str, Localisation | Removal] = {}
    for method in dict.fromkeys(line[0] for line in lines):
        numbers = torch.tensor(
            [list(map(float, line[1:])) for line in lines if line[0] == method], dtype=torch.float64
        )
        if header[1] == "grid":  # grid, cell, image, class, score
            _, _, images, targets, scores = numbers.reshape(int(numbers[-1, 0]) + 1, -1, 5).unbind(2)
            found[method] = Localisation(scores, images.long(), targets.long())
        else:  # image, and the probability at each fraction
            fractions = torch.tensor(list(map(float, header[2:])), dtype=torch.float64)
            found[method] = Removal(fractions, numbers[:, 1:])
    return found


def group_means(result: Localisation | Removal) -> torch.Tensor:
    """The values that are independent of each other: cells of a grid share its images, so that a grid is one
    value, its mean; of removal, the area of an image's curve.
    """
    return result.scores.mean(1) if isinstance(result, Localisation) else result.area()


def amount(result: Localisation | Removal) -> int:
    """The number of grids or images."""
    return len(group_means(result))


def standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean."""
    return float(values.std() / len(values) ** 0.5)


def short(name: str) -> str:
    """The name of a network's data, in names of figures."""
    return name.rpartition("_")[2]


def card(name: str) -> str:
    """Markdown for the model card and docs/evaluation.md: every method's localisation and removal, and what
    was measured, on what and with what.
    """
    found = json.loads(rows(name).read_text(encoding="utf-8"))
    return "\n".join([*methods_table(found), facts(found)])


def brief(name: str) -> str:
    """The last lines of the card, without the methods, for docs/pretrained.md."""
    return facts(json.loads(rows(name).read_text(encoding="utf-8")))


def methods_table(found: dict) -> list[str]:
    """Lines of Markdown: each method's localisation and removal, with the 95 % confidence interval of the
    mean, in the order of how far Ours is ahead on the same grids. Empty if they were not measured.
    """
    localised, removed = found.get("localisation", {}), found.get("removal", {})
    if not localised:
        return []
    lines = [
        "| method | localisation, mean | 25 % | median | 75 % | grids | Ours is ahead by | removal, area | "
        "images | Ours is ahead by |",
        "|---" * 10 + "|",
    ]
    for method in sorted(localised, key=lambda method: _lead(localised[method])):
        row, other = localised[method], removed.get(method)
        lines.append(
            f"| {method} | {_mean(row)} | {row['q25']:.3f} | {row['median']:.3f} | {row['q75']:.3f} | "
            f"{row['grids']} | {_mean(row.get('lead_of_ours'))} | "
            + (
                f"{_mean(other)} | {other['images']} | {_mean(other.get('lead_of_ours'))} |"
                if other
                else "| | |"
            )
        )
    lines += [
        "",
        "Mean ± half of the 95 % confidence interval, and by how much Ours is ahead on the same grids or "
        "images (the first grids have the most confident images), which orders the rows; 3 x 3 grids, chance "
        f"{1 / 9:.3f}; removal: least important first, mean probability over 0 to 25 %.",
        "",
    ]
    return lines


def history(name: str) -> str:
    """Markdown for docs/training.md: the curve of a run, at the epochs that were evaluated."""
    found = json.loads(rows(name).read_text(encoding="utf-8"))
    lines = [
        "| epoch | training loss | training accuracy | "
        f"{_held_out(found)} accuracy | of the moving average |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['epoch']:.0f} | {row['train_loss']:.4f} | {row['train_accuracy']:.1%} | "
        f"{row['val_accuracy']:.2%} | {row['ema_val_accuracy']:.2%} |"
        for row in found["history"]
        if "val_accuracy" in row
    ]
    lines += ["", f"{found['data']}, batch {found['recipe']['batch_size']}; {facts(found)}"]
    return "\n".join(lines)


def _held_out(found):
    return HELD_OUT.get(found["data"], "test")


def _lead(row):
    return row["lead_of_ours"]["mean"] if "lead_of_ours" in row else 0.0


def _mean(row):
    if row is None:
        return ""
    return f"{row['mean']:.3f} ± {1.96 * row['standard_error']:.3f}"


def facts(found: dict) -> str:
    """What was measured, on what and with what, in sentences."""
    parts = [
        f"{found['parameters']:,} parameters, T = {found['temperature']:g}, {found['bytes'] / 1e6:.1f} MB"
    ]
    if accuracy := found.get("accuracy"):
        part = f"accuracy {accuracy['top1']:.2%} of {accuracy['images']:,} {_held_out(found)} images"
        if first := found.get("accuracy_of_first"):
            part += f" ({first['top1']:.2%} of the first {first['images']:,})"
        parts.append(part)
    if error := found.get("completeness_error"):
        parts.append(
            f"completeness error at most {error['worst']:.0e}, relative, over {error['images']} images"
        )
    if measured := found.get("demo"):
        row = measured["results"][-1]
        parts += [
            f"accuracy {row['accuracy']:.1%} of {measured['test_images']} test images",
            f"completeness error at most {row['relative_completeness_error']:.0e}, relative",
            f"localisation in {measured['grid']} grids {row['localisation']:.3f} (chance "
            f"{measured['chance_localisation']})",
        ]
    if history := found.get("history"):
        images = history[-1]["updates"] / len(history) * found["recipe"]["batch_size"]  # of an epoch
        hours = sum(images / row["images_per_second"] for row in history) / 3600
        whole = found["recipe"]["epochs"]
        of = f" of {whole}" if len(history) < whole else ""
        parts.append(f"{len(history)}{of} epochs, {hours:.1f} hours on a core that other work shared")
    where = f"{found['device']}, torch {found['torch']}; commit {found['commit']}, {found['date']}"
    if collected := found.get("collected"):
        where += f"; measurements collected at commit {collected['commit']}, {collected['date']}"
    return f"{'; '.join(parts)}. {where}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("ship")
    one.add_argument("name", choices=DATA)
    one.add_argument("--run", type=Path, required=True)
    commands.add_parser("digits")
    two = commands.add_parser("collect")
    two.add_argument("name", choices=DATA)
    two.add_argument("--results", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    if options.command == "ship":
        ship(options.name, *of_run(options.run))
        shutil.copyfile(options.run / "curve.png", DOCS / f"training-{short(options.name)}.png")
    elif options.command == "digits":
        ship("coda_xs_digits", *of_demo())
    else:
        collect(options.name, options.results)


if __name__ == "__main__":
    main()
