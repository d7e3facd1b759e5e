"""Checkpoints: files of tensors (:mod:`s2ap_ext._files`), and what goes in and out of models and optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import HEADER, load, replacing, save

__all__ = ["HEADER", "load", "load_optimizer", "load_state", "optimizer_tensors", "replacing", "save", "write_json", "write_text"]


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
