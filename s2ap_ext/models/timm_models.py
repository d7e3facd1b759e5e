"""Networks of timm."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..parts import register
from .library import LibraryModel, library
from .normalization import IMAGENET, Normalize


@register("timm:NAME", pattern=r"timm:\w+(\.\w+)?")
class TimmModel(LibraryModel):
    """A network that timm knows by name, such as timm:vit_tiny_patch16_224 or, with a tag of weights, timm:resnet18.a1_in1k."""

    def make(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        timm = library("timm")
        if not timm.is_model(self.wanted):
            self.check_name(timm.list_models())
        about = timm.get_pretrained_cfg(self.wanted)
        size = {"img_size": image_size} if getattr(about, "fixed_input_size", False) else {}
        model = timm.create_model(self.wanted, pretrained=self.settings.pretrained, num_classes=num_classes, in_chans=in_channels, **size)
        mean, std = (getattr(about, key, value) for key, value in zip(("mean", "std"), IMAGENET, strict=True))
        return nn.Sequential(OrderedDict(normalize=Normalize(mean, std, in_channels=in_channels), model=model))
