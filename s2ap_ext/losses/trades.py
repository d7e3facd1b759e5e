"""The TRADES loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import register
from ..settings import key
from .base import Loss


@register("trades")
class Trades(Loss):
    """Cross entropy on clean images plus ``beta`` times KL(p(x) || p(x_adv)), averaged over the minibatch.

    The adversary maximises the same divergence. Clean and adversarial images go through the model in two forwards, as in the authors'
    code, so BatchNorm normalises each with its own statistics and its running ones move twice. The gradient flows through both.

    Source: Zhang et al., arXiv 1901.08573, equation 3 and algorithm 1.

    Equivalent to::

        clean, adversarial = model(x), model(x_adv)
        kl = (clean.softmax(1) * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum() / len(x)
        loss = F.cross_entropy(clean, y) + beta * kl
    """

    @dataclass(frozen=True)
    class Settings:
        beta: float = key(6.0, "weight of the divergence, 1 / lambda in the paper", low=0)

    maximised = "kl"

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, logits = model(x), model(x_adv)
        target = F.log_softmax(clean, dim=1)
        divergence = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)
        return self._cross_entropy(clean, y) + self.settings.beta * divergence, logits

    def images(self, x: Tensor, x_adv: Tensor) -> tuple[Tensor, ...]:
        return (x, x_adv)
