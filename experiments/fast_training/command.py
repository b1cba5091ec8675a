"""Train the recipe cifar10-s-fast within a number of minutes on one GPU, then evaluate the result: accuracy,
localisation, removal.

    python -m experiments.fast_training --data cifar10.npz --output FOLDER --minutes 3.5
        training.json and the weights
    python -m experiments.fast_training --device cpu --quick --output FOLDER
        rehearses it on generated images

The whole step (images selected and augmented on the device, network, loss, gradient, optimiser, moving
average) is one CUDA graph, because kernels that are launched one by one would wait for the host. If it cannot
be captured, the reason is printed and the kernels are launched one by one. The number of steps that fit into
the time is measured after the first ones, and the learning rate follows a cosine over that many steps.
``coda-fast train`` is the program for all other training. This one needs only torch, NumPy, Pillow, PyYAML
and safetensors, and cannot be interrupted and resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

import coda_fast
from bench import measure, results
from experiments.fast_training.images import TrainingProblem, made_up, read
from experiments.fast_training.judgement import judge
from experiments.fast_training.loop import train
from experiments.fast_training.trainer import TINY, Trainer

WEIGHTS = "cifar10_s_fast.safetensors"
JUDGEMENT = 40.0  # seconds reserved for the evaluation


def recipe_of(name: str = "cifar10-s-fast") -> dict:
    """The recipe as plain values. Its settings for epochs do not apply to runs measured in minutes."""
    import yaml

    return yaml.safe_load(
        (results.ROOT / "coda_fast" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    )


def main(argv=None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="fast_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        help=".npz file of CIFAR-10 as JPEGs (train_jpeg, train_offset, train_label; test_ likewise)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for training.json and the weights, made if it is not there",
    )
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="for everything, of which 40 seconds are for the judgement"
    )
    parser.add_argument("--steps", type=int, help="exactly so many, however long they take")
    parser.add_argument("--batch", type=int, help="instead of the recipe's")
    parser.add_argument("--temperature", type=float, help="instead of the recipe's")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a rehearsal: a tiny network, few images, made-up ones without --data",
    )
    options = parser.parse_args(argv)
    for name in ("minutes", "steps", "batch", "temperature"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name}: expected a positive number, got {value}")
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise TrainingProblem("needs a CUDA device, torch sees none; --device cpu --quick rehearses it")
        if options.data is None and not options.quick:
            raise TrainingProblem("--data: expected the file of the images, got none")
        if options.data is not None and not options.data.is_file():
            raise TrainingProblem(f"--data: no such file: {options.data}")
        return _run(options, start)
    except TrainingProblem as problem:
        print(f"fast_training: {problem}", file=sys.stderr)
        return 2


def _run(options, start) -> int:
    quick, device, folder = options.quick, torch.device(options.device), options.output
    finish = start + 60 * options.minutes
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of()
    if options.temperature:
        recipe["model"]["temperature"] = options.temperature
    data = "made-up images" if options.data is None else "CIFAR-10 (JPEG)"
    found = {"data": data, "recipe": recipe, "quick": quick, "of": results.environment(device)}
    say = lambda text: print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)
    (images, labels), test = _splits(options.data, quick)
    say(f"{len(labels)} images to train with, {len(test[1])} to test with")
    batch, tiny = options.batch or (4 if quick else None), TINY if quick else {}
    trainer = Trainer(recipe, images, labels, device, batch, **tiny)
    test = (test[0].to(device), test[1])

    def checkpoint(trainer, row):
        found.setdefault("checkpoints", []).append(row)
        about = {"recipe": recipe, **row, "weights": "moving average, float16"}
        coda_fast.save(trainer.averaged(torch.float16), folder / WEIGHTS, about)
        _write(found, folder)

    training = finish - (0.2 * 60 * options.minutes if options.minutes < 2 else JUDGEMENT)
    limits = dict(steps=options.steps or (3 if quick else None), every=0 if quick else 30)
    found |= train(trainer, recipe, training, test=test, keep=checkpoint, say=say, **limits)
    checkpoint(trainer, found["history"][-1])
    found.pop("checkpoints")
    del trainer.graph  # its memory is needed for the maps
    if device.type == "cuda":
        measure.empty(device)
    keep = lambda part: (found.update(judged=part), _write(found, folder))
    judge(folder / WEIGHTS, *test, device, finish, keep, half=trainer.half, quick=quick, say=say)
    found["seconds"] = round(time.monotonic() - start, 1)
    _write(found, folder)
    where = f"{folder / 'training.json'}, {folder / WEIGHTS}"
    say(f"{found['steps']} steps of {found['step_ms']:.1f} ms; {where}")
    return int(any(isinstance(part, dict) and "missing" in part for part in found["judged"].values()))


def _splits(data: Path | None, quick: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(images, labels) to train and to test with."""
    if data is None:
        return [made_up(32), made_up(32)]
    return [read(data, split, 32 if quick else None) for split in ("train", "test")]


def _write(found: dict, folder: Path) -> None:
    scratch = folder / ".training.json"
    scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, folder / "training.json")
