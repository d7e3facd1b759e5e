"""AWP: the step for finetuning, with the gradient at perturbed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._arguments import check_size
from ..nn.layers import pruned_layers
from .perturbed import Perturbed


class AWP(Perturbed):
    """Adversarial weight perturbation for finetuning: the gradient is taken at perturbed weights ``w + v``.

    Per weight tensor of more than one dimension, ``v = gamma * ||w*m|| * (g*m) / (||g*m|| + eps)``; the mask ``m`` is the pruned
    layer's, and 1 elsewhere. Pruned weights are not perturbed and have no gradient.

    Args:
        model: any module.
        base_optimizer: steps on whatever it holds, as a rule the weights.
        gamma: size of the perturbation relative to the weights, >= 0. 0 gives the plain step, bit for bit.
        eps: added to ``||g*m||``.
        warmup_epochs: plain steps in so many first epochs; :meth:`set_epoch` tells which it is.

    Raises:
        ValueError: ``gamma``, ``eps`` or ``warmup_epochs`` negative or not finite.
        TypeError: ``base_optimizer`` is not a ``torch.optim.Optimizer``.

    Source: Wu et al., NeurIPS 2020, arXiv 2004.05884, here restricted to the kept weights.

    Equivalent to::

        for w in weights: w.add_(gamma * (w * m).norm() * w.grad / (w.grad.norm() + eps))
        zero_grad(); loss(model, x_adv, y).backward()
        for w in weights: w.copy_(saved[w])
        base_optimizer.step()
    """

    gamma: float

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: torch.optim.Optimizer,
        *,
        gamma: float = 5e-3,
        eps: float = 1e-12,
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(model, base_optimizer, ascent="exact", eps=eps, warmup_epochs=warmup_epochs)
        check_size("gamma", gamma)
        self.gamma = gamma
        self._saved: dict[nn.Parameter, Tensor] = {}

    def perturbed_parameters(self) -> dict[str, nn.Parameter]:
        """The weights: all parameters of more than one dimension but scores."""
        scores = {layer.scores for layer in pruned_layers(self.model).values()}
        return {name: p for name, p in self.model.named_parameters() if p.dim() > 1 and p not in scores}

    def _gamma_is_zero(self) -> bool:
        return self.gamma == 0

    def _move(self, along: dict[nn.Parameter, Tensor] | None, gamma: float | None) -> None:
        gamma = self.gamma if gamma is None else gamma
        if along is None:
            along = {w: w.grad for w in self.perturbed_parameters().values() if w.grad is not None}
        if not along:
            raise RuntimeError("no weight has a gradient to ascend along; call loss.backward() first")
        masked = {w: value for layer in pruned_layers(self.model).values() for w, value in layer.masked_values().items()}
        self._saved = {w: w.detach().clone() for w in along}
        for w, g in along.items():
            w.add_(g * (gamma * masked.get(w, w).norm() / (g.norm() + self.eps)))

    def _return(self) -> None:
        for w, value in self._saved.items():
            w.copy_(value)
        self._saved = {}
