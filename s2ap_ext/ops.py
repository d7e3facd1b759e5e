"""The fused ops, one call for all layers of a model.

Each chooses its implementation by the device of the tensors: the CUDA kernel, the C++ kernel, or the reference
(:func:`s2ap_ext.backend` tells which). All three give the same bits. The functions check their arguments, allocate what was
not given and call ``torch.ops.s2ap``. None of them is differentiable, since masks are piecewise constant; the straight-through
gradient is the layers' (:mod:`s2ap_ext.nn`).

Strides are free: an operand that is not contiguous is copied, and a channels_last result is written back in its own layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import (
    DTYPES,
    check_cuts,
    check_lists,
    check_memory,
    check_size,
    cuts_or_zeros,
    gammas,
    momentum_argument,
    outputs,
    patterns_and_kept,
    per_layer,
)
from .reference import NANS, Pattern, mask_from_cut

__all__ = ["DTYPES", "Pattern", "check_finite", "mask_from_cut", "perturb", "select", "update", "update_select"]


class _Contiguous:
    """Contiguous stand-ins for outputs that are not; :meth:`write_back` copies the results into the originals."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.originals = list(tensors)
        self.tensors = [t.contiguous() for t in tensors]

    def write_back(self) -> None:
        for original, stand_in in zip(self.originals, self.tensors, strict=True):
            if stand_in is not original:
                original.copy_(stand_in)
        # The kernels write behind autograd's back; a graph that still needs the old values must notice.
        torch.autograd.graph.increment_version([t for t in self.originals if not t.is_inference()])


def _apart(cuts: Tensor, new_cuts: Tensor) -> dict[str, list[Tensor]]:
    """``cuts``, as an argument that new cuts must not overlap unless they take its place: the kernels note the present masks first."""
    return {"cuts": [] if cuts.data_ptr() == new_cuts.data_ptr() else [cuts]}


@torch.no_grad()
def select(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor | Sequence[int],
    *,
    patterns: Sequence[Pattern] | None = None,
    out: Sequence[Tensor] | None = None,
    cuts: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Top-k masked weights of all layers in one call.

    Args:
        scores: L tensors of any shape, floating point, one dtype and device.
        weights: L tensors with the shapes and dtype of ``scores``.
        kept: how many entries each layer keeps, or groups, or entries of each window; int64 [L], on the scores' device, or L integers.
        patterns: what ``kept`` counts, for each layer (:class:`s2ap_ext.reference.Pattern`); None: single entries of the whole layer.
        out: L tensors that receive the masked weights (allocated if None). Like all that is written, they have memory of their own:
            they may not overlap each other, or any other argument; the weights cannot be masked in place.
        cuts: int64 [L, 5] on the scores' device that receives the cuts (allocated if None).

    Returns:
        ``(masked, cuts)``. ``masked[l]`` is ``weights[l]`` where the mask is 1 and +0 elsewhere. ``cuts[l]`` is the cut of
        layer l: ranking key and index of the lowest ranked entry that stays, and the number of NaN scores
        (see :mod:`s2ap_ext.reference`); :func:`mask_from_cut` rebuilds the mask, :func:`check_finite` reads the NaN column.

    Raises:
        ValueError, TypeError: lists of different lengths, shapes, dtypes or devices; a pattern that does not divide its layer; a count
            outside ``[0, numel]`` or the pattern's ``[0, size]``, or no integer; memory that is
            written and belongs to another argument too.

    Equivalent to::

        for s, w, k in zip(scores, weights, kept):
            order = s.abs().flatten().sort(stable=True).indices
            mask = torch.zeros(s.numel()).index_fill(0, order[s.numel() - k:], 1).view_as(s)
            masked.append(w * mask)
    """
    masked = outputs(out, weights)
    check_lists({"scores": scores, "weights": weights, "out": masked})
    new_cuts = cuts_or_zeros(cuts, "cuts", scores)
    if scores:
        flat_patterns, kept = patterns_and_kept(patterns, kept, scores)
        written = {"out": [] if out is None else masked, "cuts": [] if cuts is None else [cuts]}
        check_memory(written, {"scores": scores, "weights": weights, "kept": [kept]})
        result = _Contiguous(masked)
        torch.ops.s2ap.select(
            [s.contiguous() for s in scores],
            [w.contiguous() for w in weights],
            kept,
            flat_patterns,
            result.tensors,
            new_cuts,
        )
        result.write_back()
    return masked, new_cuts


@torch.no_grad()
def perturb(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor | Sequence[int],
    cuts: Tensor,
    *,
    gamma: float | Tensor,
    eps: float = 1e-12,
    patterns: Sequence[Pattern] | None = None,
    straight_through: bool = False,
    squares: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
    new_cuts: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masked weights of all layers at the perturbed scores ``s + z``, ``z = gamma * ||s|| * g / (||g|| + eps)`` per layer.

    ``s + z`` itself is never stored: the scores stay as they are, so restoring them costs nothing and is exact.

    Args:
        scores, weights, kept, patterns, out: as in :func:`select`.
        grads: L tensors, the gradients of the loss with respect to the scores.
        cuts: int64 [L, 5], what :func:`select` returned at these scores.
        gamma: relative size of the perturbation, finite and >= 0: one for all layers, or float64 [L] on the scores' device. A layer whose
            gamma is 0 has the scale 0, whatever its norms are. Values on a CUDA device are not read by the host, and not checked: a
            negative one moves against the gradient, and NaN or infinity makes scores NaN, which column 2 of ``new_cuts`` counts.
        eps: added to ``||g||``.
        straight_through: ``grads`` are those with respect to the masked weights. The scores' own, ``g * w * sign(s)``, are formed where
            they are read and never stored.
        squares: float64 [L], the sums of squares of the scores where :func:`update_select` has returned them; None: they are taken.
        new_cuts: int64 [L, 5] that receives the cuts at ``s + z`` (allocated if None); it may be ``cuts``.

    Returns:
        ``(masked, new_cuts, scales)``. Column 3 of ``new_cuts`` counts the mask entries that flipped, column 4 the scores
        whose sign changed. ``scales`` (float64 [L]) are the factors of the scores' gradients, ``z = scales[l] * g``.

    Raises:
        ValueError, TypeError: as in :func:`select`; ``gamma``, of any layer, or ``eps`` negative or not finite.

    Source: S2AP, arXiv 2510.18381.

    Equivalent to::

        for s, g, w, k, gamma in zip(scores, grads, weights, kept, gammas):
            if straight_through:
                g = g * w * s.sign()
            z = gamma * s.norm() * g / (g.norm() + eps)
            masked.append(select(s + z, w, k))
    """
    eps = check_size("eps", eps)
    masked = outputs(out, weights)
    check_lists({"scores": scores, "grads": grads, "weights": weights, "out": masked})
    cuts = check_cuts(cuts, "cuts", scores)
    given = {"out": [] if out is None else masked, "new_cuts": [] if new_cuts is None else [new_cuts]}
    new_cuts = cuts_or_zeros(new_cuts, "new_cuts", scores)
    scales = per_layer(None, "scales", scores)
    gamma = gammas(gamma, scores)
    if squares is not None:
        squares = per_layer(squares, "squares", scores)
    if scores:
        flat_patterns, kept = patterns_and_kept(patterns, kept, scores)
        numbers = {"kept": [kept], "gamma": [gamma], "squares": [] if squares is None else [squares]}
        check_memory(given, {"scores": scores, "grads": grads, "weights": weights} | numbers | _apart(cuts, new_cuts))
        result = _Contiguous(masked)
        torch.ops.s2ap.perturb(
            [s.contiguous() for s in scores],
            [g.contiguous() for g in grads],
            [w.contiguous() for w in weights],
            kept,
            flat_patterns,
            cuts,
            squares,
            gamma,
            eps,
            straight_through,
            result.tensors,
            new_cuts,
            scales,
        )
        result.write_back()
    return masked, new_cuts, scales


@torch.no_grad()
def update(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One SGD step on the scores of all layers, in place: what ends an S2AP step.

    The perturbation of :func:`perturb` was never written into the scores, so "restore, then step" is this step alone.

    Args:
        scores: L tensors of one dtype and device, changed in place.
        grads: L tensors of the same shapes, the gradients at the perturbed scores.
        momentum_buffers: L tensors, changed in place; an empty list where ``momentum`` is 0.
        lr, momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.

    Raises:
        ValueError, TypeError: lists of different lengths, shapes, dtypes or devices; momentum without buffers; buffers or gradients
            that share memory with the scores.

    Equivalent to::

        for s, g, b in zip(scores, grads, momentum_buffers):
            d = g + weight_decay * s
            b.mul_(momentum).add_(d, alpha=1 - dampening)
            s.sub_(lr * (d + momentum * b if nesterov else b))
    """
    buffers = momentum_argument(momentum, momentum_buffers)
    check_lists({"scores": scores, "grads": grads} | buffers)
    check_memory({"scores": scores} | buffers, {"grads": grads})
    if scores:
        new_scores, new_buffers = _Contiguous(scores), _Contiguous(momentum_buffers)
        torch.ops.s2ap.update(
            new_scores.tensors,
            [g.contiguous() for g in grads],
            new_buffers.tensors,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
        )
        new_scores.write_back()
        new_buffers.write_back()


@torch.no_grad()
def update_select(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor | Sequence[int],
    cuts: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    patterns: Sequence[Pattern] | None = None,
    straight_through: bool = False,
    ascent: tuple[Sequence[Tensor], Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
    new_cuts: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """:func:`update` and the :func:`select` at the new scores in one call: what ends an S2AP step and begins the next.

    Args:
        scores, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov: as in :func:`update`.
        weights, kept, patterns, out: as in :func:`select`. The weights are those from before the step, if they step too.
        cuts: int64 [L, 5], those of the scores before the step; flips are counted against them.
        straight_through: as in :func:`perturb`.
        ascent: with ``straight_through``, where the gradients were taken: the ``grads`` and the returned ``scales`` of the :func:`perturb`
            that went there. None: at the scores.
        new_cuts: int64 [L, 5] that receives the cuts at the new scores (allocated if None); it may be ``cuts``.

    Returns:
        ``(masked, new_cuts, squares)``. Column 3 of ``new_cuts`` counts the mask entries that the step flipped. ``squares`` (float64 [L])
        are the sums of squares of the new scores, which the next :func:`perturb` need not take again.

    Raises:
        ValueError, TypeError: as in :func:`update` and :func:`select`; an ``ascent`` without ``straight_through``.

    Equivalent to::

        if straight_through:
            grads = [g * w * at.sign() for g, w, at in zip(grads, weights, where_the_gradients_were_taken)]
        update(scores, grads, momentum_buffers, lr=lr, ...)
        masked, new_cuts = select(scores, weights, kept)
        squares = torch.stack([s.double().square().sum() for s in scores])
    """
    buffers = momentum_argument(momentum, momentum_buffers)
    ascent_grads, scales = ascent or ([], None)
    if ascent is not None and not straight_through:
        raise ValueError("ascent: expected None without straight_through, whose signs are all that it is for")
    masked = outputs(out, weights)
    read = {"grads": grads, "weights": weights} | ({"ascent": ascent_grads} if ascent else {})
    check_lists({"scores": scores, "out": masked} | read | buffers)
    cuts = check_cuts(cuts, "cuts", scores)
    given = {"scores": scores, "out": [] if out is None else masked, "new_cuts": [] if new_cuts is None else [new_cuts]} | buffers
    new_cuts = cuts_or_zeros(new_cuts, "new_cuts", scores)
    squares, scales = per_layer(None, "squares", scores), per_layer(scales, "ascent", scores)
    if scores:
        flat_patterns, kept = patterns_and_kept(patterns, kept, scores)
        check_memory(given, read | {"kept": [kept], "scales": [scales]} | _apart(cuts, new_cuts))
        new_scores, new_buffers, result = _Contiguous(scores), _Contiguous(momentum_buffers), _Contiguous(masked)
        torch.ops.s2ap.update_select(
            new_scores.tensors,
            [g.contiguous() for g in grads],
            [g.contiguous() for g in ascent_grads],
            scales,
            new_buffers.tensors,
            [w.contiguous() for w in weights],
            kept,
            flat_patterns,
            cuts,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            straight_through,
            result.tensors,
            new_cuts,
            squares,
        )
        for written in (new_scores, new_buffers, result):
            written.write_back()
    return masked, new_cuts, squares


def check_finite(cuts: Tensor, names: Sequence[str]) -> None:
    """Raises ValueError naming the layers whose scores held NaN when ``cuts`` (int64 [L, 5]) was made.

    Reading ``cuts`` from a CUDA device waits for it, so call this at the end of a step, not within it.
    """
    counts = cuts[:, NANS].tolist()
    if any(counts):
        where = ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count)
        raise ValueError(f"scores: expected numbers, got NaN in {where}; lower the learning rate, or look at the loss")
