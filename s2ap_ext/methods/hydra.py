"""HYDRA: the scores train on the robust loss, the weights stay as pretrained.

Scored: every weight, by a learned score that starts from the weight's magnitude. Trained: the scores and the BatchNorm parameters.
Source: Sehwag et al., NeurIPS 2020, arXiv 2002.10509.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import pruned_layers
from .base import Method


class Hydra(Method):
    def prepare(self, model: nn.Module, *, s2ap: bool) -> list[nn.Parameter]:
        model.requires_grad_(False)
        trained = [layer.scores for layer in pruned_layers(model).values()]
        trained += [p for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()]
        for p in trained:
            p.requires_grad_(True)
        return list(dict.fromkeys(trained))  # shared scores once
