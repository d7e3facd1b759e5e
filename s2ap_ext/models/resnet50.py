"""The ResNet-50 of ImageNet."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import register
from ..settings import key
from .base import Model, check_positive
from .normalization import IMAGENET, Normalize

BLOCKS = (3, 4, 6, 3)  # of the four stages
EXPANSION = 4  # a block has so many times more channels outside than inside


class _Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, and the shortcut around them, a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        c_out = EXPANSION * c
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNet50(nn.Module):
    """ResNet-50 for ImageNet: 7x7 stem and max pooling, 16 bottlenecks with the stride in their 3x3 convolution, a linear layer.

    [N, in_channels, H, W] in [0, 1] -> logits [N, num_classes], for H and W from 32 up; 224 is usual. 54 prunable tensors. Its first
    layer normalises the images by ImageNet's mean and standard deviation, so weights that were trained on normalised images fit.

    The keys are those of torchvision's ``resnet50``: a ``state_dict`` fits both ways.

    Args:
        num_classes: size of the output.
        width: channels inside the first stage's blocks; the following stages have 2, 4 and 8 times as many. 64 is the standard network
            with 25,557,032 parameters (1000 classes).
        in_channels: channels of the images.

    Source: He et al., arXiv 1512.03385; the stride in the 3x3 convolution is that of torchvision ("ResNet v1.5").
    """

    def __init__(self, *, num_classes: int = 1000, width: int = 64, in_channels: int = 3) -> None:
        check_positive(num_classes=num_classes, width=width, in_channels=in_channels)
        super().__init__()
        self.normalize = Normalize(*IMAGENET, in_channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        stages, c_in = [], width
        for i, blocks in enumerate(BLOCKS):
            c = width * 2**i
            first = _Bottleneck(c_in, c, 1 if i == 0 else 2)
            c_in = EXPANSION * c
            stages.append(nn.Sequential(first, *(_Bottleneck(c_in, c, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(F.relu(self.bn1(self.conv1(self.normalize(x)))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


@register("resnet50")
class ResNet50Model(Model):
    """:class:`ResNet50`."""

    @dataclass(frozen=True)
    class Settings:
        width: int = key(64, "channels inside the first stage's blocks; the following ones have 2, 4 and 8 times as many", low=1)

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        return ResNet50(num_classes=num_classes, in_channels=in_channels, **asdict(self.settings))
