"""Files of tensors: safetensors with JSON in the header. Nothing passes through pickle.

Every file is written under a temporary name, brought to the disk and renamed, so a reader sees the old file or the new one, never a part,
also after a power failure. A checksum over the header and all tensors tells when a bit of either has changed since.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._extras import optional
from .settings import shown

HEADER = "s2ap_ext"  # one entry of the file's metadata, since several are written in any order: the checksum, a space, JSON
TEMPORARY = ".tmp"  # what the names of files end with that are being written


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` that takes its place when the block ends well, and is removed otherwise.

    Raises:
        OSError: the disk is full, or the like; it names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Brings what was written to ``path``, a file or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: str | Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``about`` to ``path``. Tensors that share memory are written once each."""
    safetensors = optional("safetensors.torch")
    own = _own_memory(tensors)
    header = json.dumps(about, sort_keys=True)
    with replacing(path) as temporary:
        try:
            safetensors.save_file(own, temporary, metadata={HEADER: f"{_checksum(header, own)} {header}"})
        except optional("safetensors").SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))  # how it tells what the system refused
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` on the CPU and contiguous, copied where that, or memory that several share, asks for it: safetensors takes no others."""
    own: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if (storage := tensor.untyped_storage().data_ptr()) in taken:
            tensor = tensor.clone()
        taken.add(storage)
        own[name] = tensor
    return own


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`save` wrote: ``(tensors, about)``, tensors on the CPU.

    Raises:
        ValueError: no such file; a truncated or foreign file; one that has changed since it was written.
    """
    safetensors = optional("safetensors")
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: truncated or not a safetensors file ({error})") from None
    if HEADER not in metadata:
        raise ValueError(f"checkpoint {path}: not written by s2ap_ext (no {HEADER!r} in its header)")
    checksum, _, header = metadata[HEADER].partition(" ")
    if checksum != _checksum(header, tensors):
        raise ValueError(f"checkpoint {path}: damaged: it has changed since it was written (its checksum is another)")
    try:
        about = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path}: its header is not JSON ({error})") from None
    if not isinstance(about, dict):
        raise ValueError(f"checkpoint {path}: expected an object in its header, got {header[:80]}")
    return tensors, about


def check_tensors(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError, starting with ``where``, unless ``tensors`` have the names, shapes and dtypes of ``like``."""
    if missing := sorted(like.keys() - tensors.keys()):
        raise ValueError(f"{where} ({missing[0]} is missing)")
    if unknown := sorted(tensors.keys() - like.keys()):
        raise ValueError(f"{where} ({shown(unknown[0])} is not among its tensors)")
    for name, own in like.items():
        found = tensors[name]
        if found.shape != own.shape or found.dtype != own.dtype:
            wanted, got = (f"{t.dtype} {list(t.shape)}" for t in (own, found))
            raise ValueError(f"{where} ({name}: expected {wanted}, got {got})")


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the header and of every tensor's name, dtype, shape and bytes, as hexadecimal digits."""
    value = zlib.crc32(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
