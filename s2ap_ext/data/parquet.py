"""Parquet files laid out as those of the Hugging Face hub."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._extras import optional
from .base import Dataset, check_limits
from .checksums import Files
from .images import decode
from .source import Decoder, Row, Source, checked_label, load

LAYOUT = "train.parquet and test.parquet, or shards such as train-00000-of-00001.parquet, in it or in one folder below"
MAX_CLASSES = 65_536  # what labels without names may stand for; ImageNet-21k has 21,843
IMAGES, LABELS = ("img", "image"), ("label", "fine_label")  # the names of the columns on the hub
TESTS = ("test", "validation", "valid", "val")  # the names of the split to test on
ROWS = 64  # read at once


def load_parquet(
    folder: str | Path,
    *,
    name: str = "",
    classes: tuple[str, ...] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Image classification data in parquet files with the columns ``img`` (struct of ``bytes`` and ``path``; PNG, JPEG, ...) and ``label``.

    The columns may also be called ``image`` and ``fine_label``. Images become uint8 with one channel where they are grey and three where
    they are not; grey ones of 16 bits are rounded to 8. An alpha channel is dropped from opaque images; images with transparent pixels are
    refused.

    Args:
        folder: holds train.parquet and test.parquet, or shards such as plain_text/train-00000-of-00001.parquet. Without a test split, the
            one called validation, valid or val takes its place.
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
    found = parquet_sources(folder, classes=classes)
    train = load(found.train, Decoder(len(found.classes)), limit)
    test = load(found.test, Decoder(len(found.classes), train.shape), test_limit)
    return Dataset(name or Path(folder).name, train, test, found.classes, found.files)


class Sources(NamedTuple):
    """The splits of a set before they are decoded, the names of its classes, and its files."""

    train: Source
    test: Source
    classes: tuple[str, ...]
    files: Files


def parquet_sources(
    folder: str | Path, *, tests: tuple[str, ...] = TESTS, config: str = "", classes: tuple[str, ...] | None = None
) -> Sources:
    """The parquet files of a set; arguments and errors as in :func:`load_parquet`.

    Args:
        tests: names of the split to test on, of which the first that is there is taken.
        config: the folder below ``folder`` that is meant where the set comes in several versions.
    """
    folder = Path(folder)
    inside = folder / config if config and (folder / config).is_dir() else folder
    shards = [_find_shards(inside, ("train",)), _find_shards(inside, tests)]
    train, test = (ParquetSource(paths) for paths in shards)
    if classes is None:
        classes = train.stored_classes() or tuple(str(i) for i in range(max(train.largest_label(), test.largest_label()) + 1))
    return Sources(train, test, classes, Files.single(folder, itertools.chain.from_iterable(shards)))


class ParquetSource(Source):
    """The rows of parquet files, their row groups as blocks.

    Args:
        paths: the files in order.

    Raises:
        ValueError: a file that is not readable as parquet, lacks a column or has it twice, or that claims more rows than it can have.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.groups: list[tuple[Path, int, int]] = []  # the file, the number of the group in it, and that of its first row
        sizes, stored = [], 0
        for path in paths:
            about = _open(path).file.metadata
            rows = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
            if min(rows, default=0) < 0 or sum(rows) > path.stat().st_size:  # which is how much memory the order of an epoch may take
                raise ValueError(f"{path}: not a readable parquet file ({sum(rows):,} rows in {path.stat().st_size:,} bytes)")
            firsts = itertools.accumulate(rows, initial=0)
            self.groups += [(path, i, first) for i, (n, first) in enumerate(zip(rows, firsts, strict=False)) if n]
            sizes += [n for n in rows if n]
            stored += path.stat().st_size
        if not sizes:
            raise ValueError(f"{paths[0]}: no rows")
        self.sizes, self.row_bytes = tuple(sizes), -(-stored // sum(sizes))

    def rows(self, block: int) -> Iterator[Row]:
        path, group, first = self.groups[block]
        number = 0
        for number, (image, label) in enumerate(_cells(path, group, images=True), 1):
            yield Row(f"{path}, row {first + number - 1}", (image or {}).get("bytes"), label)
        if number != self.sizes[block]:
            raise ValueError(f"{path}: truncated or corrupt ({number} rows where {self.sizes[block]} were promised)")

    def pixels(self, row: Row, decoder: Decoder, key: tuple[int, ...] | None) -> tuple[np.ndarray, int | None]:
        return decode(row.image, decoder.shape, row.where, fit=decoder.fit, key=key), row.label

    def stored_classes(self) -> tuple[str, ...] | None:
        """The class names that the hub's own tools store in a parquet file."""
        opened = _open(self.groups[0][0])
        metadata = opened.file.schema_arrow.metadata or {}
        try:
            names = json.loads(metadata[b"huggingface"])["info"]["features"][opened.label]["names"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
        return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def largest_label(self) -> int:
        """The largest label; raises ValueError naming the row for one that cannot be."""
        largest = 0
        for path, group, first in self.groups:
            for number, (_, label) in enumerate(_cells(path, group, images=False)):
                largest = max(largest, checked_label(label, MAX_CLASSES, f"{path}, row {first + number}"))
        return largest


def _find_shards(folder: Path, splits: tuple[str, ...]) -> list[Path]:
    """The parquet files of the first of ``splits`` that has any, in order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected {LAYOUT}")
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])
    for split in splits:
        pattern = re.compile(rf"{split}(-(\d+)-of-(\d+))?(-[0-9a-f]+)?\.parquet")
        found = [(path, match) for path in files if (match := pattern.fullmatch(path.name))]
        if found:
            break
    else:
        entries = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{folder}: no {splits[0]} split; expected {LAYOUT}; found {entries}")
    count = int(found[0][1][3] or 1)
    if len({path.parent for path, _ in found}) > 1 or [int(match[2] or 0) for _, match in found] != list(range(count)):
        names = ", ".join(str(path.relative_to(folder)) for path, _ in found)
        raise FileNotFoundError(f"{folder}: expected one complete {split} split, of {count} file(s); found {names}")
    return [path for path, _ in found]


class _Opened(NamedTuple):
    """A parquet file and the names of its columns."""

    file: Any
    image: str
    label: str


def _open(path: Path) -> _Opened:
    """The file with its columns checked. It is read through a small buffer, since a row group may be as large as the file."""
    parquet, arrow = optional("pyarrow.parquet"), optional("pyarrow")
    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    schema = file.schema_arrow
    image, label = (next((name for name in names if name in schema.names), "") for names in (IMAGES, LABELS))
    for name in (image, label):
        if schema.names.count(name) > 1:
            raise ValueError(f"{path}: expected one column {name}, found {schema.names.count(name)}")
    is_image = image and arrow.types.is_struct(schema.field(image).type) and schema.field(image).type.get_field_index("bytes") >= 0
    if not is_image or not label or not arrow.types.is_integer(schema.field(label).type):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        wanted = "the columns img: struct<bytes: binary, path: string> and label: int64 (or image, and fine_label)"
        raise ValueError(f"{path}: expected {wanted}, found {found}")
    return _Opened(file, image, label)


def _cells(path: Path, group: int, *, images: bool) -> Iterator[tuple[dict[str, Any] | None, int | None]]:
    """The image (None without ``images``) and the label of each row of a row group, reading no more of the file than is asked for."""
    arrow = optional("pyarrow")
    opened = _open(path)
    columns = [opened.image, opened.label] if images else [opened.label]
    rows = ROWS if images else 65_536
    try:
        for batch in opened.file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False):
            for row in batch.to_pylist():
                yield row.get(opened.image), row[opened.label]
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated or corrupt ({error})") from error
    finally:
        opened.file.close()
