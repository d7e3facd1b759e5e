"""HARP: how many weights each layer keeps is learned together with which ones.

Scored: every weight, by a learned score, as in HYDRA. Trained: the scores, the BatchNorm parameters, and one rate ``r_l`` for each layer. A
layer keeps the fraction ``k_l = k_min + (1 - k_min) * sigmoid(r_l)`` of its weights (or channels; a block of its heads or neurons), with
``k_min`` a tenth of the target. The rates start from the allocation that is chosen beside the method. Their gradient has two parts:
``dL/dk_l``, the sum of ``dL/dM`` over the entries of the layer's mask ``M``, straight through the selection; and that of the penalty on the
global density, ``(epoch + 1) * penalty * max(sum(n_l * k_l) / sum(n_l) / k_target - 1, 0)``, where ``n_l`` counts weights whatever is
removed as one. So the rates first spread, and the growing penalty then brings them down to the target. The step that crosses it is
shortened to end on it, and the rates stay there; the scores go on. S2AP perturbs the scores and not the rates.

All of it stays on the device: no step waits for it.

Source: Zhao and Wressnegger, ICLR 2023 (Holistic Adversarially Robust Pruning).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._files import check_tensors
from ..nn import Pruned, pruned_layers
from ..parts import register
from ..reference import WEIGHT, WINDOW
from ..settings import key
from ..sparsity import check_sparsity
from .base import Method, batchnorm_parameters, listen, scores_of, train_only

LOWEST = 0.1  # k_min, relative to the target
MARGIN = 1e-4  # sigmoid(r) starts so far from 0 and 1 at least: beyond, the rates could hardly move
ABOVE = 1e-3  # the density counts as above its target from this excess on: rounding alone must not end the search for rates


class Rates:
    """The densities of layers as functions of their rates.

    Args:
        target: the global density, in (0, 1].
        weights: float64 [L], the number of weights of each layer.
    """

    def __init__(self, target: float, weights: Tensor) -> None:
        self.target, self.lowest, self.share = target, LOWEST * target, weights / weights.sum()

    def densities(self, rates: Tensor) -> Tensor:
        """``k``, in (k_min, 1), of rates [L]."""
        return self.lowest + (1 - self.lowest) * rates.sigmoid()

    def slopes(self, rates: Tensor) -> Tensor:
        """``dk/dr``"""
        return (1 - self.lowest) * rates.sigmoid() * (1 - rates.sigmoid())

    def rates(self, densities: Tensor) -> Tensor:
        """The rates that give ``densities``; those below k_min, or 1, are moved inside."""
        return ((densities - self.lowest) / (1 - self.lowest)).clamp(MARGIN, 1 - MARGIN).logit()

    def density(self, rates: Tensor) -> Tensor:
        """The global density."""
        return (self.share * self.densities(rates)).sum()

    def excess(self, rates: Tensor) -> Tensor:
        """By how much the global density exceeds its target, relative to it; 0 below it."""
        return (self.density(rates) / self.target - 1).clamp(min=0)


@register("harp")
class Harp(Method):
    @dataclass(frozen=True)
    class Settings:
        penalty: float = key(0.01, "weight of the penalty on the global density in the first epoch; it grows by as much in each", low=0)
        lr_scale: float = key(1.0, "learning rate of the rates relative to that of the scores", low=0)

    def sparsify(self, model: nn.Module, sparsity: float, *, generator: torch.Generator | None = None, **how: Any) -> None:
        if not 0 <= check_sparsity(sparsity) < 1:
            raise ValueError(f"sparsity: expected a number in [0, 1) for HARP, whose densities are relative to the target, got {sparsity}")
        super().sparsify(model, sparsity, **how)
        self._layers = _one_for_each_scores(model)
        for name, layer in self._layers.items():
            if layer.mask_state.pattern.kind == WINDOW:
                raise ValueError(f"granularity: HARP learns how many weights a layer keeps, and layer {name} keeps as many of each window")
        units = [
            layer.weight.numel() if layer.mask_state.pattern.kind == WEIGHT else layer.mask_state.pattern.size
            for layer in self._layers.values()
        ]
        weights = [layer.weight.numel() * layer.weights_per_entry for layer in self._layers.values()]
        device = next(iter(self._layers.values())).scores.device
        self._units = torch.tensor(units, dtype=torch.float64, device=device)
        self._of = Rates(1 - sparsity, torch.tensor(weights, dtype=torch.float64, device=device))
        kept = torch.stack([layer.kept.to(device) for layer in self._layers.values()])
        self._rates = nn.Parameter(self._of.rates(kept / self._units))
        self._before = self._rates.detach().clone()  # the rates of the last step
        self._settled = torch.zeros((), dtype=torch.bool, device=device)  # whether the target was reached
        self._keep()

    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        trained = train_only(model, [*scores_of(model), *batchnorm_parameters(model)])
        self._index = {layer.scores: i for i, layer in enumerate(self._layers.values())}
        self._handles = listen(model, self._collect)
        return [{"params": trained}, {"params": [self._rates], "lr_scale": self.settings.lr_scale}]

    @torch.no_grad()
    def _collect(self, layer: Pruned, grad: Tensor) -> None:
        """Adds the layer's ``dL/dk * dk/dr`` to the gradient of its rate, as autograd would."""
        i = self._index[layer.scores]
        if self._rates.grad is None:
            self._rates.grad = torch.zeros_like(self._rates)
        self._rates.grad[i] += (grad * layer.weight).sum(dtype=torch.float64) * self._of.slopes(self._rates[i])

    def penalty(self, epoch: int) -> Tensor:
        penalty: float = self.settings.penalty
        return (epoch + 1) * penalty * self._of.excess(self._rates)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        before, now = self._of.density(self._before), self._of.density(self._rates)
        target = self._of.target
        crosses = (before > (1 + ABOVE) * target) & (now <= target)
        # The global density is linear in the layers' densities, so one interpolation between those of the two steps meets the target.
        back = (target - now) / (before - now)
        densities = torch.lerp(self._of.densities(self._rates), self._of.densities(self._before), back)
        stepped = torch.where(crosses, self._of.rates(densities), self._rates)
        self._rates.copy_(torch.where(self._settled, self._before, stepped))
        self._settled |= crosses
        self._before.copy_(self._rates)
        self._keep()

    @torch.no_grad()
    def _keep(self) -> None:
        """Gives every layer the number of weights that its rate says: ``n - floor((1 - k) * n)``, and one at least."""
        kept = (self._units - ((1 - self._of.densities(self._rates)) * self._units).floor()).clamp(min=1).long()
        for layer, count in zip(self._layers.values(), kept, strict=True):
            layer.kept.copy_(count)

    def finish(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()

    def metrics(self) -> dict[str, float]:
        return {"density": float(self._of.density(self._rates.detach())), "settled": float(self._settled)}

    def state(self) -> dict[str, Tensor]:
        return {"rates": self._rates, "before": self._before, "settled": self._settled}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        check_tensors(state, self.state(), "method harp: not a state of its own")
        self._rates.copy_(state["rates"])
        self._before.copy_(state["before"])
        self._settled.copy_(state["settled"])
        self._keep()


def _one_for_each_scores(model: nn.Module) -> dict[str, Pruned]:
    """The pruned layers by name, one for each tensor of scores: layers that share their scores share their rate."""
    first: dict[nn.Parameter, str] = {}
    layers = pruned_layers(model)
    for name, layer in layers.items():
        first.setdefault(layer.scores, name)
    return {name: layers[name] for name in first.values()}
