"""The ops against their specification, bit for bit: the C++ kernels where they are built, and the Python face around either path."""

import pytest
import torch
from helpers import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from op_cases import HARD, assert_same, compiled, randn, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from s2ap_ext import ops, reference


def naive_mask(scores, kept):
    """By Python's own stable sort; NaN ranks above infinity."""
    flat = scores.abs().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i] != flat[i], flat[i] if flat[i] == flat[i] else 0))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[len(flat) - kept :]] = True
    return mask.view(scores.shape)


def check_against_reference(layers, gamma=0.01, eps=1e-12):
    """``layers``: (scores, grad, weight, kept) each. Select and perturb, all in one call; ``gamma`` may be a list with one for each."""
    gammas = gamma if isinstance(gamma, list) else [gamma] * len(layers)
    gamma = torch.tensor(gamma, dtype=torch.float64) if isinstance(gamma, list) else gamma
    scores, grads, weights, kept = (list(column) for column in zip(*layers, strict=True))
    masked, cuts = ops.select(scores, weights, kept)
    moved_masked, new_cuts, scales = ops.perturb(scores, grads, weights, kept, cuts, gamma=gamma, eps=eps)
    for i, (s, g, w, k) in enumerate(layers):
        expected, row = reference.select(s, w, k)
        assert_same(cuts[i], masked[i], row, expected, k)
        expected, row, scale = reference.perturb(s, g, w, k, row, gammas[i], eps)
        assert same_bits(scales[i], scale), (i, k)
        assert_same(new_cuts[i], moved_masked[i], row, expected, k)


@compiled
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("kind", HARD)
def test_kernels_match_the_reference_on_hard_inputs(kind, dtype):
    layers = []
    for n in (0, 1, 2, 17, 4096, 4097, 16384, 16385, 70000):
        scores = HARD[kind](randn(n, seed=n)).to(dtype)
        for kept in {0, min(1, n), n // 10, n // 2, max(n - 1, 0), n}:
            layers.append((scores, randn(n, seed=n + 1, dtype=dtype, scale=1e-3), randn(n, seed=n + 2, dtype=dtype), kept))
    check_against_reference(layers)


@compiled
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 10.0])
def test_perturb_matches_the_reference_for_any_gamma(gamma):
    layers = [(randn(n, seed=n), randn(n, seed=n + 1), randn(n, seed=n + 2), n // 10) for n in (10, 5000, 40000)]
    layers.append((randn(20000), torch.zeros(20000), randn(20000), 2000))
    layers.append((torch.zeros(20000), randn(20000), randn(20000), 2000))
    check_against_reference(layers, gamma)


@compiled
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_perturb_matches_the_reference_with_a_gamma_for_each_layer(dtype):
    sizes = (10, 5000, 40000, 300, 0, 20000)
    layers = [(randn(n, seed=n, dtype=dtype), randn(n, seed=n + 1, dtype=dtype), randn(n, seed=n + 2, dtype=dtype), n // 10) for n in sizes]
    check_against_reference(layers, [0.5, 1e-3, 0.0, 10.0, 0.1, 0.02])


def test_a_gamma_for_each_layer_is_one_call_for_each_layer():
    layers = [(randn(n, seed=n), randn(n, seed=n + 1), randn(n, seed=n + 2), n // 10) for n in (100, 5000, 300)]
    scores, grads, weights, kept = (list(column) for column in zip(*layers, strict=True))
    cuts, gammas = ops.select(scores, weights, kept)[1], [0.3, 0.0, 2.0]
    masked, new_cuts, scales = ops.perturb(scores, grads, weights, kept, cuts, gamma=torch.tensor(gammas, dtype=torch.float64))
    for i, (s, g, w, k) in enumerate(layers):
        (alone,), cut, scale = ops.perturb([s], [g], [w], [k], cuts[i : i + 1], gamma=gammas[i])
        assert same_bits(masked[i], alone)
        assert torch.equal(new_cuts[i], cut[0])
        assert same_bits(scales[i], scale[0])


def test_a_gamma_may_be_an_integer_beyond_64_bits():
    layers = [torch.arange(1.0, 9), torch.ones(8), torch.arange(8.0)]
    (scores, grads, weights), (_, cuts) = ([[t] for t in layers], ops.select([layers[0]], [layers[2]], [3]))
    whole, real = (ops.perturb(scores, grads, weights, [3], cuts, gamma=gamma) for gamma in (2**70, 2.0**70))
    assert torch.equal(whole[0][0], real[0][0])
    assert torch.equal(whole[2], real[2])


def test_gamma_0_leaves_a_layer_where_it_is():
    s, g, w = randn(1000), randn(1000, seed=1), randn(1000, seed=2)
    s[7] = torch.inf  # the norm times 0 would be NaN
    (masked,), cuts = ops.select([s], [w], [100])
    (moved,), new_cuts, scales = ops.perturb([s], [g], [w], [100], cuts, gamma=torch.zeros(1, dtype=torch.float64))
    assert same_bits(moved, masked)
    assert torch.equal(new_cuts, cuts)
    assert scales.tolist() == [0]


@compiled
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_kernels_match_the_reference_on_a_huge_layer(dtype):
    n = 3_000_001
    check_against_reference([(randn(n, dtype=dtype), randn(n, seed=1, dtype=dtype), randn(n, seed=2, dtype=dtype), n // 10)])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(ops.DTYPES))
def test_select_keeps_what_a_stable_sort_keeps(data, dtype):
    # Numbers with many ties and all special values, and any bits at all.
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, float("inf"), float("-inf"), 0.5]) | st.floats(width=32, allow_nan=False)
    scores = torch.from_numpy(data.draw(hnp.arrays("float32", st.integers(0, 300), elements=numbers))).to(dtype)
    kept = data.draw(st.integers(0, scores.numel()))
    weight = torch.arange(1.0, 1 + scores.numel()).to(dtype)
    (masked,), cuts = ops.select([scores], [weight], [kept])
    mask = naive_mask(scores, kept)
    assert torch.equal(ops.mask_from_cut(scores, cuts[0]), mask)
    assert same_bits(masked, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert int(mask.sum()) == kept


@compiled
@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40000), max_size=8),
    seed=st.integers(0, 2**31),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(ops.DTYPES),
)
def test_kernels_match_the_reference_on_lists_of_layers(sizes, seed, sparsity, dtype):
    layers = [
        (
            randn(n, seed=seed + i, dtype=dtype),
            randn(n, seed=seed - i, dtype=dtype),
            randn(n, seed=seed, dtype=dtype),
            n - int(sparsity * n),
        )
        for i, n in enumerate(sizes)
    ]
    if layers:
        check_against_reference(layers)


@compiled
def test_results_do_not_depend_on_the_number_of_threads():
    scores, grads, weights = ([randn(n, seed=seed) for n in (100, 300_000, 50_000, 16_384)] for seed in range(3))
    kept = [s.numel() // 10 for s in scores]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            masked, cuts = ops.select(scores, weights, kept)
            moved, new_cuts, scales = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.1)
            buffers, stepped = [g.clone() for g in grads], [s.clone() for s in scores]
            ops.update(stepped, grads, buffers, lr=0.1, momentum=0.9, weight_decay=5e-4)
            results.append([*masked, cuts, *moved, new_cuts, scales, *buffers, *stepped])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("case", FIXTURES["masks"], ids=lambda case: f"{case['s']} keep {case['kept']}")
def test_worked_masks(case):
    scores = torch.tensor(case["s"], dtype=torch.float32)
    (masked,), cuts = ops.select([scores], [torch.ones_like(scores)], [case["kept"]])
    assert masked.tolist() == case["mask"]
    assert ops.mask_from_cut(scores, cuts[0]).tolist() == [bool(m) for m in case["mask"]]


@pytest.mark.parametrize("gamma", [0.01, 0.5])
def test_worked_perturbation(gamma):
    toy = FIXTURES["toy"]
    expected = toy[f"gamma_{gamma}"]
    s, w, g = (torch.tensor(toy[name], dtype=torch.float64) for name in ("s", "w", "dL_ds"))
    (masked,), cuts = ops.select([s], [w], [toy["kept"]])
    assert torch.equal(masked, w * torch.tensor(toy["mask"]))
    (masked,), new_cuts, scales = ops.perturb([s], [g], [w], [toy["kept"]], cuts, gamma=gamma)
    torch.testing.assert_close(scales[0] * g, torch.tensor(expected["z"], dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(masked, w * torch.tensor(expected.get("mask", toy["mask"])))
    assert new_cuts[0, reference.FLIPS] == expected["flips"]
    assert new_cuts[0, reference.SIGNS] == ((s + torch.tensor(expected["z"])).sign() != s.sign()).sum()


def test_worked_step():
    expected = FIXTURES["toy"]["gamma_0.5"]
    s, g = torch.tensor(FIXTURES["toy"]["s"], dtype=torch.float64), torch.tensor(expected["dL_ds"], dtype=torch.float64)
    ops.update([s], [g], [], lr=0.1, weight_decay=5e-4)
    torch.testing.assert_close(s, torch.tensor(expected["sgd_lr_0.1_wd_5e-4_restore_then_step"], dtype=torch.float64), rtol=0, atol=1e-12)


SGD = {
    "plain": {},
    "weight decay": {"weight_decay": 5e-4},
    "momentum": {"momentum": 0.9, "weight_decay": 5e-4},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["for each", "foreach"])
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_update_is_torchs_sgd_to_the_bit(options, foreach, dtype):
    shapes = [(), (0,), (1,), (7, 3), (129,), (40, 1003)]
    parameters = [torch.nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    scores = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=foreach, **options)
    buffers = []
    for step in range(4):
        grads = [randn(*p.shape, seed=10 * step + i, dtype=dtype) for i, p in enumerate(parameters)]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        if step == 0:  # creates the momentum buffers; from there on the op follows
            scores = [p.detach().clone() for p in parameters]
            if options.get("momentum"):
                buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
            continue
        ops.update(scores, grads, buffers, lr=0.1, **options)
        assert all(same_bits(s, p.detach()) for s, p in zip(scores, parameters, strict=True)), step
        assert all(same_bits(b, optimizer.state[p]["momentum_buffer"]) for b, p in zip(buffers, parameters, strict=False)), step


@compiled
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_update_matches_the_reference(options, dtype):
    sizes = (0, 1, 31, 33, 1000, 70001)
    scores, grads, buffers = ([randn(n, seed=seed, dtype=dtype) for n in sizes] for seed in range(3))
    if not options.get("momentum"):
        buffers = []
    expected_scores, expected_buffers = [s.clone() for s in scores], [b.clone() for b in buffers]
    ops.update(scores, grads, buffers, lr=0.1, **options)
    defaults = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    for i, (s, g) in enumerate(zip(expected_scores, grads, strict=True)):
        b = expected_buffers[i] if buffers else None
        reference.update(s, g, b, lr=0.1, **(defaults | options))
        assert same_bits(scores[i], s), i
        assert not buffers or same_bits(buffers[i], b), i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_update_in_half_precision_is_torchs_up_to_its_rounding_of_the_factors(dtype):
    """torch rounds momentum, lr, ... to half precision on the CPU, and float32 without that is nearer to the truth."""
    s, g, b = (randn(4096, seed=seed, dtype=dtype) for seed in range(3))
    truth = s.double() - 0.1 * (0.9 * b.double() + g.double())
    ops.update([s], [g], [b], lr=0.1, momentum=0.9)
    torch.testing.assert_close(s.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def strided(x):
    """The same values with gaps in memory."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "expanded"])
def test_any_strides(layout):
    change = {
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "strided": strided,
        "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
    }[layout]
    s, g, w = (change(randn(8, 4, 3, 3, seed=seed)) for seed in range(3))
    plain = [t.contiguous() for t in (s, g, w)]
    out = None if layout == "expanded" else [change(torch.empty(8, 4, 3, 3))]
    (masked,), cuts = ops.select([s], [w], [30], out=out)
    (expected,), expected_cuts = ops.select([plain[0]], [plain[2]], [30])
    assert torch.equal(masked, expected)
    assert torch.equal(cuts, expected_cuts)
    if out:
        assert masked is out[0]
        assert out[0].stride() == change(torch.empty(8, 4, 3, 3)).stride()
    (moved,), new_cuts, _ = ops.perturb([s], [g], [w], [30], cuts, gamma=0.2)
    (expected,), expected_cuts, _ = ops.perturb([plain[0]], [plain[1]], [plain[2]], [30], cuts, gamma=0.2)
    assert torch.equal(moved, expected)
    assert torch.equal(new_cuts, expected_cuts)
    if layout != "expanded":
        buffer = change(torch.ones(8, 4, 3, 3))
        plain_buffer = torch.ones(8, 4, 3, 3)
        ops.update([s], [g], [buffer], lr=0.1, momentum=0.9)
        ops.update([plain[0]], [plain[1]], [plain_buffer], lr=0.1, momentum=0.9)
        assert torch.equal(s, plain[0])
        assert torch.equal(buffer, plain_buffer)


def test_nan_is_counted_and_reported_by_name():
    good, bad = randn(10), randn(20)
    bad[3] = bad[7] = torch.nan
    _, cuts = ops.select([good, bad], [good, bad], [1, 2])
    assert cuts[:, reference.NANS].tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"NaN in layer2\.conv \(2\)"):
        ops.check_finite(cuts, ["layer1.conv", "layer2.conv"])
    ops.check_finite(cuts[:1], ["layer1.conv"])


def test_no_layers_at_all():
    masked, cuts = ops.select([], [], [])
    assert masked == []
    assert cuts.shape == (0, reference.CUT_COLUMNS)
    ops.update([], [], [], lr=0.1)


def op_arguments(dtype=torch.float32):
    scores, grads, weights, buffers = ([randn(n, seed=seed, dtype=dtype) for n in (5, 300)] for seed in range(4))
    kept = torch.tensor([2, 1])
    patterns, sgd = [*reference.SINGLE_WEIGHTS, *reference.Pattern(reference.WINDOW, 4)], (0.1, 0.9, 0.0, 5e-4, False)
    masked, cuts = ops.select(scores, weights, kept)
    new_cuts, scales = torch.zeros_like(cuts), torch.zeros(2, dtype=torch.float64)
    return {
        "select": (scores, weights, kept, patterns, masked, cuts),
        "perturb": (scores, grads, weights, kept, patterns, cuts, None, gamma([0.01] * 2), 1e-12, True, masked, new_cuts, scales),
        "update": (scores, grads, buffers, *sgd),
        "update_select": (
            *(scores, grads, grads, scales, buffers, weights, kept, patterns, cuts, *sgd, True),
            *(masked, new_cuts, torch.zeros_like(scales)),
        ),
    }


@pytest.mark.parametrize("name", ["select", "perturb", "update", "update_select"])
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.s2ap, name).default, op_arguments()[name])


@pytest.mark.parametrize("name", ["select", "perturb", "update", "update_select"])
def test_fake_tensors(name):
    arguments = op_arguments()[name]
    with FakeTensorMode() as mode:
        arguments = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        assert getattr(torch.ops.s2ap, name)(*arguments) is None


def test_under_autocast_and_inference_mode():
    s, w = randn(100), randn(100, seed=1)
    expected = ops.select([s], [w], [10])[0][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(ops.select([s], [w], [10])[0][0], expected)
    with torch.inference_mode():
        assert same_bits(ops.select([s], [w], [10])[0][0], expected)


def test_under_torch_compile():
    def masked_sum(s, w):
        out, cuts = [torch.empty_like(w)], torch.zeros(1, reference.CUT_COLUMNS, dtype=torch.int64)
        torch.ops.s2ap.select([s], [w], torch.tensor([10]), [], out, cuts)
        return out[0] * 2, cuts

    s, w = randn(100), randn(100, seed=1)
    compiled_sum = torch.compile(masked_sum, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled_sum(s, w), masked_sum(s, w), strict=True))


def test_outputs_bump_their_version():
    s, w, out = randn(10), randn(10), torch.empty(10)
    version = out._version
    ops.select([s], [w], [3], out=[out])
    assert out._version > version


def gamma(values):
    return torch.tensor(values, dtype=torch.float64)


def windows(first, begin, second):
    """Two tensors of so many elements, the second one beginning within the first."""
    memory = torch.empty(begin + second)
    return [memory[:first], memory[begin:]]


def perturb_with(s, w, gamma):
    return ops.perturb(s, s, w, [1, 1], ops.select(s, w, [1, 1])[1], gamma=gamma)


BAD_CALLS = {
    r"kept\[1\]: expected a count in \[0, 6\], got 7": lambda s, w: ops.select(s, w, [1, 7]),
    r"kept\[0\]: expected a count in \[0, 4\], got -1": lambda s, w: ops.select(s, w, torch.tensor([-1, 2])),
    r"kept: expected 2 counts, one for each of scores, got 1": lambda s, w: ops.select(s, w, [1]),
    r"weights: expected 2 tensors, one for each of scores, got 1": lambda s, w: ops.select(s, w[:1], [1, 1]),
    r"weights\[1\]: expected shape \(6,\) like scores\[1\], got \(2, 3\)": lambda s, w: ops.select(s, [w[0], w[1].view(2, 3)], [1, 1]),
    r"weights\[0\]: expected torch.float32 like scores\[0\], got torch.float64": lambda s, w: ops.select(s, [w[0].double(), w[1]], [1, 1]),
    r"scores\[0\]: expected a floating point tensor, got torch.int64": lambda s, w: ops.select([s[0].long(), s[1]], w, [1, 1]),
    r"scores\[0\]: expected a tensor, got list": lambda s, w: ops.select([[1.0], s[1]], w, [1, 1]),
    r"kept\[0\]: expected an integer, got 1.5": lambda s, w: ops.select(s, w, [1.5, 1]),
    r"kept\[1\]: expected an integer, got True": lambda s, w: ops.select(s, w, [1, True]),
    r"kept: expected int64 of shape \(2,\) on cpu, got torch.bool": lambda s, w: ops.select(s, w, torch.ones(2, dtype=torch.bool)),
    r"kept: expected int64 of shape \(2,\) on cpu, got .* on meta": lambda s, w: ops.select(s, w, torch.ones(2).long().to("meta")),
    r"patterns\[1\]: expected a Pattern of three integers, got 4": lambda s, w: ops.select(
        s, w, [1, 1], patterns=[reference.SINGLE_WEIGHTS, 4]
    ),
    r"cuts: expected contiguous int64 of shape \(2, 5\) on cpu, got .* on meta": lambda s, w: ops.select(
        s, w, [1, 1], cuts=torch.zeros(2, 5, dtype=torch.int64, device="meta")
    ),
    r"cuts: expected contiguous int64 of shape \(2, 5\) on cpu, got NoneType": lambda s, w: ops.perturb(s, s, w, [1, 1], None, gamma=0.1),
    r"out\[1\]: expected memory of its own, got that of weights\[1\]": lambda s, w: ops.select(s, w, [1, 1], out=[torch.empty(4), w[1]]),
    r"out\[0\]: expected memory of its own, got that of scores\[1\]": lambda s, w: ops.select(s, w, [1, 1], out=[s[1][2:], torch.empty(6)]),
    r"out\[1\]: expected memory of its own, got that of out\[0\]; a layer was": lambda s, w: ops.select(s, w, [1, 1], out=windows(4, 3, 6)),
    r"out\[0\]: expected memory of its own, got that of grads\[0\]": lambda s, w: ops.perturb(
        s, (g := [randn(4), randn(6)]), w, [1, 1], ops.select(s, w, [1, 1])[1], gamma=0.1, out=[g[0], torch.empty(6)]
    ),
    r"scores\[\d\]: expected memory of its own, got that of momentum_buffers\[\d\]": lambda s, w: ops.update(s, w, s, lr=0.1, momentum=0.9),
    r"scores\[1\]: expected memory of its own, got that of grads\[1\]": lambda s, w: ops.update(s, [randn(4), s[1]], [], lr=0.1),
    r"cuts: expected contiguous int64": lambda s, w: ops.select(s, w, [1, 1], cuts=torch.zeros(2, 4, dtype=torch.int64)),
    r"gamma: expected a finite number >= 0, got -1": lambda s, w: perturb_with(s, w, -1),
    r"gamma: expected a finite number >= 0, got 1000": lambda s, w: perturb_with(s, w, 10**400),
    r"gamma\[1\]: expected a finite number >= 0, got nan": lambda s, w: perturb_with(s, w, gamma([0.1, float("nan")])),
    r"gamma\[0\]: expected a finite number >= 0, got -0.1": lambda s, w: perturb_with(s, w, gamma([-0.1, 0.1])),
    r"gamma: expected float64 of shape \(2,\) on cpu, got torch.float64 of shape \(3,\)": lambda s, w: perturb_with(s, w, gamma([1, 1, 1])),
    r"gamma: expected float64 of shape \(2,\) on cpu, got torch.float32": lambda s, w: perturb_with(s, w, gamma([1, 1]).float()),
    r"gamma: expected float64 of shape \(2,\) on cpu, got .* on meta": lambda s, w: perturb_with(s, w, gamma([1, 1]).to("meta")),
    r"eps: expected a finite number >= 0, got nan": lambda s, w: ops.perturb(
        s, s, w, [1, 1], ops.select(s, w, [1, 1])[1], gamma=0.1, eps=float("nan")
    ),
    r"momentum_buffers: expected 2 tensors": lambda s, w: ops.update(s, w, [], lr=0.1, momentum=0.9),
    r"momentum_buffers: expected none with momentum 0, got 2": lambda s, w: ops.update(s, w, s, lr=0.1),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message):
    s, w = [randn(4), randn(6)], [randn(4, seed=1), randn(6, seed=1)]
    kept = [t.clone() for t in (*s, *w)]
    with pytest.raises((ValueError, TypeError), match=message):
        BAD_CALLS[message](s, w)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*s, *w), strict=True))


def test_arguments_that_are_read_may_share_memory():
    """Tied weights, and outputs side by side in one memory."""
    s, w, out = [randn(4), randn(4, seed=1)], randn(4, seed=2), windows(4, 4, 4)
    expected, _ = ops.select(s, [w, w], [2, 2])
    masked, _ = ops.select(s, [w, w], [2, 2], out=out)
    assert all(same_bits(a, b) for a, b in zip(masked, expected, strict=True))


BAD_RAW_CALLS = {
    r"kept\[0\]: expected a count in \[0, 4\], got 5": {"kept": torch.tensor([5])},
    r"kept: expected 1 elements, got 2": {"kept": torch.tensor([1, 1])},
    r"weights: expected 1 tensors, got 0": {"weights": []},
    r"weights\[0\]: expected Float, got Double": {"weights": [torch.ones(4, dtype=torch.float64)]},
    r"masked\[0\]: expected 4 elements, got 3": {"masked": [torch.ones(3)]},
    r"masked\[0\]: expected a contiguous tensor": {"masked": [torch.ones(4, 2)[:, 0]]},
    r"cuts: expected Long, got Int": {"cuts": torch.zeros(1, 5, dtype=torch.int32)},
    r"scores\[0\]: expected float32, float64, float16 or bfloat16, got Int": {"scores": [torch.ones(4, dtype=torch.int32)]},
}


@compiled
@pytest.mark.parametrize("message", BAD_RAW_CALLS)
def test_the_kernels_check_what_reaches_them_directly(message):
    arguments = {
        "scores": [torch.ones(4)],
        "weights": [torch.ones(4)],
        "kept": torch.tensor([2]),
        "patterns": [],
        "masked": [torch.ones(4)],
        "cuts": torch.zeros(1, 5, dtype=torch.int64),
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.s2ap.select(**(arguments | BAD_RAW_CALLS[message]))
