"""Files of tensors: safetensors with JSON in the header. Nothing passes through pickle.

Every file is written under a temporary name and renamed, so a reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ._extras import optional

HEADER = "s2ap_ext"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` that takes its place when the block ends well, and is removed otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes ``tensors`` and the JSON-able ``about`` to ``path``. Tensors that share memory are written once each."""
    to_bytes = optional("safetensors.torch").save
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(to_bytes(own, metadata={HEADER: json.dumps(about, sort_keys=True)}))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`save` wrote: ``(tensors, about)``, tensors on the CPU.

    Raises:
        ValueError: no such file, a truncated or foreign file.
    """
    safetensors = optional("safetensors")
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path}: truncated or not a safetensors file ({error})") from None
    if about is None:
        raise ValueError(f"checkpoint {path}: not written by s2ap_ext (no {HEADER!r} in its header)")
    try:
        return tensors, json.loads(about)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path}: what its header says is not JSON ({error})") from None
