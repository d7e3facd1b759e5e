"""late: second passes in the last epochs only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...parts import register
from ...settings import key
from ...sparsity import kept_count
from .base import Climb, Step


@register("late")
class Late(Climb):
    """Plain steps, and in the last ``floor(share * epochs)`` epochs those of ``exact``.

    How many epochs there are is what ``optimizer.set_epoch(epoch, epochs)`` tells.

    Source: Zhou et al., Sharpness-aware minimization efficiently selects flatter minima late in training, arXiv 2410.10373.
    """

    @dataclass(frozen=True)
    class Settings(Climb.Settings):
        share: float = key(0.2, "the share of the epochs, the last ones, that have second passes", low=0, high=1)

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        if at.epoch is None or at.epochs is None:
            raise RuntimeError("ascent late: call set_epoch(epoch, epochs) at the start of each epoch")
        backward()
        if at.epoch >= kept_count(at.epochs, self.settings.share):
            self.climb(at, backward)
