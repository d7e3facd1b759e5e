"""Folders of image files, one sub-folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..parts import register
from .checksums import Files
from .encoded import ImageData
from .images import decode
from .parquet import TESTS, Sources
from .source import Decoder, Row, Source, fixed_order

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LAYOUT = f"train/CLASS/IMAGE and one of {', '.join(f'{name}/CLASS/IMAGE' for name in TESTS)}"


class FolderSource(Source):
    """Image files, each a block of its own, in a fixed random order: the first so many are of all classes.

    Args:
        paths, labels: the files and their classes, in any fixed order. There may be millions, so the paths are texts.
    """

    def __init__(self, paths: list[str], labels: list[int]) -> None:
        self.paths, self.labels = paths, labels
        self.order = fixed_order(len(paths)).tolist()
        self.sizes = (1,) * len(paths)

    def rows(self, block: int) -> Iterator[Row]:
        path, label = self.paths[self.order[block]], self.labels[self.order[block]]
        yield Row(path, path, label)

    def pixels(self, row: Row, decoder: Decoder, key: tuple[int, ...] | None) -> tuple[np.ndarray, int | None]:
        try:
            data = Path(row.image).read_bytes()
        except OSError as error:
            raise ValueError(f"{row.where}: not a readable image ({error.strerror})") from error
        return decode(data, decoder.shape, row.where, fit=decoder.fit, key=key), row.label


@register("folder")
class Folder(ImageData):
    """Image files in a folder for each class, such as train/cat/1.jpg and val/cat/7.png. The classes are sorted by name."""

    def sources(self) -> Sources:
        if not self.settings.dir:
            raise ValueError(f"data {self.name}: dir: expected the folder of the images (--data-dir DIR), got none")
        folder = Path(self.settings.dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected {LAYOUT} in it")
        splits = [_below(folder, ("train",)), _below(folder, TESTS)]
        classes = tuple(_folders(splits[0]))
        if not classes:
            raise FileNotFoundError(f"{splits[0]}: expected a folder for each class, found {_entries(splits[0])}")
        if unknown := sorted(set(_folders(splits[1])) - set(classes)):
            raise ValueError(f"{splits[1] / unknown[0]}: expected only classes that {splits[0]} has, found {unknown[0]}")
        groups: list[tuple[str, tuple[str, ...]]] = []
        sources = []
        for split in splits:
            paths: list[str] = []
            labels: list[int] = []
            for label, name in enumerate(classes):
                files = _images(split / name)
                groups += [(f"{split.name}/{name}", tuple(files))] if files else []
                paths += files
                labels += [label] * len(files)
            if not paths:
                raise FileNotFoundError(f"{split}: no images; expected files such as {split / classes[0]}/1.png")
            sources.append(FolderSource(paths, labels))
        train, test = sources
        return Sources(train, test, classes, Files(folder, tuple(groups)))


def _below(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of the folders ``names`` in ``folder`` that is there."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(f"{folder}: no folder {names[0]}; expected {LAYOUT} in it; found {_entries(folder)}")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[str]:
    """The image files in ``folder``, or, as in Tiny ImageNet's archive, in its folder ``images``; sorted by name."""
    if not folder.is_dir():
        return []
    if (folder / "images").is_dir():
        folder = folder / "images"
    return sorted(entry.path for entry in os.scandir(folder) if os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file())


def _entries(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in os.scandir(folder))[:10]) or "nothing"
