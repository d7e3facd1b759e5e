"""sam: exact, with one radius for all layers together and independent of the size of the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...nn.layers import pruned_layers
from ...parts import register
from ...settings import key
from .base import Ascent, Step


@register("sam")
class Sam(Ascent):
    """Two backward passes, the second at ``s + rho * g / ||g||`` with the norm taken over all layers: SAM on the scores, as published.

    The optimizer's own gamma does not matter beyond not being 0. A layer's share of the radius is that of its gradient.

    Source: Foret et al., arXiv 2010.01412, equation 2.

    Equivalent to::

        z = {s: rho * s.grad / torch.cat([s.grad.flatten() for s in scores]).norm() for s in scores}
    """

    @dataclass(frozen=True)
    class Settings:
        rho: float = key(0.05, "length of the perturbation of all scores together", low=0, high=1e6)

    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        backward()
        gradients, names = at.gradients(), {p: name for name, p in at.perturbed_parameters().items()}
        norms = {name: g.double().norm() for name, g in gradients.items()}
        total = torch.stack(list(norms.values())).norm() if norms else torch.zeros(())
        gammas = []
        for layer in pruned_layers(at.model).values():
            share, size = norms.get(names[layer.scores], total.new_zeros(())), layer.scores.detach().double().norm()
            gammas.append(torch.where((total > 0) & (size > 0), self.settings.rho * share / (total * size), 0.0).to(at.gamma.device))
        at.move(gradients, torch.stack(gammas))
        backward()
