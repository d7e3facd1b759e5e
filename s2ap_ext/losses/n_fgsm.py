"""Single-step adversarial training that does not collapse: N-FGSM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..parts import register
from .base import Loss


@register("n_fgsm")
class NFgsm(Loss):
    """Cross entropy on images with uniform noise of twice the radius and one signed gradient step, which stay outside the ball.

    The radius is the adversary's ``eps``, and its ball must be that of the linf norm; nothing else of it is used. As in every attack here
    the model takes the step in evaluation mode, while the authors' code leaves it in training mode.

    Source: de Jorge et al., Make some noise, arXiv 2202.01181, algorithm 1 (k = 2 eps, alpha = eps, no projection).

    Equivalent to::

        noisy = (x + torch.empty_like(x).uniform_(-2 * eps, 2 * eps)).clamp(0, 1).requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(noisy), y), noisy)
        x_adv = (noisy + eps * gradient.sign()).clamp(0, 1)
        loss = F.cross_entropy(model(x_adv), y)
    """

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._eps = self._linf_radius()

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(x).uniform_(-2 * self._eps, 2 * self._eps, generator=generator)
        noisy = (x + noise).clamp_(0, 1)
        # The first step from a point never leaves the ball around that very point.
        return pgd(model, noisy, y, eps=self._eps, step_size=self._eps, steps=1, random_start=False)
