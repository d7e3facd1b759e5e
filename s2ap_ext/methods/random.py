"""Random: a control for all methods that learn their mask. The mask is drawn once and stays.

Scored: every weight, by a random number that never changes. Trained: the BatchNorm parameters, as in HYDRA, so that the two differ by the
scores' learning alone. With S2AP the scores are perturbed as in any method, and the BatchNorm parameters take their gradient there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..parts import register
from .base import Method, batchnorm_parameters, scores_of, train_only


@register("random")
class Random(Method):
    @torch.no_grad()
    def sparsify(self, model: nn.Module, sparsity: float, *, generator: torch.Generator | None = None, **how: Any) -> None:
        super().sparsify(model, sparsity, **how)
        for scores in scores_of(model):
            scores.copy_(torch.rand(scores.shape, dtype=torch.float64, generator=generator) + 1)  # no two signs, and none near 0

    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        trained = train_only(model, batchnorm_parameters(model))
        for scores in scores_of(model):
            scores.requires_grad_(perturbed)  # wanted for the perturbation only; the optimizer does not hold them
        return [{"params": trained}]
