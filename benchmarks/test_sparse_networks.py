"""Sparsity that pays, for whole networks: inference, attack and training steps of ResNet-18 for CIFAR on the kept weights, and inference
of other networks.

pytest benchmarks/test_sparse_networks.py
"""

import collections
import importlib.util
import io
import itertools
import math

import pytest
import torch
from measure import BREAK_EVEN, ROWS
from steps import Step

from s2ap_ext import AWP, S2AP, backend, densify, engine, sparsify
from s2ap_ext.attacks import pgd
from s2ap_ext.baselines import mask_every_forward
from s2ap_ext.models import build_model
from s2ap_ext.nn import dense_kernels, train_scores, train_weights

pytestmark = [
    pytest.mark.skipif(backend().cpu != "C++", reason="needs the C++ kernels"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler and exporter warn of themselves
]

SPARSITIES = (0.9, 0.95, 0.99)
SEARCHES = (0.9, 0.95)
PGD = {"eps": 8 / 255, "step_size": 2 / 255}


# name -> (model, its options for --quick)
NETWORKS = {
    "ResNet-18": ("resnet18", {"width": 8}),
    "VGG16": ("vgg16", {}),
    "WRN-28-4": ("wrn28_4", {}),
    "ViT": ("vit", {"depth": 2}),
}


def network(quick, name="ResNet-18"):
    model, smaller = NETWORKS[name]
    return build_model(model, num_classes=10, seed=0, **(smaller if quick else {}))


def images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)


def pruned(quick, sparsity, name="ResNet-18"):
    return densify(sparsify(network(quick, name), sparsity)).eval().requires_grad_(False)


def without_gradients(f):
    def run():
        with torch.no_grad():
            f()

    return run


def dense_forms(quick, name, x, path):
    """The network as it can run without this package, by form. One in bfloat16 is among them, whose logits are others."""
    xc = x.contiguous(memory_format=torch.channels_last)
    dense = pruned(quick, 0.95, name)
    last = pruned(quick, 0.95, name).to(memory_format=torch.channels_last)
    half = pruned(quick, 0.95, name).bfloat16().to(memory_format=torch.channels_last)
    functions = {
        "eager, contiguous": lambda: dense(x),
        "eager, channels_last": lambda: last(xc),
        "eager, channels_last, bfloat16": lambda: half(xc.bfloat16()),
    }
    if not quick:
        compiled = torch.compile(last)
        functions["torch.compile, channels_last"] = lambda: compiled(xc)
    if session := _onnxruntime(dense, x, path):
        functions["onnxruntime"] = lambda: session.run(None, {"x": x.numpy()})
    return functions


def fastest_dense(medians):
    """In float32."""
    dense = ("eager", "torch.compile", "onnxruntime")
    return min(t for name, t in medians.items() if name.startswith(dense) and "bfloat16" not in name)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_inference(side_by_side, quick, batch, tmp_path):
    batch = min(batch, 9) if quick else batch
    x, _ = images(batch)
    densities = (0.5, 0.1) if quick else (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
    functions, on_kept = {}, {}
    for density in densities:
        model = pruned(quick, 1 - density)
        fast = engine.compile_sparse(model, x[:1])
        functions[f"ours, {density:.1%} kept"] = lambda fast=fast: fast(x)
        layers = fast.layers if batch >= 8 else fast.small_batch_layers
        if {kind for name, kind in layers.items() if name != "linear"} == {"sparse"}:
            on_kept[density] = f"ours, {density:.1%} kept"
        else:  # the default runs some layers dense, or all
            sparse = engine.compile_sparse(model, x[:1], choose=lambda layer: "sparse")
            on_kept[density] = f"all sparse, {density:.1%} kept"
            functions[on_kept[density]] = lambda sparse=sparse: sparse(x)
    functions |= dense_forms(quick, "ResNet-18", x, tmp_path / "dense.onnx")
    functions = {name: without_gradients(f) for name, f in functions.items()}
    medians = side_by_side(functions, rounds=7, warm=True, what=f"inference, ResNet-18, batch {batch}")
    dense = fastest_dense(medians)
    speedups = {density: dense / medians[name] for density, name in on_kept.items()}
    BREAK_EVEN.extend({"batch": batch, "density": density, "speedup": speedup} for density, speedup in speedups.items())
    ROWS[-1]["note"] = f"On the kept weights alone as fast as the fastest dense form in float32: at a density of {_where_one(speedups)}."


@pytest.mark.parametrize("name", ["VGG16", "WRN-28-4", "ViT"])
def test_inference_of_other_networks(side_by_side, quick, name, tmp_path):
    batch = 2 if quick else 64
    x, _ = images(batch)
    functions, notes = {}, {}
    for sparsity in SEARCHES:
        fast = engine.compile_sparse(pruned(quick, sparsity, name), x[:1])
        functions[f"ours, {1 - sparsity:.0%} kept"] = lambda fast=fast: fast(x)
        counts = collections.Counter(fast.layers.values())
        notes[f"ours, {1 - sparsity:.0%} kept"] = (
            f"{counts['sparse']} layers sparse, {counts['dense']} dense, {len(fast.dense_parts)} parts"
        )
    functions |= dense_forms(quick, name, x, tmp_path / "dense.onnx")
    functions = {form: without_gradients(f) for form, f in functions.items()}
    medians = side_by_side(functions, rounds=7, warm=True, what=f"inference, {name}, batch {batch}")
    dense = fastest_dense(medians)
    ROWS[-1]["note"] = "Against the fastest dense form in float32: " + "; ".join(
        f"{form}, {dense / medians[form]:.2f} times as fast ({note})" for form, note in notes.items()
    )


def _where_one(speedups):
    """The density at which the speedup is 1, between two that were measured: a straight line in both logarithms."""
    falling = sorted(speedups.items())
    for (low, fast), (high, slow) in itertools.pairwise(falling):
        if fast >= 1 > slow:
            share = math.log(fast) / (math.log(fast) - math.log(slow))
            return f"{math.exp(math.log(low) + share * (math.log(high) - math.log(low))):.0%}"
    return f"above {falling[-1][0]:.0%}" if falling[-1][1] >= 1 else f"below {falling[0][0]:.1%}"


def break_even(points, about):
    """How many times faster than the fastest dense form the kept weights alone are, over the density, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="#777777", linewidth=1)
    for batch, marker, colour in zip(
        sorted({p["batch"] for p in points}), "os^v", ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False
    ):
        mine = sorted((p["density"], p["speedup"]) for p in points if p["batch"] == batch)
        axes.loglog(*zip(*mine, strict=True), marker=marker, color=colour, label=f"batch {batch}")
    axes.set_xlabel("density, %")
    axes.set_ylabel("times faster than the fastest dense form")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_title(f"Inference of ResNet-18 on the kept weights: {about['cpu']}", fontsize=10)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _onnxruntime(model, x, path):
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        return None
    import onnxruntime

    torch.onnx.export(model, (x,), str(path), input_names=["x"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads take the cores from whatever is timed next
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_attack(side_by_side, quick):
    batch, steps = (9, 2) if quick else (64, 10)
    x, y = images(batch)
    functions = {}

    def attack(model, x=x):
        return lambda: pgd(model, x, y, steps=steps, **PGD)

    for sparsity in SPARSITIES:
        functions[f"ours, {1 - sparsity:.0%} kept"] = attack(sparsify(network(quick), sparsity))
    functions["dense, contiguous"] = attack(pruned(quick, 0.95))
    functions["dense, channels_last"] = attack(
        pruned(quick, 0.95).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    )
    if not quick:
        functions["dense, torch.compile"] = attack(torch.compile(pruned(quick, 0.95).to(memory_format=torch.channels_last)))
    side_by_side(functions, rounds=3, what=f"PGD-{steps} attack, ResNet-18, batch {batch}")


def size(quick):
    return {"batch": 9 if quick else 64, "attack_steps": 2 if quick else 10}


def dense_everywhere(step):
    def run():
        with dense_kernels():
            step()

    return run


@pytest.mark.parametrize("sparsity", SEARCHES)
def test_search_step(side_by_side, quick, sparsity):
    def ours():
        return Step(train_scores(sparsify(network(quick), sparsity)), lambda m, base: S2AP(m, base, gamma=1e-3), **size(quick))

    side_by_side(
        {
            "S2AP, on the kept weights": ours(),
            "S2AP, dense convolutions": dense_everywhere(ours()),
            "plain, sort in every forward": Step(mask_every_forward(network(quick), sparsity), **size(quick)),
        },
        rounds=1,
        what=f"mask search step with PGD, ResNet-18, {1 - sparsity:.0%} kept",
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_finetuning_step(side_by_side, quick, sparsity):
    def ours():
        return Step(train_weights(sparsify(network(quick), sparsity)), AWP, **size(quick))

    side_by_side(
        {"AWP, on the kept weights": ours(), "AWP, dense convolutions": dense_everywhere(ours())},
        rounds=3,
        what=f"finetuning step with PGD, ResNet-18, {1 - sparsity:.0%} kept",
    )
