"""exact: every step ascends along the gradient of its own first backward, as in the papers of SAM and S2AP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...parts import register
from .base import Ascent, Step


@register("exact")
class Exact(Ascent):
    """Two backward passes: the first gives the direction, the second, at the perturbed point, the gradient to step with.

    Source: Foret et al., arXiv 2010.01412; S2AP, arXiv 2510.18381.
    """

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        at.move()
        backward()
