"""descent: a control, exact with the perturbation reversed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...parts import register
from .base import Ascent, Step


@register("descent")
class Descent(Ascent):
    """Two backward passes as in ``exact``, the second at ``s - gamma * ||s|| * g / ||g||``: as far away, but towards lower loss.

    If sharpness is what matters, this has to do worse than ``exact``; if any second look nearby does as well, it does not.

    Equivalent to::

        z = -gamma * s.norm() * g / (g.norm() + eps)
    """

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        at.move({name: -g for name, g in at.gradients().items()})
        backward()
