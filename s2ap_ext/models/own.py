"""Models of a user's own module, by the names that lead to them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..parts import OWN, Part, attribute, call_own, register
from .base import Model


@register("package.module:attribute", pattern=OWN)
class OwnModel(Model):
    """What an importable module defines: a class derived from :class:`Model`, or a function (num_classes=, in_channels=) -> nn.Module.

    A function that has a parameter ``image_size`` gets the images' (H, W) in it.
    """

    @classmethod
    def member(cls, name: str) -> type[Part]:
        found = attribute("model", name)
        if isinstance(found, type) and issubclass(found, Model):
            return found
        if not callable(found) or isinstance(found, nn.Module):
            wanted = "a class derived from s2ap_ext.models.Model or a function (num_classes=, in_channels=) -> nn.Module"
            raise ValueError(f"model {name}: expected {wanted}, got {type(found).__name__}")
        return cls

    def build(self, *, num_classes: int, in_channels: int, **image_size: Any) -> nn.Module:
        sizes = {"num_classes": num_classes, "in_channels": in_channels, **image_size}
        model = call_own("model", self.name, attribute("model", self.name), **sizes)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model {self.name}: expected an nn.Module from it, got {type(model).__name__}")
        return model

    def takes_image_size(self) -> bool:
        try:
            return "image_size" in inspect.signature(attribute("model", self.name)).parameters
        except (TypeError, ValueError):  # it has no signature, which build will tell
            return False

    def count_parameters(self, **sizes: Any) -> int:
        """Of a user's function nothing is known before it is called."""
        return 0
