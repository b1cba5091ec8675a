"""Training, on one processor or on many nodes: ``coda-fast train RECIPE`` and ``torchrun ... -m
coda_fast.train RECIPE`` are the same program.

Lightning Fabric provides processes, DDP, FSDP2 and devices (``processes``); timm provides optimisers,
schedules (``optimization``), the moving average of the weights and RandAugment (``augmentation``); webdataset
finds, fetches and shuffles shards. A recipe is a pydantic model (``schema``), read from YAML (``recipes``).

``engine.run`` is a run from its start to its end: it launches the processes, makes model, data and optimiser
from the recipe (``setup``), restores a checkpoint (``resume``, ``checkpoints``), and enters the ``loop``. The
``state`` is the position of the run and its metrics; the processes communicate through the ``agreement``; the
``logger`` shows and writes metrics.

A run is a function of its recipe and seed. The order of an epoch is a permutation seeded by (seed, epoch).
The random numbers of an optimiser step come from generators seeded by (seed, epoch, step), which draw for the
*global* batch, of which each process takes its slice, or by (seed, epoch, image). Therefore the number of
processes changes nothing but rounding, and epoch and step determine the position of a run completely.
"""

from __future__ import annotations

import os

from coda_fast.train.errors import FILES, STOPPED, TrainingError
from coda_fast.train.recipes import Recipe, list_recipes, load_recipe

__all__ = ["FILES", "STOPPED", "Recipe", "TrainingError", "list_recipes", "load_recipe", "run"]


def run(recipe: Recipe, output: str | os.PathLike, resume: str | None = None, progress: bool = True) -> dict:
    """Train by a ``Recipe``, with results in the folder ``output``: see ``coda_fast.train.engine.run``."""
    from coda_fast.train import engine  # Lightning is loaded when it is needed

    return engine.run(recipe, output, resume, progress)
