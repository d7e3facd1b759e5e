"""The Wide ResNets of the robustness literature."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import register
from .base import Model, check_positive


class _Block(nn.Module):
    """BatchNorm and ReLU come before each of the two 3x3 convolutions; around them the input, through a 1x1 convolution where c changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out


class _Stage(nn.Module):
    """Blocks in a row, of which the first changes the number of channels and, with a stride, the size."""

    def __init__(self, c_in: int, c_out: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = (_Block(c_out, c_out, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(_Block(c_in, c_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-widen: a 3x3 stem of 16 channels, three stages of (depth - 4) / 6 blocks, average pooling, a linear layer. No dropout.

    [N, in_channels, H, W] -> logits [N, num_classes], for H and W from 4 up; 32 is usual.

    The keys are those of the code of TRADES, HYDRA and their successors: ``conv1``, ``block1.layer.0.bn1``, ...,
    ``block1.layer.0.convShortcut``, ``bn1``, ``fc``.

    Args:
        depth: number of layers, shortcuts not counted: 10, 16, 22, 28, 34, ...
        widen: the stages have 16, 32 and 64 times as many channels.
        num_classes: size of the output.
        in_channels: channels of the images.

    Raises:
        ValueError: a size below 1, or a depth other than 6n + 4.

    Source: Zagoruyko and Komodakis, arXiv 1605.07146.
    """

    def __init__(self, *, depth: int, widen: int, num_classes: int = 10, in_channels: int = 3) -> None:
        check_positive(depth=depth, widen=widen, num_classes=num_classes, in_channels=in_channels)
        blocks, remainder = divmod(depth - 4, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"depth: expected 6n + 4 with n >= 1, such as 28 or 34, got {depth}")
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(16, 16 * widen, blocks, 1)
        self.block2 = _Stage(16 * widen, 32 * widen, blocks, 2)
        self.block3 = _Stage(32 * widen, 64 * widen, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(out)).mean(dim=(2, 3)))
        return logits


@register("wrn28_4")
class WRN28x4(Model):
    """:class:`WideResNet` of depth 28 and width 4: 5,849,050 parameters for 10 classes."""

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        return WideResNet(depth=28, widen=4, num_classes=num_classes, in_channels=in_channels)


@register("wrn34_10")
class WRN34x10(Model):
    """:class:`WideResNet` of depth 34 and width 10: 46,160,474 parameters for 10 classes."""

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        return WideResNet(depth=34, widen=10, num_classes=num_classes, in_channels=in_channels)
