"""Models pruned by heads and neurons: scores and their gradients, steps, methods, copies, files, and the way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import Selections
from tiny_transformers import GroupedAttention, digits, tiny_vit
from torch import nn

from s2ap_ext import AWP, S2AP, compile_sparse, densify, sparsify
from s2ap_ext.methods.harp import Harp
from s2ap_ext.nn import PrunedUnits, pruned_layers, sparsity_table, train_scores, train_weights
from s2ap_ext.parts import make

KINDS = ("head", "neuron")
LABELS = torch.arange(8)


def pruned(kind, sparsity=0.5, **options):
    return train_scores(sparsify(tiny_vit(**options), sparsity, granularity=kind))


def units_of(net):
    return list(pruned_layers(net).values())


def optimizer_for(net, gamma=0.3, **how):
    return S2AP(net, torch.optim.SGD([layer.scores for layer in units_of(net)], lr=0.5, momentum=0.9), gamma=gamma, **how)


def closure_for(net, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(digits()), LABELS)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", KINDS)
def test_first_scores_rank_by_magnitude(kind):
    for layer in units_of(pruned(kind)):
        assert layer.scores.shape == (layer.block.count,)
        dense, i = tiny_vit(), int(layer.block.name.split(".")[1])
        block = dense.blocks[i]
        if kind == "head":
            attention = block.attn.attention
            rows = attention.in_proj_weight.view(3, 4, -1).abs().sum(dim=(0, 2))
            sums = rows + attention.out_proj.weight.view(16, 4, 4).abs().sum(dim=(0, 2))
        else:
            sums = block.mlp.fc1.weight.abs().sum(dim=1) + block.mlp.fc2.weight.abs().sum(dim=0)
        size = 4 * 16 * 4 if kind == "head" else 2 * 16
        torch.testing.assert_close(layer.scores.detach(), (6 / size) ** 0.5 * sums / sums.max())
        assert torch.equal(layer.mask, sums >= sums.sort(descending=True)[0][layer.block.count // 2 - 1])


@pytest.mark.parametrize("defer_grads", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_follow_an_independent_computation(kind, defer_grads):
    net, twin = pruned(kind), tiny_vit().requires_grad_(False)
    scores = [layer.scores.detach().clone() for layer in units_of(net)]
    buffers = [None, None]
    optimizer = optimizer_for(net, defer_grads=defer_grads)
    ends = ["attn.attention.out_proj", "mlp.fc2"][KINDS.index(kind)]

    def gate(s):
        return torch.zeros_like(s).index_fill(0, s.abs().argsort()[len(s) // 2 :], 1.0)

    def gradients(at):
        """Those of gates that multiply the inputs of the last layers; no tensor of weights is masked here."""
        gates = [gate(s).requires_grad_() for s in at]
        if kind == "head":  # torch's attention does not call its last layer, so its weight takes the gate
            weights = {
                f"blocks.{i}.{ends}.weight": twin.blocks[i].attn.attention.out_proj.weight * g.repeat_interleave(4)
                for i, g in enumerate(gates)
            }
            out = torch.func.functional_call(twin, weights, digits())
        else:
            handles = [
                twin.blocks[i].mlp.fc2.register_forward_pre_hook(lambda module, args, g=g: (args[0] * g,)) for i, g in enumerate(gates)
            ]
            out = twin(digits())
            for handle in handles:
                handle.remove()
        return [g * s.sign() for g, s in zip(torch.autograd.grad(F.cross_entropy(out, LABELS), gates), at, strict=True)]

    flips = 0
    for _ in range(3):
        optimizer.step(closure_for(net, optimizer))
        g = gradients(scores)
        assert all((each != 0).all() for each in g)  # of units that are pruned too
        moved = [s + each * (0.3 * s.norm() / (each.norm() + 1e-12)) for s, each in zip(scores, g, strict=True)]
        assert optimizer.flips == sum(int((gate(s) != gate(m)).sum()) for s, m in zip(scores, moved, strict=True))
        for i, second in enumerate(gradients(moved)):
            buffers[i] = second if buffers[i] is None else 0.9 * buffers[i] + second
            before = gate(scores[i])
            scores[i] = scores[i] - 0.5 * buffers[i]
            flips += int((gate(scores[i]) != before).sum())
            torch.testing.assert_close(units_of(net)[i].scores.detach(), scores[i])
            assert torch.equal(units_of(net)[i].mask, gate(scores[i]).bool())
    assert flips > 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_pruned_units_have_no_gradient(kind):
    net = train_weights(pruned(kind))
    F.cross_entropy(net(digits()), LABELS).backward()
    for layer in units_of(net):
        assert not layer.scores.requires_grad
        for rows in layer.block.rows:
            by_unit = rows.tensor.grad.view(rows.parts, layer.block.count, -1)
            moves = (by_unit != 0).any(dim=2).any(dim=0)
            assert torch.equal(moves, layer.mask)
        columns = layer.columns.grad.view(len(layer.columns), layer.block.count, -1)
        assert torch.equal((columns != 0).any(dim=2).any(dim=0), layer.mask)
    assert all(not w.requires_grad for layer in units_of(train_scores(net)) for w in layer.masked_parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_one_selection_for_all_blocks_and_one_for_each_change(kind):
    net = pruned(kind)
    with Selections() as seen:
        net(digits())
        net(digits())
    assert (seen.layers, seen.calls) == ({"select": 2}, {"select": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind):
    net = train_scores(sparsify(tiny_vit().to(torch.bfloat16), 0.5, granularity=kind))
    assert {layer.scores.dtype for layer in units_of(net)} == {torch.bfloat16}
    net(digits().bfloat16()).float().square().sum().backward()
    assert all(layer.scores.grad.isfinite().all() for layer in units_of(net))
    with torch.no_grad():
        expected = net(digits().bfloat16())
        assert torch.equal(densify(net)(digits().bfloat16()), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files_are_on_their_own(kind, copied):
    net = pruned(kind)
    twin = copied(net)
    assert {id(m) for layer in units_of(twin) for m in layer.block.layers()} <= {id(m) for m in twin.modules()}
    with torch.no_grad():
        for layer in units_of(twin):
            layer.scores.copy_(layer.scores.flip(0))
            layer.kept.fill_(1)
    expected = twin(digits())
    assert not torch.equal(net(digits()), expected)
    net.load_state_dict(twin.state_dict())
    assert torch.equal(net(digits()), expected)
    assert torch.equal(densify(twin)(digits()), expected)
    assert torch.equal(net(digits()), expected)  # whose rows the copy has left alone
    net.to(torch.float64)
    torch.testing.assert_close(net(digits().double()), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_densify_leaves_no_trace(kind):
    net = pruned(kind)
    optimizer = optimizer_for(net)
    optimizer.step(closure_for(net, optimizer))
    expected = net(digits())
    gone = {layer.block: ~layer.mask for layer in units_of(net)}
    closure_for(net, optimizer)()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match=r"blocks\.0\..*: the layer stands at perturbed scores"):
        densify(net)
    optimizer.descend()
    net = pruned(kind)
    optimizer = optimizer_for(net)
    optimizer.step(closure_for(net, optimizer))
    assert torch.equal(densify(net)(digits()), expected)
    dense = tiny_vit()
    assert [type(m) for m in net.modules()] == [type(m) for m in dense.modules()]
    assert {name: value.shape for name, value in net.state_dict().items()} == {n: v.shape for n, v in dense.state_dict().items()}
    assert list(net.state_dict()) == list(dense.state_dict())
    assert sum(int(g.sum()) for g in gone.values()) == sum(b.count // 2 for b in gone)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_blocks_and_what_stays_dense(kind):
    table = sparsity_table(pruned(kind, 0.75))
    rows = {row.layer: row for row in table.rows}
    block, other = ("attn.attention", "mlp.fc1") if kind == "head" else ("mlp", "attn.attention.in_proj_weight")
    assert (rows[f"blocks.0.{block}"].weights, rows[f"blocks.0.{block}"].kept) == (1024, 256)
    assert rows[f"blocks.0.{block}"].granularity == kind
    assert rows[f"blocks.1.{other}"].granularity == "dense"
    assert table.weights == sum(p.numel() for p in tiny_vit().parameters() if p.dim() > 1)
    assert table.kept == table.weights - 2 * 768
    label = f"blocks.0.{block}"
    assert units_of(pruned(kind))[0].mask_state.label == label


@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp", "global", {"blocks.0": 0.25}])
@pytest.mark.parametrize("kind", KINDS)
def test_allocations(kind, allocation):
    net = tiny_vit()
    with torch.no_grad():
        for p in [*net.blocks[0].attn.parameters(), *net.blocks[0].mlp.parameters()]:
            p.mul_(3)
    kept = [int(layer.kept) for layer in units_of(sparsify(net, 0.5, granularity=kind, allocation=allocation))]
    count = 4 if kind == "head" else 32
    if isinstance(allocation, dict):
        assert kept == [count * 3 // 4, count // 2]
    else:
        assert sum(kept) == count
    if allocation == "global":
        assert kept[0] > kept[1]


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_ranks_all_that_a_unit_ties(kind):
    net, method = tiny_vit(), make("method", "magnitude")
    method.sparsify(net, 0.5, granularity=kind)
    method.parameters(net, perturbed=False)
    layer = units_of(net)[0]
    before = layer.mask
    with torch.no_grad():
        layer.block.rows[0].by_unit(layer.block.count)[:, ~before] *= 10
    method.after_step(net)
    assert torch.equal(layer.mask, ~before)
    scores = layer.scores.detach().clone()
    layer.reset_scores()
    torch.testing.assert_close(layer.scores / layer.scores.max(), scores / scores.max())


@pytest.mark.parametrize("kind", KINDS)
def test_harp_counts_the_weights_of_units(kind):
    net, method = tiny_vit(attention=GroupedAttention), Harp(Harp.Settings(penalty=10.0))
    net.blocks[1] = tiny_vit(width=16, heads=8, attention=GroupedAttention, seed=1).blocks[1]
    method.sparsify(net, 0.5, granularity=kind)
    groups = method.parameters(net, perturbed=False)
    optimizer = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=1.0)
    for epoch in range(6):
        optimizer.zero_grad()
        (F.cross_entropy(net(digits()), LABELS) + method.penalty(epoch)).backward()
        optimizer.step()
        method.after_step(net)
    rows = [row for row in sparsity_table(net).rows if row.granularity == kind]
    counts = [layer.block.count for layer in units_of(net)]
    assert method._units.tolist() == counts
    torch.testing.assert_close(method._of.share, torch.tensor([row.weights for row in rows]).double() / sum(row.weights for row in rows))
    assert all(1 <= int(layer.kept) <= layer.block.count for layer in units_of(net))


def test_harp_adds_the_gradient_of_gates_to_its_rates():
    net, method = tiny_vit(), make("method", "harp")
    method.sparsify(net, 0.5, granularity="head")
    method.parameters(net, perturbed=False)
    F.cross_entropy(net(digits()), LABELS).backward()
    for i, layer in enumerate(units_of(net)):
        of_gates = (layer.scores.grad * layer.scores.sign()).sum()
        torch.testing.assert_close(method._rates.grad[i], of_gates.double() * method._of.slopes(method._rates[i]).detach())


def test_awp_measures_the_weights_that_stay():
    net = train_weights(pruned("neuron"))
    optimizer = AWP(net, torch.optim.SGD(net.parameters(), lr=0.0), gamma=0.1)
    closure_for(net, optimizer)()
    fc1 = net.blocks[0].mlp.fc1.weight
    given, grad, mask = fc1.detach().clone(), fc1.grad.clone(), units_of(net)[0].mask
    optimizer.ascend()
    torch.testing.assert_close(fc1.detach(), given + grad * (0.1 * given[mask].norm() / grad.norm()))
    optimizer.descend()
    torch.testing.assert_close(fc1.detach(), given)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own, of autograd functions
def test_torch_compile_and_the_fused_path_of_torch():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x = torch.rand(2, 5, 16)
    for kind in KINDS:
        net = sparsify(copy.deepcopy(encoder), 0.5, granularity=kind)
        expected = net(x)
        with torch.no_grad():  # where torch reads the layers' weights itself
            torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(densify(net)(x), expected)
    net = pruned("neuron")
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(digits()), net(digits()))


def test_layers_outside_are_as_before():
    net = sparsify(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), 0.5, granularity="neuron")
    assert [type(m).__name__ for m in net] == ["Linear", "ReLU", "PrunedLinear"]
    assert isinstance(net[2].pruned_weight, PrunedUnits)
    of_child = [f"2.pruned_weight.{name}" for name in ("columns", "scores", "weight", "kept")]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.bias", *of_child]


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_the_same(kind):
    net = pruned(kind)
    torch.testing.assert_close(compile_sparse(net, digits())(digits()), net(digits()).detach())
    densify(net, shrink=True)
    torch.testing.assert_close(compile_sparse(net, digits())(digits()), net(digits()).detach())
