"""skip: exact, without the second pass where it would be the first one again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...parts import register
from .base import Ascent, Step


@register("skip")
class Skip(Ascent):
    """The steps of ``exact``, bit for bit, with one backward pass where the perturbation changed nothing that the loss can see.

    The loss sees the scores only through the mask, and its straight-through gradient only through the mask and the scores' signs. Where no
    entry flipped and no sign changed in any layer, the second pass would repeat the first (``docs/theory.md`` has the proof). That holds
    for a loss without random numbers of its own: under dropout ``exact`` would draw a second time. The decision waits for a CUDA device.
    ``optimizer.passes`` tells how many passes a step made.
    """

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        at.move()
        if not at.unchanged():
            backward()
