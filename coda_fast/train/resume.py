"""Finding the checkpoint from which a run is resumed, and restoring the run from it."""

from __future__ import annotations

from pathlib import Path

from coda_fast.data.decode import RULES
from coda_fast.train import checkpoints, random_state, weights
from coda_fast.train.agreement import Agreement
from coda_fast.train.errors import MODELS, TrainingError
from coda_fast.train.recipes import make_recipe
from coda_fast.train.run_folder import RunFolder
from coda_fast.train.schema import Recipe
from coda_fast.train.setup import Setup, differences
from coda_fast.train.state import State


def find(folder: RunFolder, resume: str | None, agreement: Agreement) -> tuple[Path, dict] | None:
    """The checkpoint to resume from and its content, the same for all processes; None if the run is new.

    Raises:
        TrainingError: there is no such checkpoint, it cannot be read, or the folder holds a run that would be
            overwritten.
    """
    found = None

    def choose():
        nonlocal found
        if resume is None:
            _refuse_other_model(folder)
        if folder.path.exists():
            folder.lock()
        found = _choose(folder, resume)
        return None if found is None else str(found[0])

    path = agreement.on_rank_zero(choose)
    if path is not None and found is None:
        found = Path(path), checkpoints.read(path)
    return found


def _choose(folder, resume):
    if resume == "auto":
        return checkpoints.newest(folder.checkpoints, folder.say)
    there, best = checkpoints.listed(folder.checkpoints), folder.checkpoints / "best.pt"
    if resume is None:
        if there := there or ([best] if best.exists() else []):
            raise TrainingError(
                f"{folder.path} holds a run already, up to {there[0].name}; --resume auto goes on with it"
            )
        return None
    path, content = Path(resume), checkpoints.read(resume)
    if there and path.resolve().parent != folder.checkpoints.resolve():
        raise TrainingError(
            f"{folder.path} holds another run, up to {there[0].name}; choose an empty folder to go on "
            f"from {path}"
        )
    position = content["epoch"], content["step"]
    later = [p.name for p in there if checkpoints.position(p) > position]
    if best.exists() and not best.samefile(path):
        epoch = checkpoints.epoch_of(best)
        if epoch is not None and (epoch, 0) > position:
            later.append(best.name)
    if later:
        raise TrainingError(
            f"{folder.path} holds checkpoints after {path.name}, up to {later[0]}, which would be lost; "
            f"move them away, or go on from {path} in an empty folder (--output)"
        )
    return path, content


def _refuse_other_model(folder):
    models = [name for name in MODELS.values() if (folder.path / name).exists()]
    if models and not folder.checkpoints.exists():
        raise TrainingError(
            f"{folder.path} holds the model of another run, {models[0]}; choose another folder, or move it "
            "away"
        )


def restore(setup: Setup, state: State, path: Path, content: dict) -> None:
    """Restore weights, optimiser, schedule, position, history and random states from a checkpoint.

    Raises:
        TrainingError: the checkpoint belongs to another recipe, other data, or another model.
    """
    stored = make_recipe(content["recipe"], str(path))
    _check_same_run(setup, path, content, stored)
    workers = [max(1, recipe.data.workers) for recipe in (stored, setup.recipe)]
    before, now = (content["world"], workers[0]), (setup.process.world_size, workers[1])
    if content["step"] and setup.recipe.data.kind == "webdataset" and before != now:
        setup.logger.say(
            f"shards: (processes, workers) were {before}, now {now}: in the rest of this epoch some images "
            "come twice, some not at all"
        )
    _load_weights(setup, path, content)
    for key in ("epoch", "step", "updates", "best", "seconds"):
        setattr(state, key, content[key])
    if content["sums"] is not None:  # a checkpoint within an epoch
        state.sums = content["sums"]
    state.history, state.unreadable, state.last_good = list(content["history"]), dict(content["bad"]), path
    # With another number of processes the states are not restored. The numbers that a step draws do not
    # depend on them.
    if content["world"] == setup.process.world_size:
        try:
            random_state.set_state(content["rng"][setup.process.rank])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{path}: random states that cannot be: {_first_line(error)}") from None
    setup.logger.say(f"going on from {path}: epoch {state.epoch + 1}, step {state.step}")
    if (origin := content["origin"]) is not None:
        setup.logger.say(f"the run began with weights: {origin['name']} (sha256 {origin['sha256'][:12]})")


def _check_same_run(setup, path, content, stored):
    recipe = setup.recipe
    changed = recipe.differences(stored)
    if "model.weights" in changed and _are_moved(recipe, content):
        changed.remove("model.weights")
    if changed:
        values = ", ".join(
            f"{key} (was {_value(stored, key)!r}, now {_value(recipe, key)!r})" for key in changed
        )
        raise TrainingError(
            f"{path}: the run in this checkpoint had other values of {values}; a changed run needs a "
            "folder of its own"
        )
    for key in (key for key in setup.facts if key.endswith("_rules")):
        if (rules := content["data"].get(key, 1)) != RULES:
            raise TrainingError(
                f"{path}: the run in this checkpoint began with pictures that were decoded by other rules "
                f"(version {rules}, now {RULES}: orientation, transparency and 16 bits are read as "
                "docs/data.md says); finish it with the release that began it, or begin anew in another "
                "folder"
            )
    if changed := differences(content["data"], setup.facts, "was", "now"):
        raise TrainingError(f"{path}: the run in this checkpoint had other data: {changed}")
    if recipe.epochs < (least := content["epoch"] + (content["step"] > 0)):
        raise TrainingError(
            f"{path}: epochs: expected at least {least}, where the run stands, got {recipe.epochs}"
        )


def _are_moved(recipe, content):
    """Whether ``model.weights`` names, by another name, the file from which the run began."""
    origin, name = content["origin"], recipe.model.weights
    return origin is not None and name is not None and weights.is_same(name, origin)


def _load_weights(setup, path, content):
    """Load weights, moving average, optimiser and schedule."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True)
    try:
        # The optimiser comes first: to create the state into which it loads, torch makes an optimiser step,
        # which with some optimisers changes the weights.
        optimizer = setup.optimizer.optimizer
        set_optimizer_state_dict(setup.objective, optimizer, content["optimizer"], options=whole)
        # torch gets a copy, because for sharded modules it replaces the tensors of the dictionary by shards.
        set_model_state_dict(setup.objective, dict(content["model"]), options=whole)
        if setup.ema is not None:
            set_model_state_dict(setup.ema.module, dict(content["ema"]), options=whole)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{path}: weights that do not fit this model: {_first_line(error)}") from None
    if unknown := content["schedule"].keys() ^ setup.schedule.state_dict().keys():
        raise TrainingError(
            f"{path}: a schedule that does not fit this recipe's: {sorted(map(str, unknown))[:3]}"
        )
    setup.schedule.load_state_dict(content["schedule"])
    if setup.agreement.is_rank_zero:
        checkpoints.load_whole_model(setup, content["ema"] or content["model"])


def begin(folder: RunFolder, recipe: Recipe, state: State) -> None:
    """Lock the folder, and write best.pt and recipe.yaml of this run into it. Rank zero calls this."""
    folder.lock()
    if state.last_good is None and checkpoints.listed(folder.checkpoints):
        raise TrainingError(f"{folder.path} holds a run that began meanwhile; --resume auto goes on with it")
    checkpoints.name_best(folder.checkpoints, state)
    folder.write_recipe(recipe)


def _first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)


def _value(recipe, key):
    value = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value
