"""random: the control, along a direction that knows nothing of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...parts import register
from ...settings import key
from .base import Ascent, Step


@register("random")
class Random(Ascent):
    """One backward pass in each step, at ``s + gamma * ||s|| * r / ||r||`` with ``r`` normally distributed, anew in each step and layer.

    The perturbation is as long as that of ``exact``. Its random numbers are from a generator of its own, on the CPU, so they are the same
    on each device and no other random number of a training depends on them. The step returns the loss at the perturbed point.
    """

    @dataclass(frozen=True)
    class Settings:
        seed: int = key(0, "of the directions", low=0, high=2**32 - 1)

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._generator = torch.Generator().manual_seed(self.settings.seed)

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        at.move({name: torch.randn(p.shape, generator=self._generator).to(p) for name, p in at.perturbed_parameters().items()})
        backward()

    def state(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._read(state, "generator")
        self._generator.set_state(state["generator"].cpu())
