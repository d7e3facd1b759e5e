"""What this package is measured against: the ways in which pruning code makes its masks today.

Each function makes one layer's mask from its scores, as a float tensor to multiply with; each class of layer makes it in every forward,
or, with ``cached=True``, once per change of the scores. Benchmarks and ``s2ap profile --step`` compare with them; nothing computes with
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sparsity import kept_count, score_init


def sort_mask(scores: Tensor, kept: int) -> Tensor:
    """Sorts all magnitudes and writes zeros and ones through the resulting indices: the form of the research code."""
    order = scores.abs().flatten().sort().indices
    mask = torch.empty_like(scores)
    flat = mask.view(-1)
    flat[order[: scores.numel() - kept]] = 0
    flat[order[scores.numel() - kept :]] = 1
    return mask


def topk_mask(scores: Tensor, kept: int) -> Tensor:
    """Writes ones through the indices of ``torch.topk``."""
    indices = scores.abs().flatten().topk(kept, sorted=False).indices
    return torch.zeros_like(scores).flatten().index_fill_(0, indices, 1).view_as(scores)


def kthvalue_mask(scores: Tensor, kept: int) -> Tensor:
    """Compares with the threshold of ``torch.kthvalue``; among equal magnitudes it may keep too many."""
    magnitude = scores.abs()
    threshold = magnitude.flatten().kthvalue(scores.numel() - kept).values
    return (magnitude > threshold).to(scores.dtype)


SELECTION = "make a mask"  # what a profile calls it
MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {"sort": sort_mask, "topk": topk_mask, "kthvalue": kthvalue_mask}


class _Straight(torch.autograd.Function):
    """A mask whose gradient passes to the magnitudes of the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int, make: Callable[[Tensor, int], Tensor]) -> Tensor:
        ctx.save_for_backward(scores)
        with torch.profiler.record_function(SELECTION):
            return make(scores, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        return grad * scores.sign(), None, None


class _Masked:
    weight: Tensor
    make: Callable[[Tensor, int], Tensor]

    def start(self, sparsity: float, make: Callable[[Tensor, int], Tensor], cached: bool) -> None:
        self.scores = nn.Parameter(score_init(self.weight))
        self.weight.requires_grad_(False)
        self.kept, self.cached = kept_count(self.weight.numel(), sparsity), cached
        self.make = make
        self.memory: tuple[int, Tensor] | None = None

    def masked(self) -> Tensor:
        mask: Tensor = _Straight.apply(self.scores, self.kept, self.remembered if self.cached else self.make)
        return self.weight * mask

    def remembered(self, scores: Tensor, kept: int) -> Tensor:
        if self.memory is None or self.memory[0] != scores._version:
            self.memory = (scores._version, self.make(scores, kept))
        return self.memory[1].clone()


class MaskedConv2d(_Masked, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.masked(), self.bias)
        return y


class MaskedLinear(_Masked, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked(), self.bias)


def mask_every_forward(model: nn.Module, sparsity: float, *, form: str = "sort", cached: bool = False) -> nn.Module:
    """Turns the convolutions and linear layers of ``model`` into layers of the given form, in place."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.__class__ = MaskedConv2d if type(module) is nn.Conv2d else MaskedLinear
            cast(_Masked, module).start(sparsity, MASKS[form], cached)
    return model
