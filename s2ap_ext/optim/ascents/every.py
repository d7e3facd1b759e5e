"""every: a second pass in every k-th step, and what it added in the steps between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...parts import register
from ...settings import key
from .base import Climb, Step


@register("every")
class Every(Climb):
    """LookSAM. Every ``k``-th step is that of ``exact``; the part of its gradient that is orthogonal to the first pass's is kept, and
    added, scaled, to the gradients of the steps between, which have one pass.

    The paper takes all parameters as one vector. Here each layer's scores are one, as in the perturbation itself. Where a layer's two
    gradients are equal to the bit (no flip in the whole network), their orthogonal part is 0 and not what rounding leaves of it.

    Source: Liu et al., Towards efficient and scalable sharpness-aware minimization, arXiv 2203.02714, algorithm 1.

    Equivalent to::

        if step % k == 0:
            across = g_s - (g_s @ g) / (g @ g) * g  # g: at s, g_s: at s + z
            step with g_s
        else:
            step with g + alpha * g.norm() / across.norm() * across
    """

    @dataclass(frozen=True)
    class Settings(Climb.Settings):
        k: int = key(5, "steps from one second pass to the next", low=1)
        alpha: float = key(0.7, "length of what is added between them, relative to the gradient", low=0)

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._steps = 0
        self._across: dict[str, Tensor] = {}

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        if self._steps % self.settings.k == 0:
            first = {name: g.clone() for name, g in at.gradients().items()}
            self.climb(at, backward)
            self._across = {name: orthogonal(g, first[name]) for name, g in at.gradients().items() if name in first}
        else:
            for name, g in at.gradients().items():
                if name in self._across:
                    across = self._across[name]
                    size = _norm(across)
                    g.add_(across * torch.where(size > 0, self.settings.alpha * _norm(g) / size, 0).to(g.dtype))
        self._steps += 1

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self._steps)} | {f"across.{name}": v for name, v in self._across.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._across = self._read(state, "steps", by_parameter="across")
        self._steps = int(state["steps"])


def orthogonal(g: Tensor, to: Tensor) -> Tensor:
    """The part of ``g`` that is orthogonal ``to`` another tensor of its shape; 0 where they are equal, ``g`` where ``to`` is 0."""
    a, b = g.double(), to.double()
    square = (b * b).sum()
    across = a - b * torch.where(square > 0, (a * b).sum() / square, 0)
    return torch.where((g == to).all(), 0, across).to(g.dtype)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm
