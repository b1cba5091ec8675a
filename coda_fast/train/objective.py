"""What a step minimises: binary cross-entropy on one-hot targets, and the regulariser of the dynamic
matrix.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from coda_fast.losses import DynamicMatrixLoss
from coda_fast.models import CoDANet
from coda_fast.train.recipes import Recipe


class Objective(nn.Module):
    """Model and loss in one module, so that DDP and FSDP2 see every parameter used in one forward pass."""

    def __init__(self, model: CoDANet, recipe: Recipe):
        super().__init__()
        self.model, self.autocast, self.smoothing = (
            model,
            recipe.precision == "bfloat16",
            recipe.loss.label_smoothing,
        )
        loss = recipe.loss
        self.matrix = (
            DynamicMatrixLoss(loss.matrix_weight, loss.matrix_classes, loss.matrix_norm)
            if loss.matrix_weight
            else None
        )

    def forward(self, images, labels=None, rows=None, valid=None):
        """images [N, C, H, W] in [0, 1] -> logits [N, classes]; with labels [N] (and the regulariser's rows
        [N, K], and valid [N], images that count): (logits, loss of each image [N], penalty).
        """
        with (
            torch.autocast(images.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        ):
            if labels is not None and self.matrix is not None and self.training:
                found = self.matrix(self.model, images, labels, rows, valid)
                return (
                    found.logits,
                    _bce(found.logits, labels, self.smoothing),
                    self.matrix.weight * found.penalty,
                )
            logits = self.model(images)
        if labels is None:
            return logits
        return logits, _bce(logits, labels, self.smoothing), logits.new_zeros(())


def _bce(logits, labels, smoothing=0.0):
    """Binary cross-entropy of each image, mean over classes, on one-hot targets (smoothed: each class by
    itself, towards 1/2).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    targets = targets * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
