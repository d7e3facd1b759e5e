"""The same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from ..parts import register
from ..sparsity import kept_in_pattern
from .base import Allocation, Layer


@register("uniform")
class Uniform(Allocation):
    """Every layer loses ``sparsity`` of its weights, channels or heads, or of each window's weights.

    Counts are rounded up layer by layer (:func:`s2ap_ext.sparsity.kept_in_pattern`), so all layers together may keep a little more than
    the sparsity says: less than one unit for each layer.

    Source: HYDRA, Sehwag et al., NeurIPS 2020, arXiv 2002.10509.
    """

    windows = True

    def kept(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        return [kept_in_pattern(layer.pattern, layer.weight.numel(), sparsity) for layer in layers]
