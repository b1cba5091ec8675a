"""Training within a time limit on one GPU: ``python -m experiments.fast_training``, see command.py."""

from experiments.fast_training.command import WEIGHTS, main, recipe_of
from experiments.fast_training.images import TrainingProblem, made_up, read
from experiments.fast_training.loop import train
from experiments.fast_training.trainer import TINY, Trainer, rate_of

__all__ = [
    "TINY",
    "WEIGHTS",
    "Trainer",
    "TrainingProblem",
    "made_up",
    "main",
    "rate_of",
    "read",
    "recipe_of",
    "train",
]
