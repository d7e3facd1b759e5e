"""A model under attacks by name, in the ball of the recipe's attack: what a run evaluates beside its own PGD, and ``s2ap evaluate``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..data import Dataset, in_memory
from ..engine import for_attack
from ..evaluation import Evaluation, GradientCheck, check_gradients, chosen, evaluate
from . import progress
from .progress import Stopped
from .sections import Recipe


def attacked(
    recipe: Recipe,
    data: Dataset,
    model: nn.Module,
    name: str = "model",
    *,
    engine: str = "",
    keep: Path | None = None,
    show: progress.Silent | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """The test images under the attacks of ``evaluate.attacks``; errors as :func:`s2ap_ext.evaluation.evaluate`.

    Args:
        name: what the model is called where progress is shown.
        engine: as there; empty takes the kept weights where training attacks do.
        keep: a folder for finished batches.

    Raises:
        Stopped: ``stop``, asked after each batch, said so.
    """
    test = in_memory(data.test)
    images = test.floats()
    if not engine:
        engine = "sparse" if for_attack(model, images[:1]) is not None else "torch"
    shown = _Shown(name, show or progress.Silent(), stop, recipe.evaluate.batch_size)
    try:
        return evaluate(
            model,
            images,
            test.labels,
            recipe.evaluate.attacks,
            norm=recipe.attack.norm,
            eps=recipe.attack.eps,
            seed=recipe.seed,
            batch_size=recipe.evaluate.batch_size,
            engine=engine,
            keep=keep,
            tell=shown.tell,
        )
    finally:
        shown.finish()


def gradients_checked(
    recipe: Recipe, data: Dataset, model: nn.Module, name: str = "model", *, show: progress.Silent | None = None
) -> GradientCheck:
    """Signs of gradient masking on the first ``evaluate.images_per_epoch`` test images, in the ball of the recipe's attack."""
    few = in_memory(data.test.first(recipe.evaluate.images_per_epoch))
    shown = _Shown(name, show or progress.Silent(), lambda: False, recipe.evaluate.batch_size)
    try:
        return check_gradients(
            model,
            few.floats(),
            few.labels,
            norm=recipe.attack.norm,
            eps=recipe.attack.eps,
            seed=recipe.seed,
            batch_size=recipe.evaluate.batch_size,
            tell=shown.tell,
        )
    finally:
        shown.finish()


def check_attacks(recipe: Recipe, model: nn.Module, data: Dataset) -> dict[str, str]:
    """Whose code each attack of ``evaluate.attacks`` is, by name.

    Raises:
        ImportError: a package that an attack needs is missing.
        ValueError: an unknown attack, or one that is not defined for the recipe's norm or for so few classes.
    """
    if not recipe.evaluate.attacks:
        return {}
    device = next(model.parameters()).device
    logits = torch.zeros(1, data.num_classes, device=device)
    try:
        attacks = chosen(recipe.evaluate.attacks, recipe.attack.norm, recipe.attack.eps)
        for attack in attacks.values():
            attack.check(lambda x: logits, torch.zeros(1, *data.shape, device=device))
    except ValueError as error:
        raise ValueError(f"evaluate.attacks: {error}") from None
    return {name: attack.implementation for name, attack in attacks.items()}


def radius(eps: float) -> str:
    """``eps`` in a few characters, as a fraction of 255 where it is one."""
    return f"{255 * eps:g}/255" if math.isclose(255 * eps, round(255 * eps)) else f"{eps:g}"


class _Shown:
    """Tells an evaluation's progress, one attack after the other, and ends it where ``stop`` says so."""

    def __init__(self, name: str, show: progress.Silent, stop: Callable[[], bool], batch_size: int) -> None:
        self.name, self.show, self.stop, self.batch_size = name, show, stop, batch_size
        self.label = self.note = ""

    def tell(self, label: str, done: int, total: int, held: float) -> None:
        if label != self.label:
            self.finish()
            self.label = label
            self.show.start(f"{self.name}: {label}", -(-total // self.batch_size), (done - 1) // self.batch_size)
        self.note = f"{progress.percent(held)} hold"
        self.show.advance(f"{self.name}: {label}", self.note)
        if self.stop():
            raise Stopped

    def finish(self) -> None:
        if self.label:
            self.show.stop(self.note)
        self.label = ""
