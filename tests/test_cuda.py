"""The CUDA kernels on a GPU: the same bits as the CPU, and the behaviour that only a GPU shows.

What a GPU is not needed for (every kernel against an oracle, on many grids and schedules) is in tests/native/test_cuda_*.cpp.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from s2ap_ext import S2AP, backend, densify, ops, reference, sparsify
from s2ap_ext.nn import refresh, train_scores
from s2ap_ext.pipeline import RunFolder, Session, load_recipe, open_data, run
from s2ap_ext.reference import CUT_COLUMNS, GROUP, SINGLE_WEIGHTS, WINDOW, Pattern

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (1, 2, 33, 1000, 4095, 4096, 4097, 40_000, 0, 300_007)


@pytest.fixture(autouse=True)
def kernels_are_there():
    assert backend().cuda == "CUDA", backend().why


def scores_of(kind: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(n, generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    values = {
        "normal": normal,
        "few values": torch.randint(-3, 4, (n,), generator=generator).float(),
        "all equal": torch.full((n,), 0.25),
        "zeros": torch.where(normal > 1, normal, sign * 0.0),
        "tiny": sign * torch.randint(0, 5, (n,), generator=generator) * (6e-8 if dtype == torch.float16 else 1.5e-45),
        "huge": torch.where(normal > 1, torch.inf, 60_000.0) * sign,
        "increasing": torch.arange(n).float(),
    }
    return values[kind].to(dtype)


KINDS = ("normal", "few values", "all equal", "zeros", "tiny", "huge", "increasing")


def layers_of(kind: str, dtype: torch.dtype, seed: int = 0, sizes=SIZES):
    """Scores, gradients, weights and counts on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    scores = [scores_of(kind, n, dtype, generator) for n in sizes]
    grads = [scores_of("normal", n, dtype, generator) for n in sizes]
    weights = [scores_of("normal", n, dtype, generator) for n in sizes]
    share = itertools.cycle((0.1, 0.5, 0.0, 0.9, 1.0, 0.01))
    return scores, grads, weights, [int(n * p) for n, p in zip(sizes, share, strict=False)]


def cuda(tensors, device="cuda"):
    return [t.to(device) for t in tensors]


def assert_same_bits(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.cpu().flatten().view(torch.uint8), b.cpu().flatten().view(torch.uint8)), f"layer {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_select_is_the_cpus(kind, dtype):
    scores, _, weights, kept = layers_of(kind, dtype)
    expected, expected_cuts = ops.select(scores, weights, kept)
    masked, cuts = ops.select(cuda(scores), cuda(weights), kept)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "huge"])  # infinite norms: the scores become NaN, whose bits are anyone's
def test_perturb_is_the_cpus(kind, dtype):
    scores, grads, weights, kept = layers_of(kind, dtype)
    _, now = ops.select(scores, weights, kept)
    gamma = torch.tensor([0.05, 0.5, 0.0])[torch.arange(len(scores)) % 3].double()
    expected, expected_cuts, expected_scales = ops.perturb(scores, grads, weights, kept, now, gamma=gamma)
    masked, cuts, scales = ops.perturb(cuda(scores), cuda(grads), cuda(weights), kept, now.cuda(), gamma=gamma.cuda())
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["squares taken", "squares given"])
def test_perturb_forms_the_gradients_of_the_scores_as_the_cpu_does(dtype, known):
    scores, grads, weights, kept = layers_of("normal", dtype)
    _, now = ops.select(scores, weights, kept)
    squares = torch.stack([reference.sum_of_squares(s) for s in scores]) if known else None
    how = {"gamma": 0.5, "straight_through": True}
    expected, expected_cuts, expected_scales = ops.perturb(scores, grads, weights, kept, now, squares=squares, **how)
    squares = squares.cuda() if known else None
    masked, cuts, scales = ops.perturb(cuda(scores), cuda(grads), cuda(weights), kept, now.cuda(), squares=squares, **how)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


PATTERNS = (
    (Pattern(WINDOW, 4, 1), 40_000),
    (Pattern(WINDOW, 4, 9), 64 * 64 * 9),
    (Pattern(WINDOW, 32, 7), 32 * 7 * 211),
    (Pattern(GROUP, 64, 27), 64 * 27),
    (Pattern(GROUP, 12, 64 * 768), 3 * 12 * 64 * 768),
    (Pattern(GROUP, 300, 1), 300 * 70),
    (SINGLE_WEIGHTS, 20_000),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "huge"])
def test_patterns_are_the_cpus(kind, dtype):
    patterns = [pattern for pattern, _ in PATTERNS]
    scores, grads, weights, kept = layers_of(kind, dtype, sizes=[n for _, n in PATTERNS])
    kept = [k if p == SINGLE_WEIGHTS else (p.size + 1) // 2 for k, p in zip(kept, patterns, strict=True)]
    expected, now = ops.select(scores, weights, kept, patterns=patterns)
    masked, cuts = ops.select(cuda(scores), cuda(weights), kept, patterns=patterns)
    assert torch.equal(cuts.cpu(), now)
    assert_same_bits(masked, expected)
    how = {"gamma": 0.5, "patterns": patterns, "straight_through": True}
    expected, expected_cuts, expected_scales = ops.perturb(scores, grads, weights, kept, now, **how)
    masked, cuts, scales = ops.perturb(cuda(scores), cuda(grads), cuda(weights), kept, now.cuda(), **how)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


def test_layers_beyond_16_million_elements_sum_in_three_levels():
    scores, grads, weights, kept = layers_of("normal", torch.float32, sizes=(20_000_003, 5))
    _, now = ops.select(scores, weights, kept)
    expected, expected_cuts, expected_scales = ops.perturb(scores, grads, weights, kept, now, gamma=0.001)
    masked, cuts, scales = ops.perturb(cuda(scores), cuda(grads), cuda(weights), kept, now.cuda(), gamma=0.001)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 100.0])
def test_a_misled_sample_changes_no_bit(value, dtype):
    scores, _, weights, _ = layers_of("normal", dtype, sizes=(1_000_003, 40_000))
    for s in scores:  # what csrc/cuda/bracket.cuh samples
        i, part = torch.arange(4096), s.numel() // 4096
        s[i * s.numel() // 4096 + ((i * 0x9E3779B9 % 2**32) * part >> 32)] = value
    kept = [s.numel() // 2 for s in scores]
    expected, expected_cuts = ops.select(scores, weights, kept)
    masked, cuts = ops.select(cuda(scores), cuda(weights), kept)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [0, 1 << 30, -1, torch.iinfo(torch.int64).max])
def test_a_cut_that_is_far_off_changes_no_bit(key, dtype):
    scores, grads, weights, kept = layers_of("normal", dtype)
    far = torch.full((len(scores), CUT_COLUMNS), key)
    expected, expected_cuts, _ = ops.perturb(scores, grads, weights, kept, far, gamma=0.05)
    masked, cuts, _ = ops.perturb(cuda(scores), cuda(grads), cuda(weights), kept, far.cuda(), gamma=0.05)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


def test_more_layers_than_one_launch_takes():
    sizes = [7 + i % 90 for i in range(600)]
    scores, grads, weights, kept = layers_of("few values", torch.float32, sizes=sizes)
    expected, now = ops.select(scores, weights, kept)
    masked, cuts = ops.select(cuda(scores), cuda(weights), kept)
    assert torch.equal(cuts.cpu(), now)
    assert_same_bits(masked, expected)
    expected, expected_cuts, expected_scales = ops.perturb(scores, grads, weights, kept, now, gamma=0.3)
    masked, cuts, scales = ops.perturb(cuda(scores), cuda(grads), cuda(weights), kept, now.cuda(), gamma=0.3)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(cuts.cpu(), expected_cuts)
    assert_same_bits(masked, expected)


def test_unaligned_views():
    scores, _, weights, kept = layers_of("few values", torch.float32, sizes=(10_001,))
    expected, _ = ops.select([scores[0][1:]], [weights[0][1:]], kept)
    masked, _ = ops.select([scores[0].cuda()[1:]], [weights[0].cuda()[1:]], kept)
    assert_same_bits(masked, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
        {"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4, "dampening": 0.3},
    ],
    ids=lambda s: " ".join(s),
)
def test_update_is_torchs_sgd(settings, dtype):
    scores, grads, _, _ = layers_of("normal", dtype)
    parameters = [torch.nn.Parameter(s) for s in cuda(scores)]
    sgd = torch.optim.SGD(parameters, **settings)
    ours, buffers = cuda(scores), [torch.zeros_like(s) for s in cuda(scores)]
    for step in range(4):
        gradients = [g * (step + 1) for g in cuda(grads)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        if step == 0:  # torch starts its buffers as a copy of the gradient; the op continues from buffers that exist
            sgd.step()
            ours = [p.detach().clone() for p in parameters]
            if "momentum" in settings:
                buffers = [sgd.state[p]["momentum_buffer"].clone() for p in parameters]
            continue
        sgd.step()
        ops.update(ours, gradients, buffers if "momentum" in settings else [], **settings)
        assert_same_bits(ours, [p.detach() for p in parameters])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ascent", [False, True], ids=["as given", "formed at s + z"])
@pytest.mark.parametrize("patterned", [False, True], ids=["plain", "patterns"])
def test_update_select_is_the_reference_on_the_gpu(patterned, ascent, dtype):
    patterns = [pattern for pattern, _ in PATTERNS] if patterned else [SINGLE_WEIGHTS] * len(SIZES)
    scores, grads, weights, kept = layers_of("normal", dtype, sizes=[n for _, n in PATTERNS] if patterned else SIZES)
    kept = [k if p == SINGLE_WEIGHTS else (p.size + 1) // 2 for k, p in zip(kept, patterns, strict=True)]
    scores, grads, weights = cuda(scores), cuda(grads), cuda(weights)
    _, now = ops.select(scores, weights, kept, patterns=patterns)
    buffers = [g.flip(0) for g in grads]
    first = [g * -0.5 for g in grads]
    scales = torch.linspace(0, 2, len(scores), dtype=torch.float64, device="cuda").float().double()
    copies, buffer_copies = [s.clone() for s in scores], [b.clone() for b in buffers]
    sgd = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 5e-4}
    how = {"patterns": patterns, "straight_through": ascent, "ascent": (first, scales) if ascent else None}
    masked, cuts, squares = ops.update_select(scores, grads, buffers, weights, kept, now, **sgd, **how)
    for i, (s, b) in enumerate(zip(copies, buffer_copies, strict=True)):
        where = (first[i], scales[i]) if ascent else None
        arguments = (b, weights[i], kept[i], now[i], *sgd.values(), False, patterns[i], ascent)
        expected, row, square = reference.update_select(s, grads[i], where, *arguments)
        assert_same_bits([scores[i], buffers[i], masked[i]], [s, b, expected])
        assert torch.equal(cuts[i], row)
        assert squares[i] == square


class Static:
    """Inputs and outputs that stay where they are, for graphs and for calls that must not wait."""

    def __init__(self, kind="normal", dtype=torch.float32, sizes=SIZES):
        scores, grads, weights, kept = layers_of(kind, dtype, sizes=sizes)
        self.scores, self.grads, self.weights = cuda(scores), cuda(grads), cuda(weights)
        self.buffers = [torch.zeros_like(s) for s in self.scores]
        self.kept = torch.tensor(kept, device="cuda")
        self.masked, self.moved = [torch.empty_like(s) for s in self.scores], [torch.empty_like(s) for s in self.scores]
        self.cuts = torch.zeros(len(sizes), CUT_COLUMNS, dtype=torch.int64, device="cuda")
        self.new_cuts = torch.zeros_like(self.cuts)

    def select(self):
        ops.select(self.scores, self.weights, self.kept, out=self.masked, cuts=self.cuts)

    def perturb(self):
        return ops.perturb(self.scores, self.grads, self.weights, self.kept, self.cuts, gamma=0.05, out=self.moved, new_cuts=self.new_cuts)

    def update(self):
        ops.update(self.scores, self.grads, self.buffers, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def update_select(self):
        how = {"lr": 0.1, "momentum": 0.9, "straight_through": True, "out": self.masked, "new_cuts": self.new_cuts}
        return ops.update_select(self.scores, self.grads, self.buffers, self.weights, self.kept, self.cuts, **how)

    def step(self):
        self.select()
        self.perturb()
        self.update()
        self.update_select()

    def results(self):
        return [*self.scores, *self.buffers, *self.masked, *self.moved, self.cuts, self.new_cuts]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
def test_no_call_waits_for_the_gpu():
    static = Static()
    static.step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        static.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("form", ["flips", "track"])
def test_a_flip_budget_has_the_same_bits_and_waits_for_nothing(form):
    torch.manual_seed(0)
    net = train_scores(sparsify(torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Linear(300, 70)), 0.9))
    grads = [torch.randn_like(layer.scores) for layer in net]
    found = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(net).to(device)
        optimizer = S2AP(twin, torch.optim.SGD(twin.parameters(), lr=0.1), gamma=f"{form}:0.01")
        for layer, g in zip(twin, grads, strict=True):
            layer.scores.grad = g.to(device)
        refresh(twin)
        assert optimizer.gamma.device.type == device  # which moves it there
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            optimizer.ascend()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([optimizer.gamma.cpu(), optimizer.changes().cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_graph_replays_on_new_data():
    static, plain = Static(), Static()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static.step()  # warm-up: loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.step()
    for round_ in range(3):
        for mine, others in zip(static.grads, plain.grads, strict=True):
            mine.mul_(round_ + 0.5)
            others.mul_(round_ + 0.5)
        graph.replay()
        plain.step()
        assert_same_bits(static.results(), plain.results())


def test_the_current_stream_is_used():
    static, plain = Static(), Static()
    plain.step()
    plain.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static.step()
        late = [g.clone() for g in static.grads]
        for g in static.grads:
            g.zero_()
        torch.cuda._sleep(50_000_000)
        for g, value in zip(static.grads, late, strict=True):
            g.copy_(value)  # long after the host is past the next line
        static.step()
    stream.synchronize()
    assert_same_bits(static.results(), plain.results())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_tensors_device_is_used_not_the_current_one():
    scores, _, weights, kept = layers_of("few values", torch.float32)
    expected, _ = ops.select(scores, weights, kept)
    with torch.cuda.device(0):
        masked, cuts = ops.select(cuda(scores, "cuda:1"), cuda(weights, "cuda:1"), kept)
        assert torch.cuda.current_device() == 0
    assert cuts.device == torch.device("cuda:1")
    assert_same_bits(masked, expected)


@pytest.mark.parametrize("op", ["select", "perturb", "update", "update_select"])
def test_one_launch_for_all_layers(op):
    static = Static()
    static.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        getattr(static, op)()
        torch.cuda.synchronize()
    ours = [event for event in profile.events() if f"{op}_kernel" in event.name]
    assert sum(event.count for event in ours) == 1, [event.name for event in profile.events()]


def test_a_thousand_runs_give_the_same_bits():
    static = Static("few values")
    static.select()
    _, _, scales = static.perturb()
    expected = [t.clone() for t in [*static.results(), scales]]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for t in [*static.masked, *static.moved]:
            t.fill_(-77)
        static.select()
        _, _, scales = static.perturb()
        for t, e in zip([*static.results(), scales], expected, strict=True):
            different += (t != e).sum()
    assert different.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": lambda s: [s.weights[0][:-1]]}, r"select: weights\[0\]: expected 1000 elements, got 999"),
        ({"weights": lambda s: [s.weights[0].half()]}, r"select: weights\[0\]: expected the dtype"),
        ({"weights": lambda s: [s.weights[0].repeat(2)[::2]]}, r"select: weights\[0\]: expected a contiguous tensor"),
        ({"weights": lambda s: []}, r"select: weights: expected 1 tensors, got 0"),
        ({"kept": lambda s: s.kept.int()}, r"select: kept: expected int64"),
        ({"cuts": lambda s: s.cuts[:, :3].contiguous()}, r"select: cuts: expected 5 contiguous elements, got 3"),
        ({"patterns": lambda s: [1, 2]}, r"select: patterns: expected 3 numbers, got 2"),
        ({"patterns": lambda s: [2, 3, 1]}, r"select: patterns\[0\]: expected a known kind .* 1000 elements, got kind 2, 3 \* 1"),
    ],
    ids=lambda v: "",
)
def test_wrong_operands_are_refused_with_their_name(change, message):
    static = Static(sizes=(1000,))
    operands = {
        "scores": static.scores,
        "weights": static.weights,
        "kept": static.kept,
        "patterns": [],
        "masked": static.masked,
        "cuts": static.cuts,
    }
    operands |= {name: make(static) for name, make in change.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.s2ap.select(*operands.values())


def test_formed_gradients_do_not_overwrite_the_weights_they_are_formed_from():
    s = Static(sizes=(1000,))
    gamma, scales = torch.full((1,), 0.05, dtype=torch.float64, device="cuda"), torch.zeros(1, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match=r"perturb: masked\[0\]: expected memory of its own, got that of weights\[0\]"):
        torch.ops.s2ap.perturb(
            s.scores, s.grads, s.weights, s.kept, [], s.cuts, None, gamma, 1e-12, True, s.weights, torch.zeros_like(s.cuts), scales
        )


def test_training_is_that_of_the_fallback_on_the_gpu(tmp_path):
    """All of the pipeline on the GPU, with the kernels and with the reference, one after the other: the same networks, to the bit."""
    settings = ["device=cuda", "pretrain.epochs=1", "prune.epochs=3", "prune.warmup_epochs=1", "finetune.epochs=1"]
    arguments = ["run", "digits", *(word for setting in settings for word in ("--set", setting))]
    for disabled in "01":
        result = subprocess.run(
            [sys.executable, "-c", "import sys; from s2ap_ext.cli import main; sys.exit(main())", *arguments, "--out", tmp_path / disabled],
            env={**os.environ, "S2AP_DISABLE_EXT": disabled},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    for model in ("dense", "pruned", "finetuned"):
        ours, fallbacks = (load_file(tmp_path / disabled / f"{model}.safetensors") for disabled in "01")
        assert ours.keys() == fallbacks.keys()
        assert_same_bits(ours.values(), fallbacks.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semi_structured_layers_compute_the_masked_logits(dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128)).to("cuda", dtype)
    net = sparsify(net, 0.5, granularity="2:4").requires_grad_(False)
    x = torch.randn(64, 256, device="cuda", dtype=dtype)
    expected = net(x)
    densify(net, format="semi-structured")
    torch.testing.assert_close(net(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself, and of operations without a deterministic form
@pytest.mark.parametrize("cuda_graphs", ["false", "true"], ids=["", "graphs"])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_recipes_train_in_every_precision(precision, cuda_graphs, tmp_path):
    settings = [f"precision={precision}", "channels_last=true", "compile=true", f"cuda_graphs={cuda_graphs}"]
    settings += ["model.width=8", "data.train_size=256", "data.test_size=64"]
    settings += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=2", "batch_size=64")]
    recipe = load_recipe("digits", [*settings, "prune.warmup_epochs=1"])
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        rows = run(Session(recipe, open_data(recipe), folder))
    assert rows[-1]["clean"] > 0.2
