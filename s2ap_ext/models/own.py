"""Models of a user's own module, by the names that lead to them."""

from __future__ import annotations

from torch import nn

from ..parts import OWN, Part, attribute, call_own, register
from .base import Model


@register("package.module:attribute", pattern=OWN)
class OwnModel(Model):
    """What an importable module defines: a class derived from :class:`Model`, or a function (num_classes=, in_channels=) -> nn.Module."""

    @classmethod
    def member(cls, name: str) -> type[Part]:
        found = attribute("model", name)
        if isinstance(found, type) and issubclass(found, Model):
            return found
        if not callable(found) or isinstance(found, nn.Module):
            wanted = "a class derived from s2ap_ext.models.Model or a function (num_classes=, in_channels=) -> nn.Module"
            raise ValueError(f"model {name}: expected {wanted}, got {type(found).__name__}")
        return cls

    def build(self, *, num_classes: int, in_channels: int) -> nn.Module:
        model = call_own("model", self.name, attribute("model", self.name), num_classes=num_classes, in_channels=in_channels)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model {self.name}: expected an nn.Module from it, got {type(model).__name__}")
        return model

    def count_parameters(self, *, num_classes: int, in_channels: int) -> int:
        """Of a user's function nothing is known before it is called."""
        return 0
