"""Activations as they lie in memory, and the buffers they are written to again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor


class Arena:
    """Float32 buffers by shape. Each is zeroed once, when it is made; who writes blocks leaves their halo alone, so it stays zero.

    Buffers are counted: :meth:`take` gives one to a first user, :meth:`share` adds a user, and what the last user drops is free again.
    Tensors that were made elsewhere are counted from :meth:`adopt` on, and let go of in the end.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = {}
        self._users: dict[int, int] = {}
        self._adopted: set[int] = set()

    def take(self, shape: tuple[int, ...]) -> Tensor:
        try:
            buffer = self._free[shape].pop()
        except (KeyError, IndexError):
            buffer = _new(shape)
        self._users[id(buffer)] = 1
        return buffer

    def adopt(self, tensor: Tensor) -> Tensor:
        self._users[id(tensor)] = 1
        self._adopted.add(id(tensor))
        return tensor

    def share(self, buffer: Tensor) -> Tensor:
        self._users[id(buffer)] += 1
        return buffer

    def drop(self, buffer: Tensor) -> None:
        self._users[id(buffer)] -= 1
        if not self._users[id(buffer)]:
            del self._users[id(buffer)]
            if id(buffer) in self._adopted:
                self._adopted.remove(id(buffer))
                return
            self._free.setdefault(tuple(buffer.shape), []).append(buffer)


def _new(shape: tuple[int, ...]) -> Tensor:
    """Zeros; images of one row, which are tokens, with the channels innermost, as torch's linear layers and attention want them."""
    if len(shape) == 4 and shape[2] == 1:
        n, channels, height, width = shape
        return torch.zeros(n, height, width, channels).permute(0, 3, 1, 2)
    return torch.zeros(shape)


class Arenas(threading.local):
    """The arenas of a thread, one for each size of batch; those of the sizes used last are kept."""

    KEPT = 4

    def __init__(self) -> None:
        self._arenas: OrderedDict[Hashable, Arena] = OrderedDict()

    def of(self, size: Hashable) -> Arena:
        arena = self._arenas.setdefault(size, Arena())
        self._arenas.move_to_end(size)
        if len(self._arenas) > self.KEPT:
            self._arenas.popitem(last=False)
        return arena


def inside(activation: Tensor, halo: int) -> Tensor:
    """An activation without its halo: blocks [B, C, H, W, lanes]; images [N, C, H, W], whose axes mean the same, and vectors have none."""
    if activation.dim() != 5 or halo == 0:
        return activation
    return activation[:, :, halo:-halo, halo:-halo]


def per_channel(values: Tensor, activation: Tensor) -> Tensor:
    """``values`` [C], shaped to combine with blocks, images or vectors [N, C]."""
    return values.view(-1, *[1] * (activation.dim() - 2))


def write_blocks(images: Tensor, blocks: Tensor, halo: int) -> None:
    """Writes images [N, C, H, W] into blocks; 0 into the lanes of the last block that no image is left for."""
    n, lanes = images.shape[0], blocks.shape[4]
    whole, to = n // lanes, inside(blocks, halo)
    to[:whole].copy_(images[: whole * lanes].unflatten(0, (whole, lanes)).permute(0, 2, 3, 4, 1))
    if whole < len(to):
        to[whole, ..., : n - whole * lanes].copy_(images[whole * lanes :].permute(1, 2, 3, 0))
        to[whole, ..., n - whole * lanes :].zero_()


def read_blocks(blocks: Tensor, halo: int, images: Tensor) -> None:
    """Writes the images of blocks into ``images`` [N, C, H, W]."""
    n, lanes = images.shape[0], blocks.shape[4]
    whole, source = n // lanes, inside(blocks, halo)
    images[: whole * lanes].unflatten(0, (whole, lanes)).copy_(source[:whole].permute(0, 4, 1, 2, 3))
    if whole < len(source):
        images[whole * lanes :].copy_(source[whole, ..., : n - whole * lanes].permute(3, 0, 1, 2))
