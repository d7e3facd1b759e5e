"""Data sets of a user's own module, by the names that lead to them."""

from __future__ import annotations

import torch

from ..parts import OWN, Part, attribute, call_own, register
from .base import AnySplit, Data, Dataset, Split


@register("package.module:attribute", pattern=OWN)
class OwnData(Data):
    """What an importable module defines: a class derived from :class:`Data`, or a function () -> Dataset."""

    @classmethod
    def member(cls, name: str) -> type[Part]:
        found = attribute("data", name)
        if isinstance(found, type) and issubclass(found, Data):
            return found
        if not callable(found):
            wanted = "a class derived from s2ap_ext.data.Data or a function () -> Dataset"
            raise ValueError(f"data {name}: expected {wanted}, got {type(found).__name__}")
        return cls

    def load(self, *, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        data = call_own("data", self.name, attribute("data", self.name))
        if not isinstance(data, Dataset):
            raise ValueError(f"data {self.name}: expected a Dataset from it, got {type(data).__name__}")
        for name, split in (("train", data.train), ("test", data.test)):
            _check(split, data, f"data {self.name}: {name}")
        return data.limited(limit, test_limit)


def _check(split: AnySplit, data: Dataset, where: str) -> None:
    """Raises ValueError if ``split`` is not what :class:`Split` says, or does not fit the set's shape and classes.

    Of a streamed one only the shape is known; its images are checked as they come.
    """
    if not isinstance(split, Split):
        if not data.files.groups:
            raise ValueError(f"{where}: expected the files of streamed images (Dataset.files), for their checksums, got none")
        if split.shape != data.shape:
            raise ValueError(f"{where}: expected images of one shape in both splits, got {split.shape} and {data.shape}")
        return
    images, labels = split.images, split.labels
    if images.dim() != 4 or len(images) == 0 or split.shape != data.shape or images.dtype not in (torch.uint8, torch.float32):
        wanted = "images [N, C, H, W] of uint8 or float32, of one shape in both splits"
        raise ValueError(f"{where}: expected {wanted}, got {list(images.shape)} of {images.dtype}")
    if images.dtype == torch.float32 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{where}: expected float images in [0, 1], got values from {images.min():g} to {images.max():g}")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"{where}: expected one int64 label for each of {len(images)} images, got {list(labels.shape)} of {labels.dtype}")
    if not 0 <= labels.min() <= labels.max() < data.num_classes:
        raise ValueError(f"{where}: expected labels from 0 to {data.num_classes - 1}, got {labels.min()} to {labels.max()}")
