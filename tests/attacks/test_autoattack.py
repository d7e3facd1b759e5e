"""The attacks of the package pyautoattack: the same images as a direct call of it, and what it relies on."""

import pytest
import torch
from evaluation_models import EPS, cut_down, images_of, small_network
from helpers import assert_as_found, snapshot
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext._extras import MissingExtra
from s2ap_ext.attacks import autoattack
from s2ap_ext.attacks.balls import distances
from s2ap_ext.evaluation import evaluate
from s2ap_ext.parts import make

pyautoattack = pytest.importorskip("pyautoattack")
SINGLE = ("apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")


def direct(model, x, y, *, norm="linf", version="standard", seed=3, parts=None, batch_size=250):
    """What the package itself finds."""
    attack = pyautoattack.AutoAttack(model, norm={"linf": "Linf"}.get(norm, norm.upper()), eps=EPS[norm], seed=seed, version=version)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 4
    if parts is not None:
        attack.attacks_to_run = parts
    return attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=batch_size)[0]


@pytest.mark.parametrize(
    ("norm", "version"), [("linf", "standard"), ("l2", "standard"), ("l1", "standard"), ("linf", "plus"), ("l2", "rand")]
)
def test_autoattack_is_the_packages_own_image_by_image(norm, version, monkeypatch):
    """In batches too, of which the package forms new ones after each of its attacks, from the images that are left."""
    cut_down(monkeypatch)
    model = small_network()
    x, y = images_of(model)
    attack = make("attack", "autoattack", norm=norm, eps=EPS[norm], version=version)
    found = evaluate(model, x, y, [attack], norm=norm, eps=EPS[norm], seed=3, batch_size=7)
    expected = direct(model, x, y, norm=norm, version=version, batch_size=7)
    with torch.no_grad():
        held = model(expected).argmax(1) == y
    assert torch.equal(found.held["autoattack"], held)
    assert 0 < int(held.sum()) < int(found.held["clean"].sum()) == 10
    stages = list(found.stages["autoattack"].values())
    assert stages == sorted(stages, reverse=True)
    assert list(found.stages["autoattack"]) == list(autoattack.VERSIONS[version])
    assert found.implementations["autoattack"] == f"pyautoattack {pyautoattack.__version__}"


@pytest.mark.parametrize("part", SINGLE)
def test_each_attack_makes_the_packages_images(part, monkeypatch):
    cut_down(monkeypatch)
    model = small_network()
    x, y = images_of(model)
    options = {"queries": 20} if part == "square" else {}
    before, state = snapshot(model), torch.get_rng_state()
    ours = make("attack", part, eps=EPS["linf"], **options)(model, x, y, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    assert_as_found(model, before)
    assert torch.equal(ours, direct(model, x, y, parts=[part.replace("_", "-")]))
    assert not torch.equal(ours, x)
    assert distances(ours, x, "linf").max() <= EPS["linf"] + 1e-6


def test_without_a_seed_torchs_own_decides(monkeypatch):
    cut_down(monkeypatch)
    model = small_network()
    x, y = images_of(model)
    attack = make("attack", "apgd_ce", norm="l2", eps=0.05)
    torch.manual_seed(5)
    first = attack(model, x, y)
    again = attack(model, x, y)
    torch.manual_seed(5)
    assert torch.equal(attack(model, x, y), first)
    assert not torch.equal(again, first)


def test_the_model_may_keep_its_logits_and_have_any_layout_and_dtype(monkeypatch):
    """Square writes into the logits; channels-last images and bfloat16 are not what the package expects."""
    cut_down(monkeypatch)

    class Remembers(nn.Module):
        def forward(self, x):
            self.logits = x.flatten(1)[:, :5] * torch.ones((), dtype=torch.float64)
            return self.logits

    model = Remembers()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    y = x.flatten(1)[:, :5].argmax(1)
    for part, options in (("square", {"queries": 5}), ("apgd_ce", {})):
        x_adv = make("attack", part, eps=0.01, **options)(model, x, y)
        assert x_adv.dtype == torch.float64
        assert model.logits.isfinite().all()
    convolution = small_network().to(memory_format=torch.channels_last)
    x, y = images_of(convolution)
    make("attack", "apgd_ce", norm="l2", eps=0.1)(convolution.bfloat16(), x.bfloat16().to(memory_format=torch.channels_last), y)


def test_fewer_classes_than_targets(monkeypatch):
    cut_down(monkeypatch)
    model = small_network(classes=4)
    x, y = images_of(model)
    found = evaluate(model, x, y, ["autoattack"], eps=EPS["linf"])
    assert found.accuracy["autoattack"] < found.accuracy["clean"]


class Recording(nn.Module):
    """A network that remembers the sizes of its batches; ``_orig_mod`` is how models of torch.compile are known."""

    def __init__(self, network, compiled):
        super().__init__()
        self.network, self.sizes = network, set()
        if compiled:
            self._orig_mod = network

    def forward(self, x):
        self.sizes.add(len(x))
        return self.network(x)


def test_a_compiled_model_sees_few_sizes_of_batches():
    """Square leaves out what is fooled after each query."""
    plain, compiled = Recording(small_network(), False), Recording(small_network(), True)
    x, y = images_of(small_network(), 11, wrong=0)
    square = make("attack", "square", eps=3 * EPS["linf"], queries=40)
    found = [square(model, x, y, generator=torch.Generator().manual_seed(0)) for model in (plain, compiled)]
    assert torch.equal(*found)
    assert plain.sizes - {1, 2, 4, 8, 16}
    assert compiled.sizes <= {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    ("classes", "name", "options", "message"),
    [
        (3, "autoattack", {}, "attack autoattack: expected a model with more classes, got 3; the loss of apgd_t is defined for 4 or more"),
        (2, "apgd_dlr", {}, "attack apgd_dlr: expected a model with more classes, got 2; the loss of apgd_dlr is defined for 3 or more"),
        (1, "fab_t", {}, "attack fab_t: expected a model with more classes, got 1; fab_t needs 2"),
        (2, "autoattack", {"version": "rand"}, "the loss of apgd_dlr is defined for 3 or more"),
    ],
)
def test_where_the_loss_is_not_defined_nothing_runs(classes, name, options, message):
    model = small_network(classes)
    x, y = images_of(model)
    told = []
    with pytest.raises(ValueError, match=message):
        evaluate(model, x, y, ["pgd", make("attack", name, eps=0.1, **options)], eps=0.1, tell=lambda *about: told.append(about))
    assert not told


def test_a_missing_package_is_told_before_anything_runs(monkeypatch):
    model = small_network()
    x, y = images_of(model)

    def missing():
        raise MissingExtra("pyautoattack")

    monkeypatch.setattr(autoattack, "_package", missing)
    with pytest.raises(ImportError, match=r'pyautoattack missing; install with: pip install "s2ap_ext\[eval\]"'):
        evaluate(model, x, y, ["pgd", "autoattack"], eps=0.1, tell=lambda *about: pytest.fail("it ran"))


def test_it_attacks_pruned_models_as_their_dense_copies_and_on_their_kept_weights(monkeypatch):
    cut_down(monkeypatch)
    model = sparsify(small_network(), 0.5)
    x, y = images_of(model)
    dense = densify(sparsify(small_network(), 0.5))
    norm = "l2"
    found = evaluate(model, x, y, ["autoattack"], norm=norm, eps=EPS[norm], seed=3)
    with torch.no_grad():
        assert torch.equal(found.held["autoattack"], dense(direct(dense, x, y, norm=norm)).argmax(1) == y)
    sparse = evaluate(model, x, y, ["autoattack"], norm=norm, eps=EPS[norm], seed=3, engine="sparse")
    assert torch.equal(sparse.held["autoattack"], found.held["autoattack"])
    with pytest.raises(ValueError, match="attack autoattack: expected a model of torch's, since fab takes several gradients"):
        evaluate(model, x, y, [make("attack", "autoattack", eps=0.1, version="plus")], eps=0.1, engine="sparse")
