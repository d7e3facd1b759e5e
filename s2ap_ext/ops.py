"""The fused ops, one call for all layers of a model.

Each chooses its implementation by the device of the tensors: the CUDA kernel, the C++ kernel, or the reference
(:func:`s2ap_ext.backend` tells which). All three give the same bits. The functions check their arguments, allocate what was
not given and call ``torch.ops.s2ap``. None of them is differentiable, since masks are piecewise constant; the straight-through
gradient is the layers' (:mod:`s2ap_ext.nn`).

Strides are free: an operand that is not contiguous is copied, and a channels_last result is written back in its own layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .reference import CUT_COLUMNS, GROUP, LARGEST_WINDOW, NANS, WEIGHT, WINDOW, Pattern, mask_from_cut

__all__ = ["Pattern", "check_finite", "mask_from_cut", "perturb", "select", "update", "update_select"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(arguments: dict[str, Sequence[Tensor]]) -> None:
    """All lists equally long; within a layer equal shapes; within the call one device and one dtype."""
    (first_name, first), *others = arguments.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{name}: expected {len(first)} tensors, one for each of {first_name}, got {len(tensors)}")
    dtype = getattr(first[0], "dtype", None) if len(first) else None
    device = getattr(first[0], "device", None) if len(first) else None
    for name, tensors in arguments.items():
        for i, (t, like) in enumerate(zip(tensors, first, strict=True)):
            # One condition for each of perhaps thousands of tensors; what is wrong with one is found out afterwards.
            fits = isinstance(t, Tensor) and t.dtype is dtype and t.device == device and t.shape == like.shape
            if not fits or dtype not in DTYPES:
                _refuse(name, i, t, first_name, first)


def _refuse(name: str, i: int, t: object, first_name: str, first: Sequence[Tensor]) -> NoReturn:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}[{i}]: expected a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}[{i}]: expected a floating point tensor, got {t.dtype}")
    if t.dtype != first[0].dtype:
        raise TypeError(f"{name}[{i}]: expected {first[0].dtype} like {first_name}[0], got {t.dtype}")
    if t.device != first[0].device:
        raise ValueError(f"{name}[{i}]: expected a tensor on {first[0].device} like {first_name}[0], got {t.device}")
    raise ValueError(f"{name}[{i}]: expected shape {tuple(first[i].shape)} like {first_name}[{i}], got {tuple(t.shape)}")


def _check_distinct(name: str, tensors: Sequence[Tensor]) -> None:
    """What is written must be written once."""
    first: dict[int, int] = {}
    for i, t in enumerate(tensors):
        if t.numel() and first.setdefault(t.data_ptr(), i) != i:
            raise ValueError(f"{name}[{i}]: expected memory of its own, got that of {name}[{first[t.data_ptr()]}]; a layer was given twice")


def _check_pattern(i: int, pattern: Pattern, numel: int) -> int:
    """The largest count of ``kept`` that ``pattern`` allows for a layer of ``numel`` elements."""
    kind, size, block = pattern
    if kind == WEIGHT:
        return numel
    if kind not in (GROUP, WINDOW) or size < 1 or block < 1 or not numel or numel % (size * block):
        raise ValueError(
            f"patterns[{i}]: expected WEIGHT, or GROUP or WINDOW with size * block dividing {numel} elements, got {tuple(pattern)}"
        )
    if kind == WINDOW and not 2 <= size <= LARGEST_WINDOW:
        raise ValueError(f"patterns[{i}]: expected a window of 2 to {LARGEST_WINDOW} elements, got {size}")
    return size


def _patterns_and_kept(
    patterns: Sequence[Pattern] | None, kept: Tensor | Sequence[int], scores: Sequence[Tensor]
) -> tuple[list[int], Tensor]:
    """The patterns as the ops take them, and ``kept`` as int64 [L] on the scores' device; counts known on the host are range-checked."""
    if patterns is None:
        largest = [s.numel() for s in scores]
    elif len(patterns) != len(scores):
        raise ValueError(f"patterns: expected {len(scores)}, one for each of scores, got {len(patterns)}")
    else:
        largest = [_check_pattern(i, p, s.numel()) for i, (p, s) in enumerate(zip(patterns, scores, strict=True))]
    flat = [] if patterns is None else [number for pattern in patterns for number in pattern]
    if isinstance(kept, Tensor):
        if kept.shape != (len(scores),) or kept.dtype != torch.int64:
            raise ValueError(f"kept: expected int64 of shape ({len(scores)},), got {kept.dtype} of shape {tuple(kept.shape)}")
        if kept.device.type == "cuda":
            return flat, kept.contiguous()  # reading it would synchronise; the kernels clamp
        counts = kept.tolist()
    else:
        counts = list(kept)
        if len(counts) != len(scores):
            raise ValueError(f"kept: expected {len(scores)} counts, one for each of scores, got {len(counts)}")
    for i, (count, most) in enumerate(zip(counts, largest, strict=True)):
        if not 0 <= count <= most:
            raise ValueError(f"kept[{i}]: expected a count in [0, {most}], got {count}")
    device = scores[0].device if scores else None
    return flat, torch.tensor(counts, dtype=torch.int64, device=device)


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


def _outputs(out: Sequence[Tensor] | None, like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in like] if out is None else list(out)


def _cuts(cuts: Tensor | None, name: str, scores: Sequence[Tensor]) -> Tensor:
    shape = (len(scores), CUT_COLUMNS)
    if cuts is None:
        return torch.zeros(shape, dtype=torch.int64, device=scores[0].device if scores else None)
    if cuts.shape != shape or cuts.dtype != torch.int64 or not cuts.is_contiguous():
        raise ValueError(f"{name}: expected contiguous int64 of shape {shape}, got {cuts.dtype} of shape {tuple(cuts.shape)}")
    return cuts


def _per_layer(values: Tensor | None, name: str, scores: Sequence[Tensor]) -> Tensor:
    """One float64 for each layer, zeros if there are none yet."""
    device = scores[0].device if scores else None
    if values is None:
        return torch.zeros(len(scores), dtype=torch.float64, device=device)
    if values.shape != (len(scores),) or values.dtype != torch.float64 or (scores and values.device != device):
        got = f"{values.dtype} of shape {tuple(values.shape)} on {values.device}"
        raise ValueError(f"{name}: expected float64 of shape ({len(scores)},) on {device}, got {got}")
    return values.contiguous()


def _check_size(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def _gammas(gamma: float | Tensor, scores: Sequence[Tensor]) -> Tensor:
    """One for each layer; values known on the host are range-checked."""
    if not isinstance(gamma, Tensor):
        _check_size("gamma", gamma)
        return torch.full((len(scores),), gamma, dtype=torch.float64, device=scores[0].device if scores else None)
    gammas = _per_layer(gamma, "gamma", scores)
    if gammas.device.type != "cuda":  # reading it would synchronise
        for i, value in enumerate(gammas.tolist()):
            _check_size(f"gamma[{i}]", value)
    return gammas


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
        out: L tensors that receive the masked weights (allocated if None).
        cuts: int64 [L, 5] that receives the cuts (allocated if None).

    Returns:
        ``(masked, cuts)``. ``masked[l]`` is ``weights[l]`` where the mask is 1 and +0 elsewhere. ``cuts[l]`` is the cut of
        layer l: ranking key and index of the lowest ranked entry that stays, and the number of NaN scores
        (see :mod:`s2ap_ext.reference`); :func:`mask_from_cut` rebuilds the mask, :func:`check_finite` reads the NaN column.

    Raises:
        ValueError, TypeError: lists of different lengths, shapes, dtypes or devices; a pattern that does not divide its layer; a count
            outside ``[0, numel]`` or the pattern's ``[0, size]``.

    Equivalent to::

        for s, w, k in zip(scores, weights, kept):
            order = s.abs().flatten().sort(stable=True).indices
            mask = torch.zeros(s.numel()).index_fill(0, order[s.numel() - k:], 1).view_as(s)
            masked.append(w * mask)
    """
    masked = _outputs(out, weights)
    _check({"scores": scores, "weights": weights, "out": masked})
    _check_distinct("out", masked)
    cuts = _cuts(cuts, "cuts", scores)
    if scores:
        flat_patterns, kept = _patterns_and_kept(patterns, kept, scores)
        result = _Contiguous(masked)
        torch.ops.s2ap.select(
            [s.contiguous() for s in scores],
            [w.contiguous() for w in weights],
            kept,
            flat_patterns,
            result.tensors,
            cuts,
        )
        result.write_back()
    return masked, cuts


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
        new_cuts: int64 [L, 5] that receives the cuts at ``s + z`` (allocated if None).

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
    _check_size("eps", eps)
    masked = _outputs(out, weights)
    _check({"scores": scores, "grads": grads, "weights": weights, "out": masked})
    _check_distinct("out", masked)
    cuts = _cuts(cuts, "cuts", scores)
    new_cuts = _cuts(new_cuts, "new_cuts", scores)
    scales = _per_layer(None, "scales", scores)
    gammas = _gammas(gamma, scores)
    if squares is not None:
        squares = _per_layer(squares, "squares", scores)
    if scores:
        flat_patterns, kept = _patterns_and_kept(patterns, kept, scores)
        result = _Contiguous(masked)
        torch.ops.s2ap.perturb(
            [s.contiguous() for s in scores],
            [g.contiguous() for g in grads],
            [w.contiguous() for w in weights],
            kept,
            flat_patterns,
            cuts,
            squares,
            gammas,
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
        ValueError, TypeError: lists of different lengths, shapes, dtypes or devices; momentum without buffers.

    Equivalent to::

        for s, g, b in zip(scores, grads, momentum_buffers):
            d = g + weight_decay * s
            b.mul_(momentum).add_(d, alpha=1 - dampening)
            s.sub_(lr * (d + momentum * b if nesterov else b))
    """
    buffers = _momentum_argument(momentum, momentum_buffers)
    _check({"scores": scores, "grads": grads} | buffers)
    for name, written in ({"scores": scores} | buffers).items():
        _check_distinct(name, written)
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


def _momentum_argument(momentum: float, momentum_buffers: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    if momentum == 0 and len(momentum_buffers):
        raise ValueError(f"momentum_buffers: expected none with momentum 0, got {len(momentum_buffers)}")
    return {"momentum_buffers": momentum_buffers} if momentum != 0 else {}


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
        new_cuts: int64 [L, 5] that receives the cuts at the new scores (allocated if None).

    Returns:
        ``(masked, new_cuts, squares)``. Column 3 of ``new_cuts`` counts the mask entries that the step flipped. ``squares`` (float64 [L])
        are the sums of squares of the new scores, which the next :func:`perturb` need not take again.

    Raises:
        ValueError, TypeError: as in :func:`update` and :func:`select`; an ``ascent`` without ``straight_through``; an ``out`` that is
            the memory of the weights.

    Equivalent to::

        if straight_through:
            grads = [g * w * at.sign() for g, w, at in zip(grads, weights, where_the_gradients_were_taken)]
        update(scores, grads, momentum_buffers, lr=lr, ...)
        masked, new_cuts = select(scores, weights, kept)
        squares = torch.stack([s.double().square().sum() for s in scores])
    """
    buffers = _momentum_argument(momentum, momentum_buffers)
    ascent_grads, scales = ascent or ([], None)
    if ascent is not None and not straight_through:
        raise ValueError("ascent: expected None without straight_through, whose signs are all that it is for")
    masked = _outputs(out, weights)
    _check({"scores": scores, "grads": grads, "weights": weights, "out": masked} | buffers | ({"ascent": ascent_grads} if ascent else {}))
    for name, written in ({"scores": scores, "out": masked} | buffers).items():
        _check_distinct(name, written)
    for i, (w, o) in enumerate(zip(weights, masked, strict=True)):
        if o.numel() and o.data_ptr() == w.data_ptr():
            raise ValueError(f"out[{i}]: expected memory of its own, got that of weights[{i}]")
    cuts = _cuts(cuts, "cuts", scores)
    new_cuts = _cuts(new_cuts, "new_cuts", scores)
    squares = _per_layer(None, "squares", scores)
    if scores:
        flat_patterns, kept = _patterns_and_kept(patterns, kept, scores)
        new_scores, new_buffers, result = _Contiguous(scores), _Contiguous(momentum_buffers), _Contiguous(masked)
        torch.ops.s2ap.update_select(
            new_scores.tensors,
            [g.contiguous() for g in grads],
            [g.contiguous() for g in ascent_grads],
            _per_layer(scales, "ascent", scores),
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
