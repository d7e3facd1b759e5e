"""Images in memory, by name: scikit-learn's digits, sets of the Hugging Face hub, parquet files, and a user's own.

A :class:`Split` holds all its images as one tensor and :class:`Batches` moves it to the device once, so an epoch reads no file and
copies nothing but indices.
"""

from __future__ import annotations

from pathlib import Path

from ..parts import find, import_all
from ..settings import types_of
from .base import Data, Dataset, Split
from .batches import Batches, augmented, seeded_generator
from .digits import load_digits
from .parquet import load_parquet

__all__ = ["Batches", "Data", "Dataset", "Split", "augmented", "load_data", "load_digits", "load_parquet", "seeded_generator"]

import_all(__name__, __path__)


def load_data(
    name: str = "digits", *, data_dir: str | Path | None = None, limit: int | None = None, test_limit: int | None = None
) -> Dataset:
    """Loads a data set.

    Args:
        name: ``"digits"``; the name of an image set on the Hugging Face hub such as ``"uoft-cs/cifar10"``; or
            ``"package.module:attribute"`` for a class derived from :class:`Data`, or a function ``() -> Dataset``, of a module of your own.
        data_dir: folder with the parquet files of a set of the hub. None downloads them, or takes them from the hub's local cache.
        limit, test_limit: read only so many images of the training and the test split.

    Raises:
        ValueError: an unknown name, a limit below 1, or files whose contents are wrong (see :func:`load_parquet`).
        FileNotFoundError: no such folder, or not the expected files in it.
        ImportError: a package of the ``train`` extra is missing.
        ConnectionError: the hub could not be reached, or has no such set.
    """
    part = find("data", name)
    if data_dir is not None and "dir" not in types_of(part.Settings):
        raise ValueError(f"data_dir: expected none, since {name} is not read from a folder; sets of the hub are, such as uoft-cs/cifar10")
    options = {} if data_dir is None else {"dir": str(data_dir)}
    data: Data = part(**options)
    return data.load(limit=limit, test_limit=test_limit)
