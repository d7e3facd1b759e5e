"""How kept weights are spread over the layers: published and worked numbers, exact totals, whole models, and parts of one's own."""

import copy
from dataclasses import asdict, dataclass
from fractions import Fraction

import pytest
import torch
from helpers import images, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext.allocations import Allocation, Layer, allocate
from s2ap_ext.allocations.lamp import lamp_scores
from s2ap_ext.models import build_model
from s2ap_ext.nn import pruned_layers, sparsity_table, train_scores
from s2ap_ext.parts import make, names, register
from s2ap_ext.reference import SINGLE_WEIGHTS, group_sums
from s2ap_ext.settings import key
from s2ap_ext.sparsity import granularity_of, kept_count, kept_weights, pattern_for

EXACT = ["erk", "global", "lamp"]  # these meet the overall sparsity


def layers_of(*weights, granularity="weight", sparsity=0.5):
    tensors = [torch.as_tensor(w) if not isinstance(w, tuple) else torch.ones(w) for w in weights]
    return [Layer(f"layer{i}", t, pattern_for(granularity, t.shape, sparsity)) for i, t in enumerate(tensors)]


def kept_in_all(layers, kept):
    return sum(kept_weights(layer.pattern, layer.weight.numel(), count) for layer, count in zip(layers, kept, strict=True))


def gaussian(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ERK


VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256), *[(512, 512)] * 5]
VGG16 = [(*shape, 3, 3) for shape in VGG16] + [(256, 2048), (256, 256), (10, 256)]
# Densities at 90 % sparsity as HARP's configs/strategies.json has them ("010_erk"): whole weights over the layer's size.
VGG16_ERK = [1, 0.518039286136627, 0.382717549800873, 0.253214478492737, 0.188462972640991, 0.125157654285431, 0.125157654285431]
VGG16_ERK += [0.093505859375, *[0.062216460704804] * 5, 0.626272201538086, 1, 1]
RESNET18_ERK = {
    "conv1": 1,
    "layer1": [0.479682087898254] * 4,
    "layer2": [0.354383707046509, 0.234469950199127, 1, 0.234469950199127, 0.234469950199127],
    "layer3": [0.174509704113007, 0.115892171859741, 1, 0.115892171859741, 0.115892171859741],
    "layer4": [0.086583435535431, 0.057610809803009, 0.775230407714844, 0.057610809803009, 0.057610809803009],
    "linear": 1,
}


# One of ResNet-18's published layers is a single weight off, since the published total was summed in float32.
@pytest.mark.parametrize(("network", "tolerance"), [("vgg16", 1e-7), ("resnet18", 1e-6)])
def test_erk_gives_the_published_densities(network, tolerance):
    if network == "vgg16":
        layers, published = layers_of(*VGG16), VGG16_ERK
    else:
        model = build_model("resnet18", num_classes=10, width=64, seed=0)
        layers = [Layer(name, p) for name, p in model.named_parameters() if p.dim() > 1]
        published = [d for stage in RESNET18_ERK.values() for d in (stage if isinstance(stage, list) else [stage])]
    erk = make("allocation", "erk")
    sizes = [layer.weight.numel() for layer in layers]
    whole = [round(d * n) / n for d, n in zip(erk.densities(layers, 0.9), sizes, strict=True)]
    assert whole == pytest.approx(published, abs=tolerance)
    kept = erk.kept(layers, 0.9)
    assert sum(kept) == kept_count(sum(sizes), 0.9)
    assert all(abs(count - d * n) < 2 for count, d, n in zip(kept, published, sizes, strict=True))


def test_erk_worked_numbers():
    # Dimensions 4 and 8, sizes 4 and 16, 10 of 20 stay: 10 / 12 for each dimension, so 3.33 and 6.67 weights, and 6.67 is rounded up.
    layers = layers_of((2, 2), (4, 4))
    assert make("allocation", "erk").densities(layers, 0.5) == [Fraction(5, 6), Fraction(5, 12)]
    assert allocate("erk", layers, 0.5) == [3, 7]
    # 18 of 20 stay: 6 and 12, but the first has only 4. It is dense, and 14 stay of the other.
    assert allocate("erk", layers, 0.1) == [4, 14]
    # Equal remainders: the earlier layer is rounded up.
    assert allocate("erk", layers_of((3, 3), (3, 3), (3, 3)), 0.6) == [4, 4, 3]


# LAMP


def test_lamp_worked_numbers():
    # Ascending squares 1, 4, 9, 16 over what is left from there up: 30, 29, 25, 16.
    assert lamp_scores(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)).tolist() == pytest.approx([1 / 30, 4 / 29, 9 / 25, 1])
    # Equal magnitudes, in the order in which the mask drops them: one of them is the last, so the scores differ.
    assert lamp_scores(torch.tensor([2.0, 2, 2], dtype=torch.float64)).tolist() == pytest.approx([1 / 3, 1 / 2, 1])
    assert lamp_scores(torch.zeros(2, dtype=torch.float64)).tolist() == [0, 0]
    assert lamp_scores(torch.zeros(0, dtype=torch.float64)).tolist() == []
    # Scores of both layers: 1, .36, .138, .033 and 1, .5, .333 (three ties).
    layers = layers_of([[1.0, -2], [3, -4]], [[-2.0, 2, 2]])
    kept = {n: allocate("lamp", layers, (7 - n) / 7 + 1e-9) for n in range(1, 8)}
    assert kept == {1: [1, 1], 2: [1, 1], 3: [1, 2], 4: [2, 2], 5: [2, 3], 6: [3, 3], 7: [4, 3]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lamp_agrees_with_its_definition(dtype):
    weights = [gaussian(30, 40, seed=1), gaussian(50, 10, seed=2, scale=9), gaussian(8, 3, 3, 3, seed=3) ** 3]
    layers = layers_of(*(w.to(dtype) for w in weights))
    scores = []
    for layer in layers:
        squares = [Fraction(w) ** 2 for w in sorted(abs(w) for w in layer.weight.flatten().tolist())]
        left = sum(squares)
        for square in squares:
            scores.append((square / left, layer.name))
            left -= square
    for sparsity in (0.3, 0.9, 0.99):
        stays = [name for _, name in sorted(scores, key=lambda s: s[0], reverse=True)[: kept_count(len(scores), sparsity)]]
        assert allocate("lamp", layers, sparsity) == [stays.count(layer.name) for layer in layers]


def test_lamp_sums_small_weights_of_large_layers_exactly():
    # A float32 total of a million squares with small ones taken from it would be off by far more than the top weights' squares.
    weight = torch.cat([torch.full((1_000_000,), 1.0), torch.tensor([1e-3, 2e-3])]).view(2, -1)
    scores = lamp_scores(weight.flatten().double().sort().values)
    assert scores[-3:].tolist() == [1 / 3, 1 / 2, 1]
    assert scores[0].item() == pytest.approx(1e-6 / (1e6 + 5e-6), rel=1e-7)


@pytest.mark.parametrize("scale", [2.0**-90, 0.37, 1e3, 2.0**100])
def test_lamp_does_not_see_the_scale_of_a_layer(scale):
    weights = [gaussian(20, 30, seed=i).double() for i in range(3)]
    before = allocate("lamp", layers_of(*weights), 0.8)
    weights[1] = weights[1] * scale
    assert allocate("lamp", layers_of(*weights), 0.8) == before


# Global magnitude


def test_global_worked_numbers():
    layers = layers_of([[1.0, -5], [2, 0]], [[3.0, -3, 3]], [[0.0, 0.5]])
    kept = {n: allocate("global", layers, (9 - n) / 9 + 1e-9) for n in range(3, 10)}
    # The largest weight of each layer stays; then the threes, which are in one layer; then 2 and 1; then the zeros.
    assert kept == {3: [1, 1, 1], 4: [1, 2, 1], 5: [1, 3, 1], 6: [2, 3, 1], 7: [3, 3, 1], 8: [4, 3, 1], 9: [4, 3, 2]}


def test_equal_magnitudes_go_to_the_earlier_layer():
    layers = layers_of((3, 3), (3, 3), (3, 3))
    assert allocate("global", layers, 0.5) == [9, 4, 1]
    assert allocate("global", layers, 1 - 2 / 27) == [1, 1, 1]


@pytest.mark.parametrize("allocation", ["global", "lamp"])
def test_channels_rank_by_the_mean_of_their_weights(allocation):
    # Two layers whose channels differ in size by 9; by the sum, the second layer would win every comparison.
    weights = [gaussian(16, 4, seed=1, scale=2), gaussian(8, 4, 3, 3, seed=2)]
    layers = layers_of(*weights, granularity="channel")
    scores = []
    for layer in layers:
        mean = (group_sums(layer.weight, layer.pattern) / layer.weights_per_unit).sort().values
        scores += [(s, layer) for s in (mean if allocation == "global" else lamp_scores(mean)).tolist()]
    stays, kept = [], 0
    for _, layer in sorted(scores, key=lambda s: s[0], reverse=True):
        if kept < kept_count(64 + 288, 0.6):
            stays.append(layer)
            kept += layer.weights_per_unit
    found = allocate(allocation, layers, 0.6)
    assert found == [stays.count(layer) for layer in layers]
    assert all(0 < count < layer.units for count, layer in zip(found, layers, strict=True))


# What holds for all


shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)
sparsities = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)


@st.composite
def networks(draw):
    weights = []
    for i, shape in enumerate(draw(shapes)):
        weight = gaussian(*shape, seed=draw(st.integers(0, 9)) + i, scale=10.0 ** draw(st.integers(-3, 3)))
        weights.append(weight.round() if draw(st.booleans()) else weight)  # rounded ones have many equal magnitudes and zeros
    return weights


@given(networks(), sparsities, st.sampled_from(EXACT))
@settings(deadline=None)
def test_totals_are_exact_and_no_layer_is_empty(weights, sparsity, allocation):
    layers = layers_of(*weights)
    kept = allocate(allocation, layers, sparsity)
    least = 1 if sparsity < 1 else 0
    assert all(least <= count <= layer.weight.numel() for count, layer in zip(kept, layers, strict=True))
    assert sum(kept) == max(kept_count(sum(w.numel() for w in weights), sparsity), least * len(layers))
    assert kept == allocate(allocation, layers_of(*(w.clone() for w in weights)), sparsity)


@given(networks(), sparsities, st.sampled_from(EXACT))
@settings(deadline=None)
def test_whole_channels_come_as_near_as_they_can(weights, sparsity, allocation):
    layers = layers_of(*weights, granularity="channel")
    kept = allocate(allocation, layers, sparsity)
    least = 1 if sparsity < 1 else 0
    assert all(least <= count <= layer.units for count, layer in zip(kept, layers, strict=True))
    target = kept_count(sum(w.numel() for w in weights), sparsity)
    one_each = sum(layer.weights_per_unit for layer in layers)
    total = kept_in_all(layers, kept)
    assert total >= target
    assert total == least * one_each or total - target < max(layer.weights_per_unit for layer in layers)


@given(networks(), st.sampled_from(["uniform", *EXACT]))
@settings(deadline=None)
def test_less_sparsity_never_keeps_less(weights, allocation):
    totals = [sum(allocate(allocation, layers_of(*weights), tenths / 10)) for tenths in range(11)]
    assert totals == sorted(totals, reverse=True)
    assert (totals[0], totals[-1]) == (sum(w.numel() for w in weights), 0)


@given(networks(), st.integers(0, 5), st.integers(-20, 20), sparsities)
@settings(deadline=None)
def test_powers_of_two_change_nothing_in_lamp(weights, which, power, sparsity):
    before = allocate("lamp", layers_of(*weights), sparsity)
    which %= len(weights)
    scaled = [2.0**power * w if i == which else w for i, w in enumerate(weights)]
    assert allocate("lamp", layers_of(*scaled), sparsity) == before


def test_layers_without_weights():
    for allocation in ("uniform", *EXACT):
        assert allocate(allocation, layers_of((0, 4), (2, 4), (3, 0)), 0.5) == [0, 4, 0]
        assert allocate(allocation, [], 0.5) == []


@pytest.mark.parametrize("allocation", ["global", "lamp"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_weights_that_cannot_be_ranked(allocation, granularity):
    bad = gaussian(4, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="layer layer1: expected finite weights to rank, found NaN or infinity"):
        allocate(allocation, layers_of(gaussian(4, 4), bad, granularity=granularity), 0.5)
    bad[1, 2] = torch.inf
    with pytest.raises(ValueError, match="layer layer1: expected finite weights"):
        allocate(allocation, layers_of(gaussian(4, 4), bad, granularity=granularity), 0.5)
    with pytest.raises(ValueError, match="layer layer0: expected weights with values to rank, got a tensor on the meta device"):
        allocate(allocation, layers_of(bad.to("meta"), granularity=granularity), 0.5)


# By name


def test_sparsities_by_name():
    net = sparsify(small_net(), 0.9, allocation={"0": 0.5, "5*": 0.95, "?": 0.2})
    assert [int(layer.kept) for layer in pruned_layers(net).values()] == [108, kept_count(288, 0.2), kept_count(2880, 0.95)]
    block = nn.Sequential(small_net(), nn.Linear(10, 10))
    sparsify(block, 0.9, allocation={"0": 0.5})  # a module names all layers in it; the others take the model's sparsity
    assert [int(layer.kept) for layer in pruned_layers(block).values()] == [108, 144, 1440, 10]
    text = make("allocation", "mapping", layers="0=0.5, 5*=0.95")
    assert int(pruned_layers(sparsify(small_net(), 0.9, allocation=text))["5"].kept) == 144
    assert make("allocation", "mapping").kept(layers_of((10, 10)), 0.9) == [10]


@pytest.mark.parametrize(
    ("allocation", "error", "message"),
    [
        ({"conv": 0.5}, ValueError, r"allocation mapping: no layer takes the sparsity of 'conv'; there are 0, 3, 5$"),
        ({"*": 0.5, "0": 0.9}, ValueError, "no layer takes the sparsity of '0'"),
        ({"0": 1.5}, ValueError, r"allocation: 0: expected a number in \[0, 1\]"),
        ({"0": "half"}, TypeError, r"allocation: 0: expected a number in \[0, 1\], got str"),
        (0.5, TypeError, "allocation: expected a name, an Allocation or sparsities by layer, got float"),
        ("erdos", ValueError, "allocation: expected one of .*erk, global, lamp, mapping, .*uniform, got 'erdos'"),
    ],
)
def test_bad_allocations_leave_the_model_alone(allocation, error, message):
    net = small_net()
    with pytest.raises(error, match=message):
        sparsify(net, 0.9, allocation=allocation)
    assert not pruned_layers(net)


@pytest.mark.parametrize("text", ["conv1", "conv1=", "=", "conv1=2", "conv1=nan", "conv1=0.5, conv2"])
def test_bad_texts_of_sparsities_by_name(text):
    with pytest.raises(ValueError, match=r"allocation mapping: layers: expected LAYER=SPARSITY with a sparsity in \[0, 1\], got "):
        make("allocation", "mapping", layers=text)


def test_a_layer_named_twice():
    with pytest.raises(ValueError, match="allocation mapping: layers: expected one sparsity for 'conv1', got two"):
        make("allocation", "mapping", layers="conv1=0.5, conv1=0.9")


# Whole models


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("allocation", EXACT)
def test_resnet18_keeps_exactly_what_it_should(allocation, sparsity):
    model = build_model("resnet18", num_classes=10, width=64, seed=0)
    weights = [p for p in model.parameters() if p.dim() > 1]
    table = sparsity_table(sparsify(model, sparsity, allocation=allocation))
    total = sum(w.numel() for w in weights)
    assert (table.weights, table.kept) == (total, total - total * round(100 * sparsity) // 100)
    assert len(table.rows) == 21
    assert min(row.kept for row in table.rows) >= 1


@pytest.mark.parametrize("allocation", EXACT)
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_masks_keep_the_counts_and_models_come_back(allocation, granularity):
    net = sparsify(small_net(), 0.6, allocation=allocation, granularity=granularity)
    rows = {row.layer: row for row in sparsity_table(net).rows}
    for name, layer in pruned_layers(net).items():
        assert int(layer.mask.sum()) == rows[name].kept
    assert len({round(row.sparsity, 2) for row in rows.values()}) > 1
    twin = sparsify(small_net(), 0.6, granularity=granularity)
    twin.load_state_dict(net.state_dict())
    assert sparsity_table(twin) == sparsity_table(net)
    expected = copy.deepcopy(net).eval()(images())
    assert torch.equal(densify(net.eval())(images()), expected)


def test_global_keeps_the_largest_weights_of_the_model():
    net = small_net()
    weights = torch.cat([net[i].weight.detach().flatten() for i in (0, 3, 5)])
    masks = [layer.mask for layer in pruned_layers(sparsify(net, 0.5, allocation="global")).values()]
    mask = torch.cat([mask.flatten() for mask in masks])
    assert weights[mask].abs().min() > weights[~mask].abs().max()


@pytest.mark.parametrize("allocation", EXACT)
def test_tied_weights_count_once(allocation):
    def tied():
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5), nn.Embedding(20, 20)])
        net[1].weight = net[0].weight
        return net

    net = sparsify(tied(), 0.8, allocation=allocation)
    assert net[0].scores is net[1].scores
    assert int(net[0].kept) == int(net[1].kept)
    assert int(net[0].kept) + int(net[2].kept) == 100
    table = sparsity_table(net)
    assert [(row.layer, row.granularity) for row in table.rows] == [("0", "weight"), ("2", "weight"), ("3", "dense")]
    assert (table.weights, table.kept) == (900, 500)


def test_attention_and_other_modules():
    torch.manual_seed(0)
    net = nn.ModuleList([nn.MultiheadAttention(16, 4), nn.Conv1d(16, 8, 3), nn.Linear(16, 4), nn.LayerNorm(16)])
    sparsify(net, 0.9, allocation="lamp")
    table = sparsity_table(net)
    assert sorted(row.layer for row in table.rows) == ["0.in_proj_weight", "0.out_proj", "1", "2"]
    assert table.kept == kept_count(table.weights, 0.9)
    assert [int(layer.mask.sum()) for layer in pruned_layers(net).values()] == [row.kept for row in table.rows]
    net = densify(net)
    heads = sparsity_table(sparsify(net, 0.5, granularity="head", allocation="global"))
    rows = {row.layer: row for row in heads.rows}
    assert {name: row.granularity for name, row in rows.items()} == {
        "0": "head",
        "1": "dense",
        "2": "dense",
    }
    assert (rows["0"].weights, rows["0"].kept) == (4 * 16 * 16, 2 * 4 * 4 * 16)


def test_scores_train_under_an_allocation():
    net = train_scores(sparsify(small_net(), 0.9, allocation="erk"))
    kept = {name: int(layer.kept) for name, layer in pruned_layers(net).items()}
    optimizer = torch.optim.SGD([layer.scores for layer in pruned_layers(net).values()], lr=10.0)
    before = {name: layer.mask for name, layer in pruned_layers(net).items()}
    net(images()).square().sum().backward()
    optimizer.step()
    assert {name: int(layer.mask.sum()) for name, layer in pruned_layers(net).items()} == kept
    assert any(not torch.equal(layer.mask, before[name]) for name, layer in pruned_layers(net).items())


def test_first_and_last():
    net = sparsify(small_net(), 0.9, exclude=[":first"])
    assert list(pruned_layers(net)) == ["3", "5"]
    net = sparsify(small_net(), 0.9, exclude=(":first", ":last"), allocation="erk")
    assert list(pruned_layers(net)) == ["3"]
    net = sparsify(small_net(), 0.9, exclude=["0", ":first"])  # the first of all layers, whatever else is excluded
    assert list(pruned_layers(net)) == ["3", "5"]
    net = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    sparsify(net, 0.5, granularity="head", exclude=":last")
    assert len(pruned_layers(net)) == 1
    with pytest.raises(ValueError, match="model: expected a layer to prune"):
        sparsify(nn.Linear(4, 4), 0.5, exclude=":first")
    with pytest.raises(ValueError, match="exclude: no module is named ':middle'"):
        sparsify(small_net(), 0.5, exclude=":middle")


# N:M windows


def test_layers_that_windows_do_not_divide_stay_dense():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10), nn.Linear(10, 6))
    message = r"granularity '2:4' does not divide the inputs of these layers, which stay dense: 0 \(3\), 4 \(10\)$"
    with pytest.warns(UserWarning, match=message) as caught:
        sparsify(net, 0.5, granularity="2:4")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert list(pruned_layers(net)) == ["1", "3"]
    assert [row.granularity for row in sparsity_table(net).rows] == ["dense", "2:4", "2:4", "dense"]


def test_no_warning_where_they_are_excluded_and_an_error_where_none_is_left():
    assert len(pruned_layers(sparsify(small_net(), 0.5, granularity="2:4", exclude=":first"))) == 2
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(7, 7))
    with pytest.raises(ValueError, match=r"expected a layer to prune .*; '2:4' does not divide the inputs of 0 \(3\), 1 \(7\)"):
        sparsify(net, 0.5, granularity="2:4")
    assert not pruned_layers(net)


@pytest.mark.parametrize("allocation", [*EXACT, {"*": 0.5}])
def test_windows_take_only_uniform(allocation):
    net = small_net()
    with pytest.raises(ValueError, match=r"allocation: expected 'uniform' for N:M windows, which fix the sparsity of layer 3, got '"):
        sparsify(net, 0.5, granularity="2:4", allocation=allocation, exclude=":first")
    assert not pruned_layers(net)


# The table


def test_table_of_a_model():
    net = sparsify(small_net(), 0.5, granularity="channel", exclude="3")
    table = sparsity_table(net)
    assert [tuple(asdict(row).values()) for row in table.rows] == [
        ("0", 216, 108, 0.5, "channel"),
        ("3", 288, 288, 0.0, "dense"),
        ("5", 2880, 1440, 0.5, "channel"),
    ]
    assert (table.weights, table.kept, table.sparsity) == (3384, 1836, (108 + 1440) / 3384)
    assert str(table).splitlines() == [
        "layer  weights   kept  sparsity  granularity",
        "0          216    108    50.00%  channel",
        "3          288    288     0.00%  dense",
        "5        2,880  1,440    50.00%  channel",
        "all      3,384  1,836    45.74%",
    ]
    assert sparsity_table(nn.ReLU()).sparsity == 0
    assert [row.layer for row in sparsity_table(sparsify(nn.Linear(4, 4), 0.5)).rows] == ["S2APLinear"]


@pytest.mark.parametrize("granularity", ["weight", "channel", "2:4", "1:2"])
def test_granularity_is_read_back(granularity):
    sparsity = {"1:2": 0.5, "2:4": 0.5}.get(granularity, 0.75)
    pattern = pattern_for(granularity, (8, 4, 3, 3), sparsity)
    assert granularity_of(pattern, (8, 4, 3, 3), int(granularity[0]) if ":" in granularity else 2) == granularity


# One's own


def test_an_allocation_of_ones_own():
    @register("first_layer_dense")
    class FirstLayerDense(Allocation):
        @dataclass(frozen=True)
        class Settings:
            others: float = key(0.5, "sparsity of the other layers", low=0, high=1)

        def kept(self, layers, sparsity):
            return [layers[0].units] + [kept_count(layer.units, self.settings.others) for layer in layers[1:]]

    assert "first_layer_dense" in names("allocation")
    net = sparsify(small_net(), 0.9, allocation="first_layer_dense")
    assert [layer.sparsity for layer in pruned_layers(net).values()] == [0, 0.5, 0.5]
    net = sparsify(small_net(), 0.9, allocation=FirstLayerDense(others=0.75))
    assert [layer.sparsity for layer in pruned_layers(net).values()] == [0, 0.75, 0.75]
    with pytest.raises(ValueError, match="allocation first_layer_dense: others: expected a number in"):
        FirstLayerDense(others=2)


class Answers(Allocation):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def kept(self, layers, sparsity):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([5], "allocation Answers: expected a count for each of 2 layers, got 1"),
        ([5, 5], "allocation Answers: expected layer layer0 to keep 0 to 4, got 5"),
        ([4, -1], "allocation Answers: expected layer layer1 to keep 0 to 6, got -1"),
    ],
)
def test_answers_that_do_not_fit(answer, message):
    with pytest.raises(ValueError, match=message):
        allocate(Answers(answer), layers_of((2, 2), (2, 3)), 0.5)
    with pytest.raises(TypeError):
        allocate(Answers([0.5, 1]), layers_of((2, 2), (2, 3)), 0.5)


def test_a_layer_knows_its_units():
    weight = torch.ones(8, 4, 3, 3)
    of = {g: Layer("a", weight, pattern_for(g, weight.shape, 0.5)) for g in ("weight", "channel", "2:4")}
    assert {g: (layer.units, layer.weights_per_unit) for g, layer in of.items()} == {"weight": (288, 1), "channel": (8, 36), "2:4": (4, 72)}
    assert Layer("a", weight).pattern == SINGLE_WEIGHTS
