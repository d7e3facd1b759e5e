"""Layers whose channels share one mask, because their results are added together.

A channel of a sum can be taken out (:mod:`s2ap_ext.nn.shrink`) only if every layer that is added has lost it. So such layers are pruned as
one: their weights lie side by side in one weight, [channels, weights of a channel in all of the layers], which has one score for each
weight. A channel ranks by the sum of its ``|scores|`` in all of the layers, and all of them keep it or lose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import evaluation_mode
from .channels import analyse
from .mask_state import MaskState
from .pruned_weight import PrunedWeight


class TiedWeight(nn.Module):
    """The weight of one of several layers that share a mask. Called without arguments it gives the masked weight.

    Args:
        together: the weights of all of these layers, side by side.
        first: the column there where this layer's begin.
        shape: of the layer's weight.

    Equivalent to (forward)::

        together()[:, first : first + math.prod(shape[1:])].reshape(shape)
    """

    _followers: tuple[str, ...] = ()  # the parameters that came after the weight in its module

    def __init__(self, together: PrunedWeight, first: int, shape: torch.Size) -> None:
        super().__init__()
        self.together, self.first, self.shape = together, first, shape

    def forward(self) -> Tensor:
        return self.own(self.together())

    def own(self, weights: Tensor) -> Tensor:
        """This layer's part of the weights of all of the layers."""
        return weights[:, self.first : self.first + self.shape[1:].numel()].reshape(self.shape)

    @property
    def mask_state(self) -> MaskState:
        return self.together.mask_state


def side_by_side(weights: Sequence[Tensor]) -> nn.Parameter:
    """The weights of layers, [channels, ...] each, as one weight."""
    with torch.no_grad():
        return nn.Parameter(torch.cat([weight.flatten(1) for weight in weights], dim=1), requires_grad=weights[0].requires_grad)


def layers_that_are_added(model: nn.Module, example: Any) -> list[list[str]]:
    """The names of weights whose channels can only be removed together, channel by channel in the same order. Each list has two or more.

    Args:
        model: without pruned layers.
        example: an input of the model, as for :func:`s2ap_ext.nn.shrink.shrink_channels`.

    Raises:
        ValueError: :func:`torch.export.export` cannot record the model.
    """
    with evaluation_mode(model, freeze=False), torch.no_grad():
        found = analyse(model, example)
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    together: dict[tuple[int, ...], list[str]] = {}
    for (name, axis), units in found.axes.items():
        if axis == 0 and name in weights:
            together.setdefault(found.representatives(units), []).append(name)
    return [names for names in together.values() if len(names) > 1]
