"""The data sets of an installed torchvision."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import optional
from ..parts import register
from ..settings import nearest
from .checksums import Files
from .encoded import ImageData
from .images import pixels
from .parquet import MAX_CLASSES, TESTS, Sources
from .source import Decoder, Row, Source, checked_label, fixed_order

LABELS = ("targets", "labels", "_labels")  # where torchvision's sets keep the classes of their images
FOLDERS = ("raw_folder", "_base_folder", "base_folder")  # and where they name their folder, in the root or absolute


class TorchvisionSource(Source):
    """The images of a torchvision set, each a block of its own, in a fixed random order: the first so many are of all classes.

    Args:
        images: the set: ``images[i]`` is a Pillow image and its class.
        name: what messages call it.
    """

    def __init__(self, images: Any, name: str) -> None:
        self.images, self.name = images, name
        self.order = fixed_order(len(images)).tolist()
        self.sizes = (1,) * len(images)

    def rows(self, block: int) -> Iterator[Row]:
        yield Row(f"{self.name}, image {self.order[block]}", self.order[block], None)

    def pixels(self, row: Row, decoder: Decoder, key: tuple[int, ...] | None) -> tuple[np.ndarray, int | None]:
        try:
            image, label = self.images[row.image]
        except Exception as error:  # whatever a broken file brings it to
            raise ValueError(f"{row.where}: not a readable image with its label ({error})") from error
        if not hasattr(image, "convert") or not isinstance(label, (int, np.integer)):
            found = f"{type(image).__name__} and {type(label).__name__}"
            raise ValueError(f"{row.where}: expected a Pillow image and an integer label, got {found}")
        return pixels(lambda: contextlib.nullcontext(image), decoder.shape, row.where, fit=decoder.fit, key=key), int(label)


@register("torchvision:NAME", pattern=r"torchvision:\w+")
class TorchvisionData(ImageData):
    """A data set of the installed torchvision by the name of its class, such as torchvision:CIFAR10, from torchvision's ``root`` folder."""

    def sources(self) -> Sources:
        wanted = self.name.partition(":")[2]
        module = optional("torchvision.datasets")
        if not isinstance(getattr(module, wanted, None), type):
            raise ValueError(f"data {self.name}: torchvision.datasets has no {wanted}{nearest(wanted, module.__all__)}")
        if not self.settings.dir:
            raise ValueError(f"data {self.name}: dir: expected the root folder of torchvision's data sets (--data-dir DIR), got none")
        made = [self._make(getattr(module, wanted), training) for training in (True, False)]
        train, test = (TorchvisionSource(images, f"{self.name} ({split})") for images, split in zip(made, ("train", "test"), strict=True))
        return Sources(train, test, self._classes(made[0]), _files(Path(self.settings.dir), made))

    def _make(self, cls: Any, training: bool) -> Any:
        """The training or the test split: by the argument ``train`` or ``split`` of ``cls``, whichever it takes."""
        takes = inspect.signature(cls).parameters
        if "train" in takes:
            ways: list[dict[str, Any]] = [{"train": training}]
        elif "split" in takes:
            ways = [{"split": name} for name in (("train",) if training else TESTS)]
        else:
            raise ValueError(f"data {self.name}: expected a data set with the argument train or split, got one with {', '.join(takes)}")
        for way in ways:
            try:
                return cls(self.settings.dir, **way)
            except ValueError as error:  # for a split that it does not have
                reason: Exception = error
            except (RuntimeError, OSError, TypeError) as error:  # for files that are not there
                reason = error
                break
        text = " ".join(str(reason).split())
        raise ValueError(f"data {self.name}: {text} (read from {self.settings.dir}, with {way})") from reason

    def _classes(self, images: Any) -> tuple[str, ...]:
        """The names of the classes as the set has them, or their numbers."""
        names = getattr(images, "classes", None)
        if names:
            return tuple(name if isinstance(name, str) else str(name[0]) for name in names)
        labels = next((getattr(images, name) for name in LABELS if hasattr(images, name)), None)
        if labels is None:
            raise ValueError(f"data {self.name}: expected a set with classes or one of {', '.join(LABELS)}, found neither")
        return tuple(str(i) for i in range(checked_label(int(max(labels)), MAX_CLASSES, f"data {self.name}") + 1))


def _files(root: Path, sets: list[Any]) -> Files:
    """The files of ``sets``, those of each folder in a group: those that they list, or else all in their own folder, or in ``root``."""
    groups: dict[str, set[str]] = {}
    for images in sets:
        listed = [sample[0] for sample in getattr(images, "samples", ())] or getattr(images, "_image_files", [])
        own = next((getattr(images, name) for name in FOLDERS if getattr(images, name, "")), "")
        for path in map(os.fspath, listed or (path for path in (root / own).rglob("*") if path.is_file())):
            groups.setdefault(os.path.dirname(path), set()).add(path)
    named = ((Path(os.path.relpath(folder, root)).as_posix(), tuple(sorted(paths))) for folder, paths in groups.items())
    return Files(root, tuple(sorted(named)))
