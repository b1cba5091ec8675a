"""Training, from a laptop to a cluster: ``coda-fast train RECIPE`` and ``torchrun ... -m coda_fast.train
RECIPE`` are one program.

What is whose: processes, DDP, FSDP2 and devices are Lightning Fabric's; optimisers, schedules, the moving
average of the weights and RandAugment are timm's; recipes are pydantic models in YAML; shards are found,
fetched and shuffled by webdataset. Ours are the loop (``engine``), which can stop and go on at any step, what
a recipe's images are (``data``; they are read by ``coda_fast.data``) and what chance does to them
(``augmentation``), its checkpoints (``state``) and what is seen of it (``watch``).

One run is a function of its recipe and seed. The order of an epoch is a permutation seeded by (seed, epoch);
everything random about an optimiser step comes from generators seeded by (seed, epoch, step), drawn for the
*global* batch, of which each process takes its slice, or by (seed, epoch, image). So the number of processes
changes rounding only, and a position is two numbers.
"""

from coda_fast.train.errors import FILES, STOPPED, TrainingError
from coda_fast.train.recipes import Recipe, list_recipes, load_recipe

__all__ = ["FILES", "STOPPED", "Recipe", "TrainingError", "list_recipes", "load_recipe", "run"]


def run(recipe, output, resume=None, progress=True):
    """Train by a ``Recipe`` into the folder ``output``: see ``coda_fast.train.engine.run``."""
    from coda_fast.train import engine  # Lightning is loaded when it is needed

    return engine.run(recipe, output, resume, progress)
