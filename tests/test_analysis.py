"""Mask distances by hand, and sharpness against a Hessian that is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_net
from torch import nn

from s2ap_ext import S2APLinear, analysis, sparsify

LABELS = torch.tensor([0, 1, 2, 3])


def loss(net):
    return F.cross_entropy(net(images()), LABELS)


def masks(*rows):
    return {f"layer{i}": torch.tensor(row, dtype=torch.bool) for i, row in enumerate(rows)}


def test_mask_distance_and_flip_rate_by_hand():
    a, b = masks([1, 1, 0, 0], [1, 0]), masks([1, 0, 1, 0], [1, 0])
    assert analysis.mask_distance(a, b) == pytest.approx(2 / 6)
    assert analysis.flip_rate(a, b) == pytest.approx(2 / 3)
    assert analysis.mask_distance(a, a) == analysis.flip_rate(b, b) == 0


def test_masks_of_models():
    net = sparsify(small_net(), 0.9)
    before = analysis.layer_masks(net)
    with torch.no_grad():
        net[3].scores.copy_(torch.randn_like(net[3].scores))
    changed = int((before["3"] != net[3].mask).sum())
    assert changed > 0
    assert analysis.mask_distance(before, net) == pytest.approx(changed / sum(m.numel() for m in before.values()))


def test_masks_that_do_not_match():
    with pytest.raises(ValueError, match="only one has \\['layer1'\\]"):
        analysis.mask_distance(masks([1], [1]), masks([1]))
    with pytest.raises(ValueError, match=r"layer layer0 has shape \(2,\) in one and \(1,\) in the other"):
        analysis.flip_rate(masks([1, 0]), masks([1]))


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
    state = {name: t.clone() for name, t in net.state_dict().items()}
    value = analysis.score_sharpness(net, loss, radius=0.05, iterations=3)
    assert math.isfinite(value)
    assert value != 0
    assert value == analysis.score_sharpness(net, loss, radius=0.05, iterations=3)
    for name, t in net.state_dict().items():
        assert torch.equal(t, state[name]), name
    assert net.training
    assert not net[2].training
    assert not net[0].scores.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_landscape_has_the_loss_at_its_centre():
    net = sparsify(small_net(), 0.9)
    steps, losses = analysis.landscape(net, loss, radius=0.5, points=3)
    assert torch.equal(steps, torch.tensor([-0.5, 0, 0.5], dtype=torch.float64))
    assert losses[1, 1].item() == pytest.approx(loss(net.eval()).item(), rel=1e-6)
    assert (losses != losses[1, 1]).sum() >= 4


def test_errors():
    net = sparsify(small_net(), 0.9)
    with pytest.raises(ValueError, match="radius: expected a number > 0, got 0"):
        analysis.score_sharpness(net, loss, radius=0)
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        analysis.score_sharpness(net, loss, iterations=0)
    with pytest.raises(ValueError, match="points: expected at least 2, got 1"):
        analysis.landscape(net, loss, points=1)
    with pytest.raises(ValueError, match=r"found none; call s2ap_ext\.sparsify"):
        analysis.score_sharpness(nn.Linear(2, 2), lambda m: m.weight.sum())
