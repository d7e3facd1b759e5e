"""The step of torch's SGD on scores, to the bit, in one call together with the selection at the new scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.layers import Pruned
from ..nn.mask_state import Perturbation, PrunedLayer
from ..nn.selection import select_stale, step


class Call(NamedTuple):
    """What one call steps: scores of one device, dtype and group."""

    group: dict[str, Any]  # of the base optimizer
    deferred: bool  # whether the gradients are those of the masked weights
    scores: list[nn.Parameter]


def calls(sgd: torch.optim.SGD, layers: Collection[Pruned], grads: Mapping[nn.Parameter, Tensor], moved: Collection[Pruned]) -> list[Call]:
    """The calls that can take the place of ``sgd.step()`` for scores of ``layers``; the others are left to it.

    Args:
        grads: the deferred gradients, those of masked weights, by scores. All other gradients are in ``scores.grad``.
        moved: the layers that stand at perturbed scores, or have just come back.
    """
    found: dict[tuple[Any, ...], Call] = {}
    layer_of = {layer.scores: layer for layer in layers}
    for number, group in enumerate(sgd.param_groups):
        if group["maximize"] or group["differentiable"] or group["fused"] or isinstance(group["lr"], Tensor):
            continue  # steps of other arithmetic
        for p in group["params"]:
            if p not in layer_of or not (p in grads or p.grad is not None):
                continue
            # torch makes a momentum buffer in the first step, so that one is torch's.
            if group["momentum"] == 0 or sgd.state.get(p, {}).get("momentum_buffer") is not None:
                kind = (number, p.device, p.dtype, p in grads, layer_of[p] in moved)
                found.setdefault(kind, Call(group, p in grads, [])).scores.append(p)
    return list(found.values())


def take(
    call: Call,
    sgd: torch.optim.Optimizer,
    layers: Collection[Pruned],
    grads: Mapping[nn.Parameter, Tensor],
    moves: Mapping[PrunedLayer, Perturbation],
) -> Tensor:
    """Makes one of :func:`calls`. Returns how many mask entries the step has flipped, an int64 scalar tensor.

    Args:
        grads: as in :func:`calls`.
        moves: what :func:`s2ap_ext.nn.selection.descend` returned.
    """
    # One layer for each parameter: the masks of layers that are tied to it are made when they are next used.
    first: dict[nn.Parameter, Pruned] = {}
    for layer in layers:
        first.setdefault(layer.scores, layer)
    stepped = [first[s] for s in call.scores]
    moved = all(layer in moves for layer in stepped)
    if not moved:
        select_stale(stepped)
    return step(
        stepped,
        [grad for s in call.scores if (grad := grads[s] if call.deferred else s.grad) is not None],
        [sgd.state[s]["momentum_buffer"] for s in call.scores] if call.group["momentum"] != 0 else [],
        [moves[layer] for layer in stepped] if moved else None,
        straight_through=call.deferred,
        **{name: call.group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")},
    )
