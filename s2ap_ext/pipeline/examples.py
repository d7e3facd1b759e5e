"""Adversarial examples of a finished run, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import in_memory
from ..modes import evaluation_mode
from .analyze import models_of
from .run_folder import read_recipe
from .runner import open_data, reproducible
from .trainer import evaluation_attack, seed


@dataclass(frozen=True)
class Example:
    """A test image before and after an attack.

    Attributes:
        clean, attacked: float32 [C, H, W] in [0, 1].
        label: the name of its class.
        seen, seen_attacked: the names of the classes that the model takes the two for.
    """

    clean: Tensor
    attacked: Tensor
    label: str
    seen: str
    seen_attacked: str


def examples(path: str | Path, count: int = 6) -> list[Example]:
    """The first ``count`` test images, as they are and as the recipe's attack on the last model of the run leaves them.

    Raises:
        ValueError: not the folder of a run, one without a model, or data that are not those of the run.
        OSError: the data are not where they were.
        ImportError: a package that reads the data is missing.
    """
    recipe = read_recipe(path)
    data = open_data(recipe)
    models = list(models_of(path, recipe, data).values())
    if not models:
        raise ValueError(f"{path}: expected a model, found none")
    model = models[-1]
    device = next(model.parameters()).device
    few = in_memory(data.test.first(count)).to(device)
    x, y = few.floats(), few.labels
    with reproducible(recipe):
        seed(recipe.seed, 0)
        x_adv = evaluation_attack(recipe)(model, x, y)
        with evaluation_mode(model, freeze=True), torch.no_grad():
            seen, seen_attacked = (model(images).argmax(dim=1).tolist() for images in (x, x_adv))
    names = [[data.classes[number] for number in numbers] for numbers in (y.tolist(), seen, seen_attacked)]
    return [Example(*one) for one in zip(x.cpu(), x_adv.cpu(), *names, strict=True)]
