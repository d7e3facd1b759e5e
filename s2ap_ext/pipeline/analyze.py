"""The analysis of a run: sharpness, landscapes and stability of its models (:mod:`s2ap_ext.analysis`), kept in its folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis import (
    ascended,
    chance_overlap,
    flip_rate,
    functional_distance,
    gradient_cosine,
    landscape,
    layer_masks,
    line,
    overlap,
    score_sharpness,
    spectrum,
)
from ..data import Dataset, in_memory
from ..modes import evaluation_mode
from ..nn import pruned_layers
from . import checkpoint
from .model_file import identity, load_model, pick_device
from .plan import STAGES
from .records import sealed
from .run_folder import ANALYSIS, check_run, read_recipe
from .runner import describe_attack, open_data, reproducible
from .sections import Recipe
from .trainer import evaluation_attack, seed

GAMMA = 1e-3  # where the recipe gives a budget of flips in its place
RADIUS = 0.05  # of lines and planes, relative to the norm of what is displaced
POINTS = {"line": 21, "plane": 11}
RANDOM_LINES = 2


def analyze(
    path: str | Path, *, images: int = 128, masks: dict[str, Any] | None = None, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Analyses the models in the folder of a run and writes analysis.json there.

    Everything is of the loss on the same first test images: as they are, or, for the robust loss, as the recipe's attack on the test images
    leaves them when it attacks the model in question. These examples stay fixed while the model is displaced. What each figure means is in
    docs/analysis-and-report.md.

    Args:
        path: the folder.
        images: how many test images, at least 1; fewer where there are fewer.
        masks: how the run's mask compares with those of other runs (:func:`compare_masks`), to be kept with the rest.
        tell: takes a line about what is being done.

    Returns:
        What analysis.json holds: ``images``, ``attack``, ``gamma``, one entry of ``models`` for each model in the folder, the
        ``functional_distance`` from each model to the next, and ``masks`` where they are given.

    Raises:
        ValueError: not the folder of a run, or one without a model; a model of another run; ``images`` below 1.
        MissingExtra: SciPy is not installed.
    """
    if images < 1:
        raise ValueError(f"images: expected at least 1, got {images}")
    recipe = read_recipe(path)
    data = open_data(recipe)
    device = pick_device(recipe.device)
    few = in_memory(data.test.first(images)).to(device)
    x, y = few.floats(), few.labels
    entries, logits = [], {}
    with reproducible(recipe):
        for name, model in models_of(path, recipe, data).items():
            tell(f"{path}: {name}")
            entries.append({"model": name, **_examine(model, recipe, x, y)})
            logits[name] = _logits(model, x)
    if not entries:
        raise ValueError(f"{path}: expected a model, found none; go on with: s2ap run --resume {path}")
    moved = [{"from": a, "to": b, "value": functional_distance(logits[a], logits[b])} for a, b in itertools.pairwise(logits)]
    found = {"images": len(y), "attack": describe_attack(recipe), "gamma": _gamma(recipe), "models": entries, "functional_distance": moved}
    found |= {} if masks is None else {"masks": masks}
    _save(Path(path), found)
    return found


def compare_masks(paths: Iterable[str | Path]) -> dict[str, Any]:
    """The overlap of the masks that several runs ended with, such as runs that differ in their seed, and that of random masks.

    Returns:
        ``runs``, the names of the folders, ``overlap`` and ``chance`` (:func:`s2ap_ext.analysis.overlap`).

    Raises:
        ValueError: fewer than two runs, or one without a pruned model; masks of different layers or shapes.
    """
    paths, masks = list(paths), []
    for path in paths:
        recipe = read_recipe(path)
        sparse = [model for model in models_of(path, recipe, open_data(recipe)).values() if pruned_layers(model)]
        if not sparse:
            raise ValueError(f"{path}: expected a pruned model, found none")
        masks.append(layer_masks(sparse[-1]))
    return {"runs": [Path(path).name for path in paths], "overlap": overlap(masks), "chance": chance_overlap(masks)}


def models_of(path: str | Path, recipe: Recipe, data: Dataset) -> dict[str, nn.Module]:
    """The models in the folder of a run by name, in the order of its stages, on the recipe's device.

    Raises:
        ValueError: a file that cannot be read, or that belongs to another run.
    """
    files = {name: Path(path) / f"{name}.safetensors" for name in STAGES.values()}
    models = {}
    for name, file in files.items():
        if file.exists():
            check_run(file, checkpoint.load(file)[1], identity(recipe, data))
            models[name] = load_model(file, data=data, device=pick_device(recipe.device))[0].eval()
    return models


def _examine(model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What is written down about one model."""
    seed(recipe.seed, 0)
    x_adv = evaluation_attack(recipe)(model, x, y)

    def robust(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x_adv), y)

    spaces = ["scores", "weights"] if pruned_layers(model) else ["weights"]
    with torch.no_grad():
        losses = {"clean": float(F.cross_entropy(model(x), y)), "robust": float(robust(model))}
    found: dict[str, Any] = {
        "loss": losses,
        "spectra": [asdict(spectrum(model, robust, space=space, seed=recipe.seed)) for space in spaces],
        "lines": [_line(model, robust, space, along, n) for space in spaces for along, n in _directions()],
        "planes": [_plane(model, robust, space, recipe.seed) for space in spaces],
    }
    if "scores" in spaces:
        radius = 1e-2
        found["curvature"] = {"radius": radius, "value": score_sharpness(model, robust, radius=radius, seed=recipe.seed)}
        found["ascent"] = _ascent(model, robust, _gamma(recipe), x)
    return found


def _directions() -> list[tuple[str, int]]:
    return [("ascent", 0), *(("random", number) for number in range(RANDOM_LINES))]


def _line(model: nn.Module, loss: Callable[[nn.Module], Tensor], space: str, along: str, number: int) -> dict[str, Any]:
    found = line(model, loss, along=along, space=space, radius=RADIUS, points=POINTS["line"], seed=number)
    return {"space": space, "along": along, **{name: values.tolist() for name, values in found._asdict().items()}}


def _plane(model: nn.Module, loss: Callable[[nn.Module], Tensor], space: str, seed: int) -> dict[str, Any]:
    steps, losses = landscape(model, loss, space=space, radius=RADIUS, points=POINTS["plane"], seed=seed)
    return {"space": space, "steps": steps.tolist(), "losses": losses.tolist()}


def _ascent(model: nn.Module, loss: Callable[[nn.Module], Tensor], gamma: float, x: Tensor) -> dict[str, float]:
    """What S2AP's own perturbation of the scores changes: the mask, the loss, its gradient, and the predictions."""
    moved = ascended(model, loss, gamma)
    with torch.no_grad():
        rise = float(loss(moved)) - float(loss(model))
    return {
        "flip_rate": flip_rate(model, moved),
        "rise": rise,
        "gradient_cosine": gradient_cosine(model, moved, loss),
        "functional_distance": functional_distance(_logits(model, x), _logits(moved, x)),
    }


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with evaluation_mode(model, freeze=True), torch.no_grad():
        logits: Tensor = model(x)
    return logits.cpu()


def _gamma(recipe: Recipe) -> float:
    return recipe.prune.gamma if isinstance(recipe.prune.gamma, float) else GAMMA


def _save(path: Path, found: dict[str, Any]) -> None:
    checkpoint.write_text(path / ANALYSIS, json.dumps(sealed(found, path), indent=2) + "\n")
