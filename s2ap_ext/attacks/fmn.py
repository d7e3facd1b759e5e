"""The fast minimum-norm attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import evaluation_mode
from ..parts import register
from ..settings import key
from .balls import BALLS, distances
from .base import Attack
from .minimum_norm import check, lead, nearer, sizes, within

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
LAST_STEP, LAST_GAMMA = 0.01, 0.001  # the step relative to the first one, and gamma, at the end


@register("fmn")
class Fmn(Attack):
    """FMN: looks for the nearest misclassified image, in a ball of its own for each image that shrinks where it is fooled and grows else.

    Steps go against the gradient of ``lead``, by how much the logit of the right class is above the largest other one, scaled to length
    1 in l2; they and ``gamma``, by which the balls change, shrink along a cosine. It has no step size that must fit the ball.

    Source: Pintor et al., arXiv 2102.12827, algorithm 1.
    """

    @dataclass(frozen=True)
    class Settings:
        norm: str = key("linf", "the norm of the ball", choices=BALLS)
        eps: float = key(8 / 255, "radius of the ball, in units where images lie in [0, 1]", low=0)
        steps: int = key(200, "gradient steps", low=1)
        step_size: float = key(1.0, "length of the first step, in l2", low=0)
        gamma: float = key(0.05, "by which share a ball shrinks or grows in the first step", low=LAST_GAMMA, high=1)

    settings: Any

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None, *, loss: str = "ce", generator: torch.Generator | None = None
    ) -> Tensor:
        y, norm, eps = check(self, x, y, loss), self.settings.norm, self.settings.eps
        with torch.inference_mode(False), evaluation_mode(model, freeze=True), torch.no_grad():
            x, y = x.detach().clone(), y.clone()
            best, moved = x.clone(), x.clone()
            radius = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
            for step in range(self.settings.steps):
                with torch.enable_grad():
                    moved.requires_grad_(True)
                    ahead = lead(model(moved), y)
                    (gradient,) = torch.autograd.grad(ahead.sum(), moved)
                moved = moved.detach()
                fooled = ahead < 0
                best[fooled] = nearer(best[fooled], moved[fooled], x[fooled], norm)
                nearest = sizes(best, x, norm)
                if (nearest <= eps).all():
                    break
                share = (1 + math.cos(math.pi * step / self.settings.steps)) / 2  # from 1 to 0
                gamma = LAST_GAMMA + (self.settings.gamma - LAST_GAMMA) * share
                length = self.settings.step_size * (LAST_STEP + (1 - LAST_STEP) * share)
                # Before an image is fooled for the first time its ball reaches to where a linear model's boundary would be, and (other
                # than in the paper) a little beyond: the boundary itself, which this meets where a model is linear, fools nobody.
                slope = torch.linalg.vector_norm(gradient.double().flatten(1), DUAL[norm], dim=1)
                linear = distances(moved, x, norm) + ahead.double().abs() / slope
                outside = torch.where(nearest.isinf(), linear, radius) * (1 + gamma)
                radius = torch.where(fooled, torch.minimum(radius * (1 - gamma), nearest), outside).nan_to_num(nan=torch.inf)
                unit = gradient.double() / _per_image(distances(gradient, torch.zeros_like(gradient), "l2").clamp(min=1e-12), x)
                shift = _projected((moved.double() - x.double() - length * unit).flatten(1), radius, norm).view(x.shape)
                moved = (x + shift).clamp(0, 1).to(x.dtype)
            return within(best, x, norm, eps)


def _projected(shift: Tensor, radius: Tensor, norm: str) -> Tensor:
    """``shift`` [N, pixels] onto the balls of these radii [N] around 0."""
    radius = radius[:, None]
    if norm == "linf":
        return shift.clamp(-radius, radius)
    if norm == "l2":
        size: Tensor = torch.linalg.vector_norm(shift, dim=1, keepdim=True)
        return shift * (radius / size.clamp(min=1e-300)).clamp(max=1)
    # Every entry gives up the same, down to 0, so that the sum is the radius: with the largest k entries left, (their sum - radius) / k.
    largest, _ = shift.abs().sort(dim=1, descending=True)
    given_up = (largest.cumsum(dim=1) - radius) / torch.arange(1, shift.shape[1] + 1, device=shift.device)
    given_up = given_up.amax(dim=1, keepdim=True).clamp(min=0)
    kept: Tensor = shift.sign() * (shift.abs() - given_up).clamp(min=0)
    return kept


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.dim() - 1))
