"""JSON objects that tell when they have changed since they were written, or belong to another run.

Each holds a checksum of itself and of the recipe of its run, so that neither a flipped bit nor a file of another folder is taken for a
result of this one.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"
CONFIG = "config.toml"


def sealed(record: dict[str, Any], run: Path) -> dict[str, Any]:
    """``record`` with the checksum that makes it one of the run in folder ``run``."""
    return record | {CHECKSUM: _checksum(record, run)}


def unsealed(text: str, run: Path, where: str) -> dict[str, Any]:
    """The record whose JSON is ``text``, without its checksum.

    Raises:
        ValueError: no JSON, no object, or one whose checksum is another; the message starts with ``where``.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or CHECKSUM not in record:
        raise ValueError(f"{where}: expected an object with a {CHECKSUM}, got {text[:80]}")
    checksum = record.pop(CHECKSUM)
    if checksum != _checksum(record, run):
        raise ValueError(f"{where}: damaged, or of another run: it is not as this run wrote it (its {CHECKSUM} is another)")
    return record


def _checksum(record: dict[str, Any], run: Path) -> str:
    """CRC-32 of the run's recipe and of ``record``, as hexadecimal digits. JSON gives numbers back exactly."""
    config = run / CONFIG
    value = zlib.crc32(config.read_bytes()) if config.is_file() else 0
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode(), value):08x}"
