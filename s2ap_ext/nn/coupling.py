"""Channels that have to be removed together, and those that can be: the decision behind :func:`s2ap_ext.nn.shrink.shrink_channels`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer that reads channels and mixes them.

    Attributes:
        weight, bias: names of its parameters; no bias is None.
        units, constant: of the channels that it reads.
        read: bool [C], whether a weight of the channel is not zero.
        padded: whether it pads its input with zeros, so that a constant channel is no longer constant at the border.
        groups: of the convolution.
    """

    weight: str
    bias: str | None
    units: Tensor
    constant: Tensor
    read: Tensor
    padded: bool
    groups: int

    @property
    def folded(self) -> Tensor:
        """bool [C]: channels that go into a sum which has to be made up for where they are removed."""
        return self.read & (self.constant != 0) & ~self.constant.isnan()


@dataclass
class Coupling:
    """Where the units are.

    Attributes:
        axes: for the axes of parameters and buffers, by name and axis, the unit of each entry. The second axis of the weight of a grouped
            convolution is left out, for its entries mean other channels in each group.
        readers: the layers that read channels.
        depthwise: names of the weights of depthwise convolutions, whose groups are channels.
        grouped: by the name of a grouped convolution's weight, the units that it reads and its groups.
    """

    axes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)
    depthwise: set[str] = field(default_factory=set)
    grouped: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _joined: list[int] = field(default_factory=list)  # for each unit one that it is joined with, or itself
    _fixed: set[int] = field(default_factory=set)

    def new(self, count: int) -> Tensor:
        first = len(self._joined)
        self._joined.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def fix(self, units: Tensor) -> None:
        """These units stay."""
        self._fixed.update(units.tolist())

    def join(self, a: Tensor, b: Tensor) -> None:
        for one, other in zip(a.tolist(), b.tolist(), strict=True):
            self._joined[self._representative(one)] = self._representative(other)

    def _representative(self, unit: int) -> int:
        while self._joined[unit] != unit:
            self._joined[unit] = self._joined[self._joined[unit]]
            unit = self._joined[unit]
        return unit

    def representatives(self, units: Tensor) -> tuple[int, ...]:
        """The same numbers for units that are joined."""
        return tuple(self._representative(unit) for unit in units.tolist())

    def put(self, name: str, axis: int, units: Tensor) -> None:
        """The entries of a tensor's axis belong to ``units``; a tensor that is used twice joins those of both uses."""
        if (name, axis) in self.axes:
            self.join(self.axes[name, axis], units)
        else:
            self.axes[name, axis] = units

    def removed(self) -> Tensor:
        """bool, for each unit whether it is removed. The units that are joined agree."""
        of = torch.tensor(self.representatives(torch.arange(len(self._joined))), dtype=torch.int64)
        goes = torch.ones(len(of), dtype=torch.bool)

        def stay(units: Tensor) -> None:
            goes[of[units]] = False

        stay(torch.tensor(sorted(self._fixed), dtype=torch.int64))
        for reader in self.readers:
            stay(reader.units[reader.read & reader.constant.isnan()])
        while True:
            before = goes.clone()
            for units in self.axes.values():  # a layer keeps a channel at least
                if goes[of[units]].all():
                    stay(units[:1])
            for name, (units, groups) in self.grouped.items():
                for side in (units, self.axes[name, 0]):
                    stay(_uneven(side, goes[of[side]], groups))
            for reader in self.readers:
                for units, constant, folded in zip(
                    *(t.chunk(reader.groups) for t in (reader.units, reader.constant, reader.folded)), strict=True
                ):
                    here = goes[of[units]] & folded
                    if reader.padded and here.any() and not (~goes[of[units]] & (constant.nan_to_num() != 0)).any():
                        stay(units[torch.where(here, constant.abs(), -1.0).argmax()].view(1))
            if torch.equal(before, goes):
                return goes[of]


def _uneven(units: Tensor, goes: Tensor, groups: int) -> Tensor:
    """The units that have to stay so that each group loses equally many."""
    by_group = goes.view(groups, -1)
    beyond = by_group.cumsum(1) > by_group.sum(1).min()
    return units[(by_group & beyond).flatten()]
