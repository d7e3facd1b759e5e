"""asam: exact, with a perturbation in proportion to what it perturbs, element by element."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...parts import register
from .base import Climb, Step


@register("asam")
class Asam(Climb):
    """Two passes as in ``exact``, with the perturbation along ``s**2 * g``: small scores move little, and signs change rarely.

    The direction is ASAM's, for which a neighbourhood does not change when a layer is rescaled. Its length is that of all ascents here,
    ``gamma * ||s||``, where ASAM has ``rho * ||s**2 * g|| / ||s * g||``.

    Source: Kwon et al., ASAM, arXiv 2102.11600, equation 4, with the operator ``T = |s|``.

    Equivalent to::

        z = gamma * s.norm() * s**2 * g / ((s**2 * g).norm() + eps)
    """

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        scores = at.perturbed_parameters()
        self.climb(at, backward, {name: _relative(scores[name]).square() * g for name, g in at.gradients().items()})


def _relative(s: Tensor) -> Tensor:
    """``s`` divided by its largest magnitude, lest squares underflow in half precision; s where that is 0."""
    largest = s.detach().abs().amax()
    return s.detach() / torch.where(largest > 0, largest, 1)
