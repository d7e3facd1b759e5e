"""LAMP: one threshold for the weights of all layers, each relative to what is larger in its own layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parts import register
from .base import Allocation, Layer
from .ranking import keep_highest, sorted_magnitudes


@register("lamp")
class LayerAdaptiveMagnitude(Allocation):
    """Keeps the highest LAMP scores of all layers together.

    With the weights of a layer in ascending order of ``|w|``, ``score_i = w_i^2 / sum(w_j^2 for j >= i)``: the share of a weight's
    square in what its layer still has when all smaller weights are gone. So the scale of a layer does not matter, and its largest weight
    has score 1. Equal magnitudes are ordered as the mask orders them: the first ones are pruned first. An all-zero layer has scores
    of 0. Channels and heads score in the same way, by the mean of their ``|w|``. The overall sparsity is met as
    :func:`s2ap_ext.allocations.ranking.keep_highest` says.

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, arXiv 2010.07611, equation 3.
    """

    def kept(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        return keep_highest(layers, [lamp_scores(sorted_magnitudes(layer)) for layer in layers], sparsity)


def lamp_scores(magnitudes: Tensor) -> Tensor:
    """The LAMP scores of ``magnitudes`` (float64 [n], ascending, none negative), in the same order, which is ascending too."""
    if len(magnitudes) == 0 or magnitudes[-1] == 0:
        return torch.zeros_like(magnitudes)
    squares = (magnitudes / magnitudes[-1]).square()  # relative to the largest, so that no scale under- or overflows
    # Summed from the largest down: the sums that matter are short and exact, and no total has small numbers taken away from it.
    return squares / squares.flip(0).cumsum(0).flip(0)
