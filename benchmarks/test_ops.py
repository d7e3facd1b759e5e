"""The ops on the weights of four networks, sparsity 0.9, against the forms that pruning code has for them today.

pytest benchmarks/test_ops.py
"""

import math

import pytest
import torch
from networks import NETWORKS

from s2ap_ext import ops
from s2ap_ext.baselines import MASKS
from s2ap_ext.reference import Pattern
from s2ap_ext.sparsity import kept_count, pattern_for, score_init

SPARSITY = 0.9
SGD = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4}
STREAM = "one streaming pass (torch.mul)"


class Layers:
    """Weights, scores, gradients and momentum buffers of a network; its scores are scaled weights, as in the first step."""

    def __init__(self, shapes, device):
        generator = torch.Generator().manual_seed(0)

        def randn(scale):
            return [scale * torch.randn(shape, generator=generator).to(device) for shape in shapes]

        self.shapes = shapes
        self.weights = [w / math.sqrt(w[0].numel()) for w in randn(1)]
        self.scores = [score_init(w).add_(noise) for w, noise in zip(self.weights, randn(1e-3), strict=True)]
        self.grads, self.buffers = randn(1e-3), randn(1e-3)
        self.out = [torch.empty_like(w) for w in self.weights]
        self.counts = [kept_count(math.prod(shape), SPARSITY) for shape in shapes]
        self.kept = torch.tensor(self.counts, device=device)
        self.numel = sum(map(math.prod, shapes))
        _, self.cuts = ops.select(self.scores, self.weights, self.kept, out=self.out)
        self.new_cuts = torch.zeros_like(self.cuts)

    def __iter__(self):
        return zip(self.scores, self.grads, self.weights, self.counts, self.out, strict=True)

    def stream(self):
        """One pass over the same memory: what reading two tensors and writing one costs at least."""
        for s, _, w, _, o in self:
            torch.mul(s, w, out=o)

    def select(self, make):
        for s, _, w, k, o in self:
            torch.mul(w, make(s, k), out=o)

    def perturb(self, make):
        for s, g, w, k, o in self:
            z = g * (1e-3 * s.norm() / (g.norm() + 1e-12))
            torch.mul(w, make(s + z, k), out=o)

    def optimizer(self, **how):
        parameters = [torch.nn.Parameter(s.clone()) for s in self.scores]
        for p, g in zip(parameters, self.grads, strict=True):
            p.grad = g
        return torch.optim.SGD(parameters, **SGD, **how)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return request.param


@pytest.fixture(scope="module")
def layers(network, quick, device):
    shapes = [tuple(max(1, n // 8) if n > 8 else n for n in shape) for shape in NETWORKS[network]()] if quick else NETWORKS[network]()
    return Layers(shapes, device)


def rounds(layers):
    return 15 if layers.numel < 2e7 else 7 if layers.numel < 5e7 else 3


def floor(layers, **bytes_per_element):
    n, size = layers.numel, layers.scores[0].element_size() // 4
    return STREAM, 12 * size * n, {name.replace("_", " "): b * size * n for name, b in bytes_per_element.items()}


def test_select(side_by_side, layers, network):
    masks = [MASKS["sort"](s, k) for s, _, _, k, _ in layers]

    def cached():
        for (_, _, w, _, o), m in zip(layers, masks, strict=True):
            torch.mul(w, m, out=o)

    side_by_side(
        {"select": lambda: ops.select(layers.scores, layers.weights, layers.kept, out=layers.out, cuts=layers.cuts)}
        | {f"{name} form": lambda make=make: layers.select(make) for name, make in MASKS.items()}
        | {"a cached mask times the weights": cached, STREAM: layers.stream},
        rounds=rounds(layers),
        what=f"select, {network}: top-k masked weights of {len(layers.shapes)} layers, {layers.numel:,} scores",
        floor=floor(layers, select=12),
        inspect=True,
    )


def test_perturb(side_by_side, layers, network):
    def perturb(**how):
        ops.perturb(
            *(layers.scores, layers.grads, layers.weights, layers.kept, layers.cuts),
            **{"gamma": 1e-3, "out": layers.out, "new_cuts": layers.new_cuts} | how,
        )

    side_by_side(
        {"perturb": perturb, "perturb, gradient formed inside": lambda: perturb(straight_through=True)}
        | {f"{name} form": lambda make=make: layers.perturb(make) for name, make in MASKS.items()}
        | {STREAM: layers.stream},
        rounds=rounds(layers),
        what=f"perturb, {network}: norms, selection at s + z, masked weights, flip counts",
        floor=floor(layers, perturb=28),
        inspect=True,
    )


def test_update(side_by_side, layers, network):
    fused, plain = layers.optimizer(fused=True), layers.optimizer()
    scores, saved, buffers = ([t.clone() for t in tensors] for tensors in (layers.scores, layers.scores, layers.buffers))

    def restore_by_copy():
        for p, s in zip(plain.param_groups[0]["params"], saved, strict=True):
            p.data.copy_(s)
        plain.step()

    side_by_side(
        {
            "update": lambda: ops.update(scores, layers.grads, buffers, **SGD),
            "torch SGD, fused": fused.step,
            "torch SGD, default": plain.step,
            "restore by copy, then torch SGD": restore_by_copy,
            STREAM: layers.stream,
        },
        rounds=rounds(layers),
        what=f"update, {network}: restore and SGD with momentum and weight decay",
        floor=floor(layers, update=20),
        inspect=True,
    )


def test_update_select(side_by_side, layers, network):
    scores, buffers = ([t.clone() for t in tensors] for tensors in (layers.scores, layers.buffers))
    fused = layers.optimizer(fused=True)

    def ours(**how):
        ops.update_select(
            *(scores, layers.grads, buffers, layers.weights, layers.kept, layers.cuts),
            **SGD,
            out=layers.out,
            new_cuts=layers.new_cuts,
            **how,
        )

    def apart():
        ops.update(scores, layers.grads, buffers, **SGD)
        ops.select(scores, layers.weights, layers.kept, out=layers.out)

    def torch_alone():
        fused.step()
        layers.select(MASKS["topk"])

    side_by_side(
        {
            "update select": ours,
            "update select, gradient formed inside": lambda: ours(straight_through=True),
            "update, then select": apart,
            "torch SGD, fused, then the topk form": torch_alone,
            STREAM: layers.stream,
        },
        rounds=rounds(layers),
        what=f"update_select, {network}: SGD and the masked weights at the new scores, flip counts, sums of squares",
        floor=floor(layers, update_select=28),
        inspect=True,
    )


@pytest.mark.parametrize("granularity", ["2:4", "4:8", "channel"])
def test_patterns(side_by_side, layers, network, granularity):
    if network != "ResNet-18":
        pytest.skip("measured on ResNet-18")

    def pattern(shape):
        fits = granularity == "channel" or shape[1] % int(granularity[-1]) == 0
        return pattern_for(granularity, shape, 0.5) if fits else Pattern()

    patterns = [pattern(shape) for shape in layers.shapes]
    kept = [p.size // 2 if p.size else math.prod(shape) // 2 for p, shape in zip(patterns, layers.shapes, strict=True)]

    def by_torch():
        for (s, _, w, _, o), p, k in zip(layers, patterns, kept, strict=True):
            if granularity == "channel":
                mask = torch.zeros(p.size, device=s.device).index_fill_(0, s.abs().flatten(1).sum(dim=1).topk(k).indices, 1)
                torch.mul(w, mask.view(-1, *[1] * (w.dim() - 1)), out=o)
            elif p.size:
                windows = s.abs().view(-1, p.size, p.block)
                mask = torch.zeros_like(windows).scatter_(1, windows.topk(k, dim=1).indices, 1)
                torch.mul(w, mask.view_as(w), out=o)
            else:
                torch.mul(w, MASKS["topk"](s, k), out=o)

    side_by_side(
        {
            f"select, {granularity}": lambda: ops.select(layers.scores, layers.weights, kept, patterns=patterns, out=layers.out),
            "the same with torch.topk": by_torch,
            "select, single weights": lambda: ops.select(layers.scores, layers.weights, layers.kept, out=layers.out),
            STREAM: layers.stream,
        },
        rounds=7,
        what=f"select with granularity {granularity}, {network}",
        inspect=True,
    )
