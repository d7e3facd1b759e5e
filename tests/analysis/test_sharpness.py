"""Sharpness against Hessians that are known, or that torch forms whole from a network written out by hand."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_found, images, small_net, snapshot
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from s2ap_ext import S2APLinear, analysis, densify, sparsify

LABELS = torch.tensor([0, 1, 2, 3])


def loss(net):
    return F.cross_entropy(net(images()), LABELS)


class Tiny(nn.Module):
    """Smooth, so that its Hessian exists everywhere; with a convolution, BatchNorm and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 10)
        self.norm.running_mean.uniform_(-0.2, 0.2)

    def forward(self, x):
        return self.linear(F.softplus(self.norm(self.conv(x))).mean(dim=(2, 3)))


@functools.cache
def dense_hessian(space):
    """That of the half pruned Tiny, all of it, in float64, from the relaxation's definition and a network without pruned layers."""
    net = sparsify(Tiny().double(), 0.5)
    plain = densify(sparsify(Tiny(), 0.0)).double().eval()
    layers = {"conv": net.conv, "linear": net.linear}
    start = {name: (layer.scores if space == "scores" else layer.weight).detach() for name, layer in layers.items()}
    sizes = [t.numel() for t in start.values()]

    def masked(name, value):
        layer, mask = layers[name], layers[name].mask
        if space == "weights":
            return value * mask
        return layer.weight.detach() * (mask + value.abs() - layer.scores.detach().abs())

    def value_at(flat):
        parts = {n: part.view_as(start[n]) for n, part in zip(start, flat.split(sizes), strict=True)}
        tensors = {**{n: b.double() for n, b in net.named_buffers() if n.startswith("norm")}}
        tensors |= {n: p.detach() for n, p in net.named_parameters() if not n.endswith(("scores", "weight")) or n.startswith("norm")}
        tensors |= {f"{n}.weight": masked(n, part) for n, part in parts.items()}
        return F.cross_entropy(functional_call(plain, tensors, (images().double(),)), LABELS)

    matrix = hessian(value_at, torch.cat([t.flatten() for t in start.values()]))
    if space == "weights":
        kept = torch.cat([layer.mask.flatten() for layer in layers.values()])
        matrix = matrix[kept][:, kept]
    return matrix


@pytest.mark.parametrize("space", analysis.SPACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_spectrum_is_that_of_the_dense_hessian(space, dtype):
    net = sparsify(Tiny().double(), 0.5)
    whole = dense_hessian(space)
    expected = torch.linalg.eigvalsh(whole).flip(0)

    def robust(model):
        return F.cross_entropy(model(images().to(dtype)), LABELS)

    found = analysis.spectrum(net.to(dtype), robust, space=space, top=4, probes=200)
    tolerance = 1e-4 if dtype == torch.float64 else 1e-2
    assert found.lambda_max == pytest.approx(float(expected[0]), rel=tolerance)
    assert found.eigenvalues == pytest.approx(expected[:4].tolist(), rel=tolerance)
    assert found.size == len(whole)
    assert abs(found.trace - float(whole.trace())) < 4 * found.trace_error
    assert found.trace_error < 0.2 * abs(found.trace)


def test_a_space_smaller_than_the_basis_of_lanczos():
    layer = S2APLinear(3, 2, sparsity=0.0).double()
    curvature = torch.tensor([[3.0, -7.0, 1.0], [0.5, 2.0, -1.0]], dtype=torch.float64)
    found = analysis.spectrum(layer, lambda m: 0.5 * (curvature * m.scores.square()).sum(), top=9, probes=3)
    assert found.eigenvalues == pytest.approx([3, 2, 1, 0.5, -1, -7])
    assert found.trace == pytest.approx(-1.5)  # of a diagonal matrix every probe finds the trace
    assert found.trace_error == pytest.approx(0, abs=1e-12)


def test_pruned_weights_are_no_flat_directions():
    """Where the loss curves downwards only, zeros of the pruned weights must not pass for the largest eigenvalues."""
    layer = S2APLinear(10, 10, sparsity=0.5).double()
    found = analysis.spectrum(layer, lambda m: -0.5 * m.masked_weight.square().sum(), space="weights", top=2, probes=1)
    assert found.size == 50
    assert found.eigenvalues == pytest.approx([-1, -1])
    assert found.trace == pytest.approx(-50)
    assert found.trace_error == 0


def test_the_weights_of_a_dense_model():
    net = nn.Linear(4, 3).double()
    x, y = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = analysis.spectrum(net, lambda m: F.cross_entropy(m(x), y), space="weights", top=3)
    whole = hessian(lambda w: F.cross_entropy(F.linear(x, w, net.bias.detach()), y), net.weight.detach()).view(12, 12)
    assert found.eigenvalues == pytest.approx(torch.linalg.eigvalsh(whole).flip(0)[:3].tolist())


def test_a_linear_loss_is_flat():
    layer = S2APLinear(8, 8, sparsity=0.5)
    found = analysis.spectrum(layer, lambda m: m.masked_weight.sum(), space="weights", probes=2)
    assert found.eigenvalues == (0,) * 5
    assert found.trace == 0


@pytest.mark.parametrize("space", analysis.SPACES)
def test_the_spectrum_leaves_the_model_as_found(space):
    net = sparsify(small_net(), 0.9)
    net[0].scores.requires_grad_(False)
    net[0].weight.requires_grad_(False)
    net[2].eval()
    before = snapshot(net)
    first, again = (analysis.spectrum(net, loss, space=space, top=1, probes=1) for _ in range(2))
    assert first == again
    assert math.isfinite(first.lambda_max)
    assert_as_found(net, before)


def test_sharpness_of_a_known_curvature():
    """Without pruning, s and its sign never matter, so the gradient moves only through a loss that reads the scores itself."""
    layer = S2APLinear(3, 2, sparsity=0.0).double()
    curvature = torch.tensor([[3.0, -7.0, 1.0], [0.5, 2.0, -1.0]], dtype=torch.float64)
    value = analysis.score_sharpness(layer, lambda m: 0.5 * (curvature * m.scores.square()).sum(), iterations=60)
    assert value == pytest.approx(-7.0, rel=1e-6)


def test_sharpness_leaves_the_model_as_found():
    net = sparsify(small_net(), 0.9)
    net[0].scores.requires_grad_(False)
    net[2].eval()
    before = snapshot(net)
    value = analysis.score_sharpness(net, loss, radius=0.05, iterations=3)
    assert math.isfinite(value)
    assert value != 0
    assert value == analysis.score_sharpness(net, loss, radius=0.05, iterations=3)
    assert_as_found(net, before)


def test_errors():
    net = sparsify(small_net(), 0.9)
    with pytest.raises(ValueError, match="radius: expected a number > 0, got 0"):
        analysis.score_sharpness(net, loss, radius=0)
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        analysis.score_sharpness(net, loss, iterations=0)
    with pytest.raises(ValueError, match=r"found none; call s2ap_ext\.sparsify"):
        analysis.score_sharpness(nn.Linear(2, 2), lambda m: m.weight.sum())
    with pytest.raises(ValueError, match="space: expected one of scores, weights, got 'masks'"):
        analysis.spectrum(net, loss, space="masks")
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        analysis.spectrum(net, loss, top=0)
    with pytest.raises(ValueError, match="probes: expected at least 1, got 0"):
        analysis.spectrum(net, loss, probes=0)
    with pytest.raises(ValueError, match="model: expected weights of more than one dimension"):
        analysis.spectrum(nn.BatchNorm1d(3), loss, space="weights")
    with pytest.raises(ValueError, match="loss: Lanczos iterations found no eigenvalues of its Hessian in the weights"):
        analysis.spectrum(net, lambda model: float("nan") * loss(model), space="weights", probes=1)
