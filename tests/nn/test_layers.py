"""Layers: forward, gradients, when they select, and what they survive."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import Selections, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2APConv2d, S2APLinear, densify, sparsify
from s2ap_ext.nn import pruned_layers, refresh, train_scores, train_weights
from s2ap_ext.sparsity import kept_count

# Forward and gradients


def test_conv_forward_is_the_masked_convolution():
    torch.manual_seed(0)
    layer = S2APConv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect", sparsity=0.7)
    dense = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect")
    with torch.no_grad():
        dense.weight.copy_(layer.weight * oracle_mask(layer.scores, kept_count(layer.weight.numel(), 0.7)))
        dense.bias.copy_(layer.bias)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.mask, dense.weight != 0)
    assert torch.equal(layer.masked_weight, dense.weight)


def test_first_mask_is_the_magnitude_mask(net):
    for layer in pruned_layers(net).values():
        assert torch.equal(layer.mask, oracle_mask(layer.weight, kept_count(layer.weight.numel(), 0.9)))


def test_gradients_follow_the_formula():
    torch.manual_seed(0)
    layer = S2APLinear(30, 20, sparsity=0.8).double()
    with torch.no_grad():
        layer.scores[0, 0] = 0
    x = torch.randn(5, 30, dtype=torch.float64)
    upstream = torch.randn(5, 20, dtype=torch.float64)
    layer(x).backward(upstream)
    dense = upstream.T @ x  # dL/d(w*m)
    torch.testing.assert_close(layer.scores.grad, dense * layer.weight * layer.scores.sign(), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.weight.grad, dense * layer.mask, rtol=1e-12, atol=0)
    assert layer.scores.grad[0, 0] == 0
    assert (layer.scores.grad[~layer.mask] != 0).any()


def test_worked_toy_gradients():
    layer = S2APLinear(3, 2, bias=False, sparsity=0.5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2, 3], [-4, 5, -6]]))
        layer.scores.copy_(torch.tensor([[0.3, -0.7, 0.1], [0.5, -0.2, 0.7]], dtype=torch.float64))
    loss = layer(torch.tensor([1.0, 2, -1], dtype=torch.float64)).square().sum()
    loss.backward()
    assert loss.item() == 20
    assert torch.equal(layer.mask, torch.tensor([[False, True, False], [True, False, True]]))
    assert torch.equal(layer.scores.grad, torch.tensor([[-8.0, -32, 24], [-16, -40, 24]], dtype=torch.float64))


def test_frozen_weight_gets_no_gradient(net):
    train_scores(net)
    net(images()).sum().backward()
    for layer in pruned_layers(net).values():
        assert layer.weight.grad is None
        assert layer.scores.grad is not None
    train_weights(net)
    net.zero_grad()
    net(images()).sum().backward()
    for layer in pruned_layers(net).values():
        assert layer.scores.grad is None
        assert not layer.weight.grad[~layer.mask].any()


def test_a_kept_weight_of_zero_still_learns():
    layer = S2APLinear(4, 1, bias=False, sparsity=0.5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.scores.copy_(torch.tensor([[1.0, 2, 3, 4]]))
    layer(torch.ones(4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.tensor([[0.0, 0, 1, 1]]))


def test_plain_training_with_a_torch_optimizer(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    y = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for layer in pruned_layers(net).values():
        assert torch.equal(layer.mask, oracle_mask(layer.scores, int(layer.kept)))


@pytest.mark.parametrize("train", [train_scores, train_weights])
def test_listeners_get_the_gradient_of_the_masked_weight(net, train):
    train(net)
    seen = []
    first = net[3].mask_state.listen(lambda scores, grad: seen.append(("first", scores, grad)))
    net[3].mask_state.listen(lambda scores, grad: seen.append(("second", scores, grad)))
    y = torch.tensor([0, 1, 2, 3])
    F.cross_entropy(net(images()), y).backward()
    masked = net[3].masked_weight.detach().requires_grad_()
    twin = densify(copy.deepcopy(net))
    twin[1].running_mean.zero_()
    hidden = F.relu(twin[1](twin[0](images())))
    F.cross_entropy(twin[4:](F.conv2d(hidden, masked, twin[3].bias, groups=2)), y).backward()
    assert [name for name, *_ in seen] == ["first", "second"]
    for _, scores, grad in seen:
        assert scores is net[3].scores
        torch.testing.assert_close(grad, masked.grad)
    assert (net[3].scores.grad is None) is (train is train_weights)
    first.remove()
    F.cross_entropy(net(images()), y).backward()
    assert [name for name, *_ in seen[2:]] == ["second"]
    copied = copy.deepcopy(net)
    F.cross_entropy(copied(images()), y).backward()
    assert len(seen) == 3  # listeners belong to the layer that they were given to


def test_gradients_are_deferred_to_one_collector_only():
    layer, collected = train_scores(S2APLinear(5, 4, sparsity=0.5)), []
    with layer.mask_state.defer(lambda scores, grad: collected.append((scores, grad))):
        with pytest.raises(RuntimeError, match="S2APLinear: the gradients are deferred already"):
            layer.mask_state.defer(lambda scores, grad: None)
        layer(torch.ones(3, 5)).sum().backward()
    assert layer.scores.grad is None
    ((scores, grad),) = collected
    assert scores is layer.scores
    assert torch.equal(grad, torch.full((4, 5), 3.0))
    layer(torch.ones(3, 5)).sum().backward()
    assert len(collected) == 1
    assert torch.equal(layer.scores.grad, grad * layer.weight * layer.scores.sign())


def test_sparsity_zero_and_one():
    torch.manual_seed(0)
    layer = S2APLinear(5, 4, sparsity=0.0)
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.sparsity = 1.0
    assert torch.equal(layer(x), layer.bias.expand(3, 4))


def test_kept_alone_tells_the_sparsity():
    layer = S2APLinear(7, 3, sparsity=0.9)
    for kept in range(22):
        layer.kept.fill_(kept)
        assert layer.sparsity == pytest.approx(1 - kept / 21)
        assert int(layer.mask.sum()) == kept
        layer.sparsity = layer.sparsity
        assert layer.kept == kept
        assert S2APLinear(7, 3, sparsity=layer.sparsity).kept == kept
    assert "sparsity=0)" in repr(layer)
    assert "sparsity" not in repr(layer.to("meta"))


# One selection per change


def test_selects_once_per_change(net):
    with Selections() as seen:
        for _ in range(5):
            net(images())
        assert seen.layers["select"] == 3
        with torch.no_grad():
            net[0].scores.mul_(-2)
        net(images())
        assert seen.layers["select"] == 4


def test_refresh_selects_all_layers_in_one_call(net):
    with Selections() as seen:
        refresh(net)
        net(images())
    assert seen.calls["select"] == 1
    assert seen.layers["select"] == 3


def test_weight_changes_do_not_select(net):
    net(images())
    with torch.no_grad():
        net[3].weight.mul_(2)
    with Selections() as seen:
        net(images())
    assert not seen.calls
    assert torch.equal(net[3].masked_weight, net[3].weight * net[3].mask)


@pytest.mark.parametrize("change", ["in_place", "assign_data", "load", "sparsity", "kept", "reset", "invalidate_after_data"])
def test_every_change_is_seen(net, change):
    layer = net[3]
    net(images())
    new = torch.randn_like(layer.scores)
    if change == "in_place":
        with torch.no_grad():
            layer.scores.copy_(new)
    elif change == "assign_data":
        layer.scores.data = new
    elif change == "load":
        net.load_state_dict(net.state_dict() | {"3.scores": new})
    elif change == "sparsity":
        layer.sparsity = 0.5
    elif change == "kept":
        layer.kept.fill_(17)
    elif change == "reset":
        with torch.no_grad():
            layer.weight.copy_(new)
        layer.reset_scores()
    else:
        layer.scores.data.copy_(new)
        layer.invalidate()
    net(images())
    mask = oracle_mask(layer.scores, int(layer.kept))
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.masked_weight, layer.weight * mask)


def test_data_assigned_twice_to_the_same_address_is_seen():
    layer = S2APLinear(64, 64, sparsity=0.5)
    layer.mask  # noqa: B018
    for seed in range(20):  # allocators like to hand out what was just freed
        layer.scores.data = torch.zeros(64, 64)
        layer.scores.data = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(layer.mask, oracle_mask(layer.scores, 2048))


def test_masked_weight_does_not_change_under_its_holder(net):
    before = net[3].masked_weight
    kept = before.clone()
    with torch.no_grad():
        net[3].scores.copy_(torch.randn_like(net[3].scores))
    assert not torch.equal(net[3].masked_weight, kept)
    assert torch.equal(before, kept)


def test_backward_after_the_scores_changed_is_an_error(net):
    out = net(images())
    with torch.no_grad():
        net[3].scores.mul_(-1)
    net(images())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# What a layer survives


def test_deepcopy_and_pickle(net):
    expected = net(images())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(images()), net(images()))
        with torch.no_grad():
            other[0].scores.neg_()
            other[3].scores.copy_(torch.randn_like(other[3].scores))
        other(images())
        assert torch.equal(net.eval()(images()), copy.deepcopy(net).eval()(images()))
        net.train()
    assert expected.isfinite().all()


def test_state_dict_carries_the_counts(net):
    net[0].sparsity = 0.5
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = sparsify(small_net(), 0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other[0].sparsity == 0.5
    assert other[3].sparsity == 259 / 288
    assert torch.equal(other.eval()(images()), net.eval()(images()))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_dtypes(net, dtype):
    net(images())
    net = net.to(dtype).eval()
    out = net(images().to(dtype))
    assert out.dtype == dtype
    for layer in pruned_layers(net).values():
        assert layer.masked_weight.dtype == dtype
        assert torch.equal(layer.mask, oracle_mask(layer.scores, int(layer.kept)))


def test_channels_last_gives_the_same_masks(net):
    net.eval()  # a wholly pruned channel has no variance, and training statistics would blow its rounding up
    masks = [layer.mask for layer in pruned_layers(net).values()]
    y = torch.tensor([0, 1, 2, 3])
    F.cross_entropy(net(images()), y).backward()
    grads = [layer.scores.grad.clone() for layer in pruned_layers(net).values()]
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    other.zero_grad()
    F.cross_entropy(other(images().contiguous(memory_format=torch.channels_last)), y).backward()
    assert other[3].scores.is_contiguous(memory_format=torch.channels_last)
    for layer, mask, grad in zip(pruned_layers(other).values(), masks, grads, strict=True):
        assert torch.equal(layer.mask, mask)
        torch.testing.assert_close(layer.scores.grad, grad, rtol=1e-3, atol=1e-5)


def test_autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(images())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert net[0].scores.grad.dtype == torch.float32


def test_inference_mode_before_training(net):
    with torch.inference_mode():
        expected = net(images())
    net[1].reset_running_stats()
    out = net(images())
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert net[0].scores.grad is not None


def test_model_built_in_inference_mode():
    with torch.inference_mode():
        net = sparsify(small_net(), 0.9).eval()
        assert torch.equal(net[0].masked_weight, net[0].weight * oracle_mask(net[0].scores, int(net[0].kept)))
        net(images())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own, of autograd functions
@pytest.mark.parametrize("train", [train_scores, train_weights])
def test_torch_compile(net, train):
    train(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y = torch.tensor([0, 1, 2, 3])
    for seed in (1, 2):  # the second time with other scores
        F.cross_entropy(net(images()), y).backward()
        expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        F.cross_entropy(compiled(images()), y).backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
        net.zero_grad()
        with torch.no_grad():
            net[3].scores.copy_(torch.randn(net[3].scores.shape, generator=torch.Generator().manual_seed(seed)))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = sparsify(small_net(), 0.9)
        assert fake(torch.empty(4, 3, 8, 8)).shape == (4, 10)
        assert fake[0].masked_weight.shape == fake[0].weight.shape


def test_functional_call_uses_the_given_scores(net):
    net.eval()
    new = torch.randn_like(net[3].scores)
    out = torch.func.functional_call(net, {"3.scores": new}, (images(),))
    with torch.no_grad():
        net[3].scores.copy_(new)
    assert torch.equal(net(images()), out)


def test_double_backward(net):
    x = images().requires_grad_()
    loss = F.cross_entropy(net.eval()(x), torch.tensor([0, 1, 2, 3]))
    (grad,) = torch.autograd.grad(loss, net[0].scores, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.abs().sum() > 0
