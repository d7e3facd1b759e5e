"""The weights of the networks that the ops are measured on: shapes of all convolutions and linear layers."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def wrn_28_4(classes: int = 10) -> Shapes:
    """Wide ResNet for CIFAR, Zagoruyko & Komodakis, arXiv 1605.07146."""
    shapes: Shapes = [(16, 3, 3, 3)]
    inputs = 16
    for width in (64, 128, 256):
        for block in range(4):
            shapes += [(width, inputs, 3, 3), (width, width, 3, 3)]
            if block == 0:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    return [*shapes, (classes, inputs)]


def resnet18(classes: int = 10) -> Shapes:
    """For CIFAR: a 3 x 3 stem. He et al., arXiv 1512.03385."""
    shapes: Shapes = [(64, 3, 3, 3)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, inputs, 3, 3), (width, width, 3, 3)]
            if block == 0 and inputs != width:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    return [*shapes, (classes, inputs)]


def resnet50(classes: int = 1000) -> Shapes:
    """For ImageNet. He et al., arXiv 1512.03385."""
    shapes: Shapes = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [*shapes, (classes, inputs)]


def vit_b(classes: int = 1000) -> Shapes:
    """ViT-B/16 for ImageNet. Dosovitskiy et al., arXiv 2010.11929."""
    block: Shapes = [(3 * 768, 768), (768, 768), (4 * 768, 768), (768, 4 * 768)]
    return [(768, 3, 16, 16), *(12 * block), (classes, 768)]


NETWORKS = {"WRN-28-4": wrn_28_4, "ResNet-18": resnet18, "ResNet-50": resnet50, "ViT-B": vit_b}
