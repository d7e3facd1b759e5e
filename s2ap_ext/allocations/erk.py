"""Erdos-Renyi-kernel: large layers are pruned more than small ones."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ..parts import register
from .base import Allocation, Layer, weights_to_keep
from .rounding import apportion


@register("erk")
class ErdosRenyiKernel(Allocation):
    """Each layer keeps weights in proportion to the sum of its weight's dimensions: outputs + inputs + kernel height + kernel width.

    So the density of a layer is proportional to that sum over the product of the dimensions. A layer that would keep more than it has is
    left dense, and the others share what remains. The overall sparsity is met as :func:`s2ap_ext.allocations.rounding.apportion` says.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134; for a random graph of single weights, Mocanu et al., Nature
    Communications 2018.
    """

    def kept(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        densities = self.densities(layers, sparsity)
        return apportion(layers, [d * layer.weight.numel() for d, layer in zip(densities, layers, strict=True)], sparsity)

    def densities(self, layers: Sequence[Layer], sparsity: float) -> list[Fraction]:
        """The fraction of its weights that each layer keeps, before it is rounded to whole units."""
        dimensions = [sum(layer.weight.shape) for layer in layers]
        sizes = [layer.weight.numel() for layer in layers]
        dense: set[int] = {i for i, size in enumerate(sizes) if size == 0}
        while True:
            rest = [i for i in range(len(layers)) if i not in dense]
            left = weights_to_keep(layers, sparsity) - sum(sizes[i] for i in dense)
            per_dimension = Fraction(left, sum(dimensions[i] for i in rest) or 1)
            full = {i for i in rest if per_dimension * dimensions[i] > sizes[i]}
            if not full:
                return [Fraction(1) if i in dense else per_dimension * dimensions[i] / sizes[i] for i in range(len(layers))]
            dense |= full
