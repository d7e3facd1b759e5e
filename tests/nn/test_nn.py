"""Layers: forward, gradients, when they select, what they survive, and whole models in and out of sparse form."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import Selections, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2AP, S2APConv2d, S2APLinear, densify, sparsify
from s2ap_ext.nn import PrunedWeight, pruned_layers, refresh, train_scores, train_weights
from s2ap_ext.sparsity import kept_count


@pytest.fixture
def net():
    return sparsify(small_net(), 0.9)


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


# Whole models


def test_sparsify_is_in_place_and_densify_undoes_it():
    net = small_net().eval()
    modules, weights = list(net.modules()), list(net.parameters())
    names = list(net.state_dict())
    assert sparsify(net, 0.9) is net
    assert list(net.modules()) == modules
    assert all(any(p is w for p in net.parameters()) for w in weights)
    assert isinstance(net[0], S2APConv2d)
    assert isinstance(net[5], S2APLinear)
    expected = net(images())
    mask = net[3].mask
    assert densify(net) is net
    assert torch.equal(net(images()), expected)
    assert [type(m) for m in net] == [type(m) for m in small_net()]
    assert list(net.state_dict()) == names
    assert torch.equal(net[3].weight != 0, mask)
    assert "s2ap" not in repr(vars(net[3])).lower()


def test_sparsify_a_lone_layer():
    layer = nn.Linear(10, 10)
    assert sparsify(layer, 0.9) is layer
    assert isinstance(layer, S2APLinear)
    assert int(layer.mask.sum()) == 10


def test_from_dense_and_to_dense():
    dense = nn.Conv2d(3, 4, 3)
    layer = S2APConv2d.from_dense(dense, sparsity=0.5)
    assert layer.weight is dense.weight
    assert type(dense) is nn.Conv2d
    assert not hasattr(dense, "scores")
    back = layer.to_dense()
    assert type(back) is nn.Conv2d
    assert isinstance(layer, S2APConv2d)
    assert torch.equal(back(images()), layer(images()))
    with torch.no_grad():
        back.bias.add_(1)
        back.weight.add_(1)
    assert torch.equal(dense.bias, layer.bias)
    assert not torch.equal(back.bias, layer.bias)
    with pytest.raises(TypeError, match="expected Linear, got Conv2d"):
        S2APLinear.from_dense(dense)


def test_multihead_attention_packed_projection():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    names = sorted(attention.state_dict())
    x = torch.randn(2, 5, 16)
    sparsify(attention, 0.8)
    assert all(isinstance(layer, PrunedWeight) for layer in pruned_layers(attention).values())
    assert int((attention.in_proj_weight != 0).sum()) == kept_count(16 * 48, 0.8)
    assert int((attention.out_proj.weight != 0).sum()) == kept_count(16 * 16, 0.8)
    out = attention(x, x, x)[0]
    out.sum().backward()
    for layer in pruned_layers(attention).values():
        assert layer.scores.grad.abs().sum() > 0
    copied = copy.deepcopy(attention)
    with torch.no_grad():
        for layer in pruned_layers(attention).values():
            layer.scores.mul_(torch.randn_like(layer.scores))
    assert torch.equal(copied(x, x, x)[0], out)
    densify(copied)
    assert type(copied) is nn.MultiheadAttention
    assert sorted(copied.state_dict()) == names
    assert torch.equal(copied(x, x, x)[0], out)


def test_subclasses_keep_their_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = sparsify(nn.Sequential(Doubled(6, 6), nn.Conv1d(1, 2, 3)), 0.5)
    x = torch.randn(2, 6)
    mask = oracle_mask(net[0].pruned_weight.weight, 18)
    weight = net[0].pruned_weight.weight * mask
    assert torch.equal(net[0](x), 2 * F.linear(x, weight, net[0].bias))
    assert int((net[1].weight != 0).sum()) == 3
    densify(net)
    assert type(net[0]) is Doubled
    assert type(net[1]) is nn.Conv1d


class Standardised(nn.Conv2d):
    """Has a forward of its own, that reads its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def attention(**sizes):
    return nn.MultiheadAttention(8, 2, batch_first=True, **sizes)


READ_BY_NAME = [
    (lambda: nn.Conv1d(4, 6, 3), ["weight"], [torch.rand(2, 4, 9)]),
    (lambda: nn.ConvTranspose2d(4, 6, 3), ["weight"], [torch.rand(2, 4, 5, 5)]),
    (lambda: nn.Bilinear(4, 5, 6), ["weight"], [torch.rand(2, 4), torch.rand(2, 5)]),
    (lambda: Standardised(4, 6, 3), ["weight"], [torch.rand(2, 4, 9, 9)]),
    (attention, ["in_proj_weight"], [torch.rand(2, 3, 8)] * 3),
    (
        lambda: attention(kdim=6, vdim=5),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
        [torch.rand(2, 3, 8), torch.rand(2, 4, 6), torch.rand(2, 4, 5)],
    ),
]


@pytest.mark.parametrize(("make", "names", "inputs"), READ_BY_NAME)
def test_weights_that_are_read_by_name(make, names, inputs):
    def out_of(module):
        out = module(*inputs)
        return out[0] if isinstance(out, tuple) else out

    torch.manual_seed(0)
    module = make()
    given, keys = copy.deepcopy(module), list(module.state_dict())
    for name in names:
        with torch.no_grad():
            getattr(given, name).mul_(oracle_mask(getattr(given, name), kept_count(getattr(given, name).numel(), 0.5)))
    sparsify(module, 0.5, exclude=["out_proj"] if names != ["weight"] else [])
    assert list(pruned_layers(module)) == [f"pruned_{name}" for name in names]
    out = out_of(module)
    assert torch.equal(out, out_of(given))
    out.sum().backward()
    for layer in pruned_layers(module).values():
        assert layer.scores.grad.abs().sum() > 0
        assert torch.equal(layer.weight.grad != 0, layer.mask)

    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert type(copied) is type(pickled) is type(module)
    assert list(copied.state_dict()) == list(module.state_dict())
    with torch.no_grad():
        for layer in pruned_layers(copied).values():
            layer.scores.neg_().add_(1)
    assert not torch.equal(out_of(copied), out)
    densify(copied)
    assert type(copied) is type(given)
    assert list(copied.state_dict()) == keys
    assert torch.equal(out_of(module), out)  # what happened to the copy is not seen here
    assert torch.equal(out_of(pickled), out)
    for other in (module, pickled):
        assert vars(densify(other)).keys() == vars(given).keys()
        assert torch.equal(out_of(other), out)
        assert all(type(p) is nn.Parameter for p in other.parameters())


def test_transformer_layers_compute_with_masked_weights_in_every_mode():
    torch.manual_seed(0)
    net, x = sparsify(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 0.8).eval(), torch.rand(2, 5, 16)
    dense = densify(copy.deepcopy(net))
    assert type(dense.linear1) is nn.Linear
    with torch.no_grad():  # torch's own fast path, that calls no linear layer
        torch.testing.assert_close(net(x), dense(x))
    torch.testing.assert_close(net(x), dense(x))
    net(x).sum().backward()
    assert net.linear1.pruned_weight.scores.grad.abs().sum() > 0


def test_a_masked_weight_cannot_be_assigned():
    layer = sparsify(nn.Conv1d(4, 6, 3), 0.5)
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        layer.weight = nn.Parameter(torch.rand(6, 4, 3))


def test_tied_weights_that_are_read_by_name_stay_tied():
    net = nn.ModuleList([nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1)])
    net[1].weight = net[0].weight
    sparsify(net, 0.5)
    assert net[0].pruned_weight.scores is net[1].pruned_weight.scores
    assert len(list(net.parameters())) == 7
    densify(net)
    assert net[0].weight is net[1].weight


def test_computed_weights_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="layer 1: expected its weight to be a parameter, but it is computed"):
        sparsify(net, 0.5)
    assert type(net[0]) is nn.Linear
    sparsify(net, 0.5, exclude=["1"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own, of autograd functions
def test_torch_compile_of_weights_that_are_read_by_name():
    net = train_scores(sparsify(nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3)), 0.5))
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.rand(2, 3, 9)
    for seed in (1, 2):
        net(x).square().sum().backward()
        expected = net[0].pruned_weight.scores.grad.clone()
        net.zero_grad()
        compiled(x).square().sum().backward()
        torch.testing.assert_close(net[0].pruned_weight.scores.grad, expected, rtol=1e-4, atol=1e-6)
        net.zero_grad()
        with torch.no_grad():
            net[0].pruned_weight.scores.copy_(torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(seed)))


def test_densify_between_ascend_and_descend_changes_nothing(net):
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1))
    F.cross_entropy(net(images()), torch.arange(4)).backward()
    net[0].scores.grad = net[3].scores.grad = None
    optimizer.ascend()
    with pytest.raises(RuntimeError, match="5: the layer stands at perturbed scores"):
        densify(net)
    assert len(pruned_layers(net)) == 3


def test_shared_layers_and_tied_weights():
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = nn.Parameter(torch.randn(8, 8))
    other = nn.Linear(8, 8, bias=False)
    other.weight = tied.weight
    embedding = nn.Embedding(8, 8)
    embedding.weight = tied.weight
    net = nn.ModuleList([shared, shared, tied, other, embedding])
    sparsify(net, 0.5)
    assert net[0] is net[1]
    assert net[2].scores is net[3].scores
    assert net[2].weight is net[3].weight
    assert len({id(p) for p in net.parameters() if p.shape == (8, 8)}) == 4
    x = torch.randn(2, 8)
    expected = [net[i](x) for i in range(4)]
    full = net[4].weight.clone()
    densify(net)
    assert net[2].weight is net[3].weight
    assert net[2].weight is not net[4].weight
    assert all(torch.equal(net[i](x), expected[i]) for i in range(4))
    assert torch.equal(net[4].weight, full)


def test_exclude():
    net = sparsify(small_net(), 0.9, exclude=["0", "5*"])
    assert type(net[0]) is nn.Conv2d
    assert isinstance(net[3], S2APConv2d)
    assert type(net[5]) is nn.Linear
    nested = sparsify(nn.Sequential(small_net(), nn.Linear(10, 10)), 0.9, exclude=("0",))
    assert list(pruned_layers(nested)) == ["1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity: expected a number in \[0, 1\]"),
        ({"sparsity": float("nan")}, r"sparsity: expected a number in \[0, 1\]"),
        ({"sparsity": 0.9, "granularity": "row"}, r"granularity: expected 'weight', 'channel', 'head', 'neuron' or 'N:M' .*, got 'row'"),
        ({"sparsity": 0.5, "granularity": "4:4"}, r"granularity: expected 'weight', .* got '4:4'"),
        ({"sparsity": 0.9, "granularity": "2:4", "exclude": ["0"]}, r"layer 3: sparsity: expected a multiple of 1/4 .*, got 0.9"),
        ({"sparsity": 0.75, "granularity": "2:4", "exclude": ["0"]}, r"layer 3: sparsity: expected 0.5 for granularity '2:4', got 0.75"),
        ({"sparsity": 0.5, "granularity": "head"}, r"model: expected heads to prune, found none"),
        ({"sparsity": 0.9, "exclude": ["nothing"]}, "exclude: no module is named 'nothing'"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, message):
    net = small_net()
    with pytest.raises(ValueError, match=message):
        sparsify(net, **arguments)
    assert not pruned_layers(net)


def test_nothing_to_prune_and_pruned_twice(net):
    with pytest.raises(ValueError, match="expected a layer to prune"):
        sparsify(nn.Sequential(nn.ReLU()), 0.9)
    with pytest.raises(ValueError, match="layer 0 is pruned already"):
        sparsify(net, 0.5)


def test_nan_scores_name_the_layer(net):
    net(images())
    with torch.no_grad():
        net[3].scores[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores: expected numbers, got NaN in 3 \(1\)"):
        net(images())
