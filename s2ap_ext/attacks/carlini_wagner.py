"""The attack of Carlini and Wagner in the l2 norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import evaluation_mode
from ..parts import register
from ..settings import key
from .base import Attack
from .minimum_norm import check, lead, nearer, sizes, within

INSIDE = 1 - 1e-6  # how close to black and white a pixel may come before the inverse of tanh is infinite


@register("cw")
class CarliniWagner(Attack):
    """Looks for the nearest misclassified image: Adam on distance**2 + c * lead, pixels as a tanh, c by bisection for each image.

    ``lead`` is by how much the logit of the right class is above the largest other one, or 0. The search ends for images that are fooled
    within ``eps``. With 10,000 steps it is the attack of the paper, which also goes on there.

    Source: Carlini and Wagner, arXiv 1608.04644.
    """

    @dataclass(frozen=True)
    class Settings:
        norm: str = key("l2", "the norm of the ball", choices=("l2",))
        eps: float = key(0.5, "radius of the ball, in units where images lie in [0, 1]", low=0)
        steps: int = key(1000, "steps of Adam for each value of c", low=1)
        searches: int = key(9, "values of c that are tried", low=1, high=100)
        step_size: float = key(0.01, "Adam's learning rate", low=0)
        start: float = key(1e-3, "the first value of c", low=1e-12)

    settings: Any

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None, *, loss: str = "ce", generator: torch.Generator | None = None
    ) -> Tensor:
        y, eps = check(self, x, y, loss), self.settings.eps
        with torch.inference_mode(False), evaluation_mode(model, freeze=True), torch.no_grad():
            x, y = x.detach().clone(), y.clone()
            best = x.clone()
            low, high = torch.zeros(len(x), dtype=x.dtype, device=x.device), torch.full_like(x.flatten(1)[:, 0], torch.inf)
            c = torch.full_like(low, self.settings.start)
            for _ in range(self.settings.searches):
                left = (sizes(best, x, "l2") > eps).nonzero().squeeze(1)
                if not len(left):
                    break
                found = self._search(model, x[left], y[left], c[left])
                fooled = sizes(found, x[left], "l2").isfinite()
                best[left] = nearer(best[left], found, x[left], "l2")
                high[left[fooled]], low[left[~fooled]] = c[left[fooled]], c[left[~fooled]]
                c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
            return within(best, x, "l2", eps)

    def _search(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """The nearest misclassified images that Adam comes by with these ``c``; ``x`` itself where there are none."""
        centre = torch.atanh((2 * x - 1) * INSIDE)
        shift = torch.zeros_like(x)
        adam = torch.optim.Adam([shift], lr=self.settings.step_size)
        best = x.clone()
        for _ in range(self.settings.steps):
            with torch.enable_grad():
                shift.requires_grad_(True)
                moved = (torch.tanh(centre + shift) + 1) / 2
                ahead = lead(model(moved), y)
                value = (moved - x).square().flatten(1).sum(dim=1) + c * ahead.clamp(min=0)
                (shift.grad,) = torch.autograd.grad(value.sum(), shift)
            fooled = ahead < 0
            best[fooled] = nearer(best[fooled], moved[fooled].detach(), x[fooled], "l2")
            if (sizes(best, x, "l2") <= self.settings.eps).all():
                break
            adam.step()
        return best
