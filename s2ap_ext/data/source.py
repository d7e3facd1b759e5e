"""Where encoded images come from: rows in blocks, each block read from its beginning to its end.

A :class:`Source` knows nothing of shuffling, batches or memory. :func:`load` decodes all of one into memory, and :class:`.stream.Stream`
reads it while the training goes on.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .base import Split
from .images import Fit

Shape = tuple[int, int, int]
ORDER_SEED = 0
CHUNK = 1024  # images that are put together at once


class Row(NamedTuple):
    """One image before it is decoded.

    Attributes:
        where: the file and the place in it, for messages.
        image: what :meth:`Source.pixels` takes: the bytes of a file, or where they are.
        label: None where it is only known with the image.
    """

    where: str
    image: Any
    label: int | None


@dataclass(frozen=True)
class Decoder:
    """How the images of a split are decoded.

    Attributes:
        shape: the (C, H, W) that each must have; None takes any.
        fit: what brings images of any size to one; None: they are taken as they are.
        num_classes: labels must be below it.
    """

    num_classes: int
    shape: Shape | None = None
    fit: Fit | None = None


class Source(ABC):
    """The encoded images of a split.

    Attributes:
        sizes: how many rows each block has.
        row_bytes: about how many bytes a row takes in memory before it is decoded.
    """

    sizes: tuple[int, ...]
    row_bytes: int = 1

    def __len__(self) -> int:
        return sum(self.sizes)

    @abstractmethod
    def rows(self, block: int) -> Iterator[Row]:
        """The rows of a block in order; raises ValueError naming the file if it cannot be read."""

    @abstractmethod
    def pixels(self, row: Row, decoder: Decoder, key: tuple[int, ...] | None) -> tuple[np.ndarray, int | None]:
        """The image of ``row``, uint8 [H, W, C], and its label; runs in any process.

        Raises:
            ValueError: an image that cannot be used; the message starts with ``row.where``.
        """

    def decode(self, row: Row, decoder: Decoder, key: tuple[int, ...] | None = None) -> tuple[np.ndarray, int]:
        """As :meth:`pixels`, with the label checked."""
        pixels, label = self.pixels(row, decoder, key)
        return pixels, checked_label(label, decoder.num_classes, row.where)

    def all_rows(self) -> Iterator[Row]:
        """The rows of all blocks in order."""
        return itertools.chain.from_iterable(self.rows(block) for block in range(len(self.sizes)))


def checked_label(label: int | None, num_classes: int, where: str) -> int:
    """``label``; raises ValueError, starting with ``where``, if it is none from 0 to ``num_classes`` - 1."""
    if label is None or not 0 <= label < num_classes:
        raise ValueError(f"{where}: expected a label from 0 to {num_classes - 1}, got {label}")
    return label


def shape_of(source: Source, decoder: Decoder) -> Shape:
    """The (C, H, W) of the first image of ``source`` once it is decoded."""
    pixels, _ = source.decode(next(source.all_rows()), decoder)
    height, width, channels = pixels.shape
    return channels, height, width


def load(source: Source, decoder: Decoder, limit: int | None = None, *, mixed: bool = False) -> Split:
    """The first ``limit`` images of ``source``, or all, in memory; without a shape in ``decoder`` all must have that of the first.

    Args:
        mixed: puts all in a fixed random order first, for files that are sorted by class.

    Raises:
        ValueError: as :meth:`Source.decode`.
    """
    rows: Iterator[Row] = itertools.islice(source.all_rows(), None if mixed else limit)
    order = fixed_order(len(source))[:limit] if mixed else None
    if order is not None:
        chosen = set(order.tolist())
        rows = (row for number, row in enumerate(rows) if number in chosen)
    decoder = decoder if decoder.shape else Decoder(decoder.num_classes, shape_of(source, decoder), decoder.fit)
    images, labels = [], []
    while chunk := [source.decode(row, decoder) for row in itertools.islice(rows, CHUNK)]:
        images.append(torch.from_numpy(np.stack([pixels for pixels, _ in chunk]).transpose(0, 3, 1, 2).copy()))
        labels += [label for _, label in chunk]
    split = Split(torch.cat(images), torch.tensor(labels))
    if order is None:
        return split
    place = order.argsort().argsort()  # the rows came in rising order
    return Split(split.images[place], split.labels[place])


def fixed_order(n: int) -> torch.Tensor:
    """A random order of ``n`` images that belongs to the data: it is the same in every run."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(ORDER_SEED))
