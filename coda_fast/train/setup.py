"""Setting up a run: model, data and optimiser by its recipe, all checked before anything is written."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coda_fast import registry, safety
from coda_fast.data.shards import Shards
from coda_fast.data.sources import Arrays, Process, seeded, to_float
from coda_fast.models import CoDANet, create_model
from coda_fast.stems import stem_names
from coda_fast.train import features, processes, weights
from coda_fast.train.agreement import Agreement
from coda_fast.train.data import Source, open_data
from coda_fast.train.errors import TrainingError, need
from coda_fast.train.logger import Logger
from coda_fast.train.objective import Objective
from coda_fast.train.optimization import make_optimizer, make_schedule
from coda_fast.train.schema import Recipe

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from timm.utils import ModelEmaV3

# The dtype of the weights for each precision; "bfloat16" means autocast, with weights in float32.
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a run needs and does not replace during training.

    Attributes:
        recipe: of the run.
        output: the folder of the run.
        agreement: communication with the other processes.
        logger: shows and writes metrics.
        source: training and validation images.
        facts: about the images, such that another data set has different facts.
        steps: the number of optimiser steps of an epoch.
        local_batch: the number of images of a step in each process.
        micro_batch: the number of images that a process computes at once.
        objective: model and loss.
        module: the objective, wrapped by Fabric.
        ema: timm's moving average of the objective, if the recipe has one.
        optimizer: the optimiser, wrapped by Fabric.
        schedule: of the learning rate.
        whole_model: in rank zero, a model with all weights of the last checkpoint, for maps and files; None
            in other processes.
        origin: the weights from which the run began and its network (``weights.Weights.origin``); None: the
            run began with fresh weights.
    """

    recipe: Recipe
    output: Path
    agreement: Agreement
    logger: Logger
    source: Source
    facts: dict
    steps: int
    local_batch: int
    micro_batch: int
    objective: Objective
    module: torch.nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    whole_model: CoDANet | None
    origin: dict | None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.output / "checkpoints"

    @property
    def process(self) -> Process:
        """Rank and world size."""
        return self.agreement.process

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.agreement.fabric.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return DTYPES[self.recipe.precision]

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """What the objective takes, of the images of a batch: pixels in [0, 1], or features as they are."""
        if self.recipe.data.cache is not None:
            return images.to(self.dtype)
        return to_float(images, self.dtype, self.recipe.channels_last)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype for sums of metrics: float64, except on Apple's GPUs, which do not have it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def is_sharded(self) -> bool:
        """Whether each process has only a part of the weights."""
        return processes.is_sharded(self.agreement.fabric)


def set_up(
    recipe: Recipe,
    output: Path,
    agreement: Agreement,
    logger: Logger,
    resumed: tuple[Path, dict] | None = None,
) -> Setup:
    """Model, images, optimiser and schedule of a recipe, on the device and shared over the processes. No file
    is written.

    Args:
        recipe: of the run.
        output: the folder of the run.
        agreement: communication with the other processes.
        logger: shows messages.
        resumed: the checkpoint from which the run is resumed, and its content. The file ``model.weights`` is
            not read then.

    Raises:
        TrainingError: values of the recipe do not fit each other, the data, or this machine.
    """
    fabric, process = agreement.fabric, agreement.process
    local_batch, micro_batch = split_batch(recipe, process)
    start = None
    if resumed is None and recipe.model.weights is not None:
        start = weights.Weights(recipe.model)
    _check_same_weights(recipe, agreement.gather(None if start is None else start.sha256))
    make = _maker(recipe, start, resumed)
    is_new = start is None and resumed is None
    model, source = _model_and_source(recipe, make, is_new, fabric.device, logger, local_batch, micro_batch)
    frozen = weights.frozen_layers(model, recipe.model.freeze)
    weights.freeze(model, frozen)
    origin = None if resumed is None else resumed[1]["origin"]
    if start is not None:
        origin = start.origin(model)
    facts = source.facts()
    _check_same_data(agreement.gather(facts))
    if isinstance(source.train, Shards):
        source.train.need_enough(process)
    steps = len(source.train) // recipe.batch_size
    if not steps:
        raise TrainingError(
            f"batch_size: expected at most {len(source.train)}, the training images, got {recipe.batch_size}"
        )
    if recipe.loss.matrix_weight and recipe.loss.matrix_classes > (most := source.num_classes):
        raise TrainingError(
            f"loss.matrix_classes: expected at most the {most} classes, got {recipe.loss.matrix_classes}"
        )
    logger.say(f"data: {_amounts(facts, source.num_classes)}")
    if recipe.micro_batch and 2 * micro_batch < min(recipe.micro_batch, local_batch):
        logger.say(
            f"micro_batch: {recipe.micro_batch} does not divide the {local_batch} images of a process, "
            f"{micro_batch} does"
        )
    for line in start.in_words(model) if start is not None else ():
        logger.say(line)
    if start is not None or frozen or getattr(model, "stem_name", None) is not None:
        logger.say(weights.trained_in_words(model, frozen))
    if recipe.data.cache is not None:
        if resumed is not None:  # the weights of the stem are in the checkpoint
            stored = resumed[1]["model"].items()
            model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stored})
        source = features.cached(recipe, source, model.stem, agreement, logger.reading, logger.say)
    objective, whole_model, ema = _objective(recipe, model, agreement)
    if recipe.compile:
        objective.compile()
    module = fabric.setup_module(objective)
    # Frozen parameters are kept from it altogether, whatever it does with those that have no gradient.
    optimizer = make_optimizer(recipe, (p for p in module.parameters() if p.requires_grad))
    schedule = make_schedule(recipe, optimizer, steps)
    return Setup(
        recipe=recipe,
        output=output,
        agreement=agreement,
        logger=logger,
        source=source,
        facts=facts,
        steps=steps,
        local_batch=local_batch,
        micro_batch=micro_batch,
        objective=objective,
        module=module,
        ema=ema,
        optimizer=fabric.setup_optimizers(optimizer),
        schedule=schedule,
        whole_model=whole_model,
        origin=origin,
    )


def split_batch(recipe: Recipe, process: Process) -> tuple[int, int]:
    """The number of images of a step in each process, and of a micro-batch. Micro-batches are as large as
    ``micro_batch`` allows, and all equal. TrainingError if the batch cannot be divided among the processes.
    """
    if recipe.batch_size % process.world_size:
        raise TrainingError(
            f"batch_size: expected a multiple of {process.world_size}, the number of processes, got "
            f"{recipe.batch_size}"
        )
    local = recipe.batch_size // process.world_size
    most = min(local, recipe.micro_batch or local)
    return local, next(size for size in range(most, 0, -1) if local % size == 0)


def differences(before: dict, after: dict, first: str, second: str) -> str:
    """The differences between facts about data, in words; ``first`` and ``second`` name the two."""
    return ", ".join(
        f"{key} ({first} {before.get(key)!r}, {second} {after[key]!r})"
        for key in after
        if after[key] != before.get(key)
    )


def _check_same_weights(recipe, gathered):
    """Raise a TrainingError, in every process, unless all found the same file of weights."""
    for rank, sha256 in enumerate(gathered):
        if sha256 != gathered[0]:
            raise TrainingError(
                f"model.weights: expected the same file in every process, got {recipe.model.weights} with "
                f"SHA-256 {gathered[0][:12]} in process 0, {sha256[:12]} in process {rank}"
            )


def _check_same_data(gathered):
    """Raise a TrainingError, in every process, unless all have the same images. Processes with different
    images could make different numbers of steps, and wait for each other without end.
    """
    for rank, facts in enumerate(gathered):
        if changed := differences(gathered[0], facts, "process 0", f"process {rank}"):
            raise TrainingError(f"data: expected the same images in every process, got {changed}")


def _amounts(facts, num_classes):
    """The amount of data in words: "1347 images to train with, 450 images to validate with, 10 classes"."""
    uses, parts = {"train": "train", "val": "validate"}, []
    for key, count in facts.items():
        if key.endswith(("_images", "_shards")):
            split, unit = key.split("_")
            parts.append(f"{count} {unit} to {uses[split]} with")
    return ", ".join([*parts, f"{num_classes} classes"])


def _maker(recipe, start, resumed):
    """A function of options and a device that makes the network of the run: with the weights ``start``, as
    the checkpoint ``resumed`` describes it, or fresh.
    """
    spec, dtype = recipe.model, DTYPES[recipe.precision]
    if start is not None:
        return lambda options, device="cpu": start.network(**options, device=device)
    if resumed is not None and resumed[1]["origin"] is not None:
        return lambda options, device="cpu": weights.again(resumed, spec.backend, dtype, device)
    stem = {}
    if resumed is not None:  # it gets the weights of its stem from the checkpoint
        bases = registry.model(spec.name).network.__mro__
        if any("stem_weights" in inspect.signature(base).parameters for base in bases):
            stem = {"stem_weights": None}
    return lambda options, device="cpu": _create_model(recipe, options, stem, device)


def _check_stem_weights(recipe, stem):
    """Raise a TrainingError if a stem would stay as it was drawn, unless the recipe says so."""
    if stem is None or not stem.frozen or recipe.model.stem_weights is not None:
        return
    if stem.name in stem_names():
        raise TrainingError(
            f"model.stem_weights: expected a file with weights of the frozen stem {stem.name}, or fresh for "
            "those that are drawn, got none"
        )
    if "." not in stem.name:
        raise TrainingError(
            f"model.stem_weights: expected pretrained, a file or fresh for the frozen stem {stem.name}, "
            "whose name has no tag of pretrained weights, got none"
        )


def _model_and_source(recipe, make, is_new, device, logger, local_batch, micro_batch):
    probe = make({}, "meta")  # nothing is allocated
    weights.frozen_layers(probe, recipe.model.freeze)  # checked before images are read
    features.check(recipe, probe)
    if is_new:
        _check_stem_weights(recipe, getattr(probe, "stem", None))
    source = open_data(recipe.data, probe.image_channels, device, logger.reading)
    options = {
        "class_names": source.class_names,
        "dtype": DTYPES[recipe.precision],
        "preprocessing": source.preprocessing,
    }
    if source.preprocessing.crop is not None:
        options["image_size"] = source.preprocessing.crop
    options["num_classes"] = source.num_classes
    channels = recipe.model.out_channels
    # in a network of its own layers the last of them are the classes
    if channels is not None and channels[-1] != source.num_classes:
        raise TrainingError(
            f"model.out_channels: expected {source.num_classes} classes at the end, got {channels}"
        )
    _check_memory(recipe, make(options, "meta"), source, device, local_batch, micro_batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(recipe.seed))  # the same weights in every process
        return make(options), source


def _create_model(recipe, options, stem, device):
    try:
        return create_model(recipe.model.name, **options | recipe.model.arguments() | stem, device=device)
    except (OSError, ImportError) as error:
        raise TrainingError(f"model.stem_weights: {error}") from None
    except (ValueError, TypeError) as error:
        raise TrainingError(f"model: {str(error).removeprefix('model: ')}") from None
    # torch raises these for sizes that do not fit in 64 bits
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise TrainingError(
            f"model: expected layers that this machine can hold, got {' '.join(str(error).split())[:200]}"
        ) from None


def _check_memory(recipe, model, source, device, local_batch, micro_batch):
    """Raise a TrainingError if weights, images or activations of a step alone do not fit in memory."""
    weights = sum(p.numel() for p in model.parameters()) * DTYPES[recipe.precision].itemsize
    try:
        safety.need_memory("model: weights, their gradients and a copy", 3 * weights, device)
        in_memory = isinstance(source.train, Arrays)
        height, width = source.train.images.shape[2:] if in_memory else (recipe.data.size or 1,) * 2
        pixels = height * width * model.image_channels
        if not in_memory:
            batches = 1 + 4 * recipe.data.workers  # the loader reads ahead
            safety.need_memory("batch_size, data.workers, data.size: images", batches * local_batch * pixels)
        activations = 0
        if in_memory or recipe.data.size:
            activations = sum(map(math.prod, model.layer_sizes(height, width).values()))
        # two bytes each, as under autocast
        needed = 2 * micro_batch * (activations + 2 * pixels)
        safety.need_memory("batch_size, micro_batch: activations", needed, device)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _objective(recipe, model, agreement):
    """The objective, rank zero's whole model, and the moving average, on the device."""
    is_sharded = processes.is_sharded(agreement.fabric)
    if recipe.channels_last and not is_sharded:  # FSDP2 takes contiguous weights only
        model = model.to(memory_format=torch.channels_last)
    objective = Objective(model.to(agreement.fabric.device), recipe)
    whole_model = ema = None
    if agreement.is_rank_zero:
        whole_model = copy.deepcopy(objective.model).requires_grad_(False).eval()
    if recipe.ema.decay:
        need("timm")
        from timm.utils import ModelEmaV3

        options = dict(decay=recipe.ema.decay, use_warmup=recipe.ema.warmup, foreach=not is_sharded)
        ema = ModelEmaV3(objective, **options)
        if is_sharded:
            processes.shard(ema.module, agreement.fabric.strategy.device_mesh)
    return objective, whole_model, ema
