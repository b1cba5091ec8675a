"""Options, argument checks and the progress bar that several commands share."""

from __future__ import annotations

import copy
from pathlib import Path

import click
import torch
from tqdm import tqdm

from coda_fast import pretrained
from coda_fast.network import Network

_MODEL_FILE = (
    "A model file (of coda_fast.save, train or demo), or the name of a network that the package contains: "
    f"{', '.join(pretrained.names())}."
)
CHECKPOINT = click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help=_MODEL_FILE)
ANY_CHECKPOINT = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help=f"{_MODEL_FILE} Default: one of these, by the size of the picture.",
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


class Networks:
    """The network of ``--checkpoint``, or without one, for each file the network of the package that is meant
    for pictures of its size. Each is read once.
    """

    def __init__(self, checkpoint: Path | None, device: torch.device):
        self.device = device
        self.loaded: dict[str, Network] = {}
        self.file = None if checkpoint is None else pretrained.find(checkpoint)
        self.given = None if checkpoint is None else str(checkpoint)
        if self.given is not None:  # errors come first
            self.load(self.given)

    def files(self) -> list[Path]:
        """The files that may not be overwritten."""
        return [] if self.file is None else [self.file]

    def name(self, path: Path) -> str:
        """What explains this file: the checkpoint as it was given, or a name of ``pretrained.names()``."""
        return self.given or pretrained.for_file(path)

    def title(self, path: Path) -> str:
        """``name`` for people: of a checkpoint's path, its last part."""
        return Path(self.name(path)).name

    def load(self, name: str) -> Network:
        """The network of that name."""
        if name not in self.loaded:
            self.loaded[name] = pretrained.load(name, device=self.device).eval()
        return self.loaded[name]

    def __call__(self, path: Path) -> Network:
        return self.load(self.name(path))


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
