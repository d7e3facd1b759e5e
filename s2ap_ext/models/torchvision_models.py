"""Networks of torchvision."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ..parts import register
from .library import LibraryModel, library, load_fitting
from .normalization import IMAGENET, Normalize

WITH_AUXILIARY = ("googlenet", "inception_v3")  # classifiers, which would make the output of a network in training a tuple


@register("torchvision:NAME", pattern=r"torchvision:\w+")
class TorchvisionModel(LibraryModel):
    """A classification network that torchvision knows by name, such as torchvision:mobilenet_v3_small."""

    def make(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        models = library("torchvision.models")
        self.check_name(models.list_models(module=models))
        if in_channels != 3:
            raise ValueError(f"model {self.name}: torchvision's networks take images of 3 channels, got {in_channels}")
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if self.wanted in WITH_AUXILIARY else {}
        if self.wanted.startswith("vit_"):
            if image_size[0] != image_size[1]:
                raise ValueError(f"model {self.name}: expected square images, got {image_size[0]}x{image_size[1]}")
            options = {"image_size": image_size[0]}
        model = models.get_model(self.wanted, weights=None, num_classes=num_classes, **options)
        if self.settings.pretrained:
            url = models.get_model_weights(self.wanted).DEFAULT.url
            weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
            load_fitting(model, weights, f"model {self.name}")
        return nn.Sequential(OrderedDict(normalize=Normalize(*IMAGENET), model=model))
