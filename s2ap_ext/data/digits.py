"""Handwritten digits, which come with the package.

``digits.safetensors`` holds the test part of Alpaydin and Kaynak's Optical Recognition of Handwritten Digits (UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49; CC BY 4.0) in the order of ``sklearn.datasets.load_digits``. Reading scikit-learn's own
copy would take a second, all of it for importing what no image needs.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extras import optional
from ..parts import register
from .base import Data, Dataset, Split

DIGITS_SPLIT_SEED = 0  # the split belongs to the data: runs with different seeds are measured on the same test images


def load_digits() -> Dataset:
    """1797 handwritten digits, 8x8 pixels with 17 grey levels, as float32 in [0, 1]: 1438 to train on, 359 to test.

    A fixed split in which every class has its share, each part in a fixed random order.

    Raises:
        ImportError: safetensors is missing.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (its test part).
    """
    images, labels = _read(optional("safetensors.torch"))
    generator = torch.Generator().manual_seed(DIGITS_SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    # An image's rank among those of its class decides: the first fifth of every class is for testing.
    one_hot = F.one_hot(labels[order])
    rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1
    share = (one_hot.sum(0).float() / 5).round().long()
    is_test = rank < share[labels[order]]
    train, test = (Split(images[index], labels[index]) for index in (order[~is_test], order[is_test]))
    return Dataset("digits", train, test, classes=tuple("0123456789"))


@functools.cache
def _read(safetensors: Any) -> tuple[Tensor, Tensor]:
    """All images, as float32 in [0, 1], and their labels, read with ``safetensors.torch``. Both are shared: nobody may change them."""
    stored = safetensors.load((resources.files(__package__) / "digits.safetensors").read_bytes())
    return stored["images"].float().div(16).unsqueeze(1), stored["labels"].long()


@register("digits")
class Digits(Data):
    """:func:`load_digits`."""

    def load(self, *, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        return load_digits().limited(limit, test_limit)
