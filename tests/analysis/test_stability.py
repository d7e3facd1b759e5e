"""How far models are apart, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_found, images, small_net, snapshot

from s2ap_ext import analysis, sparsify

LABELS = torch.tensor([0, 1, 2, 3])


def loss(net):
    return F.cross_entropy(net(images()), LABELS)


def test_the_cosine_is_that_of_the_gradients_autograd_gives():
    net = sparsify(small_net(), 0.9).eval()
    moved = analysis.ascended(net, loss, 0.1)
    assert analysis.mask_distance(net, moved) > 0
    gradients = []
    for model in (net, moved):
        scores = [model[i].scores for i in (0, 3, 5)]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(model), scores)]))
    before = snapshot(net)
    assert analysis.gradient_cosine(net, moved, loss) == pytest.approx(F.cosine_similarity(*gradients, dim=0).item(), rel=1e-5)
    assert analysis.gradient_cosine(net, net, loss) == pytest.approx(1)
    assert analysis.gradient_cosine(net, moved, loss, space="weights") < 1
    assert analysis.gradient_cosine(net, net, lambda model: 0 * loss(model)) == 0
    assert_as_found(net, before)


def test_models_of_different_shapes():
    with pytest.raises(ValueError, match="expected scores of the same shapes"):
        analysis.gradient_cosine(sparsify(small_net(), 0.9), sparsify(small_net()[3:4], 0.9), lambda m: m[0].masked_weight.sum())


def test_the_distance_of_predictions_is_the_divergence():
    before, after = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    expected = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean").item()
    assert analysis.functional_distance(before, after) == pytest.approx(expected, rel=1e-5)
    assert analysis.functional_distance(before, before + 3) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"expected two tensors of one shape \[N, K\], got \(6, 10\) and \(5, 10\)"):
        analysis.functional_distance(before, after[:5])
