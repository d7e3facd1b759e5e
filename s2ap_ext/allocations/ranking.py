"""One ranking of the units of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..reference import GROUP, group_sums
from .base import Layer, kept_weights_of, least, weights_to_keep

HIGHEST = int(torch.tensor(torch.inf, dtype=torch.float64).view(torch.int64))  # the bits of a score that none exceeds


def sorted_magnitudes(layer: Layer) -> Tensor:
    """The magnitudes of a layer's units in ascending order: float64 [units], on the CPU so that every device gives the same counts.

    The magnitude of a weight is ``|w|``, that of a channel or head the mean of ``|w|`` over its weights. Within a layer this is the
    order in which channels and heads are selected; the mean, unlike the sum, does not favour layers whose channels have many weights.

    Raises:
        ValueError: weights that are not finite, or that have no values (on the meta device).

    Source of the norm: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710.
    """
    if layer.weight.is_meta:
        raise ValueError(f"layer {layer.name}: expected weights with values to rank, got a tensor on the meta device")
    weight = layer.weight.detach().cpu()
    grouped = layer.pattern.kind == GROUP
    magnitudes = group_sums(weight, layer.pattern) / layer.weights_per_unit if grouped else weight.double().abs().flatten()
    if not magnitudes.isfinite().all():
        raise ValueError(f"layer {layer.name}: expected finite weights to rank, found NaN or infinity")
    return torch.from_numpy(np.sort(magnitudes.numpy()))  # several times faster than torch's sort, which moves indices along


def keep_highest(layers: Sequence[Layer], scores: Sequence[Tensor], sparsity: float) -> list[int]:
    """Keeps the units with the highest scores of all layers, until the overall sparsity is met.

    Where units are single weights, all layers together keep exactly ``total - floor(sparsity * total)`` weights. Channels and heads come as
    a whole: the one that reaches this number is the last. A layer keeps at least one unit while ``sparsity < 1``; where these
    alone are more than what is to be kept, nothing else is.

    Args:
        layers: what the scores belong to.
        scores: of each layer's units, in ascending order; float64 [units], none negative.
        sparsity: the fraction of all weights removed, in [0, 1].

    Returns:
        the number of units that each layer keeps. Of equal scores the earlier layer's are kept first.
    """
    keys = [score.view(torch.int64) for score in scores]  # the bits of numbers >= 0 order as the numbers do
    target = weights_to_keep(layers, sparsity)

    def counts(key: int) -> list[int]:
        """How many units of each layer have a score of at least ``key``."""
        above = [len(k) - int(torch.searchsorted(k, key)) for k in keys]
        return [max(count, least(layer, sparsity)) for count, layer in zip(above, layers, strict=True)]

    low, high = 0, HIGHEST + 1  # counts(low) reaches the target, counts(high) does not
    while high - low > 1:
        middle = (low + high) // 2
        reached = kept_weights_of(layers, counts(middle)) >= target
        low, high = (middle, high) if reached else (low, middle)
    kept = counts(high)
    missing = target - kept_weights_of(layers, kept)
    for i, (layer, at_most) in enumerate(zip(layers, counts(low), strict=True)):  # the units whose score is exactly low
        if missing > 0:
            more = min(at_most - kept[i], -(-missing // layer.weights_per_unit))
            kept[i] += more
            missing -= more * layer.weights_per_unit
    return kept
