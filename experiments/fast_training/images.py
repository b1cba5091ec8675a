"""The images: CIFAR-10 as JPEGs one after the other in one file, or generated ones."""

from __future__ import annotations

import concurrent.futures
import os
from pathlib import Path

import numpy as np
import torch


class TrainingProblem(Exception):
    """An error that prevents training; the message says what was expected and what was found."""


def read(path: Path, split: str, limit: int | None = None, threads: int = min(16, os.cpu_count() or 1)):
    """(images uint8 [N, 3, H, W], labels [N]) of ``split``: JPEGs one after the other, some of them replaced
    by lossless pixels.
    """
    from coda_fast.data import decode

    try:
        with np.load(path, allow_pickle=False) as file:
            raw, offsets, labels = (
                file[f"{split}_jpeg"].tobytes(),
                file[f"{split}_offset"],
                file[f"{split}_label"][:limit],
            )
            lossless = (
                (file[f"{split}_lossless_idx"], file[f"{split}_lossless_rgb"])
                if f"{split}_lossless_idx" in file.files
                else None
            )

        def some(indices):
            return [np.asarray(decode(raw[offsets[i] : offsets[i + 1]])) for i in indices]

        # Pillow releases the interpreter's lock while it decodes
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            parts = list(
                pool.map(some, np.array_split(np.arange(len(labels)), max(1, min(4 * threads, len(labels)))))
            )
        images = np.stack([image for part in parts for image in part])
        if lossless is not None:
            inside = lossless[0] < len(labels)
            images[lossless[0][inside]] = lossless[1][inside]
    except Exception as error:  # zipfile, NumPy and Pillow raise many exceptions for damaged files
        expected = f"an .npz file with {split}_jpeg, {split}_offset and {split}_label that fit"
        raise TrainingProblem(f"--data: {path}: expected {expected}: {error}") from None
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def made_up(count: int, classes: int = 10):
    """Generated images, for rehearsals."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(
        count
    ) % classes
