"""What a data set has to say, and what it is once it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..parts import Part
from .checksums import Files


class AnySplit(Protocol):
    """What :class:`Batches` and the pipeline ask of a split: images in memory (:class:`Split`) or streamed (:class:`.stream.Stream`)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    def __len__(self) -> int:
        """The number of images."""

    def first(self, count: int) -> AnySplit:
        """The split of the first ``count`` images."""

    def to(self, device: str | torch.device) -> AnySplit:
        """The split with what it holds in memory on ``device``."""

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """A random order of the images, int64 [N] on the CPU; every order that this split reads well has its chance."""

    def read(
        self, order: Tensor, batch_size: int, *, start: int = 0, key: tuple[int, ...] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the images in ``order``, from batch ``start`` on: images as they are stored, and int64 labels.

        Args:
            key: seeds what is random about each image, such as the crop that it is given for training; None: as for testing.
        """

    def fingerprint(self) -> Iterator[Any]:
        """Buffers that tell the split from one of other images: those in memory, of others how many there are of which shape."""


@dataclass(frozen=True)
class Split:
    """Images in memory and their classes.

    Attributes:
        images: [N, C, H, W], uint8 in [0, 255] or float32 in [0, 1].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def floats(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return as_floats(self.images)

    def first(self, count: int) -> Split:
        """The split of the first ``count`` images."""
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: str | torch.device) -> Split:
        """The split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """A permutation of the images, each as likely as any other."""
        return torch.randperm(len(self), generator=generator)

    def read(
        self, order: Tensor, batch_size: int, *, start: int = 0, key: tuple[int, ...] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the images in ``order``, from batch ``start`` on. Nothing is random about them, so ``key`` makes no difference."""
        for index in torch.split(order.to(self.labels.device), batch_size)[start:]:
            yield self.images[index], self.labels[index]

    def fingerprint(self) -> Iterator[Any]:
        """Types, shapes and bytes of the images and the labels."""
        for tensor in (self.images, self.labels):
            yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy()


def in_memory(split: AnySplit) -> Split:
    """The images of ``split`` in memory, in their order: what takes all of them at once needs. A streamed split is read for it."""
    if isinstance(split, Split):
        return split
    images, labels = zip(*split.read(torch.arange(len(split)), 256), strict=True)
    return Split(torch.cat(images), torch.cat(labels))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of the classes.

    Attributes:
        name: what the set is called.
        train, test: its images, in memory or streamed.
        classes: the names of the classes.
        files: the files that the images came from; none for images that come with a package.
    """

    name: str
    train: AnySplit
    test: AnySplit
    classes: tuple[str, ...]
    files: Files = field(default_factory=Files)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.train.shape

    def limited(self, limit: int | None, test_limit: int | None) -> Dataset:
        """The same set with the first ``limit`` training and ``test_limit`` test images; None keeps all.

        Raises:
            ValueError: a limit below 1.
        """
        check_limits(limit, test_limit)
        splits = ((self.train, limit), (self.test, test_limit))
        train, test = (split if count is None else split.first(count) for split, count in splits)
        return replace(self, train=train, test=test)


class Data(Part, ABC):
    """A data set that can be chosen by name. A subclass says how it is loaded.

    Attributes:
        local: settings on which no result depends, such as the folder where the files lie on this machine.
    """

    kind = "data"
    local: ClassVar[tuple[str, ...]] = ("dir", "workers")

    @abstractmethod
    def load(self, *, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """The images, in memory or streamed.

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
    """``images`` as float32 in [0, 1]: those of uint8 divided by 255, in the usual order of dimensions in memory; others as they are."""
    if images.dtype != torch.uint8:
        return images
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
