"""The results of finished batches, in a file with which an evaluation goes on after it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _files


class Kept:
    """For each stage which images hold so far, and how many are done: in a file, where there is a folder for it.

    The file is named by a digest of the model, the images and the settings, so results of different evaluations are never mixed.

    Args:
        folder: made where it is missing; None keeps nothing.
        model: by its ``state_dict`` and its structure.
        images, labels: with their order.
        settings: all else that results depend on, as JSON takes it.

    Raises:
        ValueError: a model without a ``state_dict``; a file that is damaged, or was renamed.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: nn.Module | Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        settings: dict[str, Any],
    ) -> None:
        self.path: Path | None = None
        self._held: dict[str, Tensor] = {}
        self._done: dict[str, int] = {}
        if folder is None:
            return
        self._identity = identity(model, images, labels, settings)
        self.path = Path(folder) / f"evaluation-{self._identity}.safetensors"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        tensors, about = _files.load(self.path)
        if about.get("evaluation") != self._identity:
            raise ValueError(f"keep: {self.path} is of another evaluation (another model, other images or settings); was it renamed?")
        done, size = about.get("done"), labels.shape
        fits = isinstance(done, dict) and done.keys() == tensors.keys() and all(type(count) is int for count in done.values())
        if not isinstance(done, dict) or not fits or any(t.dtype != torch.bool or t.shape != size for t in tensors.values()):
            raise ValueError(f"keep: {self.path}: expected which images hold, bool {list(size)}, and a count for each stage; found others")
        self._held, self._done = tensors, done

    def of(self, stage: str, left: Tensor) -> tuple[Tensor, int]:
        """Which images hold after the batches of ``stage`` that are done, bool [N], and how many images these had."""
        return self._held.get(stage, left).clone(), self._done.get(stage, 0)

    def put(self, stage: str, held: Tensor, done: int) -> None:
        """``held`` is what stands after ``done`` images of ``stage``."""
        if self.path is None:
            return
        self._held[stage], self._done[stage] = held.clone(), done
        _files.save(self.path, self._held, {"evaluation": self._identity, "done": self._done})


def identity(model: nn.Module | Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, settings: dict[str, Any]) -> str:
    """A digest of all that the results of an evaluation follow from; raises ValueError for a model without a ``state_dict``."""
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    if not state:
        hint = "; pass the model itself, and engine='sparse' for its kept weights" if isinstance(model, nn.Module) else ""
        raise ValueError(f"keep: expected a model with a state_dict, which tells it from others, got {type(model).__name__}{hint}")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(f"{type(model).__module__} {model!r}".encode())
    for name, tensor in {**state, "images": images, "labels": labels}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
