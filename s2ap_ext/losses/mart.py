"""The MART loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parts import register
from ..settings import key
from .base import Loss


@register("mart")
class Mart(Loss):
    """Misclassification-aware adversarial training: a cross entropy with a margin, and a divergence that counts more for hard images.

    With p = p(x) and q = p(x_adv), the loss of an image of class y is ::

        BCE = -log q_y - log(1.0001 - max over k != y of q_k + 1e-12)
        loss = BCE + beta * KL(p || q) * (1.0000001 - p_y)

    The constants are those of the authors' code; they keep logarithm and weight above 0. Its two forwards of the model are those of
    TRADES, and the gradient flows through p as well, the weight 1 - p_y included. Label smoothing is that of the first term.

    The adversary maximises the cross entropy, from its own start: the authors' code starts from Gaussian noise of size 0.001, which is
    next to ``x``, while here the start is the same for all losses (for PGD a random point of the ball).

    Source: Wang et al., Improving adversarial robustness requires revisiting misclassified examples, ICLR 2020.

    Equivalent to::

        p, q = model(x).softmax(1), model(x_adv).softmax(1)
        of_class = F.one_hot(y, q.shape[1]).bool()
        margin = -torch.log(1.0001 - q.masked_fill(of_class, 0).amax(1) + 1e-12)
        weight = 1.0000001 - p[of_class]
        loss = (-q[of_class].log() + margin + beta * (p * (p / q).log()).sum(1) * weight).mean()
    """

    @dataclass(frozen=True)
    class Settings:
        beta: float = key(5.0, "weight of the divergence", low=0)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, logits = model(x), model(x_adv)
        # Half precision knows no 1.0001.
        precision = torch.promote_types(logits.dtype, torch.float32)
        log_p, log_q = (F.log_softmax(z, dim=1, dtype=precision) for z in (clean, logits))
        of_class = y.unsqueeze(1)
        others = log_q.exp().scatter(1, of_class, 0.0).max(dim=1).values
        margin = -torch.log(1.0001 - others + 1e-12)
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
        weight = 1.0000001 - log_p.gather(1, of_class).squeeze(1).exp()
        return self._cross_entropy(logits, y) + (margin + self.settings.beta * divergence * weight).mean(), logits

    def images(self, x: Tensor, x_adv: Tensor) -> tuple[Tensor, ...]:
        return (x, x_adv)
