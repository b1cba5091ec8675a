"""The global random generators of a process: those of torch, NumPy and Python. Lightning's own functions to
collect and restore their states are private.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed all global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_state() -> dict:
    """The states of all global generators, as plain values that a checkpoint can hold."""
    legacy = np.random.get_state(legacy=False)
    name, keys, position = legacy["bit_generator"], legacy["state"]["key"], legacy["state"]["pos"]
    version, numbers, next_gauss = random.getstate()
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys.tolist(), int(position), int(legacy["has_gauss"]), float(legacy["gauss"])],
        "python": [version, list(numbers), next_gauss],
        "cuda": torch.cuda.get_rng_state() if has_cuda else None,
    }


def set_state(state: dict) -> None:
    """Restore the states that ``get_state`` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers), next_gauss))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
