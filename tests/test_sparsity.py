"""Counts and score initialisation against worked numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2ap_ext.reference import GROUP, WINDOW, Pattern
from s2ap_ext.sparsity import kept_count, kept_in_pattern, score_init, sparsity_of


@pytest.mark.parametrize(
    ("numel", "sparsity", "kept"),
    [
        (10, 0.9, 1),
        (10, 0.1, 9),
        (100, 0.29, 71),
        (30, 0.1, 27),
        (1728, 0.9, 173),
        (1728, 0.95, 87),
        (1728, 0.99, 18),
        (64, 0.99, 1),
        (36864, 0.9, 3687),
        (2359296, 0.99, 23593),
        (7, 0.0, 7),
        (7, 1.0, 0),
        (0, 0.5, 0),
    ],
)
def test_kept_count(numel, sparsity, kept):
    assert kept_count(numel, sparsity) == kept


@given(st.integers(1, 10**9), st.integers(0, 1000))
def test_kept_count_is_exact_for_decimal_sparsities(numel, thousandths):
    assert kept_count(numel, thousandths / 1000) == numel - thousandths * numel // 1000


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, math.inf])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity: expected a number in \[0, 1\]"):
        kept_count(10, sparsity)


def test_score_init_worked_numbers():
    weight = torch.tensor([0.5, -1, 0.25, 0, 2, -0.5, 1, -0.125], dtype=torch.float64).view(2, 1, 2, 2)
    expected = [0.3061862178, -0.6123724357, 0.1530931089, 0, 1.2247448714, -0.3061862178, 0.6123724357, -0.0765465545]
    torch.testing.assert_close(score_init(weight).flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("shape", "largest"), [((8, 3, 3, 3), 0.4714045208), ((4, 64, 3, 3), 0.1020620726), ((2, 512, 3, 3), 0.0360843918)]
)
def test_score_init_scale(shape, largest):
    scores = score_init(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert scores.abs().max().item() == pytest.approx(largest, rel=1e-6)


def test_score_init_of_zeros_is_zeros():
    assert torch.equal(score_init(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_score_init_needs_two_dimensions():
    with pytest.raises(ValueError, match="at least two dimensions"):
        score_init(torch.ones(3))


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(GROUP, 49, 3), Pattern(WINDOW, 7, 1)])
def test_sparsity_of_a_count_gives_the_count_again(pattern):
    for numel in (1, 3, 10, 49, 288, 10_007, 1_000_003) if pattern == Pattern() else (147,):
        for kept in {*range(min(numel, 300)), numel - 1, numel} if pattern == Pattern() else range(pattern.size + 1):
            sparsity = sparsity_of(pattern, numel, kept)
            assert 0 <= sparsity <= 1
            assert kept_in_pattern(pattern, numel, sparsity) == kept
    assert sparsity_of(Pattern(), 0, 0) == 0
