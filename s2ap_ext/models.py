"""Models by name.

All take images as floating point in [0, 1], [N, C, H, W], and have no normalisation layer in front, as robustness benchmarks expect
it: the attack's ball is then the one in pixels. BatchNorm after the first convolution does what normalising the input would.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._registry import build

__all__ = ["MODELS", "DigitsCNN", "ResNet18", "build_model"]


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


class DigitsCNN(nn.Sequential):
    """Three convolutions and a linear layer for images of 8x8 pixels: [N, in_channels, 8, 8] -> logits [N, num_classes].

    Args:
        num_classes: size of the output.
        width: channels of the first convolution; the others have twice as many. 32 gives 65,824 prunable weights.
        in_channels: channels of the images.
    """

    def __init__(self, *, num_classes: int = 10, width: int = 32, in_channels: int = 1) -> None:
        _check_positive(num_classes=num_classes, width=width, in_channels=in_channels)

        def convolution(i: int, c_in: int, c_out: int, stride: int) -> dict[str, nn.Module]:
            convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return {f"conv{i}": convolution, f"bn{i}": nn.BatchNorm2d(c_out), f"relu{i}": nn.ReLU()}

        layers = convolution(1, in_channels, width, 1) | convolution(2, width, 2 * width, 2) | convolution(3, 2 * width, 2 * width, 1)
        layers |= {"flatten": nn.Flatten(), "linear": nn.Linear(2 * width * 4 * 4, num_classes)}
        super().__init__(OrderedDict(layers))


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
        _check_positive(num_classes=num_classes, width=width, in_channels=in_channels)
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
        return self.linear(out.mean(dim=(2, 3)))


MODELS: dict[str, Callable[..., nn.Module]] = {"digits_cnn": DigitsCNN, "resnet18": ResNet18}


def build_model(name: str, *, num_classes: int, seed: int | None = None, **options: object) -> nn.Module:
    """The model called ``name`` (``"digits_cnn"`` or ``"resnet18"``), with torch's default initial weights.

    Args:
        num_classes: size of the output.
        seed: of the initial weights; torch's random state is then neither used nor moved. None draws from that state.
        options: what the model's class takes, such as ``width`` and ``in_channels``.

    Raises:
        ValueError: an unknown name or option, or a size below 1.

    >>> sum(p.numel() for p in build_model("resnet18", num_classes=10, width=16).parameters() if p.dim() > 1)
    699056
    """
    settings = {"num_classes": num_classes, **options}
    if seed is None:
        return build("model", MODELS, name, settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build("model", MODELS, name, settings)
