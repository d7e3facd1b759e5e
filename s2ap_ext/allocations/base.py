"""What an allocation is told about a layer, and what it has to answer."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..parts import Part, find, make
from ..reference import SINGLE_WEIGHTS, WEIGHT, WINDOW, Pattern
from ..sparsity import check_sparsity, kept_count, units


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that is about to be pruned.

    Attributes:
        name: as errors call it.
        weight: its weights, outputs first, then inputs.
        pattern: what ``kept`` counts: single weights, groups (channels, heads), or the weights of each window.
    """

    name: str
    weight: Tensor
    pattern: Pattern = SINGLE_WEIGHTS

    @property
    def units(self) -> int:
        """The largest that ``kept`` can be."""
        return units(self.pattern, self.weight.numel())

    @property
    def weights_per_unit(self) -> int:
        """How many weights stay for each unit that is kept."""
        return 1 if self.pattern.kind == WEIGHT else self.weight.numel() // self.pattern.size


class Allocation(Part, ABC):
    """One way to spread the kept weights over the layers. A subclass implements :meth:`kept`, a pure function of its arguments.

    Attributes:
        windows: whether it also fits layers with N:M windows, of which each has to keep N of M.
    """

    kind = "allocation"
    windows: ClassVar[bool] = False

    @abstractmethod
    def kept(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        """How many units each of ``layers`` keeps, from 0 to ``layer.units``, in their order.

        Args:
            layers: each weight once, so tied weights are one layer.
            sparsity: the fraction of all weights removed, in [0, 1].
        """


def allocate(allocation: str | Allocation | Mapping[str, float], layers: Sequence[Layer], sparsity: float) -> list[int]:
    """How many units each of ``layers`` keeps.

    Args:
        allocation: an allocation, the name of one, or sparsities by layer (:class:`s2ap_ext.allocations.mapping.SparsityByLayer`).
        layers: each weight once.
        sparsity: the fraction of all weights removed, in [0, 1].

    Raises:
        TypeError: ``allocation`` is none of these.
        ValueError: an unknown name, or a pattern that no layer matches; ``sparsity`` outside [0, 1]; layers with N:M windows and an
            allocation other than ``"uniform"``; weights that are not finite, where they are compared; an answer that does not fit
            the layers.
    """
    check_sparsity(sparsity)
    made: Allocation
    if isinstance(allocation, Mapping):
        made = find("allocation", "mapping").of(allocation)
    elif isinstance(allocation, str):
        made = make("allocation", allocation)
    elif isinstance(allocation, Allocation):
        made = allocation
    else:
        raise TypeError(f"allocation: expected a name, an Allocation or sparsities by layer, got {type(allocation).__name__}")
    name = made.name or type(made).__name__
    windows = [layer.name for layer in layers if layer.pattern.kind == WINDOW]
    if windows and not made.windows:
        raise ValueError(f"allocation: expected 'uniform' for N:M windows, which fix the sparsity of layer {windows[0]}, got {name!r}")
    kept = [operator.index(count) for count in made.kept(layers, sparsity)]
    if len(kept) != len(layers):
        raise ValueError(f"allocation {name}: expected a count for each of {len(layers)} layers, got {len(kept)}")
    for layer, count in zip(layers, kept, strict=True):
        if not 0 <= count <= layer.units:
            raise ValueError(f"allocation {name}: expected layer {layer.name} to keep 0 to {layer.units}, got {count}")
    return kept


def weights_to_keep(layers: Sequence[Layer], sparsity: float) -> int:
    """What all layers together keep: ``total - floor(sparsity * total)`` weights."""
    return kept_count(sum(layer.weight.numel() for layer in layers), sparsity)


def least(layer: Layer, sparsity: float) -> int:
    """The units that a layer keeps at least: one, unless everything is pruned, since a layer that keeps nothing cuts the model in two."""
    return min(1, layer.units) if sparsity < 1 else 0


def kept_weights_of(layers: Sequence[Layer], kept: Sequence[int]) -> int:
    """The weights that stay where each layer keeps its number of units."""
    return sum(count * layer.weights_per_unit for layer, count in zip(layers, kept, strict=True))
