"""scikit-learn's 1,797 scans of handwritten digits, with 8 x 8 grey pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from coda_fast.data.sources import Arrays, to_float


def digits(seed: int = 0) -> tuple[Arrays, Arrays, list[str]]:
    """Training images, test images (a quarter of all), and the names of the classes.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImportError("the digits need scikit-learn: pip install 'coda-fast[cli]'") from None
    source = load_digits()
    # values from 0 to 16
    images = torch.from_numpy(source.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(source.target).long()
    split = train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=seed, stratify=source.target
    )
    train, test = (Arrays(images[index], labels[index]) for index in split)
    return train, test, [str(name) for name in source.target_names]


@dataclasses.dataclass(frozen=True)
class Digits:
    """Training and test images [N, 1, 8, 8] in [0, 1], with labels [N]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: list[str]


def digit_tensors(seed: int = 0) -> Digits:
    """The data of ``digits`` as tensors that a network takes; raises the same ImportError."""
    train, test, names = digits(seed)
    images = (to_float(split.images, torch.float32) for split in (train, test))
    return Digits(next(images), train.labels, next(images), test.labels, names)
