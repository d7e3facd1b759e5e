"""N:M and grouped selection: the reference against naive loops, the kernels against the reference."""

import itertools

import pytest
import torch
from op_cases import HARD, assert_same, compiled, randn, same_bits, same_numbers

from s2ap_ext import ops, reference
from s2ap_ext.reference import GROUP, SINGLE_WEIGHTS, WINDOW, Pattern

# (pattern, number of elements); the larger ones are more than what one thread takes at once.
PATTERNS = [
    (Pattern(WINDOW, 4, 1), 4096),  # 2:4 in a linear layer
    (Pattern(WINDOW, 8, 1), 40_000),
    (Pattern(WINDOW, 4, 9), 64 * 16 * 9),  # 2:4 along the input channels of a 3 x 3 convolution
    (Pattern(WINDOW, 32, 7), 32 * 7 * 101),
    (Pattern(WINDOW, 3, 1), 3),
    (Pattern(GROUP, 16, 27), 16 * 27),  # output channels
    (Pattern(GROUP, 40, 2304), 40 * 2304),
    (Pattern(GROUP, 6, 16 * 96), 3 * 6 * 16 * 96),  # heads of packed q, k, v
    (Pattern(GROUP, 12, 64), 12 * 64 * 100),  # columns
    (Pattern(GROUP, 1, 5000), 5000),
    (Pattern(GROUP, 50, 1), 50_000),  # every 50th element
]


def naive_mask(scores, kept, pattern):
    """By loops over the elements, as the text of Pattern has it."""
    flat = scores.flatten().abs().tolist()
    place = [i // pattern.block % pattern.size for i in range(len(flat))]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    if pattern.kind == GROUP:
        sums = [sum(x for x, p in zip(flat, place, strict=True) if p == group) for group in range(pattern.size)]
        stay = sorted(range(pattern.size), key=lambda group: (sums[group], group))[pattern.size - kept :]
        mask[[i for i, p in enumerate(place) if p in stay]] = True
    else:
        windows = {}
        for i in range(len(flat)):
            windows.setdefault((i // (pattern.block * pattern.size), i % pattern.block), []).append(i)
        for window in windows.values():
            assert len(window) == pattern.size
            mask[sorted(window, key=lambda i: (flat[i], place[i]))[pattern.size - kept :]] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize(
    ("pattern", "n"),
    [(Pattern(GROUP, 4, 3), 24), (Pattern(GROUP, 5, 1), 20), (Pattern(WINDOW, 4, 1), 24), (Pattern(WINDOW, 3, 2), 24)],
)
@pytest.mark.parametrize("few", [False, True], ids=["distinct", "ties"])
def test_masks_are_those_of_naive_loops(pattern, n, few):
    scores = randn(n, seed=n).mul(4).round() if few else randn(n, seed=n).double()  # sums of small integers are exact in any order
    weight = randn(n, seed=1, dtype=scores.dtype)
    for kept in range(pattern.size + 1):
        (masked,), cuts = ops.select([scores], [weight], [kept], patterns=[pattern])
        mask = naive_mask(scores, kept, pattern)
        assert torch.equal(ops.mask_from_cut(scores, cuts[0], pattern), mask), kept
        assert torch.equal(masked, torch.where(mask, weight, 0))
        assert int(mask.sum()) == n * kept // pattern.size


def test_two_of_four_by_hand():
    scores = torch.tensor([[3.0, -1, 2, -4], [1, 1, 1, 1], [0, 5, 0, 5]])
    (masked,), _ = ops.select([scores], [torch.ones(3, 4)], [2], patterns=[Pattern(WINDOW, 4)])
    assert masked.tolist() == [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]]


def test_channels_by_hand():
    scores = torch.tensor([[1.0, -1], [3, 0], [0, -2], [2, 0]])  # sums 2, 3, 2, 2
    (masked,), cuts = ops.select([scores], [torch.ones(4, 2)], [2], patterns=[Pattern(GROUP, 4, 2)])
    assert masked.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert cuts[0, reference.INDEX] == 3


def layers_for(kind, dtype):
    for (pattern, n), seed in zip(PATTERNS, itertools.count()):
        counts = (
            {0, 1, pattern.size // 2, pattern.size - 1, pattern.size} if n < 10_000 else {max(1, pattern.size // 10), pattern.size // 2}
        )
        for kept in counts:
            tensors = (HARD[kind](randn(n, seed=seed)), randn(n, seed=seed + 1, scale=1e-3), randn(n, seed=seed + 2))
            yield *(t.to(dtype) for t in tensors), kept, pattern
    for n in (100, 20_000):  # among plain layers
        yield *(t.to(dtype) for t in (randn(n), randn(n, seed=1), randn(n, seed=2))), n // 3, SINGLE_WEIGHTS


@compiled
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "equal", "zeros", "few values", "infinite", "NaN among numbers"])
def test_kernels_match_the_reference(kind, dtype, straight_through):
    scores, grads, weights, kept, patterns = (list(column) for column in zip(*layers_for(kind, dtype), strict=True))
    masked, cuts = ops.select(scores, weights, kept, patterns=patterns)
    how = {"gamma": 0.3, "patterns": patterns, "straight_through": straight_through}
    moved_masked, new_cuts, scales = ops.perturb(scores, grads, weights, kept, cuts, **how)
    before = [s.clone() for s in scores]
    sgd = {"lr": 10.0, "weight_decay": 5e-4}
    ascent = (grads, scales) if straight_through else None
    how = {"patterns": patterns, "straight_through": straight_through, "ascent": ascent}
    new_masked, newest_cuts, squares = ops.update_select(scores, grads, [], weights, kept, cuts, **sgd, **how)
    for i, (s, g, w, k, p) in enumerate(zip(before, grads, weights, kept, patterns, strict=True)):
        expected, row = reference.select(s, w, k, p)
        assert_same(cuts[i], masked[i], row, expected, k)
        moved, moved_row, scale = reference.perturb(s, g, w, k, row, 0.3, 1e-12, p, straight_through)
        assert same_bits(scales[i], scale)
        assert_same(new_cuts[i], moved_masked[i], moved_row, moved, k)
        arguments = (ascent and (g, scale), None, w, k, row, 10.0, 0.0, 0.0, 5e-4, False, p, straight_through)
        expected, row, square = reference.update_select(s, g, *arguments)
        # The CPU fuses a + alpha * b in an update where the machine can, and the reference asks torch, which does the same.
        assert same_numbers(scores[i], s)
        assert same_numbers(squares[i], square)
        assert_same(newest_cuts[i], new_masked[i], row, expected, k)


def select_with(pattern, n=24, kept=1):
    return ops.select([torch.ones(n)], [torch.ones(n)], [kept], patterns=[pattern])


BAD_PATTERNS = {
    r"patterns\[0\]: expected WEIGHT, or GROUP or WINDOW with size \* block dividing 24 elements, got \(1, 5, 1\)": lambda: select_with(
        Pattern(GROUP, 5)
    ),
    r"patterns\[0\]: expected WEIGHT.* got \(2, 4, 5\)": lambda: select_with(Pattern(WINDOW, 4, 5)),
    r"patterns\[0\]: expected WEIGHT.* got \(7, 4, 1\)": lambda: select_with(Pattern(7, 4)),
    r"patterns\[0\]: expected a window of 2 to 32 elements, got 64": lambda: select_with(Pattern(WINDOW, 64), n=128),
    r"kept\[0\]: expected a count in \[0, 4\], got 5": lambda: select_with(Pattern(WINDOW, 4), kept=5),
    r"patterns: expected 1, one for each of scores, got 0": lambda: ops.select([torch.ones(4)], [torch.ones(4)], [1], patterns=[]),
}


@pytest.mark.parametrize("message", BAD_PATTERNS)
def test_bad_patterns(message):
    with pytest.raises(ValueError, match=message):
        BAD_PATTERNS[message]()
