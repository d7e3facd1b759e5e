"""Normalisation of the images as the first layer of a network, so that attacks live in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of the channels


class Normalize(nn.Module):
    """``(x - mean) / std``, channel by channel: [N, in_channels, H, W] -> the same shape.

    Args:
        mean, std: one number for each channel. If ``in_channels`` is another number, each channel gets their average.
        in_channels: channels of the images.
        persistent: whether ``mean`` and ``std`` are part of the state_dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, in_channels: int = 3, persistent: bool = False) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != in_channels:
                values = [sum(values) / len(values)] * in_channels
            self.register_buffer(name, torch.tensor(values).view(in_channels, 1, 1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
