"""The function that training minimises: binary cross-entropy with one-hot targets, plus the matrix
regulariser.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from coda_fast._autocast import wide
from coda_fast.data.sources import Process
from coda_fast.losses import DynamicMatrixLoss, random_rows
from coda_fast.models import CoDANet
from coda_fast.network import Network
from coda_fast.train.schema import Recipe


class Objective(nn.Module):
    """Model and loss in one module: DDP and FSDP2 require that one forward pass uses all parameters."""

    def __init__(self, model: CoDANet, recipe: Recipe):
        super().__init__()
        loss = recipe.loss
        self.model, self.smoothing = model, loss.label_smoothing
        # In a tuple, so that it is no part of the state: it shares its layers with the model.
        self._head = (model.head_network(),) if recipe.data.cache is not None else ()
        self.autocast = recipe.precision == "bfloat16"
        self.matrix = None
        if loss.matrix_weight:
            self.matrix = DynamicMatrixLoss(loss.matrix_weight, loss.matrix_classes, loss.matrix_norm)

    def forward(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [N, classes], the cross-entropy of each image [N], and the weighted penalty [] (in
        training).

        Args:
            images: [N, C, H, W] in [0, 1]; with ``data.cache`` the features of the stem instead.
            labels: [N].
            rows: the classes [N, K] of the regulariser; None: there is no regulariser.
            valid: the images that the regulariser counts, [N]; None: all.
        """
        kind = images.device.type
        with torch.autocast(kind, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            if self.matrix is not None and self.training:
                logits, penalty = self.matrix.logits_and_penalty(self.network, images, labels, rows, valid)
                penalty = self.matrix.weight * penalty
            else:
                logits = self.network(images)
                penalty = logits.new_zeros(())
        return logits, self._cross_entropy(logits, labels), penalty

    @property
    def network(self) -> Network:
        """What images go through: the model, or with ``data.cache`` the part above its stem."""
        return self._head[0] if self._head else self.model

    def _cross_entropy(self, logits, labels):
        """The loss of each image, averaged over classes. Label smoothing moves all targets towards 1/2."""
        logits = wide(logits)
        targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        targets = targets * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    def draw_rows(
        self, labels: torch.Tensor, generator: torch.Generator, process: Process
    ) -> torch.Tensor | None:
        """The classes [N, K] of the regulariser for this process' ``labels`` [N]; None without a regulariser.
        They are drawn for the global batch, so that they do not depend on the number of processes.
        """
        if self.matrix is None:
            return None
        total = len(labels) * process.world_size
        scores = torch.rand(total, self.model.num_classes, generator=generator)[process.slice(total)]
        return random_rows(labels, scores, self.matrix.classes)

    def weights_in_words(self) -> str:
        """Text for messages about a loss that is not finite: whether the weights are finite, and the largest
        of them. Images are in [0, 1], so only large weights can make |w|^2 overflow in float32.
        """
        parameters = [(name, p.detach()) for name, p in self.model.named_parameters() if p.numel()]
        sizes = {name: float(p.abs().max()) for name, p in parameters}
        if broken := [name for name, size in sizes.items() if not math.isfinite(size)]:
            return f"not finite: {len(broken)} of {len(sizes)} weights, first {broken[0]}"
        largest = max(sizes, key=lambda name: sizes[name])
        return f"the largest weight is {sizes[largest]:.1e}, in {largest}"
