"""Heads and neurons are found in every common form, what is none is refused by name, and a user can tell where they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import ATTENTIONS, MLPS, GatedMlp, PackedAttention, UnknownAttention, digits, tiny_vit
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext.nn import PrunedUnits, Units, pruned_layers


def found(model):
    """Of each block its name, kind, number of units and the names of its layers."""
    name_of = {module: name for name, module in model.named_modules()}
    blocks = [layer.block for layer in pruned_layers(model).values()]
    return {
        block.name: (block.kind, block.count, [name_of[layer].removeprefix(f"{block.name}.") for layer in block.layers()])
        for block in blocks
    }


@pytest.mark.parametrize("form", ATTENTIONS)
def test_a_head_takes_all_that_is_its_own(form):
    net = sparsify(tiny_vit(attention=ATTENTIONS[form]), 0.5, granularity="head")
    expected, blocks = net(digits()), [layer.block for layer in pruned_layers(net).values()]
    assert [block.count for block in blocks] == [2 if form == "grouped" else 4] * 2
    assert {block.kind for block in blocks} == {"head"}
    gone = {block: ~layer.mask for block, layer in zip(blocks, pruned_layers(net).values(), strict=True)}
    assert torch.equal(densify(net)(digits()), expected)
    for block, pruned in gone.items():
        assert pruned.sum() == block.count // 2
        for rows in block.rows:
            by_unit = rows.by_unit(block.count).transpose(0, 1).flatten(1)
            assert torch.equal((by_unit == 0).all(dim=1), pruned)
            with torch.no_grad():  # an independent look: whatever these rows are, nothing changes
                rows.by_unit(block.count)[:, pruned] = 3.0
        columns = block.columns.weight.view(16, block.count, -1)
        assert torch.equal((columns == 0).all(dim=2).all(dim=0), pruned)
    torch.testing.assert_close(net(digits()), expected)


@pytest.mark.parametrize("form", MLPS)
def test_neurons_of_gated_mlps(form):
    net = sparsify(tiny_vit(mlp=MLPS[form]), 0.5, granularity="neuron")
    layers = ["w12", "down"] if "packed" in form else ["gate", "up", "down"]
    assert found(net) == {f"blocks.{i}.mlp": ("neuron", 32, layers) for i in (0, 1)}
    expected = net(digits())
    assert torch.equal(densify(net)(digits()), expected)


def test_layers_of_torch_and_in_sequence():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    net = nn.Sequential(encoder, nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))
    assert found(sparsify(copy.deepcopy(net), 0.5, granularity="neuron")) == {
        "0.layers.0": ("neuron", 32, ["linear1", "linear2"]),
        "0.layers.1": ("neuron", 32, ["linear1", "linear2"]),
        "": ("neuron", 24, ["1", "4"]),  # the last layer follows one that has a part already
    }
    assert list(found(sparsify(net, 0.5, granularity="head"))) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]


def test_layers_in_neighbouring_modules():
    class Dense(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.dense = nn.Linear(a, b)

        def forward(self, x, residual=0):
            return self.dense(x) + residual

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.intermediate, self.output = Dense(8, 16), Dense(16, 8)

        def forward(self, x):
            return self.output(F.relu(self.intermediate(x)), x)

    net = sparsify(nn.Sequential(Layer(), Layer()), 0.5, granularity="neuron")
    assert found(net) == {str(i): ("neuron", 16, ["intermediate.dense", "output.dense"]) for i in (0, 1)}


class Mixing(nn.Module):
    """Looks like an MLP, but every hidden unit looks at the others."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x)))


def test_what_is_no_mlp_is_refused_by_name():
    net = tiny_vit(mlp=Mixing)
    given = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"expected neurons to prune, found none; not blocks.0.mlp \(fc1, fc2: run with other numbers, its neurons turn"
    ):
        sparsify(net, 0.5, granularity="neuron")
    net.blocks[1].mlp = GatedMlp(16, 32)
    with pytest.warns(UserWarning, match=r"these blocks have no neurons .* stay dense: blocks.0.mlp \(fc1, fc2: run"):
        sparsify(net, 0.5, granularity="neuron")
    assert list(found(net)) == ["blocks.1.mlp"]
    state = densify(net).state_dict()
    assert all(torch.equal(state[name], value) for name, value in given.items() if "blocks.1.mlp" not in name)
    sparsify(net, 0.5, granularity="neuron", exclude="blocks.0.mlp.fc1")  # which is said to be meant


def test_a_false_number_of_heads_is_refused():
    net = tiny_vit(attention=PackedAttention)
    net.blocks[0].attn.num_heads, net.blocks[0].attn.head_dim = 2, 8  # computes with heads of 8 ...
    sparsify(copy.deepcopy(net), 0.5, granularity="head")
    net.blocks[0].attn.heads = 8
    del net.blocks[0].attn.num_heads  # ... and no longer at all
    with pytest.warns(
        UserWarning, match=r"blocks.0.attn \(qkv, proj: it cannot be tried out, AttributeError: .*an example of the model's input may help"
    ):
        sparsify(net, 0.5, granularity="head")


def test_attention_that_is_not_recognised_is_named_and_can_be_told():
    net = tiny_vit(attention=UnknownAttention)
    with pytest.raises(ValueError, match=r"none; not blocks.0.attn \(its q, k, v and output layers are not recognised\); blocks.1.attn"):
        sparsify(net, 0.5, granularity="head")
    told = Units("blocks.*.inner", rows=("a", "b", "c"), columns="d", count=4)
    for example in (None, digits(2), (digits(2),), {"x": digits(2)}):
        twin = sparsify(copy.deepcopy(net), 0.5, granularity="head", structure=told, example=example)
        assert found(twin) == {f"blocks.{i}.attn.inner": ("head", 4, ["a", "b", "c", "d"]) for i in (0, 1)}
        expected = twin(digits())
        assert torch.equal(densify(twin)(digits()), expected)


def test_what_is_told_has_to_fit():
    net = tiny_vit(attention=UnknownAttention)
    rows = ("a", "b", "c")
    for told, message in [
        (Units("layers.*", rows, "d", 4), r"structure: no module is named 'layers.\*' and has layers a, b, c, d"),
        (Units("blocks.*.inner", rows, "e", 4), r"structure: no module is named 'blocks.\*.inner' and has layers a, b, c, e"),
        (Units("blocks.*.attn", ("inner",), "inner.d", 4), "structure: expected blocks.0.attn.inner to be an nn.Linear, got Unknown"),
        (
            Units("blocks.*.inner", rows, "d", 5),
            r"structure: blocks.0.attn.inner: 5 units do not divide \[16, 16, 16\] rows and 16 columns",
        ),
        (
            Units("blocks.*.inner", ("a", "b"), "d", 8),
            "structure: blocks.0.attn.inner: run with other numbers, its heads turn out not to be",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            sparsify(net, 0.5, granularity="head", structure=[told], example=digits(2))
    with pytest.raises(ValueError, match="structure: it is for granularity 'head' or 'neuron', got 'weight'"):
        sparsify(net, 0.5, structure=[Units("blocks.*.inner", rows, "d", 4)])


def test_trying_out_leaves_everything_as_it_was():
    net = tiny_vit(attention=PackedAttention).train()
    net.blocks[0].eval()
    given, modes, random = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], torch.get_rng_state()
    sparsify(net, 0.5, granularity="head", example=digits(2))
    modules = [m for m in net.modules() if not isinstance(m, PrunedUnits)]
    assert ([m.training for m in modules], torch.equal(torch.get_rng_state(), random)) == (modes, True)
    with torch.no_grad():
        for layer in pruned_layers(net).values():
            layer.kept.fill_(4)
    state = densify(net).state_dict()
    assert state.keys() == given.keys()
    assert all(torch.equal(state[name], value) for name, value in given.items())


def test_weights_that_are_shared_or_computed():
    net = tiny_vit()
    net.blocks[1].mlp.fc1.weight = net.blocks[0].mlp.fc1.weight
    with pytest.raises(ValueError, match=r"blocks.0.mlp \(fc1, fc2: another layer has one of its weights too\)"):
        sparsify(net, 0.5, granularity="neuron")
    net = tiny_vit()
    for block, layer in zip(net.blocks, ("fc1", "fc2"), strict=True):
        nn.utils.parametrizations.weight_norm(block.mlp.get_submodule(layer))
    computed = r"fc1, fc2: expected the weight of its ParametrizedLinear to be a parameter, but it is computed"
    with pytest.raises(ValueError, match=rf"blocks.0.mlp \({computed}\); blocks.1.mlp \({computed}\)"):
        sparsify(net, 0.5, granularity="neuron")


def test_layers_that_are_in_two_places():
    first, shared = nn.Linear(8, 8), nn.Linear(8, 8)
    for net in (
        nn.Sequential(nn.Sequential(first, nn.ReLU(), shared), nn.Sequential(nn.LayerNorm(8), first)),
        nn.Sequential(first, nn.ReLU(), first),
    ):
        with pytest.raises(ValueError, match="one of its layers is in two places"):
            sparsify(net, 0.5, granularity="neuron")


def test_layers_with_a_forward_of_their_own_are_tried_out():
    class Softmaxed(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(dim=-1)

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Softmaxed(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="the model \\(0, 2: run with other numbers, its neurons turn out not to be independent"):
        sparsify(net, 0.5, granularity="neuron")
    net[0] = Scaled(4, 8)
    assert found(sparsify(net, 0.5, granularity="neuron")) == {"": ("neuron", 8, ["0", "2"])}


def test_attention_without_linear_layers_is_named():
    class ConvolutionalAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Conv1d(8, 24, 1), nn.Conv1d(8, 8, 1)

    with pytest.raises(ValueError, match=r"none; not 1 \(its q, k, v and output layers are not recognised\)"):
        sparsify(nn.Sequential(nn.Linear(4, 4), ConvolutionalAttention()), 0.5, granularity="head")


def test_a_model_without_values_cannot_be_tried_out():
    with torch.device("meta"):
        net = tiny_vit()
    assert len(pruned_layers(sparsify(copy.deepcopy(net), 0.5, granularity="head"))) == 2
    with pytest.raises(ValueError, match=r"blocks.0.mlp \(fc1, fc2: it cannot be tried out, the model is on the meta device"):
        sparsify(net, 0.5, granularity="neuron")


def test_exclude():
    for exclude, left in [
        ("blocks.0", ["blocks.1.mlp"]),
        (["blocks.*.fc2"], []),
        (":first", ["blocks.1.mlp"]),
        (":last", ["blocks.0.mlp"]),
    ]:
        if not left:
            with pytest.raises(ValueError, match="expected neurons to prune, found none"):
                sparsify(tiny_vit(), 0.5, granularity="neuron", exclude=exclude)
        else:
            assert list(found(sparsify(tiny_vit(), 0.5, granularity="neuron", exclude=exclude))) == left
