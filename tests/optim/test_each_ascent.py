"""Each ascent of the package: against a few lines of plain PyTorch, and with its state saved and loaded."""

import copy

import pytest
import torch
from helpers import FIXTURES, assert_same_state, closure_for, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import S2AP, sparsify
from s2ap_ext._files import load, save
from s2ap_ext.nn import pruned_layers, train_scores
from s2ap_ext.optim import Ascent
from s2ap_ext.optim.ascents.every import orthogonal
from s2ap_ext.parts import make, names

ASCENTS = ["adaptive", "asam", "descent", "every", "exact", "late", "momentum", "previous", "random", "random_set", "reuse", "sam", "skip"]
GAMMA, LR, EPOCHS = 0.3, 0.02, 4


def test_every_ascent_of_the_field_is_there():
    assert [name for name in names("ascent") if not name.startswith("test-")] == ASCENTS


# ----------------------------------------------------------------------- one layer, float64, loss = sum((x @ (w * m).T)**2), no momentum


class Toy:
    """One pruned layer in plain PyTorch: where ``s`` stands, its gradient there, and what a minibatch is."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.w = torch.randn(6, 8, dtype=torch.float64, generator=generator)
        self.s = torch.randn(6, 8, dtype=torch.float64, generator=generator)
        self.kept = 12
        self.batches = torch.randn(12, 5, 8, dtype=torch.float64, generator=generator)

    def gradient(self, s, x):
        y = x @ (self.w * oracle_mask(s, self.kept)).T
        return 2 * y.T @ x * self.w * s.sign()

    def above(self, s, direction):
        return s + GAMMA * s.norm() * direction / (direction.norm() + 1e-12)

    def steps(self, step):
        """The scores after a step with ``step(s, x, n)`` on each minibatch."""
        s = self.s.clone()
        for n, x in enumerate(self.batches):
            s -= LR * step(s, x, n)
        return s

    def optimizer(self, ascent, **how):
        net = sparsify(nn.Sequential(nn.Linear(8, 6, bias=False)).double(), 0.75)
        with torch.no_grad():
            net[0].weight.copy_(self.w)
            net[0].scores.copy_(self.s)
        train_scores(net)
        return net, S2AP(net, torch.optim.SGD([net[0].scores], lr=LR), gamma=GAMMA, ascent=ascent, **how)

    def trained(self, ascent, along=None, **how):
        """The scores after the same steps by the optimizer, how many passes each took, and how many entries they flipped."""
        net, optimizer = self.optimizer(ascent, **how)
        passes, flips = [], []
        for n, x in enumerate(self.batches):

            def closure(x=x):
                optimizer.zero_grad()
                loss = net(x).square().sum()
                loss.backward()
                return loss

            optimizer.set_epoch(n * EPOCHS // len(self.batches), EPOCHS)
            optimizer.step(closure, None if along is None else {"0.scores": along[n]})
            passes.append(optimizer.passes)
            flips.append(optimizer.flips)
        assert any(flips)
        return net[0].scores.detach(), passes, flips


def second(toy, s, x):
    return toy.gradient(toy.above(s, toy.gradient(s, x)), x)


@pytest.fixture(params=[False, True], ids=["plain", "deferred"])
def defer_grads(request):
    return request.param


def check(toy, expected, ascent, passes, defer_grads, **how):
    found, counted, flips = toy.trained(ascent, defer_grads=defer_grads, **how)
    torch.testing.assert_close(found, toy.steps(expected), rtol=1e-9, atol=1e-12)
    assert counted == passes
    return flips


def test_exact(defer_grads):
    toy = Toy()
    check(toy, lambda s, x, n: second(toy, s, x), "exact", [2] * 12, defer_grads)


def test_skip(defer_grads):
    toy = Toy()
    net, _, flips = toy.trained("exact", defer_grads=defer_grads)
    found, passes, _ = toy.trained("skip", defer_grads=defer_grads)
    assert torch.equal(net, found)
    assert all(count == 2 for count, flipped in zip(passes, flips, strict=True) if flipped)


def test_reuse(defer_grads):
    toy = Toy()
    along = torch.randn(12, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    check(toy, lambda s, x, n: toy.gradient(toy.above(s, along[n]), x), "reuse", [1] * 12, defer_grads, along=along)


def test_previous(defer_grads):
    toy, last = Toy(), []

    def expected(s, x, n):
        last.append(toy.gradient(toy.above(s, last[-1]) if last else s, x))
        return last[-1]

    check(toy, expected, "previous", [1] * 12, defer_grads)


def test_momentum(defer_grads):
    toy, v = Toy(), torch.zeros(6, 8, dtype=torch.float64)

    def expected(s, x, n):
        g = toy.gradient(toy.above(s, -v) if n else s, x)
        v.mul_(0.8).add_(g)
        return g

    check(toy, expected, make("ascent", "momentum", decay=0.8), [1] * 12, defer_grads)


def test_every(defer_grads):
    toy, across = Toy(), [None]

    def expected(s, x, n):
        g = toy.gradient(s, x)
        if n % 3:
            return g + 0.5 * g.norm() / across[0].norm() * across[0]
        g_s = second(toy, s, x)
        across[0] = g_s - (g_s * g).sum() / (g * g).sum() * g
        return g_s

    check(toy, expected, make("ascent", "every", k=3, alpha=0.5), [2, 1, 1] * 4, defer_grads)


def test_the_worked_numbers_of_looksam():
    worked = {name: torch.tensor(value, dtype=torch.float64) for name, value in FIXTURES["looksam"].items()}
    across = orthogonal(worked["g_s"], worked["g"])
    torch.testing.assert_close(across, worked["g_v"], rtol=0, atol=1e-9)
    every, g = make("ascent", "every", k=2, alpha=float(worked["alpha"])), worked["reuse_on_g"].clone()

    class Between:  # a step in progress with one gradient
        def gradients(self):
            return {"s": g}

    every.load_state({"steps": torch.tensor(1), "across.s": across})
    every.step(Between(), lambda: None)
    torch.testing.assert_close(g, worked["reuse_on_g"] + 0.7 * worked["reuse_on_g"].norm() / across.norm() * across)
    torch.testing.assert_close(g[:2], worked["result"][:2], rtol=0, atol=1e-9)
    torch.testing.assert_close(g[2], worked["result"][2], rtol=0, atol=2e-7)  # the formula gives -0.1909800416, the file -0.1909801436


def test_equal_gradients_have_no_orthogonal_part():
    """Without a flip rounding is all that the formula would leave, and LookSAM would give it the length of a gradient."""
    g = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert not orthogonal(g, g.clone()).any()
    assert torch.equal(orthogonal(g, torch.zeros(1000)), g)


def test_late(defer_grads):
    toy = Toy()
    passes = [1] * 6 + [2] * 6  # 12 steps in 4 epochs, of which 2 are late
    check(
        toy,
        lambda s, x, n: second(toy, s, x) if n >= 6 else toy.gradient(s, x),
        make("ascent", "late", share=0.5),
        passes,
        defer_grads,
    )


@pytest.mark.parametrize(("share", "late"), [(0.0, []), (0.3, [7, 8, 9]), (0.7, list(range(3, 10))), (0.15, [9]), (1.0, list(range(10)))])
def test_which_epochs_are_late(share, late):
    net, optimizer = Toy().optimizer(make("ascent", "late", share=share))
    found = []
    for epoch in range(10):

        def closure():
            optimizer.zero_grad()
            loss = net(torch.ones(1, 8, dtype=torch.float64)).square().sum()
            loss.backward()
            return loss

        optimizer.set_epoch(epoch, 10)
        optimizer.step(closure)
        found += [epoch] * (optimizer.passes - 1)
    assert found == late


def test_adaptive(defer_grads):
    toy, running, took = Toy(), [], []

    def expected(s, x, n):
        g = toy.gradient(s, x)
        q = float(g.norm() ** 2)
        mean, variance = running[-1] if running else (q, 0.0)
        mean = 0.8 * mean + 0.2 * q
        variance = 0.8 * variance + 0.2 * (q - mean) ** 2
        running.append((mean, variance))
        took.append(2 if n == 0 or q >= mean + 0.1 * variance**0.5 else 1)
        return g if took[-1] == 1 else second(toy, s, x)

    toy.steps(expected)
    assert 1 in took
    assert took.count(2) > 1
    passes = list(took)
    running.clear()
    check(toy, expected, make("ascent", "adaptive", decay=0.8, threshold=0.1), passes, defer_grads)


def test_random(defer_grads):
    toy, generator = Toy(), torch.Generator().manual_seed(7)

    def expected(s, x, n):
        return toy.gradient(toy.above(s, torch.randn(6, 8, generator=generator).double()), x)

    check(toy, expected, make("ascent", "random", seed=7), [1] * 12, defer_grads)


def test_descent(defer_grads):
    toy = Toy()
    check(toy, lambda s, x, n: toy.gradient(toy.above(s, -toy.gradient(s, x)), x), "descent", [2] * 12, defer_grads)


def test_sam(defer_grads):
    toy = Toy()

    def expected(s, x, n):
        g = toy.gradient(s, x)
        return toy.gradient(s + 0.7 * g / g.norm(), x)

    check(toy, expected, make("ascent", "sam", rho=0.7), [2] * 12, defer_grads)


def test_sam_has_one_radius_for_all_layers():
    net = pruned_net()
    optimizer, stood = s2ap(net, make("ascent", "sam", rho=0.25), momentum=0), []
    layers = list(pruned_layers(net).values())

    def closure():
        stood.append(
            [layer.mask_state.perturbation and layer.mask_state.perturbation.position(layer.scores, layer.weight) for layer in layers]
        )
        return closure_for(net, optimizer)()

    scores = [layer.scores.detach().clone() for layer in layers]
    optimizer.step(closure)
    moved = torch.cat([(at - s).flatten() for at, s in zip(stood[1], scores, strict=True)])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.25), rtol=1e-5, atol=0)


def test_random_set(defer_grads):
    """As many leave the mask as with ``exact``; chance draws which, and which enter; as a set the sizes of the scores stay the same."""
    toy, generator = Toy(), torch.Generator().manual_seed(7)

    def exchanged(s, x):
        kept = oracle_mask(s, toy.kept)
        count = int((kept & ~oracle_mask(toy.above(s, toy.gradient(s, x)), toy.kept)).sum())
        if not count:
            return s
        out, into = (
            entries[torch.randperm(len(entries), generator=generator)[:count]]
            for entries in (kept.flatten().nonzero().flatten(), (~kept).flatten().nonzero().flatten())
        )
        at = s.clone().flatten()
        for i, j in zip(out.tolist(), into.tolist(), strict=True):
            at[i], at[j] = s.flatten()[i].sign() * s.flatten()[j].abs(), s.flatten()[j].sign() * s.flatten()[i].abs()
        assert int((oracle_mask(at.view_as(s), toy.kept) & ~kept).sum()) == count
        return at.view_as(s)

    flips = check(toy, lambda s, x, n: toy.gradient(exchanged(s, x), x), make("ascent", "random_set", seed=7), [2] * 12, defer_grads)
    assert sum(flips) > 0


def test_random_set_is_for_single_weights():
    net = train_scores(sparsify(small_net(), 0.5, granularity="channel"))
    optimizer = s2ap(net, "random_set")
    with pytest.raises(ValueError, match="ascent random_set: expected single weights as the unit of pruning, layer 0 has another"):
        optimizer.step(closure_for(net, optimizer))


def test_asam(defer_grads):
    toy = Toy()
    check(toy, lambda s, x, n: toy.gradient(toy.above(s, s * s * toy.gradient(s, x)), x), "asam", [2] * 12, defer_grads)


@pytest.mark.parametrize(("name", "direction"), [("exact", "sam"), ("asam", "asam_abs_p")])
def test_the_worked_directions_of_sam_and_asam(name, direction):
    """Their length is rho in SAM, rho * ||T^2 g|| / ||T g|| in ASAM, and gamma * ||s|| here, so directions are compared."""
    worked = {key: torch.tensor(value, dtype=torch.float64) for key, value in FIXTURES["sam"].items()}
    moved = []

    class Step:  # a step in progress at p with the gradient g
        def perturbed_parameters(self):
            return {"p": worked["p"]}

        def gradients(self):
            return {"p": worked["g"]}

        def move(self, along=None):
            moved.append((along or self.gradients())["p"])

    make("ascent", name).step(Step(), lambda: None)
    expected = worked[direction]
    torch.testing.assert_close(moved[0] / moved[0].norm(), expected / expected.norm(), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------- skipping second passes changes no bit


def pruned_net():
    return train_scores(sparsify(small_net(), 0.9))


def s2ap(net, ascent, gamma=0.3, momentum=0.9, **settings):
    return S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum), gamma=gamma, ascent=ascent, **settings)


def train(net, optimizer, steps=6):
    """Steps; returns how many backward passes each took."""
    passes = []
    for seed in range(steps):
        optimizer.set_epoch(seed, steps)
        wanted = optimizer.wanted_gradients()
        along = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for name, p in wanted.items()}
        optimizer.step(closure_for(net, optimizer, images(seed=seed)), along)
        passes.append(optimizer.passes)
    return passes


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("restore", ["before", "after"])
@pytest.mark.parametrize("defer_grads", [False, True])
@pytest.mark.parametrize(("gamma", "expected"), [(1e-9, {1}), (1e-3, {1, 2}), (0.3, {2})])
def test_skip_is_exact(gamma, expected, defer_grads, restore, momentum):
    one = pruned_net()
    two = copy.deepcopy(one)
    how = {"gamma": gamma, "momentum": momentum, "restore": restore}
    passes = train(one, s2ap(one, "skip", defer_grads=defer_grads, **how))
    assert train(two, s2ap(two, "exact", **how)) == [2] * 6
    assert_same_state(one, two)
    assert set(passes) == expected


@pytest.mark.parametrize("name", ["adaptive", "asam", "every", "late"])
@pytest.mark.parametrize("gamma", [1e-9, 3e-4])
def test_what_climbs_can_skip(name, gamma):
    options = {"late": {"share": 1}, "adaptive": {"threshold": -9}, "every": {"k": 2}}.get(name, {})
    one = pruned_net()
    two = copy.deepcopy(one)
    fewer = train(one, s2ap(one, make("ascent", name, skip=True, **options), gamma))
    passes = train(two, s2ap(two, make("ascent", name, **options), gamma))
    assert_same_state(one, two)
    assert sum(fewer) < sum(passes)


@pytest.mark.parametrize("restore", ["before", "after"])
@pytest.mark.parametrize("name", ASCENTS)
def test_deferred_gradients_change_no_bit(name, restore):
    one = pruned_net()
    two = copy.deepcopy(one)
    plain = s2ap(one, name, gamma=1.0, restore=restore)
    deferring = s2ap(two, name, gamma=1.0, restore=restore, defer_grads=True)
    assert train(one, plain) == train(two, deferring)
    assert_same_state(one, two)
    assert one[1].num_batches_tracked == 6  # once in each step


# -------------------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", ASCENTS)
@pytest.mark.parametrize("form", ["state_dict", "state_tensors"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_state_of_an_ascent_is_saved_and_loaded(name, form, steps, tmp_path):
    net = pruned_net()
    optimizer = s2ap(net, name)
    train(net, optimizer, steps)
    other = pruned_net()
    other.load_state_dict(net.state_dict())
    resumed = s2ap(other, name)
    if form == "state_dict":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        save(tmp_path / "state", optimizer.state_tensors(), {})
        resumed.load_state_tensors(load(tmp_path / "state")[0])
    assert train(net, optimizer) == train(other, resumed)
    assert_same_state(net, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", "ascent exact: expected no saved state, got ascents"),
        ("skip", "ascent skip: expected no saved state, got ascents"),
        ("every", "ascent every: expected steps, across.NAME, got ascents"),
        ("adaptive", "ascent adaptive: expected running, got ascents"),
        ("random", "ascent random: expected generator, got ascents"),
        ("previous", "ascent previous: expected last.NAME, got ascents"),
        ("momentum", "ascent momentum: expected sum.NAME, got ascents"),
    ],
)
def test_a_state_of_another_ascent_is_refused(name, message):
    net = pruned_net()
    with pytest.raises(ValueError, match=message):
        s2ap(net, name).load_state_tensors({"ascent.ascents": torch.tensor(1)})


# ------------------------------------------------------------------------------------------------------------------------- errors


def test_reuse_needs_gradients():
    net = pruned_net()
    optimizer = s2ap(net, "reuse")
    assert list(optimizer.wanted_gradients()) == ["0.scores", "3.scores", "5.scores"]
    with pytest.raises(RuntimeError, match=r"ascent reuse: expected the gradients of an attack; call step\(closure, along\)"):
        optimizer.step(closure_for(net, optimizer))


def test_a_move_can_be_taken_back_and_only_then_followed_by_another():
    net, stood = pruned_net(), []

    class Twice(Ascent):
        def step(self, at, backward):
            with pytest.raises(RuntimeError, match=r"back\(\): the model has not moved in this step"):
                at.back()
            backward()
            before = net[0].mask.clone()
            at.move()
            with pytest.raises(RuntimeError, match=r"move\(\): the model has moved in this step already"):
                at.move()
            stood.append(not torch.equal(net[0].mask, before))
            at.back()
            stood.append(torch.equal(net[0].mask, before))
            at.move()
            backward()

    other = copy.deepcopy(net)
    twice, once = s2ap(net, Twice(), gamma=1.0), s2ap(other, "exact", gamma=1.0)
    twice.step(closure_for(net, twice))
    once.step(closure_for(other, once))
    assert stood == [True, True]
    assert_same_state(net, other)


def test_a_plain_step_wants_no_gradients():
    net = pruned_net()
    assert s2ap(net, "reuse", gamma=0).wanted_gradients() == {}
    warming = s2ap(net, "reuse", warmup_epochs=1)
    warming.set_epoch(0)
    assert warming.wanted_gradients() == {}
    warming.set_epoch(1)
    assert len(warming.wanted_gradients()) == 3
    assert s2ap(net, "exact").wanted_gradients() == {}


def test_late_needs_the_number_of_epochs():
    net = pruned_net()
    optimizer = s2ap(net, "late")
    optimizer.set_epoch(0)
    with pytest.raises(RuntimeError, match=r"ascent late: call set_epoch\(epoch, epochs\)"):
        optimizer.step(closure_for(net, optimizer))
