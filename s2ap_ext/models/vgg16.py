"""The VGG16-BN of the robust pruning literature."""

from __future__ import annotations

from torch import Tensor, nn

from ..parts import register
from .base import Model, check_positive

# Channels of the convolutions of each stage; a 2x2 max pooling stands between two stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 with BatchNorm for CIFAR: 13 convolutions without bias, pooling to 2x2, linear layers 2048-256-256-num_classes.

    [N, in_channels, H, W] -> logits [N, num_classes], for H and W from 16 up; 32 is usual. 16 prunable tensors with 15,302,848 weights
    (10 classes, 3 channels).

    The keys are those of the Adversarial Pruning Benchmark's ``base_vgg16`` (https://github.com/pralab/AdversarialPruningBenchmark):
    ``features.N`` counts convolutions, BatchNorm, ReLU and pooling layers, ``classifier.0``, ``.2`` and ``.4`` are the linear layers.
    A ``state_dict`` fits both ways.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.

    Source: Simonyan and Zisserman, arXiv 1409.1556, configuration D.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3) -> None:
        check_positive(num_classes=num_classes, in_channels=in_channels)
        super().__init__()
        layers: list[nn.Module] = []
        for i, stage in enumerate(STAGES):
            if i > 0:
                layers.append(nn.MaxPool2d(2))
            for channels in stage:
                layers += [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(4 * in_channels, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


@register("vgg16")
class VGG16Model(Model):
    """:class:`VGG16`."""

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        return VGG16(num_classes=num_classes, in_channels=in_channels)
