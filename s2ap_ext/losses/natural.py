"""Ordinary training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parts import register
from .base import Loss


@register("natural")
class Natural(Loss):
    """Cross entropy on the clean images: no adversary.

    Equivalent to::

        F.cross_entropy(model(x), y)
    """

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return x
