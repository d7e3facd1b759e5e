"""Clean and robust accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modes import evaluation_mode


@dataclass(frozen=True)
class Accuracy:
    """Fractions of images classified correctly, in [0, 1].

    Attributes:
        clean: as they are.
        robust: as they are and also under the attack (None where there was none): an adversary may leave an image alone.
        images: how many there were.
    """

    clean: float
    robust: float | None
    images: int


def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
) -> Accuracy:
    """Clean and robust accuracy of ``model``.

    Args:
        model: gives logits [N, K].
        batches: pairs of images [N, ...] in [0, 1] and classes, int64 [N].
        attack: an :class:`s2ap_ext.attacks.Attack` such as ``Pgd(steps=20)``, or any other ``(model, x, y) -> x_adv``. Only images that
            are classified correctly are attacked.

    Raises:
        ValueError: no images; what the attack raises.
    """
    images = clean = robust = 0
    with evaluation_mode(model, freeze=True), torch.no_grad():
        for x, y in batches:
            right = model(x).argmax(dim=1) == y
            images += len(y)
            clean += int(right.sum())
            if attack is not None and right.any():
                x, y = x[right], y[right]
                robust += int((model(attack(model, x, y)).argmax(dim=1) == y).sum())
    if not images:
        raise ValueError("batches: expected at least one image, got none")
    return Accuracy(clean / images, None if attack is None else robust / images, images)
