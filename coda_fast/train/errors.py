"""The ways in which a run ends before its last epoch, and the names of the files that it leaves."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

STOPPED = 75  # exit code of a run that a signal stopped and that can be resumed: EX_TEMPFAIL of sysexits.h
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
MODELS = {"model": "model.safetensors", "ema": "model_ema.safetensors", "best": "model_best.safetensors"}
# the files of a run; it also has folders
FILES = ("recipe.yaml", *MODELS.values(), "steps.csv", "metrics.csv", "curve.png")


class TrainingError(ValueError):
    """A run cannot start or go on; the message names what was expected, what was found, and the last good
    checkpoint.
    """


class Stopped(Exception):
    """A signal stopped the run, which can be resumed from ``checkpoint``."""

    def __init__(self, checkpoint: Path | None):
        super().__init__(
            f"stopped by a signal; the run stands in {checkpoint} and goes on with --resume auto"
        )
        self.checkpoint = checkpoint


def need(module: str, extra: str = "train") -> Any:
    """The module of this name, or an ImportError that says what to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"training needs {error.name or module}: pip install 'coda-fast[{extra}]'"
        ) from None
