"""AWP: what is perturbed and by how much, and that pruned weights stay at zero."""

import torch
import torch.nn.functional as F
from helpers import LABELS, Selections, closure_for, images, small_net
from torch import nn

from s2ap_ext import AWP, S2APConv2d, sparsify
from s2ap_ext.nn import pruned_layers, train_weights


def test_awp_perturbs_the_kept_weights_and_restores_them():
    torch.manual_seed(0)
    layer = S2APConv2d(3, 4, 3, sparsity=0.7)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * 36, 10))
    train_weights(net)
    optimizer = AWP(net, torch.optim.SGD(net.parameters(), lr=0.0), gamma=0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    F.cross_entropy(net(images()), LABELS).backward()
    w, g, bias = layer.weight.detach().clone(), layer.weight.grad.clone(), layer.bias.detach().clone()
    d, dg = net[2].weight.detach().clone(), net[2].weight.grad.clone()
    optimizer.ascend()
    v = 0.1 * (w * layer.mask).norm() * (g * layer.mask) / ((g * layer.mask).norm() + 1e-12)
    torch.testing.assert_close(layer.weight.detach(), w + v)
    torch.testing.assert_close(net[2].weight.detach(), d + 0.1 * d.norm() * dg / dg.norm())
    assert torch.equal(layer.bias, bias)
    assert not layer.masked_weight[~layer.mask].any()
    F.cross_entropy(net(images()), LABELS).backward()
    optimizer.descend()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]), name


def test_awp_finetuning_keeps_pruned_weights_at_zero():
    net = train_weights(sparsify(small_net(), 0.9))
    masks = {name: layer.mask for name, layer in pruned_layers(net).items()}
    optimizer = AWP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4), gamma=0.01)
    with Selections() as seen:
        for _ in range(3):
            optimizer.step(closure_for(net, optimizer))
    assert not seen.calls  # the masks were made above and stand
    for name, layer in pruned_layers(net).items():
        assert torch.equal(layer.mask, masks[name])
        assert not layer.masked_weight[~masks[name]].any()
