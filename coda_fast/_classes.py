"""Classes and labels as users pass them: tensors of any integer dtype."""

from __future__ import annotations

import torch


def class_name(names: list[str] | tuple[str, ...] | None, index: int) -> str:
    """The name of a class: from ``names`` if given, else "class <index>"."""
    return names[index] if names else f"class {index}"


def as_classes(value: torch.Tensor, name: str) -> torch.Tensor:
    """``value`` as int64, the dtype that gather, scatter and one_hot take.

    Raises:
        TypeError: ``value`` is not a tensor, or holds bools, floats or complex numbers.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    return value.long()


def one_each(value: torch.Tensor, count: int, name: str) -> torch.Tensor:
    """One class for each of ``count`` images, [N] int64, from a tensor [N] or [N, 1] (as MedMNIST stores
    labels).

    Raises:
        TypeError: ``value`` is not a tensor of integers. ValueError: it has another shape.
    """
    classes = as_classes(value, name)
    if classes.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"{name}: expected one class for each of {count} images, got shape {list(classes.shape)}"
        )
    return classes.reshape(count)


def check_range(classes: torch.Tensor, count: int, name: str) -> None:
    """Raise a ValueError unless all ``classes`` lie between 0 and ``count - 1``."""
    if classes.numel() and not (0 <= int(classes.min()) and int(classes.max()) < count):
        raise ValueError(
            f"{name}: expected classes from 0 to {count - 1}, got {int(classes.min())} to "
            f"{int(classes.max())}"
        )


def fits_no_class(logits: torch.Tensor) -> bool:
    """Whether an image with these ``logits`` [classes] belongs to none of the classes: each class has a
    probability of its own, the sigmoid of its logit, and all of them are below one half.

    Raises:
        ValueError: ``logits`` has another shape.
    """
    if logits.dim() != 1 or not len(logits):
        raise ValueError(f"logits: expected those of one image, [classes], got shape {list(logits.shape)}")
    return bool((logits < 0).all())
