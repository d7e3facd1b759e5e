"""HYDRA: the scores train on the robust loss, the weights stay as pretrained.

Scored: every weight, by a learned score that starts from the weight's magnitude. Trained: the scores and the BatchNorm parameters.
Source: Sehwag et al., NeurIPS 2020, arXiv 2002.10509.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..parts import register
from .base import Method, batchnorm_parameters, scores_of, train_only


@register("hydra")
class Hydra(Method):
    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        return [{"params": train_only(model, [*scores_of(model), *batchnorm_parameters(model)])}]
