"""Gradients for the scores of a random part of the pruned weights: the cheap form of what makes a mask search dense.

A pruned weight can come back only if its score trains, so a search takes the weight's gradient everywhere, kept or not, while all else
of a step takes the kept weights alone. At 95 % sparsity that gradient is most of a step's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .layers import S2APConv2d, pruned_layers


@contextmanager
def sampled_gradients(model: nn.Module, share: float, *, generator: torch.Generator | None = None) -> Iterator[None]:
    """Within it, convolutions take the gradients of their pruned weights in a random share of the output channels only.

    The channels are drawn anew each time, for each layer by itself. Where a channel is drawn, the gradients of its pruned weights are
    multiplied by the number of channels over the number drawn, and where it is not they are 0: the expected gradient is the exact one.
    The gradients of kept weights are exact always. Put it around a whole step, so that the ascent and the step see the same channels.

    It concerns layers without groups that run on their kept weights (on the CPU, where that is faster); all others are exact.

    Args:
        model: with pruned layers.
        share: the share of the output channels that are drawn, in (0, 1]; at least one channel is. 1 changes nothing.
        generator: of the draws, on the CPU; torch's own if None.

    Raises:
        ValueError: ``share`` out of range.

    Equivalent to (for the gradient ``g`` of a masked weight, ``rows`` drawn of its ``len(g)`` channels)::

        sampled = torch.where(mask, g, 0)
        sampled[rows] = torch.where(mask, g, g * len(g) / len(rows))[rows]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share}")
    states = {}
    if share < 1:
        states = {
            layer.mask_state: len(layer.weight)
            for layer in pruned_layers(model).values()
            if isinstance(layer, S2APConv2d) and layer.groups == 1
        }
    try:
        for state, channels in states.items():
            drawn = torch.randperm(channels, generator=generator)[: max(1, round(share * channels))]
            state.sampled_channels = drawn.sort().values
        yield
    finally:
        for state in states:
            state.sampled_channels = None
