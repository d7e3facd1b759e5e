"""Intervals and paired tests against scipy and worked numbers; Holm's correction against the definition."""

import math

import pytest
from scipy import stats

from s2ap_ext.experiments.statistics import Interval, holm, interval, paired

A = [0.905, 0.911, 0.889, 0.914, 0.900]
B = [0.897, 0.903, 0.892, 0.900, 0.891]


def test_the_interval_is_scipys():
    found = interval(A)
    low, high = stats.t.interval(0.95, len(A) - 1, loc=sum(A) / 5, scale=stats.sem(A))
    assert (found.mean, found.low, found.high) == pytest.approx((sum(A) / 5, low, high))


def test_the_interval_of_worked_numbers():
    """1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653."""
    found = interval([1.0, 2.0, 3.0])
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - found.low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval():
    assert interval([0.5]) == Interval(0.5, None, None)
    assert paired([0.5], [0.25]).p is None
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        interval([])


def test_pairs_are_compared_as_scipy_does_it():
    found, theirs = paired(A, B), stats.ttest_rel(A, B)
    reach = theirs.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, reach.low, reach.high))
    assert found.mean == pytest.approx(0.0072)


def test_pairs_vary_less_than_arms():
    assert paired(A, B).p < stats.ttest_ind(A, B).pvalue


@pytest.mark.parametrize(("a", "n", "p"), [(0.25, 5, 1.0), (0.5, 5, 0.0625), (0.5, 2, 0.5)])
def test_differences_that_do_not_vary_are_compared_by_their_signs(a, n, p):
    found = paired([a] * n, [0.25] * n)
    assert (found.mean, found.low, found.high, found.p) == (a - 0.25, a - 0.25, a - 0.25, p)
    rounded = paired([a + i / 359 for i in range(n)], [0.25 + i / 359 for i in range(n)])  # differ in their last bits
    assert rounded.p == p
    assert rounded.mean == pytest.approx(found.mean)
    sums = [sum(signs) for signs in _signs(n)]
    assert a == 0.25 or p == sum(abs(s) == n for s in sums) / len(sums)


def _signs(n):
    return [[]] if n == 0 else [[sign, *rest] for sign in (-1, 1) for rest in _signs(n - 1)]


def test_lists_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="against: expected 2 values to pair, got 1"):
        paired([0.1, 0.2], [0.1])


def test_holm_on_worked_numbers():
    """0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1, none below the one before it."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("alpha", [0.01, 0.04, 0.05, 0.2, 0.5])
def test_holm_rejects_what_its_procedure_rejects(alpha):
    ps = [0.011, 0.2, 0.0001, 0.04, 0.012, 0.9]
    rejected = set()
    for rank, p in enumerate(sorted(ps)):
        if p > alpha / (len(ps) - rank):
            break
        rejected.add(p)
    assert {p for p, corrected in zip(ps, holm(ps), strict=True) if corrected <= alpha} == rejected
