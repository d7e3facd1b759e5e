"""A gamma that meets a budget of flips: searched in every step, against brute force and the specification; and tracked."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, assert_same_state, closure_for, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2AP, ops, reference, sparsify
from s2ap_ext._files import load, save
from s2ap_ext.nn import pruned_layers, train_scores
from s2ap_ext.optim import FlipBudget
from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, new_model, open_data, prune, reproducible
from s2ap_ext.pipeline.run_folder import read_metrics
from s2ap_ext.reference import FLIPS, SIGNS

SHARE = 0.06


def place_of(gamma):
    return reference.place_of(torch.tensor(gamma, dtype=torch.float64))


def before(gamma):
    return reference.gamma_at(place_of(gamma) - 1).item()


def test_the_gammas_to_choose_among():
    places = torch.tensor([0, 1, 1 << 27, (1 << 32) - 1, 1 << 32])
    gammas = reference.gamma_at(places)
    assert gammas.tolist() == [2.0**-32, 2.0**-32 * (1 + 2.0**-27), 2.0**-31, 1 - 2.0**-28, 1.0]
    assert torch.equal(torch.stack([place_of(gamma) for gamma in gammas.tolist()]), places)


@pytest.mark.parametrize("where", [1e-3, 0.37, 1.9e-9])
def test_every_scale_is_that_of_a_gamma(where):
    """Two neighbouring gammas never jump over a float32 number."""
    place = place_of(2.0 ** math.floor(math.log2(where))) + int(where * 1e7)
    scales = (reference.gamma_at(place + torch.arange(2000)) * (3.7 / 1.3)).float()
    steps = scales.view(torch.int32).diff()
    assert steps.min() >= 0
    assert steps.max() <= 1


# ------------------------------------------------------------------------------------------------------------------ brute force


def flips_of(s, g, scale, kept):
    return int((oracle_mask(s + scale * g, kept) != oracle_mask(s, kept)).sum())


def crossings(s, g):
    """All scales at which two entries of ``|s + scale * g|`` change their order."""
    first, second = torch.combinations(torch.arange(len(s)), 2).T
    scales = torch.cat([(s[first] - s[second]) / (g[second] - g[first]), -(s[first] + s[second]) / (g[second] + g[first])])
    return scales[scales > 0].sort().values


def test_the_budget_is_met_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    met = 0
    for _ in range(50):
        s, g, w = (torch.randn(16, dtype=torch.float64, generator=generator) for _ in range(3))
        kept, share = 5, 0.8  # 4 flips
        gamma = reference.flip_gamma(s, g, w, kept, reference.cut(s, kept), share, 1e-12)
        norms = (s.norm() / g.norm()).item()
        at = crossings(s, g)
        middles = torch.cat([at[:1] / 2, (at[1:] + at[:-1]) / 2, at[-1:] * 2])
        flips = torch.tensor([flips_of(s, g, middle, kept) for middle in middles])  # flips[i]: below crossing i
        if gamma == 1:  # too few flips right below it
            assert flips_of(s, g, before(1.0) * norms, kept) < 4
        else:
            assert flips[torch.searchsorted(at, torch.tensor(gamma * norms, dtype=torch.float64))] == 4
            met += 1
    assert met > 40


@pytest.mark.parametrize("start", [1e-9, 1e-3, 0.9])
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3])
def test_the_budget_is_met_from_anywhere_within_some_tries(start, share):
    generator = torch.Generator().manual_seed(0)
    s, g = (torch.randn(50_000, dtype=torch.float64, generator=generator) for _ in range(2))
    cut, tries = reference.cut(s, 5000), []

    def flips_at(gamma, asked):
        tries.append(gamma.item())
        return reference.perturb(s, g, s, 5000, cut, gamma.item(), 1e-12)[1][FLIPS].view(1)

    wanted, swap = torch.tensor([share * 5000], dtype=torch.float64), torch.tensor([2])
    gamma = reference.budgeted_gamma(flips_at, wanted, swap, torch.tensor([start], dtype=torch.float64))
    assert tries[-1] == gamma
    assert wanted <= flips_at(gamma, None) < wanted + 2
    assert len(tries) <= 24


def test_a_jump_over_the_budget_ends_at_the_jump():
    """Entries that all flip at one gamma: the smallest gamma that has them is found."""
    jump = 0.0123
    gamma = reference.budgeted_gamma(
        lambda gamma, asked: torch.where(gamma >= jump, 100, 0),
        torch.tensor([10.0], dtype=torch.float64),
        torch.tensor([2]),
        torch.tensor([1e-3], dtype=torch.float64),
    )
    assert before(gamma.item()) < jump <= gamma.item()


# --------------------------------------------------------------------------------------------------- in steps, against the reference


def pruned_net(sparsity=0.8, **how):
    return train_scores(sparsify(small_net(), sparsity, **how))


def s2ap(net, gamma, **settings):
    return S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), gamma=gamma, **settings)


def train(net, optimizer, seeds):
    for seed in seeds:
        optimizer.step(closure_for(net, optimizer, images(seed=seed)))


def backward(net):
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    F.cross_entropy(net(images().to(dtype)).double(), LABELS).backward()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "how", [{}, {"granularity": "2:4", "sparsity": 0.5, "exclude": ("0",)}, {"granularity": "channel", "exclude": ("5",)}]
)
def test_the_search_is_that_of_the_reference(how, dtype, trained):
    net = pruned_net(**how)
    if trained:
        train(net, s2ap(net, 0.01), range(5))
    net.to(dtype)
    optimizer = s2ap(net, f"flips:{SHARE}")
    backward(net)
    layers = pruned_layers(net)
    cuts = {name: reference.cut(layer.scores, int(layer.kept), layer.mask_state.pattern) for name, layer in layers.items()}
    optimizer.ascend()
    for (name, layer), gamma, (flips, _) in zip(layers.items(), optimizer.gamma.tolist(), optimizer.changes().tolist(), strict=True):
        s, g, w, pattern = layer.scores.detach(), optimizer_grad(layer), layer.weight.detach(), layer.mask_state.pattern
        kept = int(layer.kept)
        assert gamma == reference.flip_gamma(s, g, w, kept, cuts[name], SHARE, 1e-12, pattern), name
        stay = int(layer.mask.sum())
        wanted = SHARE * stay
        assert flips >= wanted or gamma == 1
        below = reference.perturb(s, g, w, kept, cuts[name], before(gamma), 1e-12, pattern)[1]
        within = flips < wanted + reference.swap_flips(pattern, s.numel())
        assert within or below[FLIPS] < wanted
        if not how and dtype in (torch.float32, torch.float64):  # no ties
            assert within


def optimizer_grad(layer):
    return layer.mask_state.perturbation.grad


@pytest.mark.parametrize("restore", ["before", "after"])
def test_deferred_gradients_change_no_bit(restore):
    one = pruned_net()
    two = copy.deepcopy(one)
    plain, deferring = s2ap(one, f"flips:{SHARE}", restore=restore), s2ap(two, f"flips:{SHARE}", restore=restore, defer_grads=True)
    train(one, plain, range(4))
    train(two, deferring, range(4))
    assert torch.equal(plain.gamma, deferring.gamma)
    assert_same_state(one, two)


def test_the_step_is_that_with_the_gamma_that_was_found():
    one = pruned_net()
    two = copy.deepcopy(one)
    searching, given = s2ap(one, f"flips:{SHARE}"), s2ap(two, 0.1)
    for seed in range(4):
        train(one, searching, [seed])
        given.gamma = searching.gamma
        train(two, given, [seed])
        assert searching.flips == given.flips > 0
    assert_same_state(one, two)


def test_what_cannot_flip_is_not_perturbed():
    net = pruned_net()
    net[0].sparsity, net[3].sparsity = 0.0, 1.0
    optimizer = s2ap(net, f"flips:{SHARE}")
    train(net, optimizer, [0])
    assert optimizer.gamma[:2].tolist() == [0, 0]
    assert optimizer.gamma[2] > 0
    assert optimizer.changes()[:2].tolist() == [[0, 0], [0, 0]]


def test_a_direction_that_flips_nothing_is_followed_up_to_gamma_1():
    s = torch.randn(100)
    gamma = reference.flip_gamma(s, s.clone(), s, 10, reference.cut(s, 10), 0.1, 1e-12)  # along the scores all of them grow alike
    assert gamma == 1


def test_an_ascent_may_still_say_how_far():
    net = pruned_net()
    optimizer = s2ap(net, f"flips:{SHARE}")
    backward(net)
    optimizer.move(gamma=torch.full((3,), 0.5, dtype=torch.float64))
    assert optimizer.gamma.tolist() == [FlipBudget.START] * 3


def test_tied_layers_have_one_gamma():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    train_scores(sparsify(net, 0.5))
    for form in ("flips", "track"):
        optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=f"{form}:0.1")
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.ascend()
        assert optimizer.gamma[0] == optimizer.gamma[1] != FlipBudget.START
        optimizer.descend()


def test_a_product_that_rounding_lifts_counts_as_the_integer():
    assert 0.14 * 100 > 14
    assert reference.wanted_flips(0.14, torch.tensor(100), 1000) <= 14


# ---------------------------------------------------------------------------------------------------------------------- tracking


def test_tracking_follows_its_rule():
    net = pruned_net()
    optimizer = s2ap(net, f"track:{SHARE}")
    expected = [FlipBudget.START] * 3
    seen = []
    for seed in range(12):
        assert optimizer.gamma.tolist() == pytest.approx(expected, rel=1e-12)
        train(net, optimizer, [seed])
        for i, (layer, (flips, _)) in enumerate(zip(pruned_layers(net).values(), optimizer.changes().tolist(), strict=True)):
            wanted = SHARE * int(layer.kept)
            expected[i] *= min(max(math.sqrt(wanted / flips), 0.5), 2) if flips else 2
        seen.append(optimizer.flips)
    kept = sum(int(layer.kept) for layer in pruned_layers(net).values())
    assert sum(seen[6:]) / 6 / kept == pytest.approx(SHARE, rel=0.7)


def test_tracking_leaves_alone_what_cannot_flip():
    net = pruned_net()
    net[0].sparsity = 0.0
    optimizer = s2ap(net, f"track:{SHARE}")
    train(net, optimizer, range(2))
    assert optimizer.gamma[0] == 0
    assert optimizer.gamma[1] > 0


# ------------------------------------------------------------------------------------------------------------------ state, errors


@pytest.mark.parametrize("form", ["flips", "track"])
@pytest.mark.parametrize("saved", ["state_dict", "state_tensors"])
def test_a_stopped_training_goes_on(form, saved, tmp_path):
    net = pruned_net()
    optimizer = s2ap(net, f"{form}:{SHARE}")
    train(net, optimizer, range(3))
    other = pruned_net()
    other.load_state_dict(net.state_dict())
    resumed = s2ap(other, f"{form}:{SHARE}")
    if saved == "state_dict":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        save(tmp_path / "state", optimizer.state_tensors(), {})
        resumed.load_state_tensors(load(tmp_path / "state")[0])
    assert torch.equal(resumed.gamma, optimizer.gamma)
    train(net, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same_state(net, other)


def test_a_state_of_another_form_is_refused():
    net = pruned_net()
    fixed, found = s2ap(net, 0.1), s2ap(net, "track:0.01")
    with pytest.raises(ValueError, match=r"optimizer state: expected gamma of shape None, got \(3,\)"):
        fixed.load_state_dict(found.state_dict())
    with pytest.raises(ValueError, match=r"optimizer state: expected gamma of shape \(3,\), got None"):
        found.load_state_tensors(fixed.state_tensors())


def test_no_flips_wanted_is_the_plain_step():
    net = pruned_net()
    optimizer = s2ap(net, "flips:0")
    assert optimizer.plain
    optimizer.gamma = "track:0.5"
    assert not optimizer.plain
    optimizer.gamma = 0.0
    assert optimizer.plain


@pytest.mark.parametrize("text", ["", "flips", "flips:", "flips:x", "flips:-1", "flips:2", "flips:nan", "flips:inf", "0.1", "share:0.1"])
def test_texts_that_are_no_budget(text):
    with pytest.raises(ValueError, match=rf"gamma: expected a number, or flips:P or track:P with P in \[0, 1\], got '{text}'"):
        s2ap(pruned_net(), text)


@pytest.mark.parametrize(("text", "share"), [("flips:0.003", 0.003), ("track:3e-3", 0.003), ("flips:.5", 0.5), ("flips:1", 1.0)])
def test_texts_that_are(text, share):
    assert FlipBudget.parse(text) == FlipBudget(share, tracked=text.startswith("track"))


# -------------------------------------------------------------------------------------------------------------- whole mask searches

SMALL = [
    "model.width=4",
    "data.train_size=96",
    "data.test_size=16",
    "attack.steps=2",
    "prune.epochs=3",
    "prune.batch_size=32",
    "prune.warmup_epochs=1",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=16",
]


def search(folder, *overrides, stop=lambda: False):
    recipe = load_recipe("digits", [*SMALL, *overrides])
    data = open_data(recipe)
    with RunFolder.resume(folder) if folder.exists() else RunFolder.create(folder, recipe) as opened, reproducible(recipe):
        return prune(Session(recipe, data, opened, stop=stop), new_model(recipe, data))


@pytest.mark.parametrize("method", ["harp", "hydra"])
@pytest.mark.parametrize("gamma", ["flips:0.02", "track:0.02"])
def test_a_budget_in_a_search(gamma, method, tmp_path):
    how = [f"prune.gamma={gamma}", f"prune.method={method}"]
    model = search(tmp_path / "run", *how)
    count = itertools.count(1)
    with pytest.raises(Stopped):
        search(tmp_path / "stopped", *how, stop=lambda: next(count) == 8)  # in the middle of the last epoch
    assert_same_state(search(tmp_path / "stopped", *how), model)
    runs = [[record | {"seconds": 0} for record in read_metrics(tmp_path / name)] for name in ("run", "stopped")]
    assert runs[0] == runs[1]
    first, *others = runs[0]
    assert "gamma" not in first  # the warm-up
    for record in others:
        assert list(record["gamma"]) == list(pruned_layers(model))
        assert all(0 < value <= 1 for value in record["gamma"].values())
        if gamma.startswith("flips"):
            kept = sum(int(layer.kept) for layer in pruned_layers(model).values())
            assert 0.02 <= record["flips"] < 0.02 + 4 * 2 / kept + 0.01


def test_gamma_stays_a_number_where_it_is_one():
    assert load_recipe("digits", ["prune.gamma=1/500"]).prune.gamma == 0.002
    assert load_recipe("digits", ["prune.gamma=flips:0.003"]).prune.gamma == "flips:0.003"
    with pytest.raises(ValueError, match=r"--set prune.gamma: expected a number, or flips:P or track:P with P in \[0, 1\], got 'flip:1'"):
        load_recipe("digits", ["prune.gamma=flip:1"])


def test_signs_alone_do_not_count():
    """A budget is about flips; what merely changes its sign is counted beside them."""
    s = torch.tensor([0.01, 1.0, 2.0, 3.0])
    g = torch.tensor([-1.0, 0.3, 0.1, -0.1])
    row = reference.perturb(s, g, torch.ones(4), 2, reference.cut(s, 2), 0.05, 1e-12)[1]
    assert (row[FLIPS], row[SIGNS]) == (0, 1)
    assert reference.flip_gamma(s, g, torch.ones(4), 2, reference.cut(s, 2), 0.5, 1e-12) > 0.05
    ops.check_finite(row[None], ["s"])
