"""Files of a run: tensors (:mod:`s2ap_ext._files`) and texts, each written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from .._files import HEADER, TEMPORARY, check_tensors, load, replacing, save

__all__ = ["HEADER", "TEMPORARY", "check_tensors", "load", "load_state", "replacing", "save", "write_text"]


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` (UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_state(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Loads ``tensors`` into ``model``; raises ValueError naming the file if names, shapes or dtypes differ."""
    check_tensors(tensors, model.state_dict(), f"checkpoint {path}: does not fit the model")
    model.load_state_dict(tensors)
