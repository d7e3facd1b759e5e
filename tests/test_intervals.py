"""Intervals by their equations, against SciPy and against published examples."""

import pytest
from scipy.stats import binomtest

from s2ap_ext.intervals import difference, wilson


def test_wilson_by_its_equation():
    """The interval's ends p are where (share - p)^2 = z^2 p (1 - p) / n."""
    for held, count in ((8, 10), (1, 128), (447, 1000), (0, 5), (5, 5)):
        for p in wilson(held / count, count):
            assert (held / count - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / count, abs=1e-12)
    assert wilson(0, 5)[0] == 0
    assert wilson(1, 5)[1] == 1
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # a published example


@pytest.mark.parametrize(("held", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 20), (327, 359), (4321, 10_000)])
def test_wilson_is_that_of_scipy(held, count):
    expected = binomtest(held, count).proportion_ci(method="wilson")
    assert wilson(held / count, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_difference_is_that_of_newcombes_paper():
    """56 of 70 against 48 of 80, his first example: 0.0524 to 0.3339."""
    assert difference(56 / 70, 48 / 80, 70, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = difference(0.5, 0.5, 100, 100)
    assert low == pytest.approx(-high)
