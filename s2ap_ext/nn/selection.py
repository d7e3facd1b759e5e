"""When the masked weights of pruned layers are made, and from what.

A layer remembers its :class:`Selection`, which tells when it is out of date, and where it stands: at its scores ``s``, or after
:func:`ascend` at ``s + z``, which is never written. All functions here work on lists of layers (:mod:`s2ap_ext.nn.layers`) and make one
fused call for all of one device and dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..reference import FLIPS, NANS, perturbed, score_grad

if TYPE_CHECKING:
    from .convolution import Entries
    from .layers import Pruned


class Snapshot:
    """Tells whether a tensor is still what it was. Holds its storage, so that no later tensor can take the same address."""

    __slots__ = ("alias", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.detach()
        self.version = tensor._version

    def matches(self, tensor: Tensor) -> bool:
        return tensor._version == self.version and tensor.data_ptr() == self.alias.data_ptr()


class Selection:
    """What a layer's masked weight was made from."""

    __slots__ = ("cut", "entries", "kept", "mask", "same_mask", "scores", "square", "weight")

    def __init__(self, layer: Pruned, cut: Tensor, mask: Tensor | None = None, square: Tensor | None = None) -> None:
        self.scores, self.weight, self.kept = Snapshot(layer.scores), Snapshot(layer.weight), Snapshot(layer.kept)
        self.cut = cut  # int64 [5], see reference.py
        self.mask = mask  # bool, made from the cut when first asked for
        self.square = square  # float64, the scores' sum of squares where update_select has returned it
        self.entries: Entries | None = None  # the kept weights as a list, made by convolutions that compute with it
        self.same_mask: Selection | None = None  # an earlier selection that may have entries with this mask

    def matches(self, layer: Pruned) -> bool:
        return self.mask_matches(layer) and self.weight.matches(layer.weight)

    def mask_matches(self, layer: Pruned) -> bool:
        return self.scores.matches(layer.scores) and self.kept.matches(layer.kept)


class Move(NamedTuple):
    """How a layer came to stand at ``s + z``, ``z = scale * g``."""

    grad: Tensor  # g, or with straight_through the gradient of the masked weight that g is formed from
    scale: Tensor  # float64
    straight_through: bool
    cut: Tensor  # that of s

    def position(self, scores: Tensor, weight: Tensor) -> Tensor:
        """``s + z``"""
        return perturbed(scores, score_grad(self.grad, weight, scores) if self.straight_through else self.grad, self.scale)


def select_stale(layers: Iterable[Pruned]) -> None:
    """Brings the masked weights of all layers up to date; those whose scores changed are selected anew.

    Raises:
        ValueError: NaN in the scores of a layer that is on the CPU.
    """
    stale = [layer for layer in layers if layer._can_remember() and layer._stale()]
    if not stale:
        return
    # What is remembered outlives this call, so it must not be born as inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        reweighted = [layer for layer in stale if layer._selection is not None and layer._selection.mask_matches(layer)]
        for layer in reweighted:  # only the weights changed: the mask stands
            mask, made = layer._mask(), layer._selection
            layer._masked = torch.where(mask, layer.weight, 0)
            layer._selection = Selection(layer, made.cut, mask, made.square)
            layer._selection.same_mask = made if made.entries is not None else made.same_mask
        for group in _groups(layer for layer in stale if layer not in reweighted):
            _, cuts = ops.select(*_operands(group), patterns=_patterns(group), out=_memory(group))
            if cuts.device.type == "cpu":
                ops.check_finite(cuts, [layer._label for layer in group])
            for layer, cut in zip(group, cuts, strict=True):
                layer._selection = Selection(layer, cut)


@torch.no_grad()
def ascend(
    layers: Iterable[Pruned], grads: Mapping[nn.Parameter, Tensor], *, gamma: Tensor, eps: float, straight_through: bool
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
    for group in _groups(layers):
        along = [grads[layer.scores] for layer in group]
        scores, weights, kept = _operands(group)
        squares = [layer._selection.square for layer in group]
        _, cuts, scales = ops.perturb(
            scores,
            along,
            weights,
            kept,
            torch.stack([layer._selection.cut for layer in group]),
            gamma=torch.stack([gammas[layer] for layer in group]).to(scores[0].device),
            eps=eps,
            patterns=_patterns(group),
            straight_through=straight_through,
            squares=None if any(square is None for square in squares) else torch.stack(squares),
            out=_memory(group),
        )
        for layer, cut, grad, scale in zip(group, cuts, along, scales, strict=True):
            layer._move = Move(grad, scale, straight_through, layer._selection.cut)
            layer._selection = Selection(layer, cut)
        seen.append(([layer._label for layer in group], cuts))
    for names, cuts in seen:
        if cuts.device.type == "cpu" and cuts[:, NANS].any():
            descend(layers)
            ops.check_finite(cuts, names)
    return seen


def descend(layers: Iterable[Pruned]) -> dict[Pruned, Move]:
    """Moves the layers back to ``s``, which was never overwritten. Returns how those that had moved stood at ``s + z``."""
    moves = {layer: layer._move for layer in layers if layer._move is not None}
    for layer in moves:
        layer._move = layer._selection = None
    return moves


@torch.no_grad()
def step(
    layers: Sequence[Pruned], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], moves: Sequence[Move] | None, **how
) -> Tensor:
    """One SGD step on the scores of ``layers``, of one device and dtype, and their masked weights at the new scores, in one fused call.

    Args:
        grads, momentum_buffers, how: as in :func:`s2ap_ext.ops.update_select`.
        moves: what :func:`descend` returned for each layer, or None if they stood at their scores (and have selected there).

    Returns:
        int64 scalar tensor: how many mask entries the step has flipped.
    """
    scores, weights, kept = _operands(layers)
    at_scores = [layer._selection for layer in layers] if moves is None else moves
    ascent = None
    if moves is not None and how["straight_through"]:
        ascent = ([move.grad for move in moves], torch.stack([move.scale for move in moves]))
    _, cuts, squares = ops.update_select(
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
    for layer, cut, square in zip(layers, cuts, squares, strict=True):
        layer._selection = Selection(layer, cut, square=square)
    return cuts[:, FLIPS].sum()


def check_scores(layers: Iterable[Pruned]) -> None:
    """Raises ValueError naming the layers whose last selection met NaN. Waits for a CUDA device."""
    for group in _groups(layer for layer in layers if layer._selection is not None):
        ops.check_finite(torch.stack([layer._selection.cut for layer in group]), [layer._label for layer in group])


def _groups(layers: Iterable[Pruned]) -> list[list[Pruned]]:
    """The layers by device and dtype: what one call of an op can take."""
    groups: dict[tuple, list[Pruned]] = {}
    for layer in layers:
        groups.setdefault((layer.scores.device, layer.scores.dtype), []).append(layer)
    return list(groups.values())


def _operands(layers: Sequence[Pruned]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return [layer.scores for layer in layers], [layer.weight for layer in layers], torch.stack([layer.kept for layer in layers])


def _patterns(layers: Sequence[Pruned]) -> list[ops.Pattern]:
    return [layer._pattern for layer in layers]


def _memory(layers: Sequence[Pruned]) -> list[Tensor]:
    """The memory for the layers' masked weights, in the layout of their weights."""
    for layer in layers:
        buffer, weight = layer._masked, layer.weight
        like = buffer is not None and (buffer.shape, buffer.dtype, buffer.device) == (weight.shape, weight.dtype, weight.device)
        if not like or buffer.stride() != weight.stride():
            layer._masked = torch.empty_like(weight, requires_grad=False)
    return [layer._masked for layer in layers]
