"""Movement pruning: a weight stays if training moves it away from 0, whatever its size.

Scored: every weight, by an accumulator ``a`` that starts near 0 and that the optimizer moves along ``-dL/da``, with
``dL/da = dL/d(w*m) * w`` (straight through the mask). The largest ``a`` stay, with their sign: a weight that shrinks is scored below one
that does not move. The kernels rank by ``|scores|``, so the scores are a positive, increasing function of ``a``. Trained: the weights under
the mask, the accumulators, the BatchNorm parameters. With S2AP the scores are perturbed as in any method.
Source: Sanh et al., NeurIPS 2020, arXiv 2005.07683, section 4 (hard movement pruning), here with a fixed sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._files import check_tensors
from ..nn import Pruned
from ..parts import register
from ..settings import key
from .base import Method, listen, scores_of

NUDGE = 1e-3  # the largest accumulator at the start: it orders the weights by magnitude and is soon outgrown
TINY = 1e-30


def positive(accumulated: Tensor) -> Tensor:
    """``1 + a`` for ``a >= 0`` and ``1 / (1 - a)`` below: positive and increasing for all numbers.

    >>> positive(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.5000, 1.0000, 2.0000])
    """
    return torch.where(accumulated >= 0, 1 + accumulated, 1 / (1 - accumulated.clamp(max=0)))


@register("movement")
class Movement(Method):
    @dataclass(frozen=True)
    class Settings:
        lr_scale: float = key(1.0, "learning rate of the accumulators relative to that of the weights", low=0)

    @torch.no_grad()
    def sparsify(self, model: nn.Module, sparsity: float, *, generator: torch.Generator | None = None, **how: Any) -> None:
        super().sparsify(model, sparsity, **how)
        # Shared scores have one accumulator. At the start accumulators rank as the magnitudes do, so the first mask is the magnitude mask.
        self._accumulated = {s: nn.Parameter(NUDGE * s.abs() / s.abs().amax().clamp(min=TINY)) for s in scores_of(model)}
        self.after_step(model)

    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        model.requires_grad_(True)
        for s in self._accumulated:
            # Their gradients are wanted for the perturbation only: the optimizer holds the accumulators.
            s.requires_grad_(perturbed)
        self._handles = listen(model, self._collect)
        weights = {"params": [p for p in model.parameters() if p not in self._accumulated]}
        return [weights, {"params": list(self._accumulated.values()), "weight_decay": 0.0, "lr_scale": self.settings.lr_scale}]

    @torch.no_grad()
    def _collect(self, layer: Pruned, grad: Tensor) -> None:
        """Adds ``dL/d(w*m) * w`` to the accumulator's gradient, as autograd would."""
        accumulated = self._accumulated[layer.scores]
        moved = grad * layer.weight
        accumulated.grad = moved if accumulated.grad is None else accumulated.grad + moved

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for scores, accumulated in self._accumulated.items():
            scores.copy_(positive(accumulated))

    def finish(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()

    def state(self) -> dict[str, Tensor]:
        return {str(i): accumulated for i, accumulated in enumerate(self._accumulated.values())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        check_tensors(state, self.state(), "method movement: not a state of its own")
        for i, accumulated in enumerate(self._accumulated.values()):
            accumulated.copy_(state[str(i)])
