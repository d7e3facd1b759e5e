"""The ResNet-18 of the CIFAR literature."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import register
from ..settings import key
from .base import Model, check_positive


class _Block(nn.Module):
    """Two 3x3 convolutions and the shortcut around them, a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """The ResNet-18 of the CIFAR literature: 3x3 stem without pooling, four stages of two blocks, average pooling, a linear layer.

    [N, in_channels, H, W] -> logits [N, num_classes], for H and W from 8 up; 32 is usual. 21 prunable tensors.

    Args:
        num_classes: size of the output.
        width: channels of the stem and the first stage; the following stages have 2, 4 and 8 times as many. 64 is the standard network
            with 11,164,352 prunable weights (10 classes).
        in_channels: channels of the images.

    Source: He et al., arXiv 1512.03385.
    """

    def __init__(self, *, num_classes: int = 10, width: int = 64, in_channels: int = 3) -> None:
        check_positive(num_classes=num_classes, width=width, in_channels=in_channels)
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_Block(width, width, 1), _Block(width, width, 1))
        self.layer2 = nn.Sequential(_Block(width, 2 * width, 2), _Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(_Block(2 * width, 4 * width, 2), _Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(_Block(4 * width, 8 * width, 2), _Block(8 * width, 8 * width, 1))
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


@register("resnet18")
class ResNet18Model(Model):
    """:class:`ResNet18`."""

    @dataclass(frozen=True)
    class Settings:
        width: int = key(64, "channels of the first stage; the following ones have 2, 4 and 8 times as many", low=1)

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        return ResNet18(num_classes=num_classes, width=self.settings.width, in_channels=in_channels)
