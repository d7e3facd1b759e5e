"""The loss along lines and over planes, and what it is compared with: steps of S2AP and AWP."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_found, images, small_net, snapshot

from s2ap_ext import S2AP, analysis, sparsify
from s2ap_ext.analysis.space import open_space

LABELS = torch.tensor([0, 1, 2, 3])


def loss(net):
    return F.cross_entropy(net(images()), LABELS)


@pytest.fixture
def net():
    return sparsify(small_net(), 0.9).eval()


@pytest.mark.parametrize("space", analysis.SPACES)
def test_a_plane_has_the_loss_at_its_centre(net, space):
    before = snapshot(net)
    steps, losses = analysis.landscape(net, loss, space=space, radius=0.5, points=3)
    assert torch.equal(steps, torch.tensor([-0.5, 0, 0.5], dtype=torch.float64))
    assert losses[1, 1].item() == pytest.approx(loss(net).item(), rel=1e-6)
    assert (losses != losses[1, 1]).sum() >= 4
    assert_as_found(net, before)


def test_the_step_along_the_ascent_is_gamma(net):
    """At a step of gamma the line meets the scores of S2AP's own perturbation, and so its loss and its flips."""
    found = analysis.line(net, loss, radius=0.05, points=3)
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.05)
    loss(net).backward()
    before = analysis.layer_masks(net)
    optimizer.ascend()
    assert found.losses[2].item() == pytest.approx(loss(net).item(), rel=1e-6)
    assert int(found.flips[2]) == optimizer.flips == round(analysis.mask_distance(before, net) * sum(m.numel() for m in before.values()))
    assert found.flips[1] == 0
    assert found.steps.tolist() == [-0.05, 0, 0.05]


def test_a_copy_at_the_ascended_scores(net):
    before = snapshot(net)
    moved = analysis.ascended(net, loss, 0.05)
    assert_as_found(net, before)
    assert loss(moved).item() == pytest.approx(analysis.line(net, loss, radius=0.05, points=3).losses[2].item(), rel=1e-6)
    assert [m.training for m in moved.modules()] == [m.training for m in net.modules()]


def test_a_small_step_along_the_ascent_raises_the_loss_in_weight_space(net):
    found = analysis.line(net, loss, space="weights", radius=1e-3, points=3)
    assert found.losses[0] < found.losses[1] < found.losses[2]
    assert not found.flips.any()


def test_axes_have_the_norms_of_what_they_displace(net):
    generator = torch.Generator().manual_seed(0)
    with open_space(net, loss, "weights") as at:
        axis = at.normalised(at.random(generator), filters=True)
        for d, layer in zip(axis, (net[0], net[3], net[5]), strict=True):
            kept = layer.weight * layer.mask
            assert not d[~layer.mask].any()
            assert d.flatten(1).norm(dim=1).tolist() == pytest.approx(kept.flatten(1).norm(dim=1).tolist(), rel=1e-5)
    with open_space(net, loss, "scores") as at:
        axis = at.normalised(at.random(generator), filters=False)
        assert [float(d.norm()) for d in axis] == pytest.approx([float(s.norm()) for s in at.start], rel=1e-5)


def test_random_lines_differ_by_their_seed(net):
    one, again, other = (analysis.line(net, loss, along="random", radius=0.3, points=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.losses, again.losses)
    assert not torch.equal(one.losses, other.losses)
    assert one.flips.tolist()[1] == 0
    assert min(one.flips[0], one.flips[2]) > 0


def test_errors(net):
    with pytest.raises(ValueError, match="points: expected at least 2, got 1"):
        analysis.landscape(net, loss, points=1)
    with pytest.raises(ValueError, match="radius: expected a number > 0, got 0"):
        analysis.line(net, loss, radius=0)
    with pytest.raises(ValueError, match="along: expected one of ascent, random, got 'descent'"):
        analysis.line(net, loss, along="descent")
    with pytest.raises(ValueError, match="gamma: expected a number >= 0, got -1"):
        analysis.ascended(net, loss, -1)
