"""What the networks of other packages share: how the package is imported, and how pretrained weights are taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import MissingExtra, optional
from ..settings import key, nearest
from .base import Model


class LibraryModel(Model):
    """A family of networks that another package has, by names such as ``timm:resnet18``.

    The network takes images in [0, 1] and normalises them itself. A subclass says in :meth:`make` how the package builds it.
    """

    @dataclass(frozen=True)
    class Settings:
        pretrained: bool = key(False, "start from the weights that the package has for it, which it downloads where they are not at hand")

    @property
    def wanted(self) -> str:
        """What the package calls the network."""
        return self.name.partition(":")[2]

    @abstractmethod
    def make(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        """The network, as :meth:`build`; it may raise whatever the package raises."""

    def build(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int] = (224, 224)) -> nn.Module:
        """As :meth:`Model.build`.

        Raises:
            ValueError: the package has no such network, or it does not fit the images.
            ImportError: the package is missing or cannot be imported.
            OSError: the weights or the configuration cannot be read.
        """
        try:
            return self.make(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        except (ValueError, ImportError, OSError):
            raise
        except Exception as error:  # whatever the package raises for sizes that do not go together
            images = f"{in_channels} channels of {image_size[0]}x{image_size[1]} pixels"
            raise ValueError(f"model {self.name}: cannot be built for {images} ({type(error).__name__}: {error})") from error

    def outside(self) -> str:
        return f"pretrained weights of {self.wanted}" if self.settings.pretrained else ""

    def self_contained(self) -> Model:
        return type(self)(replace(self.settings, pretrained=False))

    def count_parameters(self, **sizes: Any) -> int:
        return super(LibraryModel, type(self)(replace(self.settings, pretrained=False))).count_parameters(**sizes)

    def check_name(self, known: list[str]) -> None:
        """Raises ValueError unless ``wanted`` is among the ``known`` names."""
        if self.wanted not in known:
            raise ValueError(f"model {self.name}: the package has no {self.wanted}{nearest(self.wanted, known)}")


def library(module: str) -> ModuleType:
    """Imports ``module`` of another package.

    Raises:
        ImportError: the package is missing, with the command that installs it, or something in it cannot be imported.
    """
    try:
        return optional(module)
    except MissingExtra:
        raise
    except Exception as error:  # such as the RuntimeError of a torchvision that was built for another torch
        package = module.partition(".")[0]
        raise ImportError(f"{package} is installed and cannot be imported ({type(error).__name__}: {error})") from error


@torch.no_grad()
def load_fitting(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads ``weights`` into ``model``, whose head keeps its own values where the number of classes is another.

    Raises:
        ValueError: more than one layer does not fit, or is not there; the message starts with ``where``.
    """
    own = model.state_dict()
    missing = [name for name, tensor in own.items() if name not in weights or weights[name].shape != tensor.shape]
    if len({name.rpartition(".")[0] for name in missing}) > 1:
        raise ValueError(f"{where}: its pretrained weights do not fit: {', '.join(missing[:3])}")
    for name in own.keys() - set(missing):
        own[name].copy_(weights[name])
