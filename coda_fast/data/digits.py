"""scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels, grey."""

from __future__ import annotations

import numpy as np
import torch

from coda_fast.data.sources import Arrays


def digits(seed: int = 0) -> tuple[Arrays, Arrays, list[str]]:
    """Images for training, a quarter of all images for testing, and the names of the classes.

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
