"""When the masked weights of pruned layers are made, and from what.

A layer's :class:`~s2ap_ext.nn.mask_state.MaskState` tells when its selection is out of date, and where the layer stands: at its scores
``s``, or after :func:`ascend` at ``s + z``, which is never written. All functions here work on lists of layers and make one fused call
for all of one device and dtype.

**Threads.** Any number of threads may run the forwards of a model at once. Whoever finds a layer out of date selects under a lock, and
who comes later finds it done. A selection appears in the layer when its memory is complete; that memory is written again only after
scores, weight or ``kept`` have changed, and changing them during a forward is as wrong as it is for any other module. On CUDA the
threads have to use one stream, as with everything that one of them writes and another reads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..reference import FLIPS, NANS, Pattern
from .mask_state import Origin, Perturbation, PrunedLayer, Selection, can_remember

# Held while masked weights are written. There is one for all models, since they rarely select and never wait for each other while they do.
_writing = threading.RLock()


def _renew_lock() -> None:
    """In a forked process the thread that held the lock is gone, and what it was writing never appeared."""
    global _writing
    _writing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def selection_of(layer: PrunedLayer) -> Selection:
    """The selection at the layer's present scores. If there is none, all layers of its group are brought up to date.

    Raises:
        ValueError: NaN in the scores of the layer, if it is on the CPU.
        RuntimeError: the layer has changed between :func:`ascend` and :func:`descend`.
    """
    made = layer.mask_state.selection
    if made is None or not made.origin.matches(layer):
        with _writing:
            select_stale([layer])
            made = _made(layer)
    return made


def _made(layer: PrunedLayer) -> Selection:
    """The selection of a layer that has one."""
    made = layer.mask_state.selection
    assert made is not None
    return made


def mask_of(layer: PrunedLayer, made: Selection) -> Tensor:
    """The mask of the layer's selection ``made``, bool; it is kept there."""
    if made.mask is None:
        with torch.inference_mode(False), torch.no_grad():
            at = layer.mask_state.position(layer.scores, layer.weight)
            made.mask = ops.mask_from_cut(at, made.cut, layer.mask_state.pattern)
    return made.mask


def select_stale(layers: Iterable[PrunedLayer]) -> None:
    """Brings the masked weights of all layers up to date; those whose scores changed are selected anew.

    So are the other layers in the groups of those that are out of date, as far as they fit into the same calls.

    Raises:
        ValueError: NaN in the scores of one of ``layers`` that is on the CPU. All others are up to date then.
        RuntimeError: one of ``layers`` has changed between :func:`ascend` and :func:`descend`.
    """
    layers = [layer for layer in layers if can_remember(layer)]
    if not any(_is_stale(layer) for layer in layers):
        return
    # What is remembered outlives this call, so it must not be born as inference tensors.
    with _writing, torch.inference_mode(False), torch.no_grad():
        stale = [layer for layer in layers if _is_stale(layer)]  # asked again: another thread may have been here first
        kinds = {_kind(layer) for layer in stale}
        groups = dict.fromkeys(layer.mask_state.group for layer in stale)
        others = [layer for group in groups for layer in group.layers() if _can_join(layer) and _kind(layer) in kinds]
        anew = []
        for layer in dict.fromkeys(stale + others):
            made = layer.mask_state.selection
            if made is not None and made.origin.mask_matches(layer):
                _reweight(layer, made)
            else:
                anew.append(layer)
        try:
            with_nans = _select(anew)
        except (TypeError, ValueError):  # one of the others cannot be selected: whoever asks for it is told
            with_nans = _select([layer for layer in anew if layer in stale])
    asked = [layer for layer in stale if layer in with_nans]
    if asked:
        ops.check_finite(torch.stack([with_nans[layer] for layer in asked]), _labels(asked))


def _is_stale(layer: PrunedLayer) -> bool:
    state = layer.mask_state
    stale = state.selection is None or not state.selection.origin.matches(layer)
    if stale and state.perturbation is not None:
        raise RuntimeError(f"{state.label}: scores, weight or kept changed between ascend() and descend()")
    return stale


def _can_join(layer: PrunedLayer) -> bool:
    """Whether a layer that nobody has asked for is out of date and can be selected."""
    return layer.mask_state.perturbation is None and can_remember(layer) and _is_stale(layer)


def _reweight(layer: PrunedLayer, made: Selection) -> None:
    """Only the weights have changed since the selection was made: its mask stands."""
    state, mask, origin = layer.mask_state, mask_of(layer, made), Origin.of(layer)
    state.memory = torch.where(mask, layer.weight, 0)
    now = Selection(origin, state.memory, made.cut, mask=mask, square=made.square)
    now.same_mask = made if made.kept_weights is not None else made.same_mask
    state.selection = now


def _select(layers: Sequence[PrunedLayer]) -> dict[PrunedLayer, Tensor]:
    """Selects in one call for each device and dtype. Returns the cuts of layers with NaN on the CPU, which stay out of date."""
    with_nans = {}
    for together in _in_calls(layers):
        origins = [Origin.of(layer) for layer in together]
        masked, cuts = ops.select(*_operands(together), patterns=_patterns(together), out=_memory(together))
        nans = cuts[:, NANS].tolist() if cuts.device.type == "cpu" else [0] * len(together)
        for layer, origin, out, cut, count in zip(together, origins, masked, cuts, nans, strict=True):
            if count:
                with_nans[layer] = cut
            else:
                layer.mask_state.selection = Selection(origin, out, cut)
    return with_nans


@torch.no_grad()
def ascend(
    layers: Iterable[PrunedLayer], grads: Mapping[nn.Parameter, Tensor], *, gamma: Tensor, eps: float, straight_through: bool
) -> list[tuple[list[str], Tensor]]:
    """Moves the layers to ``s + z``: masks, masked weights and gradients are those there.

    Args:
        grads: for the scores of each layer their gradient, or with ``straight_through`` that of the masked weight.
        gamma: float64 [L], of each layer the size of the perturbation relative to the scores.

    Returns:
        ``(names, cuts)`` for each fused call; ``cuts``, int64 [L, 5], hold the counts of NaN, of flipped mask entries and of changed signs.

    Raises:
        ValueError: NaN at ``s + z`` in a layer that is on the CPU; no layer has moved then.
    """
    layers = list(layers)
    gammas = dict(zip(layers, gamma, strict=True))
    select_stale(layers)
    seen = []
    with _writing:
        for together in _in_calls(layers):
            gamma_there = torch.stack([gammas[layer] for layer in together]).to(together[0].scores.device)
            seen.append((_labels(together), _ascend(together, grads, gamma=gamma_there, eps=eps, straight_through=straight_through)))
    for names, cuts in seen:
        if cuts.device.type == "cpu" and cuts[:, NANS].any():
            descend(layers)
            ops.check_finite(cuts, names)
    return seen


def _ascend(
    layers: Sequence[PrunedLayer], grads: Mapping[nn.Parameter, Tensor], *, gamma: Tensor, eps: float, straight_through: bool
) -> Tensor:
    """:func:`ascend` for layers of one device and dtype, in one call; the cuts at ``s + z``."""
    along, origins = [grads[layer.scores] for layer in layers], [Origin.of(layer) for layer in layers]
    cuts_now, squares = _cuts(layers), _squares(layers)
    scores, weights, kept = _operands(layers)
    masked, cuts, scales = ops.perturb(
        scores,
        along,
        weights,
        kept,
        cuts_now,
        gamma=gamma,
        eps=eps,
        patterns=_patterns(layers),
        straight_through=straight_through,
        squares=squares,
        out=_memory(layers),
    )
    for layer, origin, out, cut, grad, scale, now in zip(layers, origins, masked, cuts, along, scales, cuts_now, strict=True):
        layer.mask_state.perturbation = Perturbation(grad, scale, straight_through, now)
        layer.mask_state.selection = Selection(origin, out, cut)
    return cuts


def flips_at(
    layers: Iterable[PrunedLayer], grads: Mapping[nn.Parameter, Tensor], *, eps: float, straight_through: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """How many mask entries an :func:`ascend` would flip, as a function of gamma.

    Returns:
        A function of gammas, float64 [L], and of which layers it is asked, bool [L]. It gives int64 [L], on gamma's device; 0 for layers
        on the CPU that are not asked. Nothing moves; there is memory for one more set of masked weights while the function lives. For
        layers on CUDA it waits for nothing.

    Args:
        layers, grads, eps, straight_through: as for :func:`ascend`.
    """
    layers = list(layers)
    select_stale(layers)
    memory = {layer: torch.empty_like(layer.weight, requires_grad=False) for layer in layers}

    def flips(gamma: Tensor, asked: Tensor) -> Tensor:
        asked_of = asked.tolist() if asked.device.type == "cpu" else [True] * len(layers)
        gammas, found = dict(zip(layers, gamma, strict=True)), dict.fromkeys(layers, torch.zeros_like(gamma[0], dtype=torch.int64))
        for together in _in_calls(layer for layer, wanted in zip(layers, asked_of, strict=True) if wanted):
            scores, weights, kept = _operands(together)
            _, cuts, _ = ops.perturb(
                scores,
                [grads[layer.scores] for layer in together],
                weights,
                kept,
                _cuts(together),
                gamma=torch.stack([gammas[layer] for layer in together]).to(scores[0].device),
                patterns=_patterns(together),
                straight_through=straight_through,
                eps=eps,
                squares=_squares(together),
                out=[memory[layer] for layer in together],
            )
            found |= dict(zip(together, cuts[:, FLIPS].to(gamma.device), strict=True))
        return torch.stack([found[layer] for layer in layers])

    return flips


def descend(layers: Iterable[PrunedLayer]) -> dict[PrunedLayer, Perturbation]:
    """Moves the layers back to ``s``, which was never overwritten. Returns how those that had moved stood at ``s + z``."""
    stood = {layer: layer.mask_state.perturbation for layer in layers if layer.mask_state.perturbation is not None}
    for layer in stood:
        layer.mask_state.perturbation = layer.mask_state.selection = None
    return stood


@torch.no_grad()
def step(
    layers: Sequence[PrunedLayer],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    moves: Sequence[Perturbation] | None,
    **how: Any,
) -> Tensor:
    """One SGD step on the scores of ``layers``, of one device and dtype, and their masked weights at the new scores, in one fused call.

    Args:
        grads, momentum_buffers, how: as in :func:`s2ap_ext.ops.update_select`.
        moves: what :func:`descend` returned for each layer, or None if they stood at their scores (and have selected there).

    Returns:
        int64 scalar tensor: how many mask entries the step has flipped.
    """
    scores, weights, kept = _operands(layers)
    cuts_now = _cuts(layers) if moves is None else torch.stack([move.cut for move in moves])
    ascent = None
    if moves is not None and how["straight_through"]:
        ascent = ([move.grad for move in moves], torch.stack([move.scale for move in moves]))
    with _writing:
        masked, cuts, squares = ops.update_select(
            scores, grads, momentum_buffers, weights, kept, cuts_now, patterns=_patterns(layers), ascent=ascent, out=_memory(layers), **how
        )
        for layer, out, cut, square in zip(layers, masked, cuts, squares, strict=True):
            layer.mask_state.selection = Selection(Origin.of(layer), out, cut, square=square)
    return cuts[:, FLIPS].sum()


def check_scores(layers: Iterable[PrunedLayer]) -> None:
    """Raises ValueError naming the layers whose last selection met NaN. Waits for a CUDA device."""
    for together in _in_calls(layer for layer in layers if layer.mask_state.selection is not None):
        ops.check_finite(_cuts(together), _labels(together))


def _kind(layer: PrunedLayer) -> tuple[torch.device, torch.dtype]:
    return layer.scores.device, layer.scores.dtype


def _in_calls(layers: Iterable[PrunedLayer]) -> list[list[PrunedLayer]]:
    """The layers by device and dtype: what one call of an op can take."""
    calls: dict[tuple[torch.device, torch.dtype], list[PrunedLayer]] = {}
    for layer in layers:
        calls.setdefault(_kind(layer), []).append(layer)
    return list(calls.values())


def _operands(layers: Sequence[PrunedLayer]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return [layer.scores for layer in layers], [layer.weight for layer in layers], torch.stack([layer.kept for layer in layers])


def _patterns(layers: Sequence[PrunedLayer]) -> list[Pattern]:
    return [layer.mask_state.pattern for layer in layers]


def _labels(layers: Sequence[PrunedLayer]) -> list[str]:
    return [layer.mask_state.label for layer in layers]


def _cuts(layers: Sequence[PrunedLayer]) -> Tensor:
    """Those of the layers' selections, int64 [L, 5]."""
    return torch.stack([_made(layer).cut for layer in layers])


def _squares(layers: Sequence[PrunedLayer]) -> Tensor | None:
    """The scores' sums of squares, float64 [L], if all of the layers' selections know theirs."""
    squares = [square for layer in layers if (square := _made(layer).square) is not None]
    return torch.stack(squares) if len(squares) == len(layers) else None


def _memory(layers: Sequence[PrunedLayer]) -> list[Tensor]:
    """The memory for the layers' masked weights, in the layout of their weights. What was selected there before ends here."""
    memories = []
    for layer in layers:
        state, weight = layer.mask_state, layer.weight
        state.selection, memory = None, state.memory
        like = memory is not None and (memory.shape, memory.dtype, memory.device) == (weight.shape, weight.dtype, weight.device)
        if memory is None or not like or memory.stride() != weight.stride():
            memory = state.memory = torch.empty_like(weight, requires_grad=False)
        memories.append(memory)
    return memories
