"""Checkpoints: tensors in safetensors with JSON in the header. Nothing passes through pickle.

Every file is written under a temporary name and renamed, so a reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .extras import optional

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


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` (UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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
    return tensors, json.loads(about)


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Loads ``tensors`` into ``model``; raises ValueError naming the file if names or shapes differ."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(f"checkpoint {path}: does not fit the model ({lines[0]})") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimizer's state by ``index.name``, index being the parameter's place in its groups."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entries in state.items() for name, value in entries.items() if isinstance(value, Tensor)}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Gives the optimizer the state that :func:`optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, entry = name.partition(".")
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
