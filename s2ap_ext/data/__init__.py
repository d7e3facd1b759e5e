"""Images by name: handwritten digits, sets of the Hugging Face hub, folders of images, torchvision's sets, and a user's own.

A :class:`Split` holds all its images as one tensor and :class:`Batches` moves it to the device once, so an epoch reads no file and
copies nothing but indices. A :class:`Stream` is for sets that do not fit into memory: it decodes them during the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ..parts import find, import_all
from ..settings import types_of
from .base import AnySplit, Data, Dataset, Split, in_memory
from .batches import Batches, augmented, seeded_generator
from .checksums import Files
from .digits import load_digits
from .encoded import ImageData
from .parquet import Sources, load_parquet
from .source import Decoder, Row, Source
from .stream import Stream

__all__ = [
    "AnySplit",
    "Batches",
    "Data",
    "Dataset",
    "Decoder",
    "Files",
    "ImageData",
    "Row",
    "Source",
    "Sources",
    "Split",
    "Stream",
    "augmented",
    "in_memory",
    "load_data",
    "load_digits",
    "load_parquet",
    "seeded_generator",
]

import_all(__name__, __path__)


def load_data(
    name: str = "digits", *, data_dir: str | Path | None = None, limit: int | None = None, test_limit: int | None = None, **options: Any
) -> Dataset:
    """Loads a data set, or opens it for streaming.

    Args:
        name: ``"digits"``, ``"cifar10"``, ``"cifar100"``, ``"svhn"``, ``"tiny_imagenet"``, ``"imagenet"``; the name of an image set on the
            Hugging Face hub such as ``"uoft-cs/cifar10"``; ``"folder"`` for image files in a folder for each class;
            ``"torchvision:NAME"``; or ``"package.module:attribute"`` for a class derived from :class:`Data`, or a function
            ``() -> Dataset``, of a module of your own.
        data_dir: folder with the files. None downloads a set of the hub, or takes it from the hub's local cache.
        limit, test_limit: read only so many images of the training and the test split.
        options: what else can be set about the data set, such as ``size=64`` (see its ``Settings``).

    Raises:
        ValueError: an unknown name or option, a limit below 1, or files whose contents are wrong (see :func:`load_parquet`).
        FileNotFoundError: no such folder, or not the expected files in it.
        ImportError: a package of the ``train`` extra, or torchvision, is missing.
        ConnectionError: the hub could not be reached, or has no such set.
    """
    part = cast(type[Data], find("data", name))
    if data_dir is not None and "dir" not in types_of(part.Settings):
        raise ValueError(f"data_dir: expected none, since {name} is not read from a folder; sets of the hub are, such as uoft-cs/cifar10")
    if data_dir is not None:
        options["dir"] = str(data_dir)
    return part(**options).load(limit=limit, test_limit=test_limit)
