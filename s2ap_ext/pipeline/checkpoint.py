"""Files of a run: tensors (:mod:`s2ap_ext._files`), texts and JSON, each written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._files import HEADER, TEMPORARY, load, replacing, save

__all__ = ["HEADER", "TEMPORARY", "load", "load_state", "replacing", "save", "write_json", "write_text"]


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` (UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Loads ``tensors`` into ``model``; raises ValueError naming the file if names or shapes differ."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(f"checkpoint {path}: does not fit the model ({lines[0]})") from None
