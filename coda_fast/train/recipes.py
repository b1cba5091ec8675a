"""Recipes: all that a run depends on, as YAML files in ``coda_fast/recipes`` or elsewhere, with ``key=value``
overrides.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from coda_fast.train.errors import TrainingError, need
from coda_fast.train.schema import Data, Recipe, keys

__all__ = ["Data", "Recipe", "list_recipes", "load_recipe", "make_recipe"]


def list_recipes() -> dict[str, str]:
    """The names of the recipes of this package, each with a description."""
    return {name: load_recipe(name).about for name in _names()}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or YAML file, with ``key=value`` overrides such as ``optimizer.lr=1e-3``; values are
    YAML.

    Raises:
        TrainingError: there is no such recipe, keys are unknown (the message names similar ones), values have
            the wrong type, or overrides change nothing.
    """
    values = _read(name)
    known = set(keys())
    changes = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise TrainingError(f"override: expected key=value, got {text!r}")
        if key not in known:
            raise TrainingError(_unknown(key, known))
        if not value.strip():  # as of a variable of a shell that is not set
            raise TrainingError(f"{key}: expected a value after the sign, null for none, got nothing")
        *sections, field = key.split(".")
        node = values
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[field] = _parse(value, key)
        changes.append((key, value))
    recipe = make_recipe(values, str(name))
    _refuse_unused(recipe, changes)
    return recipe


def _read(name):
    """The plain values of a recipe."""
    path = files("coda_fast").joinpath("recipes", f"{name}.yaml")
    if not path.is_file():
        path = Path(name)
        if path.suffix in (".yaml", ".yml") and not path.exists():
            raise TrainingError(f"recipe: no such file: {name}")
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise TrainingError(
                f"recipe: expected one of {', '.join(_names())} or a .yaml file, got {name!r}"
            )
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1).decode()
    except UnicodeDecodeError:
        raise TrainingError(f"{name}: expected a text file in UTF-8") from None
    values = _parse(text, str(name))
    if not isinstance(values, dict):
        raise TrainingError(f"{name}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def _refuse_unused(recipe, changes):
    """Raise a TrainingError if an override has no effect together with the other values. An override that
    sets the default is allowed.
    """
    unused = recipe.unused()
    for key, value in changes:
        if key not in unused:
            continue
        section, _, field = key.partition(".")
        found = getattr(recipe, section)
        if getattr(found, field) != type(found).model_fields[field].default:
            raise TrainingError(
                f"{key}: expected {unused[key]} beside it, without which it changes nothing; got "
                f"{key}={value}"
            )


def make_recipe(values: dict, source: str) -> Recipe:
    """A checked ``Recipe`` from plain values, which messages call ``source``; TrainingError if keys are
    unknown or values do not fit.
    """
    from pydantic import ValidationError

    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = []
        for found in error.errors()[:10]:
            # keys and list indices, without the types that pydantic tried for a union
            key = ".".join(
                str(part)
                for part in found["loc"]
                if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)
            )
            if found["type"] == "extra_forbidden":
                problems.append(_unknown(key, set(keys())))
            elif found["type"] == "missing":
                problems.append(f"{key}: expected a value, got none")
            elif found["type"] == "value_error":
                problems.append(f"{key + ': ' if key else ''}{found['ctx']['error']}")
            else:
                message = found["msg"][0].lower() + found["msg"][1:]
                wanted = message.removeprefix("input should be ").removeprefix("a valid ")
                problems.append(f"{key}: expected {wanted}, got {_short(found['input'])}")
        raise TrainingError(f"recipe {source}: " + "; ".join(dict.fromkeys(problems))) from None


_TYPES = {"int", "float", "str", "bool"}


def _names():
    return sorted(
        p.name.removesuffix(".yaml")
        for p in files("coda_fast").joinpath("recipes").iterdir()
        if p.name.endswith(".yaml")
    )


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unknown(key, known):
    if len(key) > 100:
        return f"unknown key {_short(key)}"
    last = {k: k.rpartition(".")[2] for k in known}
    near = [k for k in known if last[k] == key.rpartition(".")[2]] + difflib.get_close_matches(
        key, known, 3, 0.6
    )
    near += [
        k
        for k in known
        if last[k] in difflib.get_close_matches(key.rpartition(".")[2], set(last.values()), 2, 0.7)
    ]
    near = list(dict.fromkeys(sorted(near[:1]) + near))[:4]
    return f"unknown key {key!r}" + (f"; near to it: {', '.join(near)}" if near else "")


LONGEST, DEEPEST, LARGEST = 2**16, 20, 10_000  # limits of a recipe: bytes, depth, number of values


def _parse(text, what):
    yaml = need("yaml")
    if len(text) > LONGEST:
        raise TrainingError(f"{what}: expected a recipe of at most {LONGEST} bytes, got more")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        hint = "; text that begins with such a sign needs quotes" if text[:1] in set("*&!%@`|>") else ""
        raise TrainingError(f"{what}: not YAML: {' '.join(str(error).split())[:1000]}{hint}") from None
    except RecursionError:
        raise TrainingError(f"{what}: expected values at most {DEEPEST} deep, got deeper ones") from None
    except (ValueError, TypeError, OverflowError) as error:  # numbers and dates that Python cannot represent
        raise TrainingError(
            f"{what}: not YAML that can be read: {' '.join(str(error).split())[:1000]}"
        ) from None
    _need_modest(found, what)
    return found


def _need_modest(found, what):
    """Raise a TrainingError if YAML aliases make too many values, or a value that contains itself."""
    level, count = [found], 0
    for _ in range(DEEPEST + 1):
        count += len(level)
        if count > LARGEST:
            raise TrainingError(
                f"{what}: expected at most {LARGEST} values, aliases counted as what they stand for, got more"
            )
        below = []
        for value in level:
            if isinstance(value, (dict, list, tuple, set)):
                below += [*value, *value.values()] if isinstance(value, dict) else value
                if len(below) > LARGEST:
                    break
        level = below
    if level:
        raise TrainingError(f"{what}: expected values at most {DEEPEST} deep, got deeper ones")
