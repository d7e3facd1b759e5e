"""The specification: every fused op for one layer, in plain PyTorch, with no tricks.

The kernels in ``csrc/`` must give the same bits as these functions, and where no kernel is available these functions are
what runs. Each function here has the name of its op; :mod:`s2ap_ext.ops` calls them for whole lists of layers.

**Ranking.** Elements are ordered by ``(|s|, index)``, where the index counts in logical contiguous (row-major) order whatever
the strides are. The ``kept`` largest stay. So among equal magnitudes the lowest indices are pruned first, exactly as a
stable ascending sort does it, and the result can be written as one *cut*: the smallest pair that stays. Element ``i`` is
kept iff ``(key_i, i) >= (cut key, cut index)``; that is all that is needed to rebuild a mask.

**Patterns.** What stays or goes as one, and among what it is ranked, is a layer's :class:`Pattern`: single weights of the whole layer,
groups of weights (such as channels), or single weights within small windows (N:M sparsity).

**Keys.** ``key(s)`` is the bit pattern of ``|s|`` as float32 (float64 for float64 scores), read as an integer. It orders like
``|s|``, equal magnitudes give equal keys, and -0.0 gives the key of 0.0. NaN has a key above infinity and is counted.

**Norms** are sums of squares in float64 in one fixed order (:func:`sum_of_squares`), so that their bits do not depend on the number
of threads or on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 4096  # elements per partial sum; csrc/plan.h has the same number
LANES = 64  # independent running sums within a chunk; csrc/plan.h has the same number

# Columns of a cut, one row of int64 per layer.
KEY, INDEX, NANS, FLIPS, SIGNS = range(5)
CUT_COLUMNS = 5
SMALLEST_GAMMA = 2.0**-32  # that budgeted_gamma looks at
TRIES = 64  # of budgeted_gamma: the last 32 halve whatever bracket is left, down to two neighbours
KEEP_NONE = torch.iinfo(torch.int64).max  # a cut key that no element reaches

# Kinds of patterns; csrc/plan.h has the same numbers.
WEIGHT, GROUP, WINDOW = range(3)


class Pattern(NamedTuple):
    """What a layer's ``kept`` counts. Element ``i`` of the flat scores has the place ``(i // block) % size``.

    * ``WEIGHT`` (no size): the ``kept`` largest elements of the layer stay.
    * ``GROUP``: all elements of one place are a group, and the ``kept`` groups with the largest ``sum(|s|)`` stay, equal ones by place. The
      output channels of a convolution are ``size`` groups of ``block = numel / size``. Where ``size * block`` is less than all elements,
      each group recurs.
    * ``WINDOW``: ``size`` elements that differ only in their place are a window (neighbours for ``block`` 1), and in each window the
      ``kept`` largest elements stay, equal ones by place. 2:4 sparsity along the input channels of a convolution is ``size`` 4,
      ``block = kernel height * kernel width``.

    ``size * block`` divides the number of elements.
    """

    kind: int = WEIGHT
    size: int = 0
    block: int = 1


SINGLE_WEIGHTS = Pattern()
LARGEST_WINDOW = 32


def keys(scores: Tensor) -> Tensor:
    """Integer ranking keys of ``scores``, flat, in logical order: int32, or int64 for float64 scores."""
    magnitude = scores.detach().reshape(-1).abs()
    if magnitude.dtype == torch.float64:
        return magnitude.view(torch.int64)
    return magnitude.float().view(torch.int32)


def group_sums(scores: Tensor, pattern: Pattern) -> Tensor:
    """``sum(|s|)`` of each group, float64 [size], in the order of :func:`sum_of_squares`. A group with NaN has one and the same NaN."""
    groups = scores.detach().reshape(-1, pattern.size, pattern.block).transpose(0, 1).reshape(pattern.size, -1)
    sums = _sum_in_order(groups.double().abs())
    return torch.where(sums.isnan(), torch.nan, sums)


def mask_from_cut(scores: Tensor, cut: Tensor, pattern: Pattern = SINGLE_WEIGHTS) -> Tensor:
    """Rebuilds the boolean mask of ``scores`` from its ``cut`` (int64 [5]); same shape as ``scores``."""
    if pattern.kind == WINDOW:
        key = keys(scores).view(-1, pattern.size, pattern.block)
        place_in_order = key.argsort(dim=1, stable=True).argsort(dim=1)
        return (place_in_order >= pattern.size - cut[INDEX]).view(scores.shape)
    key = keys(scores if pattern.kind == WEIGHT else group_sums(scores, pattern)).long()
    index = torch.arange(key.numel(), device=key.device)
    mask = (key > cut[KEY]) | ((key == cut[KEY]) & (index >= cut[INDEX]))
    if pattern.kind == GROUP:
        mask = mask.view(-1, 1).expand(scores.numel() // (pattern.size * pattern.block), pattern.size, pattern.block).reshape(-1)
    return mask.view(scores.shape)


def cut(scores: Tensor, kept: int, pattern: Pattern = SINGLE_WEIGHTS) -> Tensor:
    """The cut (int64 [5]) that keeps the ``kept`` largest of ``scores``; flips and sign changes are 0.

    KEY and INDEX are those of the lowest ranked element, or group, that stays. Windows have no cut in common: INDEX is ``kept``, KEY 0.
    """
    row = torch.zeros(CUT_COLUMNS, dtype=torch.int64, device=scores.device)
    row[NANS] = scores.isnan().sum()
    if pattern.kind == WINDOW:
        row[INDEX] = kept
        return row
    key = keys(scores if pattern.kind == WEIGHT else group_sums(scores, pattern))
    n = key.numel()
    if kept == 0:
        row[KEY] = KEEP_NONE
    elif kept < n:
        first = torch.argsort(key, stable=True)[n - kept]  # the lowest ranked that stays
        row[KEY], row[INDEX] = key[first], first
    return row


def select(scores: Tensor, weight: Tensor, kept: int, pattern: Pattern = SINGLE_WEIGHTS) -> tuple[Tensor, Tensor]:
    """Keeps the ``kept`` entries (or groups, or entries of each window) of ``weight`` with the largest ``|scores|``; the others become +0.

    Returns:
        ``(masked, cut)``: the masked weight, of weight's shape, and its cut, int64 [5].
    """
    row = cut(scores, kept, pattern)
    return torch.where(mask_from_cut(scores, row, pattern), weight, 0), row


def sum_of_squares(x: Tensor) -> Tensor:
    """``sum(x**2)`` in float64, in the one order that every kernel follows.

    The elements are cut into chunks of 4096 (the last one padded with zeros), each laid out as 64 rows of 64 lanes. Lane j adds its
    column from top to bottom; then the upper half of the lanes is added to the lower half until one is left. The
    chunks' sums are summed the same way, again and again, until a single one remains. Squares are rounded before they
    are added (no fused multiply-add).
    """
    return _sum_in_order(x.detach().reshape(1, -1).double().square())[0]


def _sum_in_order(partial: Tensor) -> Tensor:
    """Sums of the rows of ``partial`` (float64 [R, n]) in the order of :func:`sum_of_squares`."""
    if partial.shape[1] == 0:
        return partial.sum(dim=1)
    while True:
        chunks = torch.nn.functional.pad(partial, (0, -partial.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK // LANES, LANES))
        lanes = torch.zeros_like(chunks[:, :, 0])
        for row in range(CHUNK // LANES):
            lanes = lanes + chunks[:, :, row]
        while lanes.shape[2] > 1:
            half = lanes.shape[2] // 2
            lanes = lanes[:, :, :half] + lanes[:, :, half:]
        partial = lanes[:, :, 0]
        if partial.shape[1] == 1:
            return partial[:, 0]


def score_grad(grad: Tensor, weight: Tensor, at: Tensor) -> Tensor:
    """The straight-through gradient of scores that stand ``at``: ``dL/d(w*m) * w * sign(at)``, where sign(0) = 0.

    The first product is rounded; the second is exact.
    """
    return grad * weight * at.sign()


def ascent_scale(scores: Tensor, grad: Tensor, gamma: float, eps: float, square: Tensor | None = None) -> Tensor:
    """``gamma * ||s|| / (||g|| + eps)``, and 0 where ``g`` or ``gamma`` is 0, even if a norm is infinite.

    Args:
        square: ``sum_of_squares(scores)`` where that is known already.

    Returns:
        A float64 scalar that holds a float32 value (float64 for float64 scores).

    Source: S2AP, arXiv 2510.18381 (the layer-normalised perturbation).
    """
    # On the host, because torch's sqrt on the CPU (MKL's) is not always the correctly rounded one.
    norm_s, norm_g = (math.sqrt(x.item()) for x in (sum_of_squares(scores) if square is None else square, sum_of_squares(grad)))
    size = 0.0 if gamma == 0 or norm_g == 0 else (gamma * norm_s) / (norm_g + eps)
    scale = torch.tensor(size, dtype=torch.float64, device=scores.device)
    return scale if scores.dtype == torch.float64 else scale.float().double()


def perturbed(scores: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    """``s + z`` with ``z = scale * g``: the product rounded, then the sum rounded, then cast to the scores' dtype.

    Half precision is computed in float32 and rounded once at the end.
    """
    compute = torch.float64 if scores.dtype == torch.float64 else torch.float32
    z = grad.to(compute) * scale.to(compute)
    return (scores.to(compute) + z).to(scores.dtype)


def perturb(
    scores: Tensor,
    grad: Tensor,
    weight: Tensor,
    kept: int,
    cut_now: Tensor,
    gamma: float,
    eps: float,
    pattern: Pattern = SINGLE_WEIGHTS,
    straight_through: bool = False,
    square: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects at ``s + z`` without keeping ``s + z``: the masked weight there, its cut, and the scale of ``z``.

    Args:
        cut_now: the cut of ``scores`` (int64 [5]); flips are counted against it.
        straight_through: ``grad`` is the gradient of the masked weight; the scores' is made from it (:func:`score_grad`).
        square: ``sum_of_squares(scores)`` where that is known already.

    Returns:
        ``(masked, cut, scale)``. The cut's FLIPS column counts entries whose mask changed, SIGNS those whose
        sign of score changed (sign(0) = 0, so leaving or reaching 0 counts). If both are 0 the loss and its
        straight-through gradient at ``s + z`` are exactly those at ``s``.
    """
    if straight_through:
        grad = score_grad(grad, weight, scores)
    scale = ascent_scale(scores, grad, gamma, eps, square)
    moved = perturbed(scores, grad, scale)
    masked, row = select(moved, weight, kept, pattern)
    row[FLIPS] = (mask_from_cut(moved, row, pattern) != mask_from_cut(scores, cut_now, pattern)).sum()
    row[SIGNS] = (moved.sign() != scores.sign()).sum()
    return masked, row, scale


def wanted_flips(share: float, kept: Tensor, numel: int) -> Tensor:
    """The flips that a share of the kept weights stands for: ``share * kept``, but never more than a layer can flip.

    Args:
        kept: how many of ``numel`` weights stay, an int64 scalar.

    Returns:
        A float64 scalar. A product that only rounding has lifted above an integer counts as that integer.
    """
    possible = 2 * torch.minimum(kept, numel - kept)
    return torch.minimum(share * kept.double() * (1 - 1e-12), possible.double())


def swap_flips(pattern: Pattern, numel: int) -> int:
    """How many of ``numel`` mask entries flip when one unit of ``pattern`` takes another one's place: both of its entries, or groups."""
    return 2 * (numel // pattern.size if pattern.kind == GROUP else 1)


def gamma_at(place: Tensor) -> Tensor:
    """The gammas that :func:`budgeted_gamma` chooses among, by their place, int64 in [0, 2**32]: 2**-32 is the first and 1 the last.

    They are the float64 numbers with 27 bits after the first: dense enough for every float32 number to be the scale of one of them.
    """
    return (place + ((1023 - 32) << 27) << 25).view(torch.float64)


def place_of(gamma: Tensor) -> Tensor:
    """The place of the largest :func:`gamma_at` that is not above ``gamma``, positive float64. It may be below 0 or above 2**32."""
    return (gamma.view(torch.int64) >> 25) - ((1023 - 32) << 27)


def budgeted_gamma(flips_at: Callable[[Tensor, Tensor], Tensor], wanted: Tensor, swap: Tensor, start: Tensor) -> Tensor:
    """For each layer a gamma, up to 1, whose perturbation flips at least ``wanted`` mask entries, and less than one swap beyond.

    Where no gamma does that (entries that flip at the same gamma), it is one that flips enough while its neighbour below does not; where
    none is seen to flip enough, it is 1. At first the next gamma to try follows from proportion, then by turns from the straight line
    between the largest gamma with too few flips and the smallest with enough, and as the middle of the two. In training, ``start`` is the
    gamma of the step before, and four to eight tries are the rule.

    Args:
        flips_at: takes gammas, float64 [L], and of which layers they are asked, bool [L], and gives the numbers of mask entries that
            perturbations of that size flip, int64 [L]; any number for layers that are not asked.
        wanted: float64 [L], on the device where the gammas shall be.
        swap: int64 [L], how many entries flip when one unit takes another one's place in the mask: 2 where single weights are pruned.
        start: float64 [L], the gammas to try first.

    Returns:
        float64 [L]; 0 where no flip is wanted. On the CPU the search ends when all layers are done; on a device it makes ``TRIES`` tries,
        with the same result, so that nothing waits for it.
    """
    last = 1 << 32
    low, high = torch.zeros_like(swap), torch.full_like(swap, last)
    too_few, enough_flips = torch.zeros_like(wanted), torch.full_like(wanted, torch.inf)
    done = wanted <= 0
    place = torch.where(done | (start <= 0), last // 2, place_of(start)).clamp(1, last - 1)
    aim = wanted + 0.25 * swap
    for tried in range(TRIES):
        if done.device.type == "cpu" and done.all():
            break
        flips = flips_at(gamma_at(place), ~done).double()
        enough = flips >= wanted
        low, too_few = torch.where(done | enough, low, place), torch.where(done | enough, too_few, flips)
        high, enough_flips = torch.where(done | ~enough, high, place), torch.where(done | ~enough, enough_flips, flips)
        done = done | (enough & (flips < wanted + swap)) | (high - low <= 1)
        if tried % 3 == 2 or tried >= TRIES - 32:
            following = (low + high) // 2
        else:
            # A line needs flips at both of its ends; before these are known gamma grows or shrinks in proportion, by a factor of 4 at most.
            at, below, above = gamma_at(place), gamma_at(low), gamma_at(high)
            line = below + (above - below) * ((aim - too_few) / (enough_flips - too_few))
            proportion = at * (aim / flips).clamp(0.25, 4)
            following = place_of(torch.where((low > 0) & (high < last), line, proportion))
        place = torch.where(done, place, torch.minimum(torch.maximum(following, low + 1), high - 1))
    return torch.where(wanted > 0, gamma_at(high), 0)


def flip_gamma(
    scores: Tensor,
    grad: Tensor,
    weight: Tensor,
    kept: int,
    cut_now: Tensor,
    share: float,
    eps: float,
    pattern: Pattern = SINGLE_WEIGHTS,
    straight_through: bool = False,
    start: float = 1e-3,
) -> float:
    """The gamma whose :func:`perturb` flips ``share`` times as many mask entries as stay (:func:`budgeted_gamma`)."""
    stay = kept if pattern.kind == WEIGHT else kept * (scores.numel() // pattern.size)
    wanted = wanted_flips(share, torch.tensor(stay), scores.numel()).view(1)

    def flips_at(gamma: Tensor, asked: Tensor) -> Tensor:
        row = perturb(scores, grad, weight, kept, cut_now, gamma.item(), eps, pattern, straight_through)[1]
        return row[FLIPS].view(1)

    swap = torch.tensor([swap_flips(pattern, scores.numel())])
    return budgeted_gamma(flips_at, wanted, swap, torch.tensor([start], dtype=torch.float64)).item()


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


def update_select(
    scores: Tensor,
    grad: Tensor,
    ascent: tuple[Tensor, Tensor] | None,
    momentum_buffer: Tensor | None,
    weight: Tensor,
    kept: int,
    cut_now: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    pattern: Pattern = SINGLE_WEIGHTS,
    straight_through: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`update`, then :func:`select` at the new scores.

    Args:
        ascent: where the gradient was taken, as ``(grad, scale)`` of the :func:`perturb` with ``straight_through`` that went there, or
            None: at ``scores``. Only the signs there matter, and only to ``straight_through``.
        cut_now: the cut of ``scores`` before the step; the new cut's FLIPS column counts the entries whose mask the step changed.
        straight_through: as in :func:`perturb`.

    Returns:
        ``(masked, cut, square)``, the last one ``sum_of_squares`` of the new scores.
    """
    if straight_through:
        at = scores if ascent is None else perturbed(scores, score_grad(ascent[0], weight, scores), ascent[1])
        grad = score_grad(grad, weight, at)
    mask_now = mask_from_cut(scores, cut_now, pattern)
    update(scores, grad, momentum_buffer, lr, momentum, dampening, weight_decay, nesterov)
    masked, row = select(scores, weight, kept, pattern)
    row[FLIPS] = (mask_from_cut(scores, row, pattern) != mask_now).sum()
    return masked, row, sum_of_squares(scores)


def _add_scaled(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``a + alpha * b``. Half precision is computed in float32 with alpha in float32, as torch does on CUDA.

    On the CPU torch rounds alpha to half precision first, and in the last few elements of each thread's share the product as
    well, so that its own half-precision results depend on the number of threads.
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        return a.float().add(b.float(), alpha=alpha).to(a.dtype)
    return a.add(b, alpha=alpha)
