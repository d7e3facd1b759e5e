"""Mask-search steps of ResNet-18 with PGD-10 by precision, memory layout, torch.compile and CUDA graphs, plain and with S2AP.

pytest benchmarks/test_fast_step.py --device cuda
"""

import pytest
import torch
from steps import Step

from s2ap_ext import S2AP, sparsify
from s2ap_ext.models import build_model
from s2ap_ext.nn import Accelerated, train_scores
from s2ap_ext.nn.accelerated import check_precision
from s2ap_ext.optim import LossScale, Plain

PRECISIONS = ("fp32", "bf16", "tf32", "fp16")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself


def s2ap(model, base):
    return S2AP(model, base, gamma=1e-3, defer_grads=True)


def s2ap_fp16(model, base):
    return S2AP(model, base, gamma=1e-3)  # a loss scale works on .grad


@pytest.mark.parametrize("batch", [128, 512])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fast_step(side_by_side, quick, device, batch, precision):
    try:
        check_precision(precision, device)
    except ValueError as error:
        pytest.skip(str(error))
    if quick and (batch, precision) != (128, "bf16"):
        pytest.skip("at tiny size one of them shows that all run")
    batch, attack_steps = (4, 1) if quick else (batch, 10)

    def step(make, **how):
        model = train_scores(sparsify(build_model("resnet18", num_classes=10, width=8 if quick else 64, seed=0), 0.9)).to(device)
        forwards = Accelerated(model, **how) if how else model
        scale = LossScale() if how.get("precision") == "fp16" else None
        return Step(
            model, make, batch=batch, attack_steps=attack_steps, device=device, forwards=forwards, precision=precision, loss_scale=scale
        )

    torch.compiler.reset()
    layouts = {"": {}, ", channels_last": {"channels_last": True}}
    compiled = {"channels_last": True, "compiled_batch": batch, "backend": "eager" if quick else "inductor"}
    layouts[", channels_last, compiled"] = compiled
    if device.type == "cuda":
        layouts[", channels_last, compiled, CUDA graphs"] = compiled | {"cuda_graphs": True}
    steps = {"S2AP, fp32": step(s2ap), "plain, fp32": step(Plain)}
    for name, how in layouts.items():
        if name or precision != "fp32":
            kinds = {"S2AP": s2ap_fp16 if precision == "fp16" else s2ap, "plain": Plain}
            steps |= {f"{kind}, {precision}{name}": step(make, precision=precision, **how) for kind, make in kinds.items()}
    side_by_side(steps, rounds=5, wall=True, what=f"training step with PGD-{attack_steps}, ResNet-18, batch {batch}, {precision}")
