"""momentum: along the accumulated direction of the last steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...parts import register
from ...settings import key
from .base import Ascent, Step


@register("momentum")
class Momentum(Ascent):
    """One backward pass in each step, at ``s - gamma * ||s|| * v / ||v||`` with ``v`` the accumulated gradient of the steps before.

    ``v`` is not the base optimizer's: methods whose optimizer holds weights or accumulators in place of scores have none there. As in MSAM
    the sign is that of descent, towards where momentum will carry the scores. The first step is a plain one. The step returns the loss at
    the perturbed point.

    Source: Becker et al., Momentum-SAM, arXiv 2401.12033, algorithm 1.

    Equivalent to::

        z = -gamma * s.norm() * v / (v.norm() + eps)
        v = decay * v + gradient at s + z
    """

    @dataclass(frozen=True)
    class Settings:
        decay: float = key(0.9, "how much of the accumulated gradient stays at each step", low=0, high=1)

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._sum: dict[str, Tensor] = {}

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        if self._sum:
            at.move({name: -v for name, v in self._sum.items()})
        backward()
        for name, g in at.gradients().items():
            self._sum[name] = self._sum[name].mul_(self.settings.decay).add_(g) if name in self._sum else g.clone()

    def state(self) -> dict[str, Tensor]:
        return {f"sum.{name}": v for name, v in self._sum.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._sum = {name: v.clone() for name, v in self._read(state, by_parameter="sum").items()}
