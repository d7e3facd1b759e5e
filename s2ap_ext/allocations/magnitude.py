"""Global magnitude: one threshold for the weights of all layers."""

from __future__ import annotations

from collections.abc import Sequence

from ..parts import register
from .base import Allocation, Layer
from .ranking import keep_highest, sorted_magnitudes


@register("global")
class GlobalMagnitude(Allocation):
    """Keeps the largest ``|w|`` of all layers together; of channels and heads those with the largest mean of ``|w|``.

    The overall sparsity is met as :func:`s2ap_ext.allocations.ranking.keep_highest` says.

    Source: Han et al., NeurIPS 2015, arXiv 1506.02626; compared with layerwise rates in Blalock et al., MLSys 2020, arXiv 2003.03033.
    """

    def kept(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        return keep_highest(layers, [sorted_magnitudes(layer) for layer in layers], sparsity)
