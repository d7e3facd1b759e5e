"""Whole models in and out of sparse form, with layers of every kind."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2AP, S2APConv2d, S2APLinear, densify, sparsify
from s2ap_ext.nn import PrunedWeight, pruned_layers, train_scores
from s2ap_ext.sparsity import kept_count


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
