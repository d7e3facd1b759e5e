"""What a model has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import nn

from ..parts import Part


class Model(Part, ABC):
    """A network that can be chosen by name. A subclass says how it is built.

    Attributes:
        usual_channels: channels of the images that the network is usual for.
    """

    kind = "model"
    usual_channels: ClassVar[int] = 3

    @abstractmethod
    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        """The network, [N, in_channels, H, W] -> logits [N, num_classes], its weights drawn from torch's random state.

        Raises:
            ValueError: a size below 1.
        """


def check_positive(**sizes: int) -> None:
    """Raises ValueError naming the first of ``sizes`` that is no integer >= 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
