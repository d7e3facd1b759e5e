"""A small convolutional network for the digits of 8x8 pixels."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from ..parts import register
from ..settings import key
from .base import Model, check_positive


class DigitsCNN(nn.Sequential):
    """Three convolutions and a linear layer for images of 8x8 pixels: [N, in_channels, 8, 8] -> logits [N, num_classes].

    Args:
        num_classes: size of the output.
        width: channels of the first convolution; the others have twice as many. 32 gives 65,824 prunable weights.
        in_channels: channels of the images.
    """

    def __init__(self, *, num_classes: int = 10, width: int = 32, in_channels: int = 1) -> None:
        check_positive(num_classes=num_classes, width=width, in_channels=in_channels)

        def convolution(i: int, c_in: int, c_out: int, stride: int) -> dict[str, nn.Module]:
            convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return {f"conv{i}": convolution, f"bn{i}": nn.BatchNorm2d(c_out), f"relu{i}": nn.ReLU()}

        layers = convolution(1, in_channels, width, 1) | convolution(2, width, 2 * width, 2) | convolution(3, 2 * width, 2 * width, 1)
        layers |= {"flatten": nn.Flatten(), "linear": nn.Linear(2 * width * 4 * 4, num_classes)}
        super().__init__(OrderedDict(layers))


@register("digits_cnn")
class DigitsCNNModel(Model):
    """:class:`DigitsCNN`."""

    usual_channels = 1

    @dataclass(frozen=True)
    class Settings:
        width: int = key(32, "channels of the first convolution; the others have twice as many", low=1)

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        return DigitsCNN(num_classes=num_classes, width=self.settings.width, in_channels=in_channels)
