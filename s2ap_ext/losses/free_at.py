"""Adversarial training for free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..parts import register
from ..settings import key
from .base import Loss


@register("free_at")
class FreeAt(Loss):
    """Cross entropy at a perturbation that is carried along: each backward serves the weights and the perturbation at once.

    There is one perturbation for each place in a minibatch. It is 0 at the start, is kept from minibatch to minibatch and from epoch to
    epoch, and after each backward moves by eps along the sign of its gradient and is clipped to [-eps, eps]. It has no gradient where the
    perturbed image leaves [0, 1] and is clamped. A last minibatch of fewer images uses and moves the first ones.

    Each minibatch is trained on ``replays`` times, so so many times fewer epochs cost as much as ordinary training.

    The radius is the adversary's ``eps``, and its ball must be that of the linf norm; nothing else of it is used.

    Source: Shafahi et al., Adversarial training for free!, arXiv 1904.12843, algorithm 1.

    Equivalent to, for each minibatch, with ``delta`` from the one before::

        for _ in range(replays):
            delta.requires_grad_()
            F.cross_entropy(model((x + delta).clamp(0, 1)), y).backward()
            delta = (delta.detach() + eps * delta.grad.sign()).clamp(-eps, eps)
            optimizer.step()
    """

    @dataclass(frozen=True)
    class Settings:
        replays: int = key(4, "optimizer steps on each minibatch, m in the paper", low=1)

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self.replays = self.settings.replays
        self._eps = self._linf_radius()
        self._delta: Tensor | None = None  # [largest minibatch so far, ...]

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The images with the perturbation as it stands. They require a gradient, for :meth:`after_backward`."""
        delta = self._perturbation(x)
        return (x + delta).clamp_(0, 1).requires_grad_()

    def after_backward(self, x: Tensor, x_adv: Tensor) -> None:
        if x_adv.grad is None:
            raise RuntimeError("loss free_at: x_adv has no gradient; call backward() before after_backward()")
        delta = self._perturbation(x)
        with torch.no_grad():
            perturbed = x + delta
            inside = (perturbed >= 0) & (perturbed <= 1)
            delta.add_(x_adv.grad.sign() * inside, alpha=self._eps).clamp_(-self._eps, self._eps)
        # A second pass on the same images, at perturbed scores or weights, is for the optimizer alone.
        x_adv.grad = None
        x_adv.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        return {} if self._delta is None else {"delta": self._delta}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors and set(tensors) != {"delta"}:
            raise ValueError(f"loss free_at: expected the state delta, got {', '.join(tensors)}")
        self._delta = tensors["delta"].clone() if tensors else None

    def _perturbation(self, x: Tensor) -> Tensor:
        """The part of the perturbation for the images ``x``, a view."""
        if self._delta is None:
            self._delta = torch.zeros_like(x)
        if self._delta.shape[1:] != x.shape[1:]:
            raise ValueError(f"x: expected images of shape {tuple(self._delta.shape[1:])} as before, got {tuple(x.shape[1:])}")
        self._delta = self._delta.to(x)
        if len(x) > len(self._delta):
            self._delta = torch.cat([self._delta, torch.zeros_like(x[len(self._delta) :])])
        return self._delta[: len(x)]
