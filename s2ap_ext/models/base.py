"""What a model has to say."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

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

        A network that fits images of one size only takes ``image_size: tuple[int, int]``, H and W, too; its default is the usual size.

        Raises:
            ValueError: a size below 1.
        """

    def sizes(self, shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
        """The arguments of :meth:`build` for images of ``shape``, (C, H, W), in ``num_classes`` classes."""
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": shape[0]}
        return sizes | {"image_size": shape[1:]} if self.takes_image_size() else sizes

    def takes_image_size(self) -> bool:
        """Whether :meth:`build` has a parameter ``image_size``."""
        return "image_size" in inspect.signature(self.build).parameters

    def outside(self) -> str:
        """What :meth:`build` reads besides installed packages, such as pretrained weights, in words; empty if nothing."""
        return ""

    def self_contained(self) -> Model:
        """This network without its weights: the same architecture, with all that is outside written into the settings.

        So it is what a file of weights holds. Errors as in :meth:`build`.
        """
        return self

    def count_parameters(self, **sizes: Any) -> int:
        """How many parameters :meth:`build` makes of its arguments ``sizes``, found without memory for them.

        It builds on torch's meta device. A class whose ``build`` cannot run there overrides this.

        Raises:
            ValueError: as :meth:`build`; sizes whose products overflow.
        """
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in self.build(**sizes).parameters())
        except RuntimeError as error:
            raise ValueError(f"model {self.name}: {self.settings} has too many parameters to count ({error})") from None


@contextlib.contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Within it no network of more than so many parameters can be built: a ValueError stops it on the way.

    Counting on the meta device needs no memory for the parameters, but the modules themselves take some.
    """
    count = 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += max(parameter.numel(), 1)
        if count > parameters:
            raise ValueError(f"does not fit the model: it has more than {parameters:,} parameters")

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def check_positive(**sizes: int) -> None:
    """Raises ValueError naming the first of ``sizes`` that is no integer >= 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
