"""Parquet files laid out as the Hugging Face hub's ``uoft-cs/cifar10``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._extras import optional
from .base import Dataset, Split, check_limits
from .images import decode

LAYOUT = "train.parquet and test.parquet, or shards such as train-00000-of-00001.parquet, in it or in one folder below"
MAX_CLASSES = 65_536  # what labels without names may stand for; ImageNet-21k has 21,843


def load_parquet(
    folder: str | Path,
    *,
    name: str = "",
    classes: tuple[str, ...] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Image classification data in parquet files with the columns ``img`` (struct of ``bytes`` and ``path``; PNG, JPEG, ...) and ``label``.

    Images become uint8 with one channel where they are grey and three where they are not; grey ones of 16 bits are rounded to 8. An alpha
    channel is dropped from opaque images; images with transparent pixels are refused.

    Args:
        folder: holds train.parquet and test.parquet, or shards such as plain_text/train-00000-of-00001.parquet.
        name: what the data set is called; the folder's name if empty.
        classes: names of the classes. None takes those stored in the file, and where there are none counts the labels.
        limit, test_limit: read only the first so many rows.

    Raises:
        FileNotFoundError: no such folder, or not the expected files in it; the message says what was found.
        ValueError: a limit below 1; a file that is not readable as parquet, lacks a column or has it twice; an image that cannot be
            decoded, is of another size, has transparent pixels or pixels without a fixed range; a label out of range. The message names
            file and row.
        ImportError: pyarrow or Pillow is missing.
    """
    check_limits(limit, test_limit)
    folder = Path(folder)
    shards = {split: _find_shards(folder, split) for split in ("train", "test")}
    if classes is None:
        classes = _stored_classes(shards["train"][0]) or tuple(str(i) for i in range(_largest_label(shards) + 1))
    train = _read_split(shards["train"], len(classes), limit, None)
    _, channels, height, width = train.images.shape
    test = _read_split(shards["test"], len(classes), test_limit, (channels, height, width))
    return Dataset(name or folder.name, train, test, classes)


def _find_shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of ``split``, in order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected {LAYOUT}")
    pattern = re.compile(rf"{split}(-(\d+)-of-(\d+))?(-[0-9a-f]+)?\.parquet")
    found = [path for path in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]) if pattern.fullmatch(path.name)]
    if not found:
        entries = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{folder}: no {split} split; expected {LAYOUT}; found {entries}")
    parts = [match.groups() for path in found if (match := pattern.fullmatch(path.name))]
    count = int(parts[0][2] or 1)
    if len({path.parent for path in found}) > 1 or [int(part[1] or 0) for part in parts] != list(range(count)):
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise FileNotFoundError(f"{folder}: expected one complete {split} split, of {count} file(s); found {names}")
    return found


def _open(path: Path) -> tuple[Any, str]:
    """The ParquetFile, with the columns checked, and the name of the image column."""
    parquet, arrow = optional("pyarrow.parquet"), optional("pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    schema = file.schema_arrow
    image = next((name for name in ("img", "image") if name in schema.names), None)
    for name in (image, "label"):
        if schema.names.count(name) > 1:
            raise ValueError(f"{path}: expected one column {name}, found {schema.names.count(name)}")
    is_image = image and arrow.types.is_struct(schema.field(image).type) and schema.field(image).type.get_field_index("bytes") >= 0
    if image is None or not is_image or "label" not in schema.names or not arrow.types.is_integer(schema.field("label").type):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(f"{path}: expected the columns img: struct<bytes: binary, path: string> and label: int64, found {found}")
    return file, image


def _rows(path: Path, *, images: bool) -> Iterator[tuple[str, dict[str, Any] | None, int | None]]:
    """Where the row is, its image (None without ``images``) and its label, row by row, reading no more of ``path`` than is asked for."""
    arrow = optional("pyarrow")
    file, image = _open(path)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=[image, "label"] if images else ["label"]):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row.get(image), row["label"]
                number += 1
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated or corrupt ({error})") from error


def _stored_classes(path: Path) -> tuple[str, ...] | None:
    """The class names that the hub's own tools store in a parquet file."""
    metadata = _open(path)[0].schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _largest_label(shards: dict[str, list[Path]]) -> int:
    largest = 0
    for path in (path for paths in shards.values() for path in paths):
        for where, _, label in _rows(path, images=False):
            largest = max(largest, _checked(label, MAX_CLASSES, where))
    return largest


def _checked(label: int | None, num_classes: int, where: str) -> int:
    if label is None or not 0 <= label < num_classes:
        raise ValueError(f"{where}: expected a label from 0 to {num_classes - 1}, got {label}")
    return label


def _read_split(paths: list[Path], num_classes: int, limit: int | None, shape: tuple[int, int, int] | None) -> Split:
    """Decodes the images of ``paths``, all of one ``shape`` (C, H, W); that of the first if None."""
    images, labels = [], []
    for where, cell, label in (row for path in paths for row in _rows(path, images=True)):
        image = decode((cell or {}).get("bytes"), shape, where)
        shape = shape or (image.shape[2], *image.shape[:2])
        images.append(image)
        labels.append(_checked(label, num_classes, where))
        if len(labels) == limit:
            break
    if not labels:
        raise ValueError(f"{paths[0]}: no rows")
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
