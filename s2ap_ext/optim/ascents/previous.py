"""previous: along the gradient of the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...parts import register
from .base import Ascent, Step


@register("previous")
class Previous(Ascent):
    """One backward pass in each step, at the point above along the gradient that the last step took its own step with.

    The first step has no gradient before it and is a plain one. The step returns the loss at the perturbed point.

    Source: Ji et al., A single-step, sharpness-aware minimization is all you need to achieve efficient and accurate sparse training
    (S2-SAM), NeurIPS 2024.

    Equivalent to::

        z = gamma * s.norm() * last / (last.norm() + eps)
        last = gradient at s + z
    """

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._last: dict[str, Tensor] = {}

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        if self._last:
            at.move(self._last)
        backward()
        self._last = {name: g.clone() for name, g in at.gradients().items()}

    def state(self) -> dict[str, Tensor]:
        return {f"last.{name}": g for name, g in self._last.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._last = self._read(state, by_parameter="last")
