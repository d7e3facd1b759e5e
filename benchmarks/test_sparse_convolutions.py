"""Sparse convolutions, layer by layer: the shapes of ResNet-18, batch 64, against torch's dense ones and SparseProp (if installed).

pytest benchmarks/test_sparse_convolutions.py
"""

import copy
import importlib.util
import io
import math

import pytest
import torch
import torch.nn.functional as F
from measure import ROOFLINE, ROWS

from s2ap_ext import S2APConv2d, backend
from s2ap_ext.nn import train_weights
from s2ap_ext.nn.kept_weights import KeptWeights, convolution_of
from s2ap_ext.nn.layout import empty_batch_innermost
from s2ap_ext.sparse_reference import to_blocks

pytestmark = pytest.mark.skipif(backend().cpu != "C++", reason="needs the C++ kernels")

# inputs, outputs, size, kernel, stride
SHAPES = {
    "64 -> 64 at 32x32": (64, 64, 32, 3, 1),
    "128 -> 128 at 16x16": (128, 128, 16, 3, 1),
    "256 -> 256 at 8x8": (256, 256, 8, 3, 1),
    "512 -> 512 at 4x4": (512, 512, 4, 3, 1),
    "64 -> 128 at 32x32, stride 2": (64, 128, 32, 3, 2),
    "128 -> 256 at 16x16, stride 2": (128, 256, 16, 3, 2),
    "256 -> 512 at 8x8, stride 2": (256, 512, 8, 3, 2),
}
DENSITIES = (0.1, 0.05, 0.01)
HALO = 1


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(side_by_side, quick, shape, density):
    inputs, outputs, size, kernel, stride = SHAPES[shape]
    batch = 16 if quick else 64
    if quick:
        inputs, outputs = inputs // 16, outputs // 16
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False).requires_grad_(False)
    conv.weight.mul_(torch.rand(conv.weight.shape, generator=generator) < density)
    x = torch.randn(batch, inputs, size, size, generator=generator)
    y = conv(x)
    grad = torch.randn(y.shape, generator=generator)
    geometry = convolution_of(conv)
    kept = KeptWeights.of(conv.weight, None, geometry)
    forward = kept.starts, kept.columns, kept.values
    backward = kept.input_starts, kept.input_columns, kept.input_values

    from s2ap_ext import _C

    blocks_x, blocks_grad = (to_blocks(t, _C.lanes(), HALO) for t in (x, grad))
    blocks_y, blocks_grad_x = torch.zeros_like(blocks_grad), torch.zeros_like(blocks_x)
    innermost_x, innermost_grad = (empty_batch_innermost(tuple(t.shape), t).copy_(t) for t in (x, grad))
    to_y, to_x, to_weight = (torch.empty_like(t) for t in (innermost_grad, innermost_x, conv.weight))

    def dense(memory_format):
        a, w, g = (t.contiguous(memory_format=memory_format) for t in (x, conv.weight, grad))

        def gradient(which):
            return torch.ops.aten.convolution_backward(
                g, a, w, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [which == "input", which == "weight", False]
            )

        return lambda: F.conv2d(a, w, None, stride, kernel // 2), lambda: gradient("input"), lambda: gradient("weight")

    first, last = dense(torch.contiguous_format), dense(torch.channels_last)
    ours_forward = {
        "ours, blocks": lambda: torch.ops.s2ap.sparse_conv(blocks_x, *forward, None, None, *geometry, HALO, False, blocks_y),
        "ours, images": lambda: torch.ops.s2ap.sparse_conv(innermost_x, *forward, None, None, *geometry, 0, False, to_y),
    }
    ours_gradient = {
        "ours, blocks": lambda: torch.ops.s2ap.sparse_conv_input_grad(blocks_grad, *backward, None, None, *geometry, HALO, blocks_grad_x),
        "ours, images": lambda: torch.ops.s2ap.sparse_conv_input_grad(innermost_grad, *backward, None, None, *geometry, 0, to_x),
    }

    def weight_grad():
        torch.ops.s2ap.sparse_conv_weight_grad(innermost_x, innermost_grad, *forward[:2], *geometry, to_weight)

    theirs = _sparseprop(conv, x, grad)
    what = f"{shape}, {density:.0%} kept, batch {batch}"
    title = {"forward": (ours_forward, 0), "input gradient": (ours_gradient, 1)}
    for name, (ours, which) in title.items():
        others = {"dense, contiguous": first[which], "dense, channels_last": last[which]}
        if theirs and name == "forward":
            others["SparseProp"] = theirs[0]
        medians = side_by_side(ours | others, rounds=7, warm=True, what=f"{name}: {what}", benchmarked=False)
        ROWS[-1]["sparse_layer"] = (name, density)
        if name == "forward":
            count = len(kept.values)
            flops = 2 * count * y.numel() // outputs
            moved = 4 * (x.numel() + y.numel()) + 8 * count
            ROOFLINE.append({"layer": shape, "density": density, "flops": flops, "bytes": moved, "seconds": medians["ours, blocks"]})
    if theirs:
        ours = _layer(conv, innermost_x, innermost_grad, quick)
        what_both = f"forward and both gradients: {what}"
        side_by_side({"ours, images": ours, "SparseProp": theirs[1]}, rounds=5, warm=True, what=what_both, benchmarked=False)
        ROWS[-1]["sparse_layer"] = ("forward and both gradients", density)
    side_by_side(
        {"ours, images": weight_grad, "dense, contiguous": first[2], "dense, channels_last": last[2]},
        rounds=5,
        warm=True,
        what=f"weight gradient: {what}",
    )
    ROWS[-1]["sparse_layer"] = ("weight gradient", density)


def _layer(conv, x, grad, quick):
    """Forward and backward of a pruned layer whose kept weights train, on activations with the batch innermost."""
    density = conv.weight.count_nonzero().item() / conv.weight.numel()
    layer = train_weights(S2APConv2d.from_dense(copy.deepcopy(conv), sparsity=1 - density))
    a = x.detach().requires_grad_()

    def both():
        a.grad = layer.weight.grad = None
        layer(a).backward(grad)

    both()
    assert quick or layer.mask_state.selection.kept_weights is not None  # it runs on the kept weights
    return both


def _sparseprop(conv, x, grad):
    """Forward, and forward with backward, of the public package for sparse backpropagation on CPUs (arXiv 2302.04852); None without it.

    The faster of its two ways to vectorise.
    """
    if importlib.util.find_spec("sparseprop") is None:
        return None
    import time

    from sparseprop.modules import SparseConv2d

    best = None
    for over_outputs in (False, True):
        layer = SparseConv2d.from_dense(conv, vectorizing_over_on=over_outputs)
        a = x.clone().requires_grad_()

        def forward(layer=layer):
            with torch.no_grad():
                layer(x)

        def both(layer=layer, a=a):
            a.grad = layer.W_val.grad = None
            layer(a).backward(grad)

        both()
        start = time.perf_counter()
        both()
        seconds = time.perf_counter() - start
        if best is None or seconds < best[0]:
            best = seconds, forward, both
    return best[1:]


def test_geometric_means_are_noted():
    """How many times faster than the best dense form, over all layers; as a row of its own."""
    rows = [row for row in ROWS if "sparse_layer" in row]
    if not rows:
        pytest.skip("needs the rows of test_layer in the same run")
    means: dict[str, float] = {}
    for name, density in dict.fromkeys(row["sparse_layer"] for row in rows):
        ratios: dict[str, list[float]] = {}
        for row in rows:
            if row["sparse_layer"] != (name, density):
                continue
            ms = row["median_ms"]
            dense = [t for form, t in ms.items() if form.startswith("dense")]
            for form in ms:
                if form.startswith("ours") and dense:
                    ratios.setdefault(f"{name}, {form}, against dense", []).append(min(dense) / ms[form])
                if form.startswith("ours") and "SparseProp" in ms:
                    ratios.setdefault(f"{name}, {form}, against SparseProp", []).append(ms["SparseProp"] / ms[form])
        means |= {f"{what}, {density:.0%} kept": math.exp(sum(map(math.log, r)) / len(r)) for what, r in ratios.items()}
    ROWS[-1]["note"] = "Times faster, geometric mean over the layers:\n\n" + "\n".join(
        f"* {what}: {mean:.1f}" for what, mean in means.items()
    )


def roofline(points, about, peak_flops, bandwidth):
    """Arithmetic on the kept weights per second over arithmetic per byte, under the machine's measured limits, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    intensities = [p["flops"] / p["bytes"] for p in points]
    low, high = min(intensities) / 2, max(*intensities, peak_flops / bandwidth) * 2
    knee = peak_flops / bandwidth
    axes.loglog([low, knee, high], [low * bandwidth / 1e9, peak_flops / 1e9, peak_flops / 1e9], color="#777777", label="measured limits")
    for density, marker in zip(DENSITIES, "os^", strict=True):
        mine = [p for p in points if p["density"] == density]
        axes.loglog(
            [p["flops"] / p["bytes"] for p in mine],
            [p["flops"] / p["seconds"] / 1e9 for p in mine],
            marker,
            label=f"{density:.0%} kept",
        )
    axes.set_xlabel("floating point operations on kept weights per byte of activations and entries")
    axes.set_ylabel("GFLOP/s on kept weights")
    axes.set_title(f"Sparse convolutions (blocks), forward: {about['cpu']}", fontsize=10)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
