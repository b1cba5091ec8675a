"""Evaluation of the trained weights: accuracy, completeness, localisation, pixel removal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import coda_fast
from bench import measure
from coda_fast import evaluation


@torch.no_grad()
def accuracy(
    model, images: torch.Tensor, labels: torch.Tensor, device, half: bool, batch: int = 1000
) -> float:
    """Share of uint8 images that are classified correctly. ``half``: under autocast, as in training."""
    model, correct = _on(model, device), 0
    for some, classes in zip(images.split(batch), labels.split(batch), strict=True):
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=half and torch.device(device).type == "cuda"
        ):
            logits = model(some.to(device).float().div_(255))
        correct += int((logits.argmax(1).cpu() == classes.cpu()).sum())
    return correct / max(1, len(labels))


def _on(model, device):
    if torch.device(device).type == "cuda":
        for layer in model.layers:
            layer.backend = "triton"
    return model.to(device)


def judge(
    path: Path, images, labels, device, finish: float, keep, *, half: bool, quick: bool = False, say=print
) -> dict:
    """Evaluate the weights in the file, in float32 unless stated otherwise. ``keep(found)`` is called after
    each part, so that a run that is cut off loses only one. A part without enough time covers fewer images or
    grids, and states how many.
    """
    model, found = _on(coda_fast.load(path).float(), device), {}
    parts = _explanations(model, images.to(device).float().div_(255), labels.to(device), finish, quick)
    parts = {
        "accuracy": lambda: accuracy(model, images, labels, device, False),
        "accuracy_autocast": lambda: accuracy(model, images, labels, device, half),
        **parts,
    }
    for name, part in parts.items():
        begun = time.monotonic()
        try:
            if begun > finish:
                raise TimeoutError("no time left")
            found[name] = part()
        except Exception as error:  # the other metrics can still be measured
            found[name] = {"missing": measure.reason(error)}
        found.setdefault("seconds", {})[name] = round(time.monotonic() - begun, 2)
        say(f"{name}: {json.dumps(found[name])} ({found['seconds'][name]} s)")
        keep(found)
    return found


def _explanations(model, pixels, labels, finish, quick) -> dict[str, Callable]:
    """{metric: function that measures it}."""
    removed, grids = (2, 2) if quick else (1024, 500)
    # after the few steps of a rehearsal no image would be confident
    logits = F.one_hot(labels, model.num_classes).float() if quick else None

    def completeness():
        few = slice(4 * removed)
        return float(evaluation.completeness_error(model, pixels[few], labels[few]).max())

    def localisation():
        options = dict(side=3, grids=grids, logits=logits, batch_size=1 if quick else 10)
        progress = _until(finish, 0.6)
        return evaluation.localisation(model, pixels, labels, **options, progress=progress).summary()

    def removal(order):
        options = dict(order=order, points=3 if quick else 129, batch_size=1024, attribution_batch=128)
        few, progress = slice(removed), _until(finish, 0.6)
        found = evaluation.pixel_removal(model, pixels[few], labels[few], **options, progress=progress)
        return {
            "images": len(found.probabilities),
            "area": float(found.area().mean()),
            "end": float(found.curve()[-1]),
        }

    return {
        "completeness_error": completeness,
        "localisation_3x3": localisation,
        "removal_least_first": lambda: removal("least"),
        "removal_most_first": lambda: removal("most"),
    }


def _until(finish, share):
    """A ``progress`` that ends after this share of the remaining time, but not before its first item."""
    deadline = time.monotonic() + share * max(0.0, finish - time.monotonic())

    def progress(things, label):
        for i, thing in enumerate(things):
            if i and time.monotonic() > deadline:
                return
            yield thing

    return progress
