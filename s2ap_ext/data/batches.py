"""Batches of a split, shuffled and augmented as functions of (seed, epoch).

A resumed run sees what an uninterrupted one would have seen, and every device sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .base import AnySplit, as_floats


def seeded_generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of ``key``, such as (seed, epoch); different keys give unrelated numbers."""
    # With its length in front: to SeedSequence (1,) and (1, 0) are the same.
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def augmented(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """``images`` moved and mirrored, each in its own way, all in one gather; what moves in is 0.

    Args:
        images: [N, C, H, W], any dtype.
        shifts: int64 [N, 2], rows and columns by which the image moves up and left.
        flips: bool [N], whether it is then mirrored left to right.

    Returns:
        A new tensor like ``images``.

    Equivalent to::

        p = shifts.abs().max()
        for image, (dy, dx), flip in zip(F.pad(images, (p, p, p, p)), shifts, flips):
            crop = image[:, p + dy : p + dy + H, p + dx : p + dx + W]
            out.append(crop.flip(2) if flip else crop)
    """
    n, c, height, width = images.shape
    rows = torch.arange(height, device=images.device) + shifts[:, :1]  # [N, H]
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns) + shifts[:, 1:]  # [N, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]  # [N, H, W]
    index = (rows.clamp(0, height - 1) * width)[:, :, None] + columns.clamp(0, width - 1)[:, None, :]
    index = index.view(n, 1, height * width).expand(n, c, height * width)
    moved = images.reshape(n, c, height * width).gather(2, index).view_as(images)
    return moved * inside[:, None]


class Batches:
    """The batches of a split: ``(images, labels)``, float32 [B, C, H, W] in [0, 1] and int64 [B], on the device.

    Iterating gives the images as they are and in order, for evaluation. :meth:`epoch` gives them shuffled and augmented, for training.

    Args:
        split: the images. Those in memory are moved to ``device`` here, once; streamed ones batch by batch.
        batch_size: images per batch; the last one may have fewer.
        device: where the batches are made.
        seed: of shuffling and augmentation.
        shift: each image moves by up to so many pixels in both directions, with zeros moving in: a random crop from the padded image.
        flip: mirror every second image, at random.

    Raises:
        ValueError: ``batch_size`` below 1, a negative ``shift``, an empty split.
    """

    def __init__(
        self,
        split: AnySplit,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("shift", shift, 0), ("split: number of images", len(split), 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        self.split, self.device = split.to(device), device
        self.batch_size, self.seed, self.shift, self.flip = batch_size, seed, shift, flip

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.split.read(torch.arange(len(self.split)), self.batch_size):
            yield as_floats(images.to(self.device)), labels.to(self.device)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number``, from 0: the same ones whenever it is asked for.

        Args:
            start: leaves out so many batches at the beginning, which costs little: their images are not decoded.
        """
        n = len(self.split)
        generator = seeded_generator(self.seed, number)
        order = self.split.shuffled(generator)
        shifts = torch.randint(-self.shift, self.shift + 1, (n, 2), generator=generator)[order]
        flips = (torch.rand(n, generator=generator) < (0.5 if self.flip else 0))[order]
        moves = zip(*(torch.split(t.to(self.device), self.batch_size)[start:] for t in (shifts, flips)), strict=True)
        batches = self.split.read(order, self.batch_size, start=start, key=(self.seed, number))
        for (images, labels), move in zip(batches, moves, strict=True):
            images = images.to(self.device)
            if self.shift or self.flip:
                images = augmented(images, *move)
            yield as_floats(images), labels.to(self.device)
