"""How far a model's predictions move from epoch to epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..analysis import functional_distance
from ..data import Batches
from ..modes import evaluation_mode


class Drift:
    """How far the model's predictions on the watched test images move from the end of one epoch to that of the next."""

    def __init__(self, watched: Batches, images: int) -> None:
        self.watched, self.images = watched, images
        self.logits: Tensor | None = None  # at the end of the last epoch

    def since_last(self, model: nn.Module) -> dict[str, float]:
        """The epoch's ``functional_distance``; nothing after the first epoch, before which there is nothing to compare with."""
        with evaluation_mode(model, freeze=True), torch.no_grad():
            before, self.logits = self.logits, torch.cat([model(images) for images, _ in self.watched])
        return {} if before is None else {"functional_distance": functional_distance(before, self.logits)}

    def state(self) -> dict[str, Tensor]:
        return {} if self.logits is None else {"logits": self.logits}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.logits = state.get("logits")
        if state.keys() - {"logits"} or (self.logits is not None and (self.logits.dim() != 2 or len(self.logits) != self.images)):
            raise ValueError(f"drift: expected the logits of {self.images} images, got something else")
