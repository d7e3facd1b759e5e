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

from .reference import CUT_COLUMNS, NANS, mask_from_cut

__all__ = ["check_finite", "mask_from_cut", "perturb", "select", "update"]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(arguments: dict[str, Sequence[Tensor]]) -> None:
    """All lists equally long; within a layer equal shapes; within the call one device and one dtype."""
    (first_name, first), *others = arguments.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{name}: expected {len(first)} tensors, one for each of {first_name}, got {len(tensors)}")
    for name, tensors in arguments.items():
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}]: expected a tensor, got {type(t).__name__}")
            if t.dtype not in DTYPES:
                raise TypeError(f"{name}[{i}]: expected a floating point tensor, got {t.dtype}")
            if t.dtype != first[0].dtype:
                raise TypeError(f"{name}[{i}]: expected {first[0].dtype} like {first_name}[0], got {t.dtype}")
            if t.device != first[0].device:
                raise ValueError(f"{name}[{i}]: expected a tensor on {first[0].device} like {first_name}[0], got {t.device}")
            if t.shape != first[i].shape:
                raise ValueError(f"{name}[{i}]: expected shape {tuple(first[i].shape)} like {first_name}[{i}], got {tuple(t.shape)}")


def _check_distinct(name: str, tensors: Sequence[Tensor]) -> None:
    """What is written must be written once."""
    first: dict[int, int] = {}
    for i, t in enumerate(tensors):
        if t.numel() and first.setdefault(t.data_ptr(), i) != i:
            raise ValueError(f"{name}[{i}]: expected memory of its own, got that of {name}[{first[t.data_ptr()]}]; a layer was given twice")


def _kept_tensor(kept: Tensor | Sequence[int], scores: Sequence[Tensor]) -> Tensor:
    """``kept`` as int64 [L] on the scores' device; counts that are known on the host are range-checked."""
    if isinstance(kept, Tensor):
        if kept.shape != (len(scores),) or kept.dtype != torch.int64:
            raise ValueError(f"kept: expected int64 of shape ({len(scores)},), got {kept.dtype} of shape {tuple(kept.shape)}")
        if kept.device.type == "cuda":
            return kept.contiguous()  # reading it would synchronise; the kernels clamp
        counts = kept.tolist()
    else:
        counts = list(kept)
        if len(counts) != len(scores):
            raise ValueError(f"kept: expected {len(scores)} counts, one for each of scores, got {len(counts)}")
    for i, (count, s) in enumerate(zip(counts, scores, strict=True)):
        if not 0 <= count <= s.numel():
            raise ValueError(f"kept[{i}]: expected a count in [0, {s.numel()}], got {count}")
    device = scores[0].device if scores else None
    return torch.tensor(counts, dtype=torch.int64, device=device)


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


@torch.no_grad()
def select(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor | Sequence[int],
    *,
    out: Sequence[Tensor] | None = None,
    cuts: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Top-k masked weights of all layers in one call.

    Args:
        scores: L tensors of any shape, floating point, one dtype and device.
        weights: L tensors with the shapes and dtype of ``scores``.
        kept: how many entries each layer keeps; int64 [L], on the device of the scores, or L integers.
        out: L tensors that receive the masked weights (allocated if None).
        cuts: int64 [L, 5] that receives the cuts (allocated if None).

    Returns:
        ``(masked, cuts)``. ``masked[l]`` is ``weights[l]`` where the mask is 1 and +0 elsewhere. ``cuts[l]`` is the cut of
        layer l: ranking key and index of the lowest ranked entry that stays, and the number of NaN scores
        (see :mod:`s2ap_ext.reference`); :func:`mask_from_cut` rebuilds the mask, :func:`check_finite` reads the NaN column.

    Raises:
        ValueError, TypeError: lists of different lengths, shapes, dtypes or devices; a count outside ``[0, numel]``.

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
        result = _Contiguous(masked)
        torch.ops.s2ap.select(
            [s.contiguous() for s in scores],
            [w.contiguous() for w in weights],
            _kept_tensor(kept, scores),
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
    gamma: float,
    eps: float = 1e-12,
    out: Sequence[Tensor] | None = None,
    new_cuts: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Masked weights of all layers at the perturbed scores ``s + z``, ``z = gamma * ||s|| * g / (||g|| + eps)`` per layer.

    ``s + z`` itself is never stored: the scores stay as they are, so restoring them costs nothing and is exact.

    Args:
        scores, weights, kept, out: as in :func:`select`.
        grads: L tensors, the gradients of the loss with respect to the scores.
        cuts: int64 [L, 5], what :func:`select` returned at these scores.
        gamma: relative size of the perturbation, >= 0.
        eps: added to ``||g||``.
        new_cuts: int64 [L, 5] that receives the cuts at ``s + z`` (allocated if None).

    Returns:
        ``(masked, new_cuts, scales)``. Column 3 of ``new_cuts`` counts the mask entries that flipped, column 4 the scores
        whose sign changed. ``scales`` (float64 [L]) are the factors of the gradients, ``z = scales[l] * grads[l]``.

    Raises:
        ValueError, TypeError: as in :func:`select`; ``gamma`` or ``eps`` negative or not finite.

    Source: S2AP, arXiv 2510.18381.

    Equivalent to::

        for s, g, w, k in zip(scores, grads, weights, kept):
            z = gamma * s.norm() * g / (g.norm() + eps)
            masked.append(select(s + z, w, k))
    """
    for name, value in {"gamma": gamma, "eps": eps}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    masked = _outputs(out, weights)
    _check({"scores": scores, "grads": grads, "weights": weights, "out": masked})
    _check_distinct("out", masked)
    cuts = _cuts(cuts, "cuts", scores)
    new_cuts = _cuts(new_cuts, "new_cuts", scores)
    scales = torch.zeros(len(scores), dtype=torch.float64, device=cuts.device)
    if scores:
        result = _Contiguous(masked)
        torch.ops.s2ap.perturb(
            [s.contiguous() for s in scores],
            [g.contiguous() for g in grads],
            [w.contiguous() for w in weights],
            _kept_tensor(kept, scores),
            cuts,
            gamma,
            eps,
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
    has_momentum = momentum != 0
    if not has_momentum and len(momentum_buffers):
        raise ValueError(f"momentum_buffers: expected none with momentum 0, got {len(momentum_buffers)}")
    arguments = {"scores": scores, "grads": grads}
    if has_momentum:
        arguments["momentum_buffers"] = momentum_buffers
    _check(arguments)
    for name in arguments.keys() - {"grads"}:
        _check_distinct(name, arguments[name])
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


def check_finite(cuts: Tensor, names: Sequence[str]) -> None:
    """Raises ValueError naming the layers whose scores held NaN when ``cuts`` (int64 [L, 5]) was made.

    Reading ``cuts`` from a CUDA device waits for it, so call this at the end of a step, not within it.
    """
    counts = cuts[:, NANS].tolist()
    if any(counts):
        where = ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count)
        raise ValueError(f"scores: expected numbers, got NaN in {where}; lower the learning rate, or look at the loss")
