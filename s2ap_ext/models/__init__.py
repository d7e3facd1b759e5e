"""Networks by name, one file each.

All take images as floating point in [0, 1], [N, C, H, W], as robustness benchmarks expect it: the attack's ball is then the one in
pixels. What normalises them is part of the network: BatchNorm after the first convolution in those of the CIFAR literature, else a
:class:`Normalize` layer in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..parts import import_all, make
from .base import Model
from .digits_cnn import DigitsCNN
from .normalization import Normalize
from .resnet18 import ResNet18
from .resnet50 import ResNet50
from .vgg16 import VGG16
from .vit import ViT
from .wide_resnet import WideResNet

__all__ = ["VGG16", "DigitsCNN", "Model", "Normalize", "ResNet18", "ResNet50", "ViT", "WideResNet", "build_model"]

import_all(__name__, __path__)


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int | None = None,
    **options: object,
) -> nn.Module:
    """The model called ``name``, with torch's default initial weights.

    Args:
        name: such as ``"resnet18"`` (``s2ap_ext.parts.names("model")`` lists them); ``"torchvision:NAME"``, ``"timm:NAME"`` or
            ``"hf:NAME"`` for a network of another package; or ``"package.module:attribute"`` for a class derived from :class:`Model`,
            or a function ``(num_classes=, in_channels=) -> nn.Module``, of a module of your own.
        num_classes: size of the output.
        in_channels: channels of the images; None takes those of the images that the model is usual for (1 for ``"digits_cnn"``, else 3).
        image_size: H and W of the images; None takes the usual ones. Only networks that fit images of one size ask for it.
        seed: of the initial weights; torch's random state is then neither used nor moved. None draws from that state.
        options: the model's settings, such as ``width``.

    Raises:
        ValueError: an unknown name or option, a size below 1, or an attribute of your own that gives no model.
        ImportError: the package that the name leads to is missing.

    >>> sum(p.numel() for p in build_model("resnet18", num_classes=10, width=16).parameters() if p.dim() > 1)
    699056
    """
    part: Model = make("model", name, **options)
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": part.usual_channels if in_channels is None else in_channels}
    if image_size is not None and part.takes_image_size():
        sizes["image_size"] = image_size
    if seed is None:
        return part.build(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return part.build(**sizes)
