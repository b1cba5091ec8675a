"""Options, argument checks and the progress bar that several commands share."""

from __future__ import annotations

import copy
from pathlib import Path

import click
import torch
from tqdm import tqdm

CHECKPOINT = click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="A model file: of coda_fast.save, train or demo.",
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
SIZE = click.option(
    "--size",
    type=click.IntRange(0, 4096),
    help="Whole pictures, their shorter side scaled to this many pixels; 0: as they are. Default: resized "
    "and cropped as in training.",
)


class Methods(click.Option):
    """An option whose help ends with the names of all registered attribution methods."""

    def get_help_record(self, context):
        from coda_fast import baselines

        named = copy.copy(self)
        named.help = f"{self.help} Methods: {', '.join(baselines.METHODS)}."
        return super(Methods, named).get_help_record(context)


def bar(items, label):
    """A progress bar over items, shown only in a terminal."""
    return tqdm(items, desc=label, disable=None)


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.UsageError(
            f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device


def class_index(text: str, model) -> int:
    """The index of a class that is given by number or name."""
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
