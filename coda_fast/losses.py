"""The matrix regulariser: a penalty on the global linear map that makes it small and sparse
(arXiv:2104.00032).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from coda_fast._autocast import wide
from coda_fast._classes import as_classes, one_each
from coda_fast._wrappers import wrapped_by
from coda_fast.dynamic_linear import DynamicLinear, need_network

PENALTIES = ("l1", "l2")


class MatrixLoss(NamedTuple):
    """What ``DynamicMatrixLoss`` returns: ``total = bce + weight * penalty`` (to be minimised), its terms,
    and the logits [N, classes].
    """

    total: torch.Tensor
    bce: torch.Tensor
    penalty: torch.Tensor
    logits: torch.Tensor


def matrix_penalty(
    model: DynamicLinear, images: torch.Tensor, classes: torch.Tensor, norm: str = "l1"
) -> torch.Tensor:
    """Mean absolute value ("l1") or mean square ("l2") of the entries of the rows ``[W_{0->L}(x)]_c`` of each
    image's global linear map, including 1/T.

    A row is a vector with a one for the class at every output pixel, multiplied by the transposed layers with
    the weights that the image generates. The penalty is fully differentiable in the parameters, also through
    the activations from which a layer generates its weights; explanation mode would stop those gradients. It
    costs a forward pass, and for each class an adjoint of every layer and its backward pass.

    Args:
        model: a CoDANet or another ``DynamicLinear``, or a wrapper of one (``coda_fast.unwrap``).
            DistributedDataParallel does not see calls of the network inside it, and is refused if there are
            gradients to share.
        images: [N, C, H, W]; classes: the rows of each image, [N, K], of any integer dtype.

    Raises:
        ValueError, TypeError: shapes, classes or the norm do not fit.
    """
    if norm not in PENALTIES:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, PENALTIES))}, got {norm!r}")
    model = _trained_network(model)
    model.check_images(images)
    classes = _checked_rows(classes, "classes", len(images), model.num_classes)
    return _penalty(model, *model.linearise(model.encoder(images)), classes, norm)


def random_rows(labels: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """The label of each image first, then the classes of its ``count - 1`` highest other ``scores``.

    Args:
        labels: [N], int64; scores: [N, classes], random numbers below 1.

    Returns:
        [N, count], on the device of the labels.
    """
    scores = scores.to(labels.device, non_blocking=True).scatter(1, labels[:, None], 2.0)
    return scores.argsort(1, descending=True)[:, :count]


def _trained_network(model):
    """The network inside wrappers; an error if its gradients would silently be wrong."""
    given, model = model, need_network(model)
    if torch.is_grad_enabled() and wrapped_by(given, "DistributedDataParallel"):
        raise TypeError(
            "model: expected a CoDANet, got DistributedDataParallel, which shares the gradients of its own "
            "calls alone: wrap a module that holds the network and calls the loss"
        )
    if any(layer.explaining for layer in model.dau_layers().values()):
        raise ValueError("model: expected a network that trains, got one in explanation mode")
    return model


def _checked_rows(classes, name, count, num_classes):
    """[count, K] classes from 0 to ``num_classes - 1`` as int64."""
    classes = as_classes(classes, name)
    if classes.dim() != 2 or len(classes) != count or not classes.shape[1]:
        raise ValueError(f"{name}: expected [{count}, K] with K >= 1, got shape {list(classes.shape)}")
    _check_range(classes, num_classes, name)
    return classes


def _check_range(classes, count, name):
    """Raise a ValueError unless all classes lie between 0 and ``count - 1``. On CUDA a kernel asserts it and
    prints the message, because reading the numbers here would synchronise with the device in every step.
    """
    if not classes.numel():
        return
    if classes.is_cuda:
        inside = ((classes >= 0) & (classes < count)).all()
        torch._assert_async(inside, f"{name}: expected 0 to {count - 1}, got others")
        return
    least, most = int(classes.min()), int(classes.max())
    if least < 0 or most >= count:
        raise ValueError(f"{name}: expected 0 to {count - 1}, got {least} to {most}")


def _penalty(model, evidence, pull_back, classes, norm, valid=None):
    if not len(classes):
        return sum((p * 0).sum() for p in model.parameters())
    total, dtype = 0, torch.float64 if evidence.dtype == torch.float64 else torch.float32
    for k in range(classes.shape[1]):
        chosen = F.one_hot(classes[:, k], model.num_classes).to(evidence)
        chosen = chosen if valid is None else chosen * valid[:, None]
        value = pull_back(chosen[:, :, None, None].expand_as(evidence))  # the head sums over pixels
        row = value.to(dtype) / model.temperature  # last: float16 holds 1 / T = 1e-5 to two digits only
        total = total + (row.abs() if norm == "l1" else row.square()).mean()
    return total / classes.shape[1]


class DynamicMatrixLoss(nn.Module):
    """Binary cross-entropy plus ``weight`` times the matrix penalty (``matrix_penalty``) on the rows of the
    true class and of random other classes.

    Both terms share one forward pass.

    Args:
        weight: lambda; published: 0.1, 0.25, 0.5, 1, with T = 64.
        classes: number of rows for each image: the true class and ``classes - 1`` others (published: 2).
        norm: "l1" (published) or "l2".
        generator: draws the other classes, on the CPU; None: torch's global one.

    Raises:
        ValueError: the weight is negative, there is less than one class, or the norm is unknown.

    >>> import torch, coda_fast
    >>> model = coda_fast.create_model("coda_xs_digits")
    >>> loss = DynamicMatrixLoss(weight=0.1)(model, torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]))
    >>> loss.total.backward()
    """

    def __init__(
        self, weight: float, classes: int = 2, norm: str = "l1", generator: torch.Generator | None = None
    ):
        super().__init__()
        if not (isinstance(weight, int | float) and 0 <= weight < float("inf")):
            raise ValueError(f"weight: expected a number that is not negative, got {weight!r}")
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise ValueError(f"classes: expected a positive integer, got {classes!r}")
        if norm not in PENALTIES:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, PENALTIES))}, got {norm!r}")
        self.weight, self.classes, self.norm, self.generator = weight, classes, norm, generator

    def forward(
        self,
        model: DynamicLinear,
        images: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> MatrixLoss:
        """The losses, in float32 or wider, and the logits in the dtype of the network.

        Args:
            model: as in ``matrix_penalty``.
            images: [N, C, H, W].
            labels: their classes, [N] or [N, 1], of any integer dtype.
            rows: the classes whose rows are penalised, [N, K], of any integer dtype; None: drawn by
                ``self.rows``.
            valid: which images the penalty counts, [N]; the others enter its mean as zeros. None: all.

        Raises:
            ValueError, TypeError: as ``matrix_penalty``.
        """
        logits, penalty = self.logits_and_penalty(model, images, labels, rows, valid)
        targets = F.one_hot(labels.long().reshape(-1), logits.shape[1])
        bce = F.binary_cross_entropy_with_logits(wide(logits), targets.to(wide(logits).dtype))
        return MatrixLoss(bce + self.weight * penalty if self.weight else bce, bce, penalty, logits)

    def logits_and_penalty(
        self,
        model: DynamicLinear,
        images: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, penalty): ``forward`` without the cross-entropy, for callers that compute another one."""
        model = _trained_network(model)
        model.check_images(images)
        labels = one_each(labels, len(images), "labels")
        _check_range(labels, model.num_classes, "labels")
        if self.classes > model.num_classes:
            raise ValueError(
                f"classes: expected at most {model.num_classes}, those of the model, got {self.classes}"
            )
        evidence, pull_back = model.linearise(model.encoder(images))
        logits = model.head(evidence)
        if not self.weight:
            return logits, wide(logits).new_zeros(())
        if rows is None:
            rows = self.rows(labels, model.num_classes)
        else:
            rows = _checked_rows(rows, "rows", len(images), model.num_classes)
        return logits, _penalty(model, evidence, pull_back, rows, self.norm, valid)

    def rows(self, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
        """The true class first, then distinct random others, [N, classes]."""
        return random_rows(
            labels, torch.rand(len(labels), num_classes, generator=self.generator), self.classes
        )

    def extra_repr(self) -> str:
        """The options of the loss."""
        return f"weight={self.weight}, classes={self.classes}, norm={self.norm!r}"
