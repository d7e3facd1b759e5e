"""A gamma that nobody has to tune: as large as it takes to flip a given share of each layer's mask."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..nn.layers import Pruned
from ..nn.selection import flips_at
from ..reference import SMALLEST_GAMMA, budgeted_gamma, swap_flips, wanted_flips
from ..sparsity import kept_weights


@dataclass(frozen=True)
class FlipBudget:
    """How many mask entries a perturbation is to flip in each layer, relative to the weights that the layer keeps.

    A flip is a mask entry that changes, as ``optimizer.flips`` counts them: every weight that leaves the kept set makes two, its own and
    that of the weight that takes its place. A layer that keeps everything or nothing has nothing to flip and is not perturbed.

    Attributes:
        share: flips per kept weight.
        tracked: False (``"flips:P"``): in each step and layer a gamma that flips at least so many entries, and less than one swap of two
            units beyond, ties aside (:func:`s2ap_ext.reference.budgeted_gamma`). It takes some selections, without a forward, from the
            gamma of the step before on. True (``"track:P"``): gamma starts at ``START`` and follows the flips of the step before,
            ``gamma *= sqrt(wanted / flips)``, by a factor of 2 at most. That costs nothing, and meets the budget on average only.
            Neither waits for a CUDA device.
    """

    share: float
    tracked: bool

    START: ClassVar[float] = 1e-3

    @classmethod
    def parse(cls, text: str) -> FlipBudget:
        """The budget that ``"flips:P"`` or ``"track:P"`` stands for; raises ValueError, without a name before it, for other texts."""
        form, _, number = text.partition(":")
        if form in ("flips", "track") and re.fullmatch(r"\d*\.?\d+([eE][-+]?\d+)?", number) and float(number) <= 1:
            return cls(float(number), tracked=form == "track")
        raise ValueError(f"expected a number, or flips:P or track:P with P in [0, 1], got {text!r}")

    def wanted(self, layers: Sequence[Pruned], device: torch.device) -> Tensor:
        """How many entries are to flip in each layer, float64 [L]."""
        numels = [layer.weight.numel() for layer in layers]
        kept = [kept_weights(layer.mask_state.pattern, n, layer.kept.to(device)) for layer, n in zip(layers, numels, strict=True)]
        return torch.stack([wanted_flips(self.share, k, n) for k, n in zip(kept, numels, strict=True)])

    def search(
        self,
        layers: Sequence[Pruned],
        along: Mapping[nn.Parameter, Tensor],
        start: Tensor,
        *,
        eps: float,
        straight_through: bool,
        device: torch.device,
    ) -> Tensor:
        """The gammas of the layers that flip what is wanted, float64 [L] on ``device``.

        Args:
            start: float64 [L], the gammas to try first.
            layers, along, eps, straight_through: as for :func:`s2ap_ext.nn.selection.ascend`.
        """
        flips = flips_at(layers, along, eps=eps, straight_through=straight_through)
        swap = torch.tensor([swap_flips(layer.mask_state.pattern, layer.weight.numel()) for layer in layers], device=device)
        return budgeted_gamma(flips, self.wanted(layers, device), swap, start)

    def follow(self, gamma: Tensor, layers: Sequence[Pruned], flips: Tensor) -> Tensor:
        """The next gamma of layers in which the last one, float64 [L], has flipped ``flips``, int64 [L]."""
        wanted = self.wanted(layers, gamma.device)
        followed = gamma * (wanted / flips).sqrt().clamp(0.5, 2)
        return torch.where(wanted > 0, followed.clamp(SMALLEST_GAMMA, 1), 0)


def budget_of(gamma: str) -> FlipBudget:
    """:meth:`FlipBudget.parse` of what was given as ``gamma``."""
    try:
        return FlipBudget.parse(gamma)
    except ValueError as error:
        raise ValueError(f"gamma: {error}") from None
