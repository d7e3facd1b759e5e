"""How nodes of a graph see images: with channels first, as values always have them, or otherwise, as transformers do.

A value is images of shape (C, H, W), or vectors; a row of tokens is an image of height 1. A node that permutes or flattens images gives the
same value with another view, so nothing moves, and a linear layer on tokens is a 1x1 convolution of the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN, LAST, FLAT, TOKENS = "plain", "last", "flat", "tokens"  # [N, C, H, W] (or vectors); [N, H, W, C]; [N, C, H * W]; [N, H * W, C]

Shape = tuple[int, ...]


def shape_in(view: str, shape: Shape) -> Shape:
    """The shape of a value, without the batch, as ``view`` shows it."""
    if view == PLAIN:
        return shape
    channels, height, width = shape
    return {LAST: (height, width, channels), FLAT: (channels, height * width), TOKENS: (height * width, channels)}[view]


def seen(images: Tensor, view: str) -> Tensor:
    """A value as ``view`` shows it."""
    if view == LAST:
        return images.permute(0, 2, 3, 1)
    if view == FLAT:
        return images.flatten(2)
    return images.flatten(2).transpose(1, 2) if view == TOKENS else images


def unseen(tensor: Tensor, view: str, shape: Shape) -> Tensor:
    """The value, of this shape without the batch, that ``view`` shows as ``tensor``."""
    if view == LAST:
        return tensor.permute(0, 3, 1, 2)
    if view == FLAT:
        return torch.unflatten(tensor, 2, shape[1:])
    return torch.unflatten(tensor.transpose(1, 2), 2, shape[1:]) if view == TOKENS else tensor


def reshaped(view: str, shape: Shape, to: Shape) -> str | None:
    """The view that shows a value of ``shape`` as ``to``, after a reshape of what ``view`` shows; None if there is none."""
    alike = (PLAIN, FLAT) if view in (PLAIN, FLAT) else (LAST, TOKENS)
    return next((other for other in alike if len(shape) == 3 and shape_in(other, shape) == to), None)


def permuted(view: str, order: Shape) -> str | None:
    """The view after the axes, that of the batch included, were put into this order; None if there is none."""
    if order == tuple(range(len(order))):
        return view
    moves = {
        (PLAIN, (0, 2, 3, 1)): LAST,
        (LAST, (0, 3, 1, 2)): PLAIN,
        (FLAT, (0, 2, 1)): TOKENS,
        (TOKENS, (0, 2, 1)): FLAT,
    }
    return moves.get((view, order))
