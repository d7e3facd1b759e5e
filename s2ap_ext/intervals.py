"""How far accuracies measured on some images may be from those on all images of their kind."""

from __future__ import annotations

import math

Z = 1.959963984540054  # of the normal distribution 95 % lie within so many standard deviations


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a fraction of ``count`` images, in [0, 1].

    Args:
        fraction: of the images, in [0, 1].
        count: how many images there were, at least 1.

    Source: Wilson, Journal of the American Statistical Association 22, 1927.
    """
    centre = fraction + Z * Z / (2 * count)
    spread = Z * math.sqrt(fraction * (1 - fraction) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    low = (centre - spread) / scale if fraction > 0 else 0.0  # exactly, whatever rounding makes of it
    high = (centre + spread) / scale if fraction < 1 else 1.0
    return max(low, 0.0), min(high, 1.0)


def difference(first: float, second: float, first_count: int, second_count: int) -> tuple[float, float]:
    """The 95 % interval of ``first - second``, two fractions of so many images, by Newcombe's hybrid of their Wilson intervals.

    The interval is that of independent samples. Models that are tested on the same images mostly differ less by chance, so it is rather too
    wide than too narrow for them.

    Source: Newcombe, Statistics in Medicine 1998, method 10.
    """
    (low1, high1), (low2, high2) = wilson(first, first_count), wilson(second, second_count)
    gap = first - second
    return gap - math.hypot(first - low1, high2 - second), gap + math.hypot(high1 - first, second - low2)
