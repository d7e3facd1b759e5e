"""A gamma for each layer: by name, as a tensor, and what each layer makes of its own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, assert_same_state, closure_for, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2AP, sparsify
from s2ap_ext.nn import pruned_layers, train_scores

GAMMAS = {"0": 0.7, "3": 0.0, "5": 0.2}


def pruned_net():
    return train_scores(sparsify(small_net(), 0.9))


def s2ap(net, gamma, **settings):
    return S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), gamma=gamma, **settings)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_each_layers_perturbation_follows_the_formula():
    net = pruned_net().double()
    optimizer = s2ap(net, GAMMAS)
    F.cross_entropy(net(images().double()), LABELS).backward()
    at_scores = {name: layer.mask for name, layer in pruned_layers(net).items()}
    expected = {}
    for name, layer in pruned_layers(net).items():
        s, g = layer.scores.detach(), layer.scores.grad
        expected[name] = oracle_mask(s + GAMMAS[name] * s.norm() * g / (g.norm() + 1e-12), int(layer.kept))
    optimizer.ascend()
    for (name, layer), (flips, _) in zip(pruned_layers(net).items(), optimizer.changes().tolist(), strict=True):
        assert torch.equal(layer.mask, expected[name]), name
        assert flips == (expected[name] != at_scores[name]).sum()
    assert torch.equal(optimizer.changes()[1], torch.zeros(2, dtype=torch.int64))  # gamma 0
    assert (optimizer.changes()[[0, 2], 0] > 0).all()


@pytest.mark.parametrize("defer_grads", [False, True])
@pytest.mark.parametrize(
    ("gamma", "same"),
    [
        (0.1, tensor(0.1, 0.1, 0.1)),
        (GAMMAS, tensor(0.7, 0, 0.2)),
        ({"3": 0, "*": 0.4}, tensor(0.4, 0, 0.4)),
        ({"[05]": 0.4, "*": 0.3, "3": 9}, tensor(0.4, 0.3, 0.4)),  # the first that fits
    ],
)
def test_the_forms_of_gamma(gamma, same, defer_grads):
    one = pruned_net()
    two = copy.deepcopy(one)
    optimizers = [s2ap(net, g, defer_grads=defer_grads) for net, g in ((one, gamma), (two, same))]
    assert torch.equal(optimizers[0].gamma, same)
    for seed in range(3):
        for net, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.step(closure_for(net, optimizer, images(seed=seed)))
    assert optimizers[0].flips > 0
    assert_same_state(one, two)


def test_gamma_can_be_assigned():
    net = pruned_net()
    optimizer = s2ap(net, 0.1)
    optimizer.gamma = {"0": 0.5, "*": 0}
    assert optimizer.gamma.tolist() == [0.5, 0, 0]
    assert not optimizer.plain
    optimizer.gamma = tensor(0, 0, 0)
    assert optimizer.plain


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ({"0": 0.1, "conv*": 0.2, "*": 0}, r"gamma: no pruned layer is named 'conv\*'; there are 0, 3, 5"),
        ({"0": 0.1, "5": 0.2}, r'gamma: no pattern fits layer 3; the last may be "\*"'),
        ({"0": -0.1, "*": 0}, "gamma of layer 0: expected a finite number >= 0, got -0.1"),
        (tensor(0.1, 0.1, math.inf), "gamma of layer 5: expected a finite number >= 0, got inf"),
        (tensor(0.1, 0.1), r"gamma: expected float64 of shape \(3,\), got torch.float64 of shape \(2,\)"),
        (torch.zeros(3), r"gamma: expected float64 of shape \(3,\), got torch.float32 of shape \(3,\)"),
    ],
)
def test_gammas_that_do_not_fit(gamma, message):
    with pytest.raises(ValueError, match=message):
        s2ap(pruned_net(), gamma)


def test_tied_layers_have_one_gamma():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    train_scores(sparsify(net, 0.5))
    assert s2ap(net, {"*": 0.1}).gamma.tolist() == [0.1, 0.1]
    with pytest.raises(ValueError, match=r"gamma: layers 0 and 2 share their scores, but have 0\.1 and 0\.2"):
        s2ap(net, {"0": 0.1, "2": 0.2})
