"""The results of a run: model files of the last epoch and of the best one."""

from __future__ import annotations

from pathlib import Path

from coda_fast import checkpoints as model_files
from coda_fast.train import checkpoints
from coda_fast.train.errors import MODELS
from coda_fast.train.setup import Setup
from coda_fast.train.state import State


def write_models(setup: Setup, state: State) -> list[Path]:
    """Write model.safetensors, and model_ema.safetensors and model_best.safetensors if the run has them.
    Returns their paths.
    """
    assert state.last_good is not None, "an epoch ends with a checkpoint"
    last, best_file = checkpoints.read(state.last_good), setup.checkpoints / "best.pt"
    written = [_write(setup, last, weights, MODELS[weights]) for weights in ("model", "ema") if last[weights]]
    if state.best is None:
        return written
    if best := checkpoints.read_best(best_file, state):
        written.append(_write(setup, best, "model" if best["ema"] is None else "ema", MODELS["best"]))
    else:
        setup.logger.say(
            f"no {MODELS['best']}: {best_file} is not the best epoch, of accuracy {state.best:.2%}"
        )
    return written


def _write(setup, content, weights, name):
    """Write one set of weights of a checkpoint as a model file, with the recipe and the last row of the
    checkpoint's history.
    """
    path = setup.output / name
    metadata = {"recipe": setup.recipe.model_dump(mode="json"), **content["history"][-1], "weights": weights}
    if setup.origin is not None:
        metadata["origin"] = {key: setup.origin[key] for key in ("name", "sha256")}
    model_files.save(checkpoints.load_whole_model(setup, content[weights]), path, metadata)
    return path
