"""Loss and accuracy on the validation images, for the weights and for their moving average."""

from __future__ import annotations

import contextlib

import torch

from coda_fast.data.sources import Batch
from coda_fast.train import checkpoints
from coda_fast.train.errors import Stopped, TrainingError
from coda_fast.train.setup import Setup
from coda_fast.train.signals import Signals
from coda_fast.train.state import State
from coda_fast.train.unreadable import note_unreadable


@torch.no_grad()
def evaluate(setup: Setup, state: State, signals: Signals) -> dict:
    """The validation part of an epoch's row: ``val_loss``, ``val_accuracy``, and with 100 classes or more
    ``val_top5``; the same for the moving average, with the prefix ``ema_``; and ``val_images``. Every image
    counts once, over all processes.

    Raises:
        Stopped: a signal stopped the run; when it is resumed, it repeats the evaluation.
        TrainingError: no image can be read, or more than ``data.max_corrupt`` cannot.
    """
    setup.module.eval()
    modules = {"": setup.objective}
    if setup.ema is not None:
        modules["ema_"] = setup.ema.module
    for module in modules.values():
        setup.agreement.share_buffers(module)
    batches = setup.source.val.evaluation(setup.recipe.evaluation.batch_size, setup.process)
    with contextlib.closing(batches):
        sums, failures = _sums(setup, state, signals, batches, list(modules.values()))
    total = torch.cat([sums.flatten(), torch.tensor([float(len(failures))])])
    total = setup.agreement.sum(total.to(setup.device, setup.sum_dtype))
    if float(total[-1]):
        note_unreadable(setup, state, failures)
    row: dict[str, float] = {}
    for prefix, numbers in zip(modules, total[:-1].reshape(sums.shape).tolist(), strict=True):
        loss, first, five, count = numbers
        if not count:
            raise TrainingError(
                f"data: expected validation images, could read none of them; {state.last_good_in_words()}"
            )
        row |= {f"{prefix}val_loss": loss / count, f"{prefix}val_accuracy": first / count}
        if setup.source.num_classes >= 100:
            row[f"{prefix}val_top5"] = five / count
    return row | {"val_images": int(count)}


def _sums(setup, state, signals, batches, modules):
    """Sums over the images of this process, [modules, 4]: losses, correct predictions, labels among the five
    most likely classes, images. Also (name, reason) of each image that could not be read.
    """
    sums, failures = torch.zeros(len(modules), 4, dtype=torch.float64), []
    while True:
        batch = next(batches, None)
        message = torch.tensor([float(batch is not None), float(signals.asked)], device=setup.device)
        left, asked = setup.agreement.sum(message).tolist()
        if asked:
            checkpoints.save(setup, state)
            raise Stopped(state.last_good)
        if not left:
            return sums, failures
        if batch is None:  # other processes still have batches
            if not setup.is_sharded:
                continue
            batch = _no_images(setup)  # with sharded weights, all processes must run every forward pass
        batch = batch.to(setup.device)
        failures += batch.failures
        images = setup.inputs(batch.images)
        for row, module in zip(sums, modules, strict=True):
            logits, losses, _ = module(images, batch.labels)
            row += _batch_sums(logits, losses, batch)


def _batch_sums(logits, losses, batch):
    readable = slice(None) if batch.valid is None else batch.valid
    losses, labels = losses[readable].cpu().double(), batch.labels[readable]  # Apple's GPUs have no float64
    top = (logits[readable].topk(min(5, logits.shape[1])).indices == labels[:, None]).cpu()
    found = losses.sum(), top[:, :1].sum(), top.sum(), len(losses)
    return torch.tensor([float(number) for number in found], dtype=torch.float64)


def _no_images(setup):
    side, channels = setup.recipe.data.size or 32, setup.objective.network.image_channels
    images = torch.zeros(1, channels, side, side, dtype=torch.uint8)
    return Batch(images, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
