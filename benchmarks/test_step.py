"""Whole mask-search steps of ResNet-18 on images of CIFAR's size: PGD-10, forwards, backwards, optimiser step. Batch 64.

pytest benchmarks/test_step.py [-k ascents]
"""

import pytest
from steps import Step

from s2ap_ext import S2AP, sparsify
from s2ap_ext.baselines import mask_every_forward
from s2ap_ext.models import build_model
from s2ap_ext.nn import dense_kernels, sampled_gradients, train_scores

ASCENTS = ["exact", "skip", "reuse", "previous"]


def network(quick):
    return build_model("resnet18", num_classes=10, width=4 if quick else 64, seed=0)


def pruned(quick, sparsity=0.9):
    return train_scores(sparsify(network(quick), sparsity))


def s2ap(**how):
    return lambda model, base: S2AP(model, base, defer_grads=True, **how)


@pytest.fixture(scope="module")
def size(quick, device):
    return {"batch": 4 if quick else 64, "attack_steps": 2 if quick else 10, "device": device}


def test_step(side_by_side, quick, size):
    side_by_side(
        {
            "S2AP": Step(pruned(quick), s2ap(gamma=1e-3), **size),
            "plain": Step(pruned(quick), **size),
            "plain, sort in every forward": Step(mask_every_forward(network(quick), 0.9), **size),
            "plain, sort with a mask cache": Step(mask_every_forward(network(quick), 0.9, cached=True), **size),
        },
        rounds=5,
        wall=True,
        what=f"training step with PGD-{size['attack_steps']}, ResNet-18, batch {size['batch']}",
    )


@pytest.mark.parametrize(("kernels", "sparsity"), [("dense", 0.9), ("sparse", 0.95)])
def test_ascents(side_by_side, quick, size, kernels, sparsity):
    """What each ascent adds to the plain step, and what sampled gradients and a budget of flips change."""

    def with_dense_kernels(step):
        def run():
            with dense_kernels():
                step()

        return run if kernels == "dense" else step

    def quarter(model):
        return sampled_gradients(model, 0.25)

    steps = {"plain": Step(pruned(quick, sparsity), **size)}
    steps |= {name: Step(pruned(quick, sparsity), s2ap(gamma=1e-3, ascent=name), **size) for name in ASCENTS}
    steps["exact, gamma by flips:0.003"] = Step(pruned(quick, sparsity), s2ap(gamma="flips:0.003"), **size)
    if kernels == "sparse":
        steps["plain, gradients of a quarter of the channels"] = Step(pruned(quick, sparsity), around=quarter, **size)
        steps["exact, gradients of a quarter of the channels"] = Step(pruned(quick, sparsity), s2ap(gamma=1e-3), around=quarter, **size)
    side_by_side(
        {name: with_dense_kernels(step) for name, step in steps.items()},
        rounds=3,
        wall=True,
        what=f"mask search step with PGD-{size['attack_steps']}, ResNet-18, {kernels} kernels, {1 - sparsity:.0%} kept",
    )
