"""What attacks share that look for the nearest misclassified image, and not for the worst one of a ball."""

from __future__ import annotations

import torch
from torch import Tensor

from .balls import distances
from .base import Attack


def check(attack: Attack, x: Tensor, y: Tensor | None, loss: str) -> Tensor:
    """The classes ``y``; raises ValueError where they, or the images or the ``loss``, are not what the attack can use."""
    if loss != "ce" or y is None:
        raise ValueError(f"attack {attack.name}: expected classes and the loss ce, since it has a loss of its own; got {loss}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"attack {attack.name}: expected float32 or float64 images, whose steps are not lost in rounding, got {x.dtype}")
    return y


def lead(logits: Tensor, y: Tensor) -> Tensor:
    """By how much the logit of the right class is above the largest other one, [N]; below 0 the image is misclassified."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return logits.gather(1, y[:, None]).squeeze(1) - others.amax(dim=1)


def sizes(found: Tensor, x: Tensor, norm: str) -> Tensor:
    """The distance of each image from ``x``, float64 [N]; infinite where nothing was found yet, which is where it is ``x`` itself."""
    far = distances(found, x, norm)
    return torch.where(far > 0, far, torch.inf)


def nearer(best: Tensor, found: Tensor, x: Tensor, norm: str) -> Tensor:
    """For each image that one of ``best`` and ``found`` that is nearer to ``x``, by :func:`sizes`."""
    better = sizes(found, x, norm) < sizes(best, x, norm)
    return torch.where(better.view(-1, *[1] * (x.dim() - 1)), found, best)


def within(best: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """``best`` where it is within ``eps``, and ``x`` where not: what the attack answers."""
    close = sizes(best, x, norm) <= eps
    return torch.where(close.view(-1, *[1] * (x.dim() - 1)), best, x)
