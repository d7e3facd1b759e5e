"""random_set: a control that flips as many mask entries as exact does, but which ones chance decides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn.layers import pruned_layers
from ...parts import register
from ...reference import WEIGHT
from .base import Step
from .random import Random


@register("random_set")
class RandomSet(Random):
    """Two backward passes, the second where as many random weights have left each layer's mask as ``exact`` would have driven out.

    In each layer, each of them and a random pruned weight exchange the sizes of their scores. So the layer keeps as many weights, its
    scores keep their signs and, as a set, their sizes, and the flipped entries lie anywhere, not near the threshold. The scores move much
    further than by ``exact``. Random numbers are those of ``random``. It is for single weights as the unit of pruning, and
    waits for a CUDA device.

    Equivalent to::

        left = mask(s) & ~mask(s + gamma * s.norm() * g / (g.norm() + eps))
        out, into = choice(kept weights, left.sum()), choice(pruned weights, left.sum())
        s[out], s[into] = s[out].sign() * s[into].abs(), s[into].sign() * s[out].abs()
    """

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        layers, names = pruned_layers(at.model), {p: name for name, p in at.perturbed_parameters().items()}
        for name, layer in layers.items():
            if layer.mask_state.pattern.kind != WEIGHT:
                raise ValueError(f"ascent random_set: expected single weights as the unit of pruning, layer {name} has another")
        before = {name: layer.mask.clone() for name, layer in layers.items()}
        at.move()
        leave = {name: int((before[name] & ~layer.mask).sum()) for name, layer in layers.items()}
        at.back()
        along: dict[str, Tensor] = {}
        gammas = []
        for name, layer in layers.items():
            own = names[layer.scores]
            if leave[name] and own not in along:
                along[own] = self._exchange(layer.scores, before[name], leave[name])
            reach = along[own].double().norm() / layer.scores.detach().double().norm() if own in along else torch.zeros(())
            gammas.append(reach.to(at.gamma))
        if along:
            at.move(along, torch.stack(gammas))
        backward()

    def _exchange(self, scores: nn.Parameter, mask: Tensor, count: int) -> Tensor:
        """What has to be added to ``scores`` for ``count`` random kept entries to exchange sizes with as many random pruned ones."""
        s, kept = scores.detach().flatten(), mask.flatten().cpu()
        out, into = (self._some(entries.nonzero().flatten(), count).to(s.device) for entries in (kept, ~kept))
        sign = torch.where(s < 0, -1.0, 1.0).to(s)
        moved = s.clone()
        moved[out], moved[into] = sign[out] * s[into].abs(), sign[into] * s[out].abs()
        return (moved - s).view_as(scores)

    def _some(self, entries: Tensor, count: int) -> Tensor:
        return entries[torch.randperm(len(entries), generator=self._generator)[:count]]
