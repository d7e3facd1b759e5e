"""Robust training losses. Each says which adversarial examples it wants and what is minimised on them.

The two are apart because S2AP and AWP look at one minibatch twice: the attack runs once, and the loss is evaluated on the same
``x_adv`` at the weights and again at the perturbed ones::

    x_adv = loss.attack(model, x, y)
    value, logits = loss(model, x, x_adv, y)

Losses are values: frozen dataclasses, made by name with :func:`get_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._registry import build
from .attacks import check_pgd, pgd

__all__ = ["LOSSES", "PGDAT", "TRADES", "CrossEntropy", "Loss", "get_loss"]


class Loss(Protocol):
    """What every loss offers."""

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The adversarial examples to train on, of x's shape. Leaves the model as :func:`s2ap_ext.attacks.pgd` does."""

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(loss, logits)``: the mean over the batch, with its graph, and the logits [N, K] of ``x_adv``."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy on clean images: ordinary training. Its attack returns ``x``."""

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return x

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x_adv)
        return F.cross_entropy(logits, y), logits


@dataclass(frozen=True)
class PGDAT(CrossEntropy):
    """Adversarial training: cross entropy on PGD examples.

    Args:
        eps, step_size, steps, norm: the attack, as in :func:`s2ap_ext.attacks.pgd`; it starts at random.

    Raises:
        ValueError: a setting that makes no sense.

    Source: Madry et al., arXiv 1706.06083.
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"

    def __post_init__(self) -> None:
        check_pgd(self.eps, self.step_size, self.steps, self.norm)

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return pgd(model, x, y, eps=self.eps, step_size=self.step_size, steps=self.steps, norm=self.norm, generator=generator)


@dataclass(frozen=True)
class TRADES:
    """Cross entropy on clean images plus ``beta`` times KL(p(x) || p(x_adv)), averaged over the batch.

    The attack maximises the same divergence from a random start in the ball. Clean and adversarial images go through the model in
    two forwards, as in the authors' code, so BatchNorm normalises each with its own statistics and its running ones move twice. The
    gradient flows through both.

    Args:
        eps, step_size, steps, norm: the attack, as in :func:`s2ap_ext.attacks.pgd`.
        beta: weight of the divergence, 1 / lambda in the paper.

    Raises:
        ValueError: a setting that makes no sense.

    Source: Zhang et al., arXiv 1901.08573, equation 3 and algorithm 1.

    Equivalent to::

        clean, adversarial = model(x), model(x_adv)
        kl = (clean.softmax(1) * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum() / len(x)
        loss = F.cross_entropy(clean, y) + beta * kl
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    beta: float = 6.0

    def __post_init__(self) -> None:
        check_pgd(self.eps, self.step_size, self.steps, self.norm)
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta: expected a finite number >= 0, got {self.beta}")

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        settings = {"eps": self.eps, "step_size": self.step_size, "steps": self.steps, "norm": self.norm}
        return pgd(model, x, y, **settings, loss="kl", generator=generator)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, logits = model(x), model(x_adv)
        target = F.log_softmax(clean, dim=1)
        divergence = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)
        return F.cross_entropy(clean, y) + self.beta * divergence, logits


LOSSES: dict[str, type] = {"ce": CrossEntropy, "pgd_at": PGDAT, "trades": TRADES}


def get_loss(name: str, **settings: object) -> Loss:
    """The loss called ``name`` (``"ce"``, ``"pgd_at"`` or ``"trades"``) with its settings.

    Raises:
        ValueError: an unknown name or setting, a missing one, or one that makes no sense.

    >>> get_loss("pgd_at", eps=8 / 255, step_size=2 / 255, steps=10).norm
    'linf'
    """
    return build("loss", LOSSES, name, settings)
