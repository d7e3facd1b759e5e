"""Dense models that others trained: their weights, read without running anything of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..settings import shown
from .extras import optional
from .model_file import new_model
from .sections import Recipe


def import_model(path: str | Path, recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model for ``data`` with the weights of the file ``path``.

    Args:
        path: a safetensors file, or one that ``torch.save`` wrote, which is read with ``weights_only=True`` and so runs nothing. In the
            latter the ``state_dict`` may be an entry of a dictionary. Names may have a prefix (``module.``), numbers another precision,
            and BatchNorm's ``num_batches_tracked`` may be missing.
        recipe: of which the model counts.
        data: whose channels and classes the model is for.

    Raises:
        ValueError: no such file, no such content, or weights that are not those of the recipe's model; the message names the file.
    """
    model = new_model(recipe, data)
    own = model.state_dict()
    tensors = _without_prefix(_state_dict(_content(Path(path)), path), own)
    where = f"{path}: not the weights of the model {recipe.model.name}"
    if missing := [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]:
        raise ValueError(f"{where} ({missing[0]} is missing; the file has {', '.join(map(shown, list(tensors)[:3]))}, ...)")
    if unknown := [name for name in tensors if name not in own]:
        raise ValueError(f"{where} ({shown(unknown[0])} is not among its tensors, and would have been left out)")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            wanted, got = (f"{t.dtype} {list(t.shape)}" for t in (own[name], tensor))
            raise ValueError(f"{where} ({name}: expected {wanted}, got {got})")
        if not tensor.isfinite().all():
            raise ValueError(f"{where} ({name} has values that are not finite)")
    model.load_state_dict(tensors, strict=False)  # it converts the precision; what is missing is listed above
    return model


def _content(path: Path) -> Any:
    """What the file holds."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return optional("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is something else makes the two raise
        kind = "safetensors file" if path.suffix == ".safetensors" else "file that torch.load reads with weights_only=True"
        raise ValueError(f"{path}: not a {kind} ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def _state_dict(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The dictionary of tensors that ``content`` is, or that is an entry of it."""
    if _is_state_dict(content):
        return dict(content)
    inside = {name: value for name, value in content.items() if _is_state_dict(value)} if isinstance(content, Mapping) else {}
    if len(inside) != 1:
        found = f"{len(inside)} of them: {', '.join(map(str, inside))}" if inside else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected a dictionary of tensors, or one with a single dictionary of tensors in it; found {found:.200}")
    return dict(next(iter(inside.values())))


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in value.items())


def _without_prefix(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without the prefix of their names where they all have one more than ``own``, such as DistributedDataParallel's."""
    first = next(iter(own))
    for name in tensors:
        prefix = name.removesuffix(first)
        if name.endswith(first) and all(other.startswith(prefix) for other in tensors):
            return {other.removeprefix(prefix): tensor for other, tensor in tensors.items()}
    return tensors
