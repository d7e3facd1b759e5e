"""Magnitude (LWM): the mask keeps each layer's largest weights, which train under it.

Scored: every weight, by its own magnitude, and every head or neuron by the mean of its weights' magnitudes. The weights train on the
robust loss under their magnitude mask, and after each step the scores follow the weights. A pruned weight has no gradient, so it moves by
weight decay alone and seldom comes back. With S2AP the scores are perturbed as in any method, and the weights take their gradient under the
perturbed mask. Without any epochs this is least-weight-magnitude pruning of the pretrained model (Han et al., arXiv 1506.02626).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import pruned_layers
from ..parts import register
from .base import Method, scores_of


@register("magnitude")
class Magnitude(Method):
    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        model.requires_grad_(True)
        scores = set(scores_of(model))
        for s in scores:
            s.requires_grad_(perturbed)  # wanted for the perturbation only; the optimizer does not hold them
        return [{"params": [p for p in model.parameters() if p not in scores]}]

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for layer in pruned_layers(model).values():
            layer.scores.copy_(layer.magnitudes)
