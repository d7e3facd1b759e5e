"""update_select, and gradients formed inside the ops: against update and select, plain torch, and the reference."""

import pytest
import torch
from op_cases import HARD, assert_same, compiled, randn, same_bits, same_numbers

from s2ap_ext import ops, reference

SGD = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "all": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 5e-4},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
}

SIZES = (0, 1, 17, 4097, 16384, 16385, 70_000)


def layers(kind="normal", dtype=torch.float32, sizes=SIZES):
    """scores, grads, momentum buffers, weights, kept, cuts"""
    scores = [HARD[kind](randn(n, seed=n)).to(dtype) for n in sizes]
    grads, buffers, weights = ([randn(n, seed=n + i, dtype=dtype) for n in sizes] for i in (1, 2, 3))
    kept = [n // 10 for n in sizes]
    return scores, grads, buffers, weights, kept, ops.select(scores, weights, kept)[1]


@pytest.mark.parametrize("sgd", SGD)
def test_it_is_the_update_and_then_the_selection(sgd):
    scores, grads, buffers, weights, kept, cuts = layers()
    buffers = buffers if "momentum" in SGD[sgd] else []
    alone, buffers_alone = [s.clone() for s in scores], [b.clone() for b in buffers]
    before = [ops.mask_from_cut(s, c) for s, c in zip(scores, cuts, strict=True)]
    masked, new_cuts, squares = ops.update_select(scores, grads, buffers, weights, kept, cuts, **SGD[sgd])
    ops.update(alone, grads, buffers_alone, **SGD[sgd])
    expected, expected_cuts = ops.select(alone, weights, kept)
    assert all(map(same_bits, scores + buffers + masked, alone + buffers_alone + expected))
    for i, s in enumerate(scores):
        assert new_cuts[i, :3].tolist() == expected_cuts[i, :3].tolist()
        assert new_cuts[i, reference.FLIPS] == (ops.mask_from_cut(s, new_cuts[i]) != before[i]).sum()
        assert same_bits(squares[i], reference.sum_of_squares(s))
    assert new_cuts[:, reference.FLIPS].sum() > 0


def test_the_gradient_of_masked_weights_becomes_that_of_the_scores():
    torch.manual_seed(0)
    s, w, x = torch.randn(50, requires_grad=True), torch.randn(50), torch.randn(50)
    mask = ops.mask_from_cut(s, ops.select([s], [w], [5])[1][0])
    # Straight through: d(s.abs()) stands for d(mask).
    (w * (mask + s.abs() - s.abs().detach()) * x).sum().backward()
    s.detach()[3] = 0
    at_zero = reference.score_grad(x, w, s.detach())
    assert at_zero[3] == 0
    assert torch.equal(at_zero.index_fill(0, torch.tensor([3]), 0), s.grad.index_fill(0, torch.tensor([3]), 0))


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_forming_the_gradient_inside_changes_no_bit(dtype):
    scores, grads, buffers, weights, kept, cuts = layers(dtype=dtype)
    formed = [reference.score_grad(g, w, s) for g, w, s in zip(grads, weights, scores, strict=True)]
    outside = ops.perturb(scores, formed, weights, kept, cuts, gamma=0.5)
    inside = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.5, straight_through=True)
    assert all(map(same_bits, outside[0], inside[0]))
    assert torch.equal(outside[1], inside[1])
    assert same_bits(outside[2], inside[2])
    assert inside[1][:, reference.SIGNS].sum() > 0  # so that it matters where the second gradient's signs are taken

    second = [randn(s.numel(), seed=9, dtype=dtype) for s in scores]
    moved = [reference.perturbed(s, g, a) for s, g, a in zip(scores, formed, inside[2], strict=True)]
    second_formed = [reference.score_grad(g, w, at) for g, w, at in zip(second, weights, moved, strict=True)]
    copies, buffer_copies = [s.clone() for s in scores], [b.clone() for b in buffers]
    outside = ops.update_select(copies, second_formed, buffer_copies, weights, kept, cuts, **SGD["all"])
    how = {"straight_through": True, "ascent": (grads, inside[2])}
    inside = ops.update_select(scores, second, buffers, weights, kept, cuts, **SGD["all"], **how)
    assert all(map(same_bits, [*outside[0], *copies, *buffer_copies], [*inside[0], *scores, *buffers]))
    assert torch.equal(outside[1], inside[1])
    assert same_bits(outside[2], inside[2])


def test_known_sums_of_squares_change_nothing():
    scores, grads, _, weights, kept, cuts = layers()
    squares = torch.stack([reference.sum_of_squares(s) for s in scores])
    plain = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.5)
    known = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.5, squares=squares)
    assert same_bits(plain[2], known[2])
    assert torch.equal(plain[1], known[1])
    doubled = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.5, squares=4 * squares)
    assert same_bits(2 * plain[2], doubled[2])  # they are used


@compiled
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("kind", HARD)
def test_kernels_match_the_reference(kind, dtype, straight_through):
    scores, grads, buffers, weights, kept, cuts = layers(kind, dtype)
    first = [g.flip(0) for g in grads]
    scales = torch.linspace(0, 2, len(scores), dtype=torch.float64).float().double()
    ascent = (first, scales) if straight_through else None
    inputs = [[t.clone() for t in tensors] for tensors in (scores, buffers)]
    how = {"straight_through": straight_through, "ascent": ascent}
    masked, new_cuts, squares = ops.update_select(scores, grads, buffers, weights, kept, cuts, **SGD["all"], **how)
    for i, (s, b) in enumerate(zip(*inputs, strict=True)):
        arguments = (b, weights[i], kept[i], cuts[i], *(SGD["all"] | {"nesterov": False}).values())
        expected, row, square = reference.update_select(
            s, grads[i], ascent and (first[i], scales[i]), *arguments, straight_through=straight_through
        )
        assert same_numbers(scores[i], s)
        assert same_numbers(buffers[i], b)
        assert same_numbers(squares[i], square)
        assert_same(new_cuts[i], masked[i], row, expected, kept[i])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_huge_layer_and_any_number_of_threads(threads):
    scores, grads, buffers, weights, kept, cuts = layers(sizes=(1_000_003, 200_000))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        masked, new_cuts, squares = ops.update_select(scores, grads, buffers, weights, kept, cuts, **SGD["all"])
    finally:
        torch.set_num_threads(before)
    for i, s in enumerate(scores):
        expected, row = reference.select(s, weights[i], kept[i])
        assert same_bits(masked[i], expected)
        assert new_cuts[i, :3].tolist() == row[:3].tolist()
        assert same_bits(squares[i], reference.sum_of_squares(s))


def test_the_cuts_may_be_overwritten_by_the_new_ones():
    scores, grads, _, weights, kept, cuts = layers()
    copies = [s.clone() for s in scores]
    _, apart, _ = ops.update_select(copies, grads, [], weights, kept, cuts, lr=0.1)
    ops.update_select(scores, grads, [], weights, kept, cuts, lr=0.1, new_cuts=cuts)
    assert torch.equal(apart, cuts)


BAD_CALLS = {
    r"ascent: expected None without straight_through": {"ascent": ([torch.ones(4)], torch.ones(1).double())},
    r"ascent: expected float64 of shape \(1,\)": {"straight_through": True, "ascent": ([torch.ones(4)], torch.ones(1))},
    r"ascent: expected 1 tensors": {"straight_through": True, "ascent": ([], torch.ones(1).double())},
    r"out\[0\]: expected shape \(4,\)": {"out": [torch.ones(2, 2)]},
    r"momentum_buffers: expected 1 tensors": {"momentum": 0.9},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message):
    s = torch.arange(4.0)
    cuts = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        ops.update_select([s], [torch.ones(4)], [], [torch.ones(4)], [2], cuts, **({"lr": 0.1} | BAD_CALLS[message]))
    assert torch.equal(s, torch.arange(4.0))


def test_the_masked_weights_have_memory_of_their_own():
    s, w, cuts = torch.arange(4.0), torch.ones(4), torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"out\[0\]: expected memory of its own, got that of weights\[0\]"):
        ops.update_select([s], [torch.ones(4)], [], [w], [2], cuts, lr=0.1, out=[w])
    assert torch.equal(s, torch.arange(4.0))
