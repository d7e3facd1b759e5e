"""What a data set has to say, and what it is once it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..parts import Part


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: [N, C, H, W], uint8 in [0, 255] or float32 in [0, 1].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return as_floats(self.images)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of the classes."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def limited(self, limit: int | None, test_limit: int | None) -> Dataset:
        """The same set with the first ``limit`` training and ``test_limit`` test images; None keeps all.

        Raises:
            ValueError: a limit below 1.
        """
        check_limits(limit, test_limit)
        splits = ((self.train, limit), (self.test, test_limit))
        train, test = (Split(split.images[:count], split.labels[:count]) for split, count in splits)
        return replace(self, train=train, test=test)


class Data(Part, ABC):
    """A data set that can be chosen by name. A subclass says how it is loaded."""

    kind = "data"

    @abstractmethod
    def load(self, *, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """The images in memory.

        Args:
            limit, test_limit: load only the first so many images of the training and the test split.

        Raises:
            ValueError: a limit below 1, or contents that are wrong.
            FileNotFoundError: the files are not where they should be.
            ImportError: a package of the ``train`` extra is missing.
        """


def check_limits(limit: int | None, test_limit: int | None) -> None:
    """Raises ValueError naming the limit that is below 1."""
    for key, value in {"limit": limit, "test_limit": test_limit}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{key}: expected an integer >= 1, got {value!r}")


def as_floats(images: Tensor) -> Tensor:
    """``images`` as float32 in [0, 1]: those of uint8 divided by 255, others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
