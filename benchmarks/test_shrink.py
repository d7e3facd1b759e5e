"""Channels, heads and neurons that are gone, taken out: networks with half of them masked, and the smaller networks that compute the same.

pytest benchmarks/test_shrink.py
"""

import copy

import pytest
import torch
from measure import ROWS
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext.models import build_model
from s2ap_ext.nn.shrink import size_of
from s2ap_ext.nn.tracing import configured_calls

# name -> (model, its options, those for --quick, side of its images, what is removed as one, in this order)
NETWORKS = {
    "ResNet-18": ("resnet18", {}, {"width": 8}, 32, ("channel",)),
    "VGG16": ("vgg16", {}, {}, 32, ("channel",)),
    "WRN-28-4": ("wrn28_4", {}, {}, 32, ("channel",)),
    "ResNet-50": ("resnet50", {}, {"width": 8}, 64, ("channel",)),
    "ViT, heads": ("vit", {"heads": 6}, {"depth": 2}, 32, ("head",)),
    "ViT, neurons": ("vit", {"heads": 6}, {"depth": 2}, 32, ("neuron",)),
    "ViT, heads and neurons": ("vit", {"heads": 6}, {"depth": 2}, 32, ("head", "neuron")),
}

# Families of Hugging Face's transformers -> their configuration where it is not their own default.
SMALL = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6}
FAMILIES = {
    "ViT": {**SMALL, "intermediate_size": 1536},
    "DeiT": {**SMALL, "intermediate_size": 1536},
    "Dinov2": SMALL,
    "Bert": {**SMALL, "intermediate_size": 1536},
    "Swin": {},
    "MobileViT": {},
}
QUICK = {family: {"num_hidden_layers": 1} for family in ("ViT", "DeiT", "Dinov2", "Bert")} | {
    "Swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "MobileViT": {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
}


def trained(name, options):
    """With statistics and BatchNorm parameters as after training: many masked channels hold a number other than 0."""
    model = build_model(name, num_classes=10, seed=0, **options)
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return model


def half_removed(model, x, granularities, *, shrink):
    """``model`` without half of its channels, heads or neurons: masked, with zeros in their place, or ``shrink``: taken out."""
    model = copy.deepcopy(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for granularity in granularities:
        tied = {"tied": True, "exclude": [":last"]} if granularity == "channel" else {}
        sparsify(model, 0.5, granularity=granularity, example=x[:2], **tied)
        for norm in norms:
            norm.momentum = 1
        with torch.no_grad():
            model.train()(x)
        model.eval().requires_grad_(False)
        densify(model, shrink=shrink, example=x[:2] if shrink else None)
    return model


@pytest.mark.parametrize("network", NETWORKS)
def test_inference(side_by_side, quick, network):
    name, options, smaller, side, granularities = NETWORKS[network]
    x = torch.rand(2 if quick else 64, 3, side, side, generator=torch.Generator().manual_seed(0))
    model = trained(name, options | smaller if quick else options)
    before, after = (half_removed(model, x, granularities, shrink=shrink) for shrink in (False, True))
    last = [copy.deepcopy(net).to(memory_format=torch.channels_last) for net in (before, after)]
    xc = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        apart = (after(x) - before(x)).abs().max().item()
        # In double precision, for in float32 a deep network amplifies rounding; what is left is that of the weights that were added up.
        old, new = (copy.deepcopy(net).double()(x[:8].double()) for net in (before, after))
        assert (old - new).abs().max() <= 1e-5 * max(1, old.abs().max().item())
        side_by_side(
            {
                "smaller": lambda: after(x),
                "masked": lambda: before(x),
                "smaller, channels_last": lambda: last[1](xc),
                "masked, channels_last": lambda: last[0](xc),
            },
            rounds=5,
            warm=True,
            what=f"inference, {network}, half removed, batch {len(x)} of {side}x{side}",
        )
    ROWS[-1]["note"] = note(before, after, x[:1], apart)


def note(before, after, example, apart):
    old, new = (size_of(net, example) for net in (before, after))
    return (
        f"Parameters {old.parameters:,} -> {new.parameters:,}; FLOPs of an input {old.flops:.4g} -> {new.flops:.4g} "
        f"({old.flops / new.flops:.2f} times fewer); logits differ by {apart:.1g} at most."
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_hugging_face(side_by_side, quick, family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = FAMILIES[family] | (QUICK[family] if quick else {})
    config = getattr(transformers, f"{family}Config")(**options)
    what = "Sequence" if family == "Bert" else "Image"
    model = getattr(transformers, f"{family}For{what}Classification")(config).eval().requires_grad_(False)
    batch = 1 if quick else 8
    x = {name: value[:1].repeat_interleave(batch, dim=0) for name, value in configured_calls(model)[0][1].items()}
    sparsify(model, 0.5, granularity="head")
    before, after = densify(copy.deepcopy(model)), densify(model, shrink=True)
    with torch.no_grad():
        apart = (after(**x).logits - before(**x).logits).abs().max().item()
        assert apart <= 1e-5
        side_by_side(
            {"smaller": lambda: after(**x), "masked": lambda: before(**x)},
            rounds=7,
            warm=True,
            what=f"inference, {family} of Hugging Face, half of the heads removed, batch {batch}",
        )
    ROWS[-1]["note"] = note(before, after, {name: value[:1] for name, value in x.items()}, apart)
