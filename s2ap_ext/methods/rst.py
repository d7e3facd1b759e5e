"""RST: robust tickets in a random network. No weight is ever trained: the mask alone makes the network robust.

Scored: every weight of the random network, by a learned score that starts at random. Trained: the scores. The weights are signed constants
(or Kaiming normal) and frozen, biases are 0, BatchNorm has no scale and shift. There is no pretraining, and no finetuning unless
``finetune`` is set: then the kept weights train from their random values.
Source: Fu et al., NeurIPS 2021, arXiv 2110.14068 (robust scratch tickets), with the edge-popup scores of Ramanujan et al., CVPR 2020,
arXiv 1911.13299.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..parts import register
from ..settings import key
from .base import Method, scores_of, train_only


@register("rst")
class RobustScratchTickets(Method):
    @dataclass(frozen=True)
    class Settings:
        weights: str = key("signed_constant", "the frozen weights", choices=("signed_constant", "kaiming_normal"))
        finetune: bool = key(False, "the kept weights train after the search")

    @property
    def stages(self) -> tuple[str, ...]:
        return ("prune", "finetune") if self.settings.finetune else ("prune",)

    @torch.no_grad()
    def sparsify(self, model: nn.Module, sparsity: float, *, generator: torch.Generator | None = None, **how: Any) -> None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.affine = False
                module.register_parameter("weight", None)
                module.register_parameter("bias", None)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("weight") and p.dim() > 1:
                self._draw(p, generator)
        super().sparsify(model, sparsity, **how)
        for scores in scores_of(model):
            bound = 1 / math.sqrt(_fan_in(scores))  # Kaiming's uniform one with a = sqrt(5)
            scores.copy_((2 * torch.rand(scores.shape, generator=generator) - 1) * bound)

    def _draw(self, weight: Tensor, generator: torch.Generator | None) -> None:
        scale = math.sqrt(2 / _fan_in(weight))
        drawn = torch.randn(weight.shape, generator=generator)
        weight.copy_(scale * (drawn if self.settings.weights == "kaiming_normal" else torch.where(drawn < 0, -1.0, 1.0)))

    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        return [{"params": train_only(model, scores_of(model))}]


def _fan_in(weight: Tensor) -> int:
    """The number of inputs of one output."""
    return max(weight[0].numel(), 1) if len(weight) else 1
