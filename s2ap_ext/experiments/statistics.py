"""Means with intervals, and paired comparisons over seeds.

The runs of one seed share their pretrained model and the order of their images, so arms are compared seed by seed: the differences vary
much less than the arms do. Their mean has a t-interval, and the paired t-test says how likely a mean so far from 0 is where there is no
difference. It takes the differences as about normal. The exact test without that, which compares the mean with those of all choices of
signs, cannot fall below ``2**(1 - n)`` for n seeds, which is 0.06 for five: with so few it could never tell anything. It is taken where
all differences are equal and the t-test is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .._extras import optional

LEVEL = 0.95
ROUNDING = 1e-9  # relative to the values: differences that vary less are equal, and what varies is their last bits


@dataclass(frozen=True)
class Interval:
    """A mean, and where the true one lies with 95 % confidence; None as ends where one value alone says nothing of that."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference with its interval, and ``p``, the probability of one as large without a true difference; None for one value."""

    p: float | None


def interval(values: Sequence[float]) -> Interval:
    """The mean of n ``values`` and ``mean -+ t(0.975, n - 1) * s / sqrt(n)``, with ``s`` their standard deviation; ValueError for none."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    reach = float(optional("scipy.stats").t.ppf((1 + LEVEL) / 2, n - 1)) * math.sqrt(variance / n)
    return Interval(mean, mean - reach, mean + reach)


def paired(values: Sequence[float], against: Sequence[float]) -> Difference:
    """How much larger ``values`` are than ``against``, pair by pair.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    if len(values) != len(against):
        raise ValueError(f"against: expected {len(values)} values to pair, got {len(against)}")
    differences = [a - b for a, b in zip(values, against, strict=True)]
    found = interval(differences)
    if len(differences) == 1:
        return Difference(found.mean, None, None, None)
    rounding = ROUNDING * max(map(abs, [*values, *against]))
    if max(differences) - min(differences) <= rounding:
        p = 1.0 if abs(found.mean) <= rounding else 2.0 ** (1 - len(differences))
        return Difference(found.mean, found.mean, found.mean, p)
    return Difference(found.mean, found.low, found.high, float(optional("scipy.stats").ttest_1samp(differences, 0).pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """``ps`` corrected for their number: each may be read as if it were the only one.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).

    Equivalent to::

        for rank, i in enumerate(sorted(range(n), key=ps.__getitem__)):
            largest = max(largest, (n - rank) * ps[i])
            corrected[i] = min(largest, 1)
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, (len(ps) - rank) * ps[i])
        corrected[i] = min(largest, 1.0)
    return corrected
