"""How a recipe wants the forwards of its training to be computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import Accelerated
from ..nn.accelerated import AUTOCAST
from ..optim import LossScale
from .sections import Recipe


def forwards(recipe: Recipe, model: nn.Module, batch_size: int) -> tuple[nn.Module, nn.Module]:
    """``model`` as steps call it, and as the accuracies of an epoch do; the model itself where the recipe asks for nothing else.

    The latter is never compiled: its attack runs on the images that are classified correctly, whose number always differs.
    """
    how: dict[str, Any] = {"precision": recipe.precision, "channels_last": recipe.channels_last}
    watched = Accelerated(model, **how) if recipe.precision in AUTOCAST or recipe.channels_last else model
    if not recipe.compile:
        return watched, watched
    torch.compiler.reset()  # the graphs of the stage before would count towards torch's limit, and hold its memory
    return Accelerated(model, compiled_batch=batch_size, cuda_graphs=recipe.cuda_graphs, **how), watched


def loss_scale(recipe: Recipe) -> LossScale | None:
    """What scales the loss in fp16; None in other precisions, whose exponents are those of float32."""
    return LossScale() if recipe.precision == "fp16" else None
