"""The three ops on ResNet-18's layer list (21 tensors, 11,164,352 scores), sparsity 0.9.

pytest benchmarks/test_ops.py
"""

import pytest
import torch
from baselines import MASKS

from s2ap_ext import ops
from s2ap_ext.models import build_model
from s2ap_ext.sparsity import kept_count, score_init

SPARSITY = 0.9


@pytest.fixture(scope="module")
def layers(quick):
    """Weights, scores, gradients and momentum buffers of ResNet-18; in the first step scores are scaled weights."""
    model = build_model("resnet18", num_classes=10, width=4 if quick else 64, seed=0)
    generator = torch.Generator().manual_seed(0)
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    scores = [score_init(w) + 1e-3 * torch.randn(w.shape, generator=generator) for w in weights]
    grads = [1e-3 * torch.randn(w.shape, generator=generator) for w in weights]
    return {
        "weights": weights,
        "scores": scores,
        "grads": grads,
        "buffers": [g.clone() for g in grads],
        "out": [torch.empty_like(w) for w in weights],
        "kept": [kept_count(w.numel(), SPARSITY) for w in weights],
    }


def streaming(layers):
    """One pass over the same memory: what reading two tensors and writing one costs at least."""
    for s, w, o in zip(layers["scores"], layers["weights"], layers["out"], strict=True):
        torch.mul(s, w, out=o)


def test_select(side_by_side, layers):
    scores, weights, kept, out = (layers[name] for name in ("scores", "weights", "kept", "out"))
    kept_tensor = torch.tensor(kept)

    def form(make):
        def run():
            for s, w, k, o in zip(scores, weights, kept, out, strict=True):
                torch.mul(w, make(s, k), out=o)

        return run

    masks = [MASKS["sort"](s, k) for s, k in zip(scores, kept, strict=True)]

    def cached():  # the mask is there already: what even a cache pays in every forward that it does not keep the product
        for w, m, o in zip(weights, masks, out, strict=True):
            torch.mul(w, m, out=o)

    side_by_side(
        {"select": lambda: ops.select(scores, weights, kept_tensor, out=out)}
        | {f"{name} form": form(make) for name, make in MASKS.items()}
        | {"sort form, cached mask": cached, "one streaming pass (torch.mul)": lambda: streaming(layers)},
        rounds=15,
        what="select: top-k masked weights of all layers",
    )


def test_perturb(side_by_side, layers):
    scores, weights, grads, kept, out = (layers[name] for name in ("scores", "weights", "grads", "kept", "out"))
    kept_tensor = torch.tensor(kept)
    _, cuts = ops.select(scores, weights, kept_tensor, out=out)

    def form(make):
        def run():
            for s, g, w, k, o in zip(scores, grads, weights, kept, out, strict=True):
                z = g * (1e-3 * s.norm() / (g.norm() + 1e-12))
                torch.mul(w, make(s + z, k), out=o)

        return run

    side_by_side(
        {"perturb": lambda: ops.perturb(scores, grads, weights, kept_tensor, cuts, gamma=1e-3, out=out)}
        | {f"{name} form": form(make) for name, make in MASKS.items()}
        | {"one streaming pass (torch.mul)": lambda: streaming(layers)},
        rounds=15,
        what="perturb: norms, selection at s + z, masked weights, flip counts",
    )


def test_update(side_by_side, layers):
    sgd = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4}

    def optimizer(**how):
        parameters = [torch.nn.Parameter(s.clone()) for s in layers["scores"]]
        for p, g in zip(parameters, layers["grads"], strict=True):
            p.grad = g
        return torch.optim.SGD(parameters, **sgd, **how)

    fused, plain = optimizer(fused=True), optimizer()
    scores = [s.clone() for s in layers["scores"]]
    saved = [s.clone() for s in layers["scores"]]

    def restore_by_copy():
        for p, s in zip(plain.param_groups[0]["params"], saved, strict=True):
            p.data.copy_(s)
        plain.step()

    side_by_side(
        {
            "update": lambda: ops.update(scores, layers["grads"], layers["buffers"], **sgd),
            "torch SGD, fused": fused.step,
            "torch SGD, default": plain.step,
            "restore by copy, then torch SGD": restore_by_copy,
        },
        rounds=15,
        what="update: restore and SGD with momentum and weight decay",
    )
