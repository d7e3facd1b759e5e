"""What every loss offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack, Pgd
from ..parts import Part


class Loss(Part):
    """What is minimised in training. Unless a subclass says otherwise: cross entropy on the adversary's examples.

    Args:
        settings, options: the loss's own settings, as for every :class:`s2ap_ext.parts.Part`.
        adversary: makes the examples to train on; None takes :class:`s2ap_ext.attacks.Pgd` with its defaults.
        label_smoothing: in every cross entropy with the labels, the share of the target that all classes get alike, in [0, 1]. The
            adversary maximises the loss without it.

    Attributes:
        replays: how many optimizer steps are taken on each minibatch.
        maximised: which loss of the adversary's is maximised, ``"ce"`` or ``"kl"``.

    Raises:
        ValueError: an unknown option, a value outside its range, or an adversary that the loss cannot use.
        TypeError: ``adversary`` is not an attack.
    """

    kind = "loss"
    replays: int = 1
    maximised: str = "ce"

    def __init__(self, settings: Any = None, *, adversary: Attack | None = None, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(settings, **options)
        if adversary is not None and not isinstance(adversary, Attack):
            raise TypeError(f"adversary: expected an s2ap_ext.attacks.Attack, got {type(adversary).__name__}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        self.adversary = Pgd() if adversary is None else adversary
        self.label_smoothing = label_smoothing

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The examples to train on, of x's shape.

        Args:
            model: gives logits [N, K]. It is left as found.
            x: images [N, ...], floating point, in [0, 1].
            y: classes, int64 [N].
            generator: source of random numbers, on the device of ``x``; torch's default one if None.

        Raises:
            ValueError: what the adversary raises.
        """
        return self.adversary(model, x, y, loss=self.maximised, generator=generator)

    def attack_with_gradients(
        self, model: nn.Module, x: Tensor, y: Tensor, parameters: Mapping[str, nn.Parameter], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What :meth:`attack` returns, and the gradients of ``parameters`` from the adversary's last backward.

        Args and returns are those of :meth:`s2ap_ext.attacks.Attack.with_gradients`.

        Raises:
            ValueError: what the adversary raises; a loss that makes its examples in a way of its own.
        """
        if type(self).attack is not Loss.attack:
            raise ValueError(f"loss {self.name or type(self).__name__}: makes its examples itself, and takes no gradients on the way")
        return self.adversary.with_gradients(model, x, y, parameters, loss=self.maximised, generator=generator)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(value, logits)``: the mean loss over the minibatch, with its graph, and the logits [N, K] of ``x_adv``.

        Args:
            x, y: as for :meth:`attack`.
            x_adv: what :meth:`attack` returned for them.
        """
        logits = model(x_adv)
        return self._cross_entropy(logits, y), logits

    def images(self, x: Tensor, x_adv: Tensor) -> tuple[Tensor, ...]:
        """What the loss shows the model, one forward each: BatchNorm's running statistics are of these images."""
        return (x_adv,)

    def after_backward(self, x: Tensor, x_adv: Tensor) -> None:
        """What the loss learns from the backward at the unperturbed point; the training loop calls it right after that one."""
        return

    def state(self) -> dict[str, Tensor]:
        """What the loss carries from step to step: with it a training that was stopped goes on to the same bits."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` returned; raises ValueError for anything else."""
        if tensors:
            raise ValueError(f"loss {self.name}: expected no state, got {', '.join(tensors)}")

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

    def _linf_radius(self) -> float:
        """The radius of the adversary's ball; raises ValueError if that is none of the linf norm."""
        norm = getattr(self.adversary.settings, "norm", None)
        if norm != "linf":
            raise ValueError(f"loss {self.name}: expected an adversary of norm linf, got {norm or self.adversary.name}")
        eps: float = self.adversary.settings.eps
        return eps
