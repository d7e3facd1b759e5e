"""The specification: every fused op for one layer, in plain PyTorch, with no tricks.

The kernels in ``csrc/`` must give the same bits as these functions, and where no kernel is available these functions are
what runs. Each function here has the name of its op; :mod:`s2ap_ext.ops` calls them for whole lists of layers.

**Ranking.** Elements are ordered by ``(|s|, index)``, where the index counts in logical contiguous (row-major) order whatever
the strides are. The ``kept`` largest stay. So among equal magnitudes the lowest indices are pruned first, exactly as a
stable ascending sort does it, and the result can be written as one *cut*: the smallest pair that stays. Element ``i`` is
kept iff ``(key_i, i) >= (cut key, cut index)``; that is all that is needed to rebuild a mask.

**Keys.** ``key(s)`` is the bit pattern of ``|s|`` as float32 (float64 for float64 scores), read as an integer. It orders like
``|s|``, equal magnitudes give equal keys, and -0.0 gives the key of 0.0. NaN has a key above infinity and is counted.

**Norms** are sums of squares in float64 in one fixed order (:func:`sum_of_squares`), so that their bits do not depend on the number
of threads or on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 4096  # elements per partial sum; csrc/plan.h has the same number
LANES = 64  # independent running sums within a chunk; csrc/plan.h has the same number

# Columns of a cut, one row of int64 per layer.
KEY, INDEX, NANS, FLIPS, SIGNS = range(5)
CUT_COLUMNS = 5
KEEP_NONE = torch.iinfo(torch.int64).max  # a cut key that no element reaches


def keys(scores: Tensor) -> Tensor:
    """Integer ranking keys of ``scores``, flat, in logical order: int32, or int64 for float64 scores."""
    magnitude = scores.detach().reshape(-1).abs()
    if magnitude.dtype == torch.float64:
        return magnitude.view(torch.int64)
    return magnitude.float().view(torch.int32)


def mask_from_cut(scores: Tensor, cut: Tensor) -> Tensor:
    """Rebuilds the boolean mask of ``scores`` from its ``cut`` (int64 [5]); same shape as ``scores``."""
    key = keys(scores).long()
    index = torch.arange(key.numel(), device=key.device)
    mask = (key > cut[KEY]) | ((key == cut[KEY]) & (index >= cut[INDEX]))
    return mask.view(scores.shape)


def cut(scores: Tensor, kept: int) -> Tensor:
    """The cut (int64 [5]) that keeps the ``kept`` largest of ``scores``; flips and sign changes are 0."""
    key = keys(scores)
    n = key.numel()
    row = torch.zeros(CUT_COLUMNS, dtype=torch.int64, device=scores.device)
    row[NANS] = scores.isnan().sum()
    if kept == 0:
        row[KEY] = KEEP_NONE
    elif kept < n:
        first = torch.argsort(key, stable=True)[n - kept]  # the lowest ranked element that stays
        row[KEY], row[INDEX] = key[first], first
    return row


def select(scores: Tensor, weight: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Keeps the ``kept`` entries of ``weight`` with the largest ``|scores|``; the others become +0.

    Returns:
        ``(masked, cut)``: the masked weight, of weight's shape, and its cut, int64 [5].
    """
    row = cut(scores, kept)
    return torch.where(mask_from_cut(scores, row), weight, 0), row


def sum_of_squares(x: Tensor) -> Tensor:
    """``sum(x**2)`` in float64, in the one order that every kernel follows.

    The elements are cut into chunks of 4096 (the last one padded with zeros), each laid out as 64 rows of 64 lanes. Lane j adds its
    column from top to bottom; then the upper half of the lanes is added to the lower half until one is left. The
    chunks' sums are summed the same way, again and again, until a single one remains. Squares are rounded before they
    are added (no fused multiply-add).
    """
    partial = x.detach().reshape(-1).double().square()
    if partial.numel() == 0:
        return partial.sum()
    while True:
        chunks = torch.nn.functional.pad(partial, (0, -partial.numel() % CHUNK)).view(-1, CHUNK // LANES, LANES)
        lanes = torch.zeros(chunks.shape[0], LANES, dtype=torch.float64, device=x.device)
        for row in range(CHUNK // LANES):
            lanes = lanes + chunks[:, row]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        partial = lanes[:, 0]
        if partial.numel() == 1:
            return partial[0]


def ascent_scale(scores: Tensor, grad: Tensor, gamma: float, eps: float) -> Tensor:
    """``gamma * ||s|| / (||g|| + eps)``, 0 where ``g`` is 0; a float64 scalar that holds a float32 value (float64 for float64 scores).

    Source: S2AP, arXiv 2510.18381 (the layer-normalised perturbation).
    """
    # On the host, because torch's sqrt on the CPU (MKL's) is not always the correctly rounded one.
    norm_s, norm_g = (math.sqrt(sum_of_squares(x).item()) for x in (scores, grad))
    scale = 0.0 if norm_g == 0 else (gamma * norm_s) / (norm_g + eps)
    scale = torch.tensor(scale, dtype=torch.float64, device=scores.device)
    return scale if scores.dtype == torch.float64 else scale.float().double()


def perturbed(scores: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """``s + z`` with ``z = scale * g``: the product rounded, then the sum rounded, then cast to the scores' dtype.

    Half precision is computed in float32 and rounded once at the end.
    """
    compute = torch.float64 if scores.dtype == torch.float64 else torch.float32
    z = grad.to(compute) * scale.to(compute)
    return (scores.to(compute) + z).to(scores.dtype)


def perturb(
    scores: Tensor, grad: Tensor, weight: Tensor, kept: int, cut_now: Tensor, gamma: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects at ``s + z`` without keeping ``s + z``: the masked weight there, its cut, and the scale of ``z``.

    Args:
        cut_now: the cut of ``scores`` (int64 [5]); flips are counted against it.

    Returns:
        ``(masked, cut, scale)``. The cut's FLIPS column counts entries whose mask changed, SIGNS those whose
        sign of score changed (sign(0) = 0, so leaving or reaching 0 counts). If both are 0 the loss and its
        straight-through gradient at ``s + z`` are exactly those at ``s``.
    """
    scale = ascent_scale(scores, grad, gamma, eps)
    moved = perturbed(scores, grad, scale)
    masked, row = select(moved, weight, kept)
    row[FLIPS] = (mask_from_cut(moved, row) != mask_from_cut(scores, cut_now)).sum()
    row[SIGNS] = (moved.sign() != scores.sign()).sum()
    return masked, row, scale


def update(
    scores: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """One SGD step on ``scores`` and ``momentum_buffer`` (None where ``momentum`` is 0), both in place.

    Operation for operation what ``torch.optim.SGD`` does once its momentum buffer exists (but see :func:`_add_scaled`). The
    scores were never moved to ``s + z``, so there is nothing to restore.
    """
    d = _add_scaled(grad, scores, weight_decay) if weight_decay != 0 else grad
    if momentum_buffer is not None:
        momentum_buffer.mul_(momentum)
        momentum_buffer.copy_(_add_scaled(momentum_buffer, d, 1 - dampening))
        d = _add_scaled(d, momentum_buffer, momentum) if nesterov else momentum_buffer
    scores.copy_(_add_scaled(scores, d, -lr))


def _add_scaled(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``a + alpha * b``. Half precision is computed in float32 with alpha in float32, as torch does on CUDA.

    On the CPU torch rounds alpha to half precision first, and in the last few elements of each thread's share the product as
    well, so that its own half-precision results depend on the number of threads.
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        return a.float().add(b.float(), alpha=alpha).to(a.dtype)
    return a.add(b, alpha=alpha)
