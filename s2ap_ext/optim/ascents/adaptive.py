"""adaptive: a second pass where the gradient is large for the present stage of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...parts import register
from ...settings import key
from .base import Climb, Step


@register("adaptive")
class Adaptive(Climb):
    """AE-SAM's test. With ``q`` the squared norm of the gradient over all perturbed parameters, a step is that of ``exact`` where
    ``q >= mean + threshold * deviation``, and a plain one elsewhere.

    Mean and variance are running ones, with the present step in them, and start from the first step, which so always has its second pass.
    The paper lowers the threshold from 1 to -1 in the course of training; here it stays. The decision waits for a CUDA device.

    Source: Jiang et al., An adaptive policy to employ sharpness-aware minimization, arXiv 2304.14647, section 3.

    Equivalent to::

        mean = decay * mean + (1 - decay) * q
        variance = decay * variance + (1 - decay) * (q - mean) ** 2
        second_pass = q >= mean + threshold * variance ** 0.5
    """

    @dataclass(frozen=True)
    class Settings(Climb.Settings):
        decay: float = key(0.9, "how much of the running mean and variance stays at each step", low=0, high=1)
        threshold: float = key(0.0, "how many deviations above the mean the squared norm must lie", low=-100, high=100)

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._running: Tensor | None = None  # float64 [2], on the CPU: mean and variance

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in at.gradients().values()]
        q = torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum().item()
        mean, variance = (q, 0.0) if self._running is None else self._running.tolist()
        decay = self.settings.decay
        mean = decay * mean + (1 - decay) * q
        variance = decay * variance + (1 - decay) * (q - mean) ** 2
        first = self._running is None
        self._running = torch.tensor([mean, variance], dtype=torch.float64)
        if first or q >= mean + self.settings.threshold * variance**0.5:
            self.climb(at, backward)

    def state(self) -> dict[str, Tensor]:
        return {} if self._running is None else {"running": self._running}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._read(state, *(["running"] if state else []))
        self._running = state["running"].cpu() if state else None
