"""Models pruned by channels and N:M windows: masks, gradients, steps, and the way there and back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_net
from torch import nn

from s2ap_ext import S2AP, S2APConv2d, S2APLinear, densify, sparsify
from s2ap_ext.nn import pruned_layers, train_scores
from s2ap_ext.sparsity import pattern_for

# (granularity, sparsity, layers to exclude in small_net)
KINDS = [("channel", 0.5, ()), ("2:4", 0.5, ("0",)), ("1:4", 0.75, ("0",)), ("2:3", 1 / 3, ("3", "5"))]


def pruned(granularity, sparsity, exclude):
    return train_scores(sparsify(small_net(), sparsity, granularity=granularity, exclude=exclude))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_masks_have_the_structure(kind):
    granularity, sparsity, _ = kind
    for layer in pruned_layers(pruned(*kind)).values():
        mask = layer.mask
        if granularity == "channel":
            assert torch.equal(mask.flatten(1).all(dim=1), mask.flatten(1).any(dim=1))
            norms = layer.scores.detach().flatten(1).abs().sum(dim=1)
            stays = mask.flatten(1).all(dim=1)
            assert norms[stays].min() > norms[~stays].max()
        else:
            stays, window = map(int, granularity.split(":"))
            # Along the inputs, at each place of a convolution's kernel: what sparse matrix units take.
            of_windows = mask.movedim(1, -1).unflatten(-1, (-1, window))
            assert (of_windows.sum(dim=-1) == stays).all()
            scores = layer.scores.detach().movedim(1, -1).unflatten(-1, (-1, window)).abs()
            assert (scores.masked_fill(~of_windows, torch.inf).amin(-1) >= scores.masked_fill(of_windows, 0).amax(-1)).all()
        assert mask.float().mean() == pytest.approx(1 - sparsity)
        assert torch.equal(layer.masked_weight, torch.where(mask, layer.weight, 0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_follow_an_independent_computation(kind):
    granularity = kind[0]
    net = pruned(*kind)
    twin = small_net().requires_grad_(False)
    scores = {name: layer.scores.detach().clone() for name, layer in pruned_layers(net).items()}
    buffers = {}
    base = torch.optim.SGD([layer.scores for layer in pruned_layers(net).values()], lr=0.5, momentum=0.9)
    optimizer = S2AP(net, base, gamma=0.3, defer_grads=True)
    y = torch.tensor([0, 1, 2, 3])

    def mask(s):
        if granularity == "channel":
            sums = s.double().abs().flatten(1).sum(dim=1)
            stays = torch.zeros(len(sums), dtype=torch.bool).index_fill(0, sums.argsort()[len(sums) // 2 :], True)
            return stays.view(-1, *[1] * (s.dim() - 1)).expand_as(s)
        stays, window = map(int, granularity.split(":"))
        rank = s.abs().movedim(1, -1).unflatten(-1, (-1, window)).argsort(dim=-1).argsort(dim=-1)
        return (rank >= window - stays).flatten(-2).movedim(-1, 1)

    def gradients(x, at):
        masked = {name: (twin.get_submodule(name).weight * mask(s)).requires_grad_() for name, s in at.items()}
        out = torch.func.functional_call(twin, {f"{name}.weight": w for name, w in masked.items()}, x)
        grads = torch.autograd.grad(F.cross_entropy(out, y), list(masked.values()))
        return {name: g * twin.get_submodule(name).weight * at[name].sign() for (name, g) in zip(masked, grads, strict=True)}

    flips = 0
    for seed in range(4):
        x = images(seed=seed)

        def closure(x=x):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        g = gradients(x, scores)
        moved = {name: s + g[name] * (0.3 * s.norm() / (g[name].norm() + 1e-12)) for name, s in scores.items()}
        flips = sum(int((mask(scores[name]) != mask(moved[name])).sum()) for name in scores)
        assert optimizer.flips == flips
        for name, second in gradients(x, moved).items():
            buffers[name] = 0.9 * buffers[name] + second if name in buffers else second
            before = mask(scores[name])
            scores[name] = scores[name] - 0.5 * buffers[name]
            flips += int((mask(scores[name]) != before).sum())
            torch.testing.assert_close(net.get_submodule(name).scores.detach(), scores[name])
            assert torch.equal(net.get_submodule(name).mask, mask(scores[name]))
    assert flips > 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_there_and_back(kind):
    net = pruned(*kind)
    twin = pruned(*kind)
    with torch.no_grad():
        for layer in pruned_layers(net).values():
            layer.scores.add_(torch.randn_like(layer.scores))
    twin.load_state_dict(net.state_dict())
    twin = copy.deepcopy(twin)
    assert torch.equal(twin(images()), net(images()))
    logits = net.eval()(images())
    assert torch.equal(densify(net)(images()), logits)


def test_layers_of_their_own():
    conv = S2APConv2d(8, 6, 3, sparsity=0.5, granularity="2:4")
    assert (conv.mask.unflatten(1, (2, 4)).sum(dim=2) == 2).all()
    assert conv.kept == 2
    linear = S2APLinear.from_dense(nn.Linear(5, 10), sparsity=0.7, granularity="channel")
    assert linear.mask.all(dim=1).sum() == 3
    linear.sparsity = 0.2
    assert linear.mask.all(dim=1).sum() == 8
    conv.sparsity = 0.75
    assert (conv.mask.unflatten(1, (2, 4)).sum(dim=2) == 1).all()
    with pytest.raises(ValueError, match=r"sparsity: expected a multiple of 1/4 for windows of 4 weights, got 0.9"):
        conv.sparsity = 0.9


def test_patterns():
    assert pattern_for("weight", (8, 4), 0.9) == (0, 0, 1)
    assert pattern_for("channel", (8, 4, 3, 3), 0.9) == (1, 8, 36)
    assert pattern_for("4:8", (8, 16), 0.5) == (2, 8, 1)
    with pytest.raises(ValueError, match="'head' is of several layers together"):
        pattern_for("head", (48, 16), 0.5)
