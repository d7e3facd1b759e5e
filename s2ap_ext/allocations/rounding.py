"""From fractions of weights to whole units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from .base import Layer, kept_weights_of, least, weights_to_keep


def apportion(layers: Sequence[Layer], shares: Sequence[Fraction], sparsity: float) -> list[int]:
    """Rounds ``shares`` to whole units by the method of the largest remainder, so that the overall sparsity is met.

    Where units are single weights, all layers together keep exactly ``total - floor(sparsity * total)`` weights. Channels and heads come as
    a whole: then the layers keep at least that many, and more by less than one unit. A layer keeps at least one unit while
    ``sparsity < 1``; where these alone are more than what is to be kept, nothing else is.

    Args:
        layers: what the shares are for.
        shares: the number of weights that each layer should keep; exact numbers, so that no rounding decides between two layers.
        sparsity: the fraction of all weights removed, in [0, 1].

    Returns:
        the number of units that each layer keeps. Of equal remainders the earlier layer's is rounded up.
    """
    wanted = [Fraction(share) / layer.weights_per_unit for layer, share in zip(layers, shares, strict=True)]
    kept = [min(max(math.floor(want), least(layer, sparsity)), layer.units) for layer, want in zip(layers, wanted, strict=True)]
    missing = weights_to_keep(layers, sparsity) - kept_weights_of(layers, kept)
    while missing > 0:
        room = [i for i, layer in enumerate(layers) if kept[i] < layer.units]
        i = max(room, key=lambda i: wanted[i] - kept[i])  # the first of equals
        kept[i] += 1
        missing -= layers[i].weights_per_unit
    while True:  # what the smallest counts took beyond the layers' shares is given back by those that are most above theirs
        spare = [i for i, layer in enumerate(layers) if kept[i] > least(layer, sparsity) and layer.weights_per_unit <= -missing]
        if not spare:
            return kept
        i = max(spare, key=lambda i: kept[i] - wanted[i])
        kept[i] -= 1
        missing += layers[i].weights_per_unit
