"""Every method of mask search, plain and with S2AP, under several losses; and what each does by its own formulas."""

import itertools
import json
import math

import pytest
import torch
from helpers import FIXTURES

from s2ap_ext import densify, parts
from s2ap_ext.methods import Method
from s2ap_ext.methods.harp import Rates
from s2ap_ext.methods.movement import positive
from s2ap_ext.nn import pruned_layers
from s2ap_ext.parts import find, make, names, register
from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, new_model, open_data, prune, reproducible, run
from s2ap_ext.pipeline.model_file import make_sparse
from s2ap_ext.pipeline.run_folder import read_metrics
from s2ap_ext.sparsity import kept_count

SMALL = [
    "model.width=4",
    "data.train_size=96",
    "data.test_size=16",
    "attack.steps=2",
    "pretrain.epochs=1",
    "pretrain.batch_size=32",
    "prune.epochs=2",
    "prune.batch_size=32",
    "prune.warmup_epochs=0",
    "prune.gamma=0.05",
    "finetune.epochs=1",
    "finetune.batch_size=32",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=16",
    "evaluate.latency_at_scale=false",
    "prune.control=false",
]
FROZEN = ("hydra", "harp", "random", "rst")  # methods that leave the weights alone


def search(folder, *overrides, stop=lambda: False):
    """The model that a mask search leaves, from an untrained one; goes on where ``folder`` stands."""
    recipe = load_recipe("digits", [*SMALL, *overrides])
    data = open_data(recipe)
    with RunFolder.resume(folder) if folder.exists() else RunFolder.create(folder, recipe) as opened, reproducible(recipe):
        return prune(Session(recipe, data, opened, stop=stop), new_model(recipe, data))


def start(*overrides):
    """What the search starts from: the model with pruned layers, and its method."""
    recipe = load_recipe("digits", [*SMALL, *overrides])
    data = open_data(recipe)
    model = new_model(recipe, data)
    return model, make_sparse(model, recipe, data.shape)


def records(folder):
    return read_metrics(folder)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_method_of_the_field_is_there():
    assert names("method") == ["harp", "hydra", "magnitude", "movement", "random", "rst"]


@pytest.mark.parametrize("loss", ["natural", "pgd_at", "trades"])
@pytest.mark.parametrize("s2ap", ["true", "false"])
@pytest.mark.parametrize("method", ["harp", "hydra", "magnitude", "movement", "random", "rst"])
def test_every_method_searches(method, s2ap, loss, tmp_path):
    how = [f"prune.method={method}", f"prune.s2ap={s2ap}", f"prune.loss={loss}"]
    model = search(tmp_path / "run", *how)
    first, _ = start(*how)
    layers, before = pruned_layers(model), pruned_layers(first)
    assert list(layers) == list(before) == ["conv1", "conv2", "conv3", "linear"]
    for name, layer in layers.items():
        n = layer.weight.numel()
        assert int(layer.mask.sum()) == int(layer.kept)
        assert 1 <= int(layer.kept) <= n if method == "harp" else int(layer.kept) == kept_count(n, 0.9)
        assert not layer.masked_weight[~layer.mask].any()
        assert torch.equal(layer.weight, before[name].weight) == (method in FROZEN)
        assert torch.equal(layer.scores, before[name].scores) == (method == "random")
    assert all(t.isfinite().all() for t in model.state_dict().values())
    found = records(tmp_path / "run")
    assert [r["epoch"] for r in found] == [1, 2]
    assert all(r["flips"] > 0 for r in found) == (s2ap == "true")
    assert all(r["mask_distance"] > 0 for r in found) == (method != "random")

    count = itertools.count(1)
    with pytest.raises(Stopped):
        search(tmp_path / "stopped", *how, stop=lambda: next(count) == 4)  # in the middle of the second epoch
    assert same(search(tmp_path / "stopped", *how), model)
    timeless = [[{**r, "seconds": 0} for r in records(tmp_path / name)] for name in ("run", "stopped")]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("method", ["harp", "hydra", "magnitude", "movement", "random", "rst"])
def test_the_whole_run_of_every_method(method, tmp_path):
    recipe = load_recipe("digits", [*SMALL, f"prune.method={method}", "prune.epochs=1"])
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        rows = run(Session(recipe, open_data(recipe), folder))
    assert [row["model"] for row in rows] == (["pruned"] if method == "rst" else ["dense", "pruned", "finetuned"])


# ------------------------------------------------------------------------------------------------------------------------- HARP


@pytest.mark.parametrize("case", FIXTURES["harp"], ids=lambda case: str(case["k_target"]))
def test_harp_rates_and_densities_follow_the_worked_numbers(case):
    rates = Rates(case["k_target"], torch.tensor([1.0], dtype=torch.float64))
    assert rates.lowest == pytest.approx(case["k_min"])
    k = torch.tensor([case["k"]], dtype=torch.float64)
    r = rates.rates(k)
    assert r.item() == pytest.approx(case["r"], abs=1e-8)
    assert rates.densities(r).item() == pytest.approx(case["k"], abs=1e-12)
    assert rates.slopes(r).item() == pytest.approx(case["dk_dr"], abs=1e-9)


def test_harp_penalty_follows_the_worked_numbers():
    case = FIXTURES["l_hw"]
    rates = Rates(case["target"], torch.tensor(case["n"], dtype=torch.float64))
    r = rates.rates(torch.tensor(case["k"], dtype=torch.float64)).requires_grad_()
    assert rates.excess(r).item() == pytest.approx(case["L"])
    k = torch.tensor([0.3, 0.05], dtype=torch.float64)  # above the target: the slope is that of the worked numbers
    r = rates.rates(k).requires_grad_()
    (gradient,) = torch.autograd.grad(rates.excess(r), r)
    assert (gradient / rates.slopes(r)).tolist() == pytest.approx(case["slope_when_active"])


def test_harp_gradient_of_a_rate_follows_the_worked_numbers():
    toy, case = FIXTURES["toy"], FIXTURES["harp_toy"]
    layer = torch.nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(toy["w"]))
    method = make("method", "harp")
    method.sparsify(layer, 0.95)
    method.parameters(layer, perturbed=False)
    with torch.no_grad():
        layer.scores.copy_(torch.tensor(toy["s"]))
        method._rates.fill_(case["r"])
    method.load_state(method.state())
    assert layer.mask.long().tolist() == case["mask"]
    layer(torch.tensor(toy["x"], dtype=torch.float64)).square().sum().backward()
    assert method._rates.grad.item() == pytest.approx(case["dL_dr"])


def test_harp_starts_from_the_allocation_and_clips_what_lies_below_its_range():
    weights = torch.tensor([1000.0, 1000.0], dtype=torch.float64)
    rates = Rates(0.1, weights)
    found = rates.densities(rates.rates(torch.tensor([0.001, 1.0], dtype=torch.float64)))
    assert found.isfinite().all()
    assert 0.01 < found[0] < 0.0102
    assert 0.999 < found[1] < 1
    model, method = start("prune.method=harp", "prune.allocation=erk")
    uniform, _ = start("prune.method=harp")
    for name, layer in pruned_layers(model).items():
        assert (
            abs(int(layer.kept) - method._of.densities(method._rates)[list(pruned_layers(model)).index(name)] * layer.weight.numel()) <= 1
        )
    assert [int(layer.kept) for layer in pruned_layers(model).values()] != [int(layer.kept) for layer in pruned_layers(uniform).values()]


def test_harp_ends_its_search_for_rates_on_the_target():
    _, method = start("prune.method=harp")
    steps = [0.5, 0.4, -3.0, 1.0]  # up, up, across the target, and one that must change nothing
    densities = []
    for step in steps:
        with torch.no_grad():
            method._rates += step
        method.after_step(None)
        densities.append(method.metrics()["density"])
    assert densities[1] > densities[0] > 0.1
    assert densities[2] == densities[3] == pytest.approx(0.1, rel=1e-12)
    assert method.metrics()["settled"] == 1


def test_harp_learns_channels_too(tmp_path):
    model = search(tmp_path / "run", "prune.method=harp", "prune.granularity=channel", "prune.sparsity=0.5")
    for layer in pruned_layers(model).values():
        channels = layer.mask.flatten(1)
        assert torch.equal(channels.all(1), channels.any(1))
        assert int(channels.any(1).sum()) == int(layer.kept)


def test_harp_refuses_windows():
    with pytest.raises(ValueError, match=r"granularity: HARP learns how many weights a layer keeps, and layer conv2 keeps as many"):
        start("prune.method=harp", "prune.granularity=2:4", "prune.sparsity=0.5", "prune.exclude=conv1")


@pytest.mark.slow
def test_harp_meets_its_target_on_digits(tmp_path):
    recipe = load_recipe("digits-long", ["data.train_size=720", "prune.method=harp", "pretrain.epochs=8", "finetune.epochs=0"])
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        rows = run(Session(recipe, open_data(recipe), folder))
    assert rows[1]["sparsity"] == pytest.approx(0.9, abs=0.001)
    density = json.loads((tmp_path / "run/results.json").read_text())["density"]
    assert max(density.values()) > 1.2 * min(density.values())
    assert rows[1]["robust"] > 0.6


def test_a_harp_network_densifies_to_the_bit(tmp_path):
    model = search(tmp_path / "run", "prune.method=harp").eval()
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(densify(model)(x), expected)


# -------------------------------------------------------------------------------------------------------------------------- RST


@pytest.mark.parametrize("weights", ["signed_constant", "kaiming_normal"])
def test_rst_freezes_a_random_network(weights, tmp_path):
    how = ["prune.method=rst", f"prune.method.weights={weights}"]
    model, again = search(tmp_path / "run", *how), start(*how)[0]
    for name, layer in pruned_layers(model).items():
        assert torch.equal(layer.weight, pruned_layers(again)[name].weight)
        scale = math.sqrt(2 / layer.weight[0].numel())
        if weights == "signed_constant":
            assert torch.equal(layer.weight.abs(), torch.full_like(layer.weight, scale))
        else:
            assert layer.weight.std().item() == pytest.approx(scale, rel=0.5)
    assert not model.linear.bias.any()
    assert model.bn1.weight is None
    assert not torch.equal(start(*how, "seed=1")[0].conv2.weight, again.conv2.weight)


def test_rst_trains_what_stays_if_asked(tmp_path):
    recipe = load_recipe("digits", [*SMALL, "prune.method=rst", "prune.method.finetune=true", "prune.epochs=1"])
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        rows = run(Session(recipe, open_data(recipe), folder))
    assert [row["model"] for row in rows] == ["pruned", "finetuned"]


@pytest.mark.slow
def test_rst_finds_a_robust_network_that_was_never_trained(tmp_path):
    recipe = load_recipe("digits", ["data.train_size=720", "prune.method=rst", "prune.sparsity=0.5"])
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        (row,) = run(Session(recipe, open_data(recipe), folder))
    assert row["robust"] > 0.4  # chance is 0.1


# --------------------------------------------------------------------------------------------------------------------- movement


def test_movement_scores_grow_with_what_has_accumulated():
    a = torch.tensor([-100.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 100.0])
    scores = positive(a)
    assert (scores > 0).all()
    assert (scores.diff() > 0).all()
    assert scores[3] == 1


def test_movement_accumulates_minus_gradient_times_weight():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4, bias=False)
    method = make("method", "movement")
    method.sparsify(layer, 0.5)
    (weights, accumulators) = method.parameters(layer, perturbed=False)
    assert weights["params"] == [layer.weight]
    (accumulated,) = accumulators["params"]
    magnitude_mask, before, x = layer.mask.clone(), accumulated.detach().clone(), torch.randn(3, 6)
    assert int(magnitude_mask.sum()) == 12
    assert layer.weight[magnitude_mask].abs().min() >= layer.weight[~magnitude_mask].abs().max()
    masked = (layer.weight.detach() * magnitude_mask).requires_grad_()
    (x @ masked.T).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.allclose(accumulated.grad, masked.grad * layer.weight, rtol=1e-5)
    torch.optim.SGD([accumulated], lr=0.1).step()
    method.after_step(layer)
    expected = before - 0.1 * masked.grad * layer.weight.detach()
    assert torch.allclose(layer.scores, positive(expected), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- a method of one's own


def test_a_method_from_outside_is_found_by_name(monkeypatch):
    monkeypatch.setattr(parts, "_registered", dict(parts._registered))

    @register("for this test")
    class Mine(find("method", "hydra")):
        @property
        def stages(self):
            return ("prune", "nap")

    assert issubclass(find("method", "for this test"), Method)
    with pytest.raises(ValueError, match="method for this test: expected stages of pretrain, prune, finetune, got nap"):
        run(Session(load_recipe("digits", ["prune.method=for this test"]), None, None))
