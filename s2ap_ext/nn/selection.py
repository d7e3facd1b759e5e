"""When the masked weights of pruned layers are made, and from what.

A layer's :class:`~s2ap_ext.nn.mask_state.MaskState` tells when its selection is out of date, and where the layer stands: at its scores
``s``, or after :func:`ascend` at ``s + z``, which is never written. All functions here work on lists of layers and make one fused call
for all of one device and dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..reference import FLIPS, NANS, Pattern
from .mask_state import Perturbation, PrunedLayer, Selection, can_remember


def select_stale(layers: Iterable[PrunedLayer]) -> None:
    """Brings the masked weights of all layers up to date; those whose scores changed are selected anew.

    Raises:
        ValueError: NaN in the scores of a layer that is on the CPU.
    """
    stale = [layer for layer in layers if can_remember(layer) and is_stale(layer)]
    if not stale:
        return
    # What is remembered outlives this call, so it must not be born as inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        anew = []
        for layer in stale:
            made = layer.mask_state.selection
            if made is not None and made.mask_matches(layer):
                _reweight(layer, made)
            else:
                anew.append(layer)
        for group in _groups(anew):
            masked, cuts = ops.select(*_operands(group), patterns=_patterns(group), out=_memory(group))
            if cuts.device.type == "cpu":
                ops.check_finite(cuts, _labels(group))
            for layer, out, cut in zip(group, masked, cuts, strict=True):
                layer.mask_state.selection = Selection(layer, out, cut)


def is_stale(layer: PrunedLayer) -> bool:
    """Whether the layer's masked weight is out of date.

    Raises:
        RuntimeError: it is, while the layer stands at perturbed scores.
    """
    state = layer.mask_state
    stale = state.selection is None or not state.selection.matches(layer)
    if stale and state.perturbation is not None:
        raise RuntimeError(f"{state.label}: scores, weight or kept changed between ascend() and descend()")
    return stale


def mask_of(layer: PrunedLayer) -> Tensor:
    """The mask of the layer's selection, bool, made when it is first asked for."""
    made = layer.mask_state.selection
    if made.mask is None:
        with torch.inference_mode(False), torch.no_grad():
            at = layer.mask_state.position(layer.scores, layer.weight)
            made.mask = ops.mask_from_cut(at, made.cut, layer.mask_state.pattern)
    return made.mask


def _reweight(layer: PrunedLayer, made: Selection) -> None:
    """Only the weights have changed since the selection was made: its mask stands."""
    state, mask = layer.mask_state, mask_of(layer)
    state.memory = torch.where(mask, layer.weight, 0)
    state.selection = Selection(layer, state.memory, made.cut, mask=mask, square=made.square)
    state.selection.same_mask = made if made.entries is not None else made.same_mask


@torch.no_grad()
def ascend(
    layers: Iterable[PrunedLayer], grads: Mapping[nn.Parameter, Tensor], *, gamma: float, eps: float, straight_through: bool
) -> list[tuple[list[str], Tensor]]:
    """Moves the layers to ``s + z``: masks, masked weights and gradients are those there.

    Args:
        grads: for the scores of each layer their gradient, or with ``straight_through`` that of the masked weight.

    Returns:
        ``(names, cuts)`` for each fused call; ``cuts``, int64 [L, 5], hold the counts of NaN, of flipped mask entries and of changed signs.

    Raises:
        ValueError: NaN at ``s + z`` in a layer that is on the CPU; no layer has moved then.
    """
    layers = list(layers)
    select_stale(layers)
    seen = []
    for group in _groups(layers):
        along = [grads[layer.scores] for layer in group]
        scores, weights, kept = _operands(group)
        squares = [layer.mask_state.selection.square for layer in group]
        masked, cuts, scales = ops.perturb(
            scores,
            along,
            weights,
            kept,
            torch.stack([layer.mask_state.selection.cut for layer in group]),
            gamma=gamma,
            eps=eps,
            patterns=_patterns(group),
            straight_through=straight_through,
            squares=None if any(square is None for square in squares) else torch.stack(squares),
            out=_memory(group),
        )
        for layer, out, cut, grad, scale in zip(group, masked, cuts, along, scales, strict=True):
            state = layer.mask_state
            state.perturbation = Perturbation(grad, scale, straight_through, state.selection.cut)
            state.selection = Selection(layer, out, cut)
        seen.append((_labels(group), cuts))
    for names, cuts in seen:
        if cuts.device.type == "cpu" and cuts[:, NANS].any():
            descend(layers)
            ops.check_finite(cuts, names)
    return seen


def descend(layers: Iterable[PrunedLayer]) -> dict[PrunedLayer, Perturbation]:
    """Moves the layers back to ``s``, which was never overwritten. Returns how those that had moved stood at ``s + z``."""
    stood = {layer: layer.mask_state.perturbation for layer in layers if layer.mask_state.perturbation is not None}
    for layer in stood:
        layer.mask_state.perturbation = layer.mask_state.selection = None
    return stood


@torch.no_grad()
def step(
    layers: Sequence[PrunedLayer], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], moves: Sequence[Perturbation] | None, **how
) -> Tensor:
    """One SGD step on the scores of ``layers``, of one device and dtype, and their masked weights at the new scores, in one fused call.

    Args:
        grads, momentum_buffers, how: as in :func:`s2ap_ext.ops.update_select`.
        moves: what :func:`descend` returned for each layer, or None if they stood at their scores (and have selected there).

    Returns:
        int64 scalar tensor: how many mask entries the step has flipped.
    """
    scores, weights, kept = _operands(layers)
    at_scores = [layer.mask_state.selection for layer in layers] if moves is None else moves
    ascent = None
    if moves is not None and how["straight_through"]:
        ascent = ([move.grad for move in moves], torch.stack([move.scale for move in moves]))
    masked, cuts, squares = ops.update_select(
        scores,
        grads,
        momentum_buffers,
        weights,
        kept,
        torch.stack([selection.cut for selection in at_scores]),
        patterns=_patterns(layers),
        ascent=ascent,
        out=_memory(layers),
        **how,
    )
    for layer, out, cut, square in zip(layers, masked, cuts, squares, strict=True):
        layer.mask_state.selection = Selection(layer, out, cut, square=square)
    return cuts[:, FLIPS].sum()


def check_scores(layers: Iterable[PrunedLayer]) -> None:
    """Raises ValueError naming the layers whose last selection met NaN. Waits for a CUDA device."""
    for group in _groups(layer for layer in layers if layer.mask_state.selection is not None):
        ops.check_finite(torch.stack([layer.mask_state.selection.cut for layer in group]), _labels(group))


def _groups(layers: Iterable[PrunedLayer]) -> list[list[PrunedLayer]]:
    """The layers by device and dtype: what one call of an op can take."""
    groups: dict[tuple, list[PrunedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.scores.device, layer.scores.dtype), []).append(layer)
    return list(groups.values())


def _operands(layers: Sequence[PrunedLayer]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return [layer.scores for layer in layers], [layer.weight for layer in layers], torch.stack([layer.kept for layer in layers])


def _patterns(layers: Sequence[PrunedLayer]) -> list[Pattern]:
    return [layer.mask_state.pattern for layer in layers]


def _labels(layers: Sequence[PrunedLayer]) -> list[str]:
    return [layer.mask_state.label for layer in layers]


def _memory(layers: Sequence[PrunedLayer]) -> list[Tensor]:
    """The memory for the layers' masked weights, in the layout of their weights."""
    for layer in layers:
        state, weight = layer.mask_state, layer.weight
        memory = state.memory
        like = memory is not None and (memory.shape, memory.dtype, memory.device) == (weight.shape, weight.dtype, weight.device)
        if not like or memory.stride() != weight.stride():
            state.memory = torch.empty_like(weight, requires_grad=False)
    return [layer.mask_state.memory for layer in layers]
