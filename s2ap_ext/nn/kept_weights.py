"""The kept weights of a convolution or linear layer as a list: what sparse convolutions compute with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..sparse_reference import rows_of

Convolution = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""Kernel size, stride, padding, dilation and groups."""


def convolution_of(layer: nn.Conv2d) -> Convolution:
    assert not isinstance(layer.padding, str)
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups


@dataclass(frozen=True, eq=False)
class KeptWeights:
    """The kept weights of one layer, as :mod:`s2ap_ext.sparse_reference` describes them.

    Attributes:
        starts, columns, values: by output channels, float32 values.
        input_starts, input_columns: the same weights by input channels.
        order: int32, for each of these which of the former it is.
        bias: of a network for inference; a layer that trains has its own.
        flat: int64, where each is in the flat weight; None where nobody is going to ask for :meth:`with_values_of`.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    input_starts: Tensor
    input_columns: Tensor
    order: Tensor
    bias: Tensor | None = None
    flat: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor | None, convolution: Convolution) -> KeptWeights:
        """``mask``: which weights are kept, bool of weight's shape; None: those that are not 0."""
        weight = weight.contiguous()
        starts, columns, input_starts, input_columns, order = torch.ops.s2ap.sparse_pattern(
            weight, None if mask is None else mask.contiguous(), *convolution
        )
        flat = rows_of(starts, len(weight)) * weight[0].numel() + columns
        return cls(starts, columns, weight.flatten()[flat], input_starts, input_columns, order, flat=flat)

    def with_values_of(self, weight: Tensor) -> KeptWeights:
        """The same places with the values that ``weight`` has there."""
        return replace(self, values=weight.contiguous().flatten()[self.flat])

    @cached_property
    def input_values(self) -> Tensor:
        """The values in the order of input channels. Only gradients read it."""
        return self.values.index_select(0, self.order)
