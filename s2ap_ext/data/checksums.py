"""Checksums of the files that images come from: what a run keeps to tell whether it still sees the images it began with.

Each file is read once and its CRC-32 taken, which finds damage and exchanged files; anybody can compute it, so it is no signature. Reading
the 140 GB of ImageNet takes minutes, so the checksums of large sets are remembered in ``$XDG_CACHE_HOME/s2ap_ext`` (``~/.cache/s2ap_ext``)
under the size and the time of the last change of each file, and taken anew for a file where one of the two is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .._files import replacing

REMEMBERED = 1 << 30  # bytes from which on the checksums of a set are remembered: below that, reading it takes seconds
SETTLED = 2.0  # seconds that a file must have been left alone: within the resolution of its time it could change unseen


@dataclass(frozen=True)
class Files:
    """The files of a data set, in groups that have one checksum each.

    Attributes:
        folder: what the names of the groups are relative to.
        groups: the paths of each group by its name: one parquet file, or all files of a class's folder.
    """

    folder: Path = Path()
    groups: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def single(cls, folder: Path, paths: Iterable[Path]) -> Files:
        """Each of ``paths`` as a group of its own."""
        return cls(folder, tuple((path.relative_to(folder).as_posix(), (str(path),)) for path in paths))

    @cached_property
    def bytes(self) -> int:
        """How large the files are together."""
        return sum(os.path.getsize(path) for _, paths in self.groups for path in paths)

    @cached_property
    def checksums(self) -> dict[str, str]:
        """``"BYTES CRC32"`` of each group by its name, the CRC in hexadecimal digits.

        The CRC of a group of several files is that of their names and contents in turn. Files are read by several threads at once.

        Raises:
            OSError: a file cannot be read; it names the file.
        """
        known = _Remembered(self.folder) if self.bytes >= REMEMBERED else None
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sums = dict(zip((name for name, _ in self.groups), pool.map(lambda g: _checksum(g[1], known), self.groups), strict=True))
        if known is not None:
            known.save()
        return sums


def _checksum(paths: tuple[str, ...], known: _Remembered | None) -> str:
    stamp = _stamp(paths)
    if known is not None and stamp in known.before:
        return known.keep(stamp, known.before[stamp])
    size = value = 0
    for path in paths:
        if len(paths) > 1:
            value = zlib.crc32(os.fsencode(os.path.basename(path)), value)
        for chunk in _chunks(path):
            value, size = zlib.crc32(chunk, value), size + len(chunk)
    checksum = f"{size} {value:08x}"
    return checksum if known is None else known.keep(stamp, checksum, paths)


def _chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _stamp(paths: tuple[str, ...]) -> str:
    """A digest of the names, sizes and times of change of ``paths``."""
    digest = hashlib.sha256()
    for path in paths:
        about = os.stat(path)
        digest.update(os.fsencode(os.path.basename(path)))
        digest.update(f"\0{about.st_size} {about.st_mtime_ns} {about.st_ino}\0".encode())
    return digest.hexdigest()


class _Remembered:
    """The checksums of the files of one folder by their stamps, in a file of the user's cache.

    A cache that cannot be read is taken for an empty one, and one that cannot be written is left: all that costs is time.
    """

    def __init__(self, folder: Path) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2ap_ext" / "checksums"
        self.path = cache / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
        self.before: dict[str, str] = {}
        self._now: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            read = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(read, dict) and all(isinstance(value, str) for value in read.values()):
                self.before = read

    def keep(self, stamp: str, checksum: str, paths: tuple[str, ...] = ()) -> str:
        """Remembers ``checksum``, unless one of ``paths``, which were just read, has changed a moment ago or since."""
        if all(time.time() - os.path.getmtime(path) > SETTLED for path in paths) and (not paths or _stamp(paths) == stamp):
            self._now[stamp] = checksum
        return checksum

    def save(self) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(self._now), encoding="utf-8")
