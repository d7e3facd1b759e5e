"""What a pass through a program works on: slots with activations and with gradients, in buffers of an arena."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arena import Arena


class Slot(NamedTuple):
    """A place for an activation: its shape without the batch, and whether it is in blocks."""

    shape: tuple[int, ...]
    blocked: bool


class Target(NamedTuple):
    """A contribution to a slot's gradient."""

    slot: int
    adds: bool  # to what is there already
    gated: bool  # the sum is complete with it, and 0 where the slot is not above 0


class Run:
    """One pass of ``n`` images through a program, and back."""

    def __init__(self, slots: Sequence[Slot], weights: Sequence[Any], arena: Arena, n: int, lanes: int, halo: int) -> None:
        self.slots, self.weights, self.arena, self.n, self.lanes, self.halo = slots, weights, arena, n, lanes, halo
        self.values: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}
        self.graphs: dict[int, tuple[list[Tensor], Tensor]] | None = (
            None  # of dense parts, by the slot they write; None: no gradient wanted
        )

    def take(self, slot: int) -> Tensor:
        """A buffer for what belongs to the slot."""
        shape, blocked = self.slots[slot]
        if not blocked:
            return self.arena.take((self.n, *shape))
        channels, height, width = shape
        blocks = -(-self.n // self.lanes)
        return self.arena.take((blocks, channels, height + 2 * self.halo, width + 2 * self.halo, self.lanes))

    def new(self, slot: int) -> Tensor:
        """The buffer that a step writes the slot to."""
        self.values[slot] = self.take(slot)
        return self.values[slot]

    def put(self, slot: int, tensor: Tensor) -> Tensor:
        """``tensor``, made elsewhere, is what a step writes the slot to."""
        self.values[slot] = self.arena.adopt(tensor)
        return tensor

    def drop(self, slot: int) -> None:
        self.arena.drop(self.values.pop(slot))

    def before(self, target: Target) -> Tensor | None:
        return self.grads.get(target.slot) if target.adds else None

    def gate(self, target: Target) -> Tensor | None:
        return self.values[target.slot] if target.gated else None

    def settle(self, target: Target, grad: Tensor) -> None:
        """``grad``, a buffer of its own, is the target's gradient now; what was there before is in it."""
        if target.adds:
            self.arena.drop(self.grads[target.slot])
        self.grads[target.slot] = grad

    def contribute(self, target: Target, grad: Tensor) -> None:
        """Adds ``grad``, a buffer of its own."""
        if target.adds:
            grad.add_(self.grads[target.slot])
        if target.gated:
            _gate(grad, self.values[target.slot], out=grad)
        self.settle(target, grad)

    def pass_on(self, target: Target, grad: Tensor) -> None:
        """Adds ``grad``, which belongs to another slot too: it is shared and not copied where nothing has to be done to it."""
        if target.adds:
            self.contribute(target, self.take(target.slot).copy_(grad))
        elif target.gated:
            self.settle(target, _gate(grad, self.values[target.slot], out=self.take(target.slot)))
        else:
            self.settle(target, self.arena.share(grad))


def _gate(grad: Tensor, activation: Tensor, out: Tensor) -> Tensor:
    gated: Tensor = torch.ops.aten.threshold_backward.grad_input(grad, activation, 0, grad_input=out)
    return gated
