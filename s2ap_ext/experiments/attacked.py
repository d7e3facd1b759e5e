"""Further attacks on the last model of each run, in balls that it was not trained for: what ``[attacked.NAME]`` in a plan asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .. import pipeline
from ..data import Dataset
from ..pipeline import STAGES, Recipe, override
from ..pipeline.checkpoint import write_text
from ..pipeline.evaluation import attacked, check_attacks
from ..pipeline.records import sealed, unsealed

Settings = Mapping[str, str]


def recipe_for(recipe: Recipe, name: str, settings: Settings) -> Recipe:
    """``recipe`` with the ball and the attacks of ``[attacked.NAME]``; ValueError for settings that do not fit."""
    if strange := [key for key in settings if key.partition(".")[0] not in ("attack", "evaluate")]:
        raise ValueError(f"attacked.{name}: {strange[0]}: the model is made already; expected keys of attack and evaluate")
    try:
        return override(recipe, [f"{key}={value}" for key, value in settings.items()])
    except ValueError as error:
        raise ValueError(f"attacked.{name}: {str(error).removeprefix('--set ')}") from None


def check(recipe: Recipe, data: Dataset, name: str, settings: Settings) -> None:
    """Raises ValueError for attacks that are unknown, none, or not defined for these models, ImportError for packages they need."""
    if not settings.get("evaluate.attacks"):
        raise ValueError(f"attacked.{name}: expected evaluate.attacks, the names of attacks")
    changed = recipe_for(recipe, name, settings)
    try:
        check_attacks(changed, pipeline.new_model(changed, data), data)
    except ValueError as error:
        raise ValueError(f"attacked.{name}: {error}") from None


def attack(folder: Path, name: str, settings: Settings, recipe: Recipe, data: Dataset, stop: Callable[[], bool]) -> None:
    """Attacks the last model of the finished run in ``folder``, unless that is done, and leaves the accuracies in a file there.

    Finished batches are kept, so that what was stopped goes on.

    Raises:
        Stopped: ``stop`` said so.
        ValueError, ImportError: as :func:`s2ap_ext.pipeline.attacked`.
    """
    if _file(folder, name).is_file():
        return
    model_name = STAGES[pipeline.plan(recipe)[-1]]
    model, _, _ = pipeline.load_model(folder / f"{model_name}.safetensors", data=data, device=pipeline.pick_device(recipe.device))
    with pipeline.reproducible(recipe):
        found = attacked(recipe_for(recipe, name, settings), data, model, model_name, keep=folder / "evaluations", stop=stop)
    accuracies = {key: fraction for key, fraction in found.accuracy.items() if key != "clean"}
    write_text(_file(folder, name), json.dumps(sealed({**accuracies, "worst": found.worst}, folder)) + "\n")


def read_attacked(folder: Path, names: Iterable[str]) -> dict[str, float]:
    """The accuracies that are there, as ``NAME.ATTACK`` and ``NAME.worst``; raises ValueError for a file that is damaged."""
    found: dict[str, float] = {}
    for name in names:
        if (file := _file(folder, name)).is_file():
            record = unsealed(file.read_text(encoding="utf-8", errors="replace"), folder, str(file))
            found |= {f"{name}.{key}": fraction for key, fraction in record.items()}
    return found


def is_attacked(folder: Path, names: Iterable[str]) -> bool:
    """Whether all of these attacks are done."""
    return all(_file(folder, name).is_file() for name in names)


def _file(folder: Path, name: str) -> Path:
    return folder / f"attacked-{name}.json"
