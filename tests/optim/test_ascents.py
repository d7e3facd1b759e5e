"""Ascents: one from outside the package by its name, what an ascent can ask for, its state, and its errors.

The ascents below are small forms of those in the literature, each of which needs another part of the interface.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from helpers import assert_same_state, closure_for, images, small_net

from s2ap_ext import AWP, S2AP, sparsify
from s2ap_ext._files import load, save
from s2ap_ext.nn import train_scores
from s2ap_ext.optim import Ascent
from s2ap_ext.parts import make, register
from s2ap_ext.settings import key


@register("test-every")
class Every(Ascent):
    """Ascends in every k-th step; between them the step is a plain one with what the last ascent added to the gradient."""

    @dataclass(frozen=True)
    class Settings:
        k: int = key(2, "steps from one ascent to the next", low=1)

    def __init__(self, settings=None, **options):
        super().__init__(settings, **options)
        self.count = 0
        self.added = {}

    def step(self, at, backward):
        backward()
        if self.count % self.settings.k == 0:
            first = {name: g.clone() for name, g in at.gradients().items()}
            at.move()
            backward()
            self.added = {name: g - first[name] for name, g in at.gradients().items()}
        else:
            for name, g in at.gradients().items():
                g.add_(self.added[name])
        self.count += 1

    def state(self):
        return {"count": torch.tensor(self.count)} | {f"added.{name}": g for name, g in self.added.items()}

    def load_state(self, state):
        self.count = int(state["count"])
        self.added = {name.removeprefix("added."): g for name, g in state.items() if name != "count"}


@register("test-skip")
class Skip(Ascent):
    """Leaves the second backward out where nothing has changed."""

    def step(self, at, backward):
        backward()
        at.move()
        if at.changes().any():
            backward()


@register("test-previous")
class Previous(Ascent):
    """One backward only, ascended to along the gradient of the step before."""

    def __init__(self, settings=None, **options):
        super().__init__(settings, **options)
        self.last = {}

    def step(self, at, backward):
        if self.last:
            at.move(self.last, gamma=2 * at.gamma)
        backward()
        self.last = {name: g.clone() for name, g in at.gradients().items()}

    def state(self):
        return self.last

    def load_state(self, state):
        self.last = dict(state)


def pruned_net():
    return train_scores(sparsify(small_net(), 0.9))


def s2ap(net, ascent, gamma=0.3, **settings):
    return S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), gamma=gamma, ascent=ascent, **settings)


def train(net, optimizer, steps=4):
    """Steps; returns how many backward passes each took."""
    passes = []
    for seed in range(steps):
        closure = closure_for(net, optimizer, images(seed=seed))
        calls = []

        def counted(closure=closure, calls=calls):
            calls.append(None)
            return closure()

        optimizer.step(counted)
        passes.append(len(calls))
    return passes


def test_an_ascent_from_outside_the_package_is_found_by_its_name():
    net = pruned_net()
    assert train(net, s2ap(net, "test-every")) == [2, 1, 2, 1]
    assert train(net, s2ap(net, make("ascent", "test-every", k=3))) == [2, 1, 1, 2]
    assert net[1].num_batches_tracked == 8  # once in each step


@pytest.mark.parametrize(("gamma", "expected"), [(1e-9, {1}), (1e-3, {1, 2}), (0.3, {2})])
@pytest.mark.parametrize("defer_grads", [False, True])
def test_a_second_pass_without_a_change_can_be_left_out(gamma, expected, defer_grads):
    one = pruned_net()
    two = copy.deepcopy(one)
    passes = train(one, s2ap(one, "test-skip", gamma, defer_grads=defer_grads), 6)
    train(two, s2ap(two, "exact", gamma), 6)
    assert_same_state(one, two)
    assert set(passes) == expected


@pytest.mark.parametrize("restore", ["before", "after"])
@pytest.mark.parametrize("name", ["test-every", "test-skip", "test-previous"])
def test_deferred_gradients_change_no_bit(name, restore):
    one = pruned_net()
    two = copy.deepcopy(one)
    plain = s2ap(one, name, gamma=1.0, restore=restore)
    deferring = s2ap(two, name, gamma=1.0, restore=restore, defer_grads=True)
    assert train(one, plain, 5) == train(two, deferring, 5)
    assert_same_state(one, two)


def test_a_move_before_the_only_backward():
    """Against the steps by hand: the gradient of the step before, ascended along with twice the gamma."""
    net = pruned_net()
    twin = copy.deepcopy(net)
    optimizer = s2ap(net, "test-previous")
    by_hand = s2ap(twin, "exact", gamma=0.6)
    assert train(net, optimizer, 3) == [1, 1, 1]
    assert optimizer.flips > 0
    by_hand.gamma = 0
    by_hand.step(closure_for(twin, by_hand, images(seed=0)))
    by_hand.gamma = 0.6
    for seed in (1, 2):  # the scores still have the gradient of the step before
        twin.eval()
        by_hand.ascend()
        twin.train()
        closure_for(twin, by_hand, images(seed=seed))()
        by_hand.descend()
    assert_same_state(net, twin)


@pytest.mark.parametrize("name", ["test-every", "test-previous"])
@pytest.mark.parametrize("form", ["state_dict", "state_tensors"])
@pytest.mark.parametrize("steps", [1, 2])
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


def test_names():
    net = pruned_net()
    with pytest.raises(ValueError, match=r"ascent: expected one of .*exact.*, got 'exactt'; did you mean exact"):
        s2ap(net, "exactt")
    with pytest.raises(TypeError, match="ascent: expected a name or an Ascent, got int"):
        s2ap(net, 3)


def test_exact_has_no_state():
    net = pruned_net()
    with pytest.raises(ValueError, match="ascent exact: expected no saved state, got count"):
        s2ap(net, "exact").load_state_tensors({"ascent.count": torch.tensor(1)})


def test_by_hand_there_is_only_exact():
    net = pruned_net()
    optimizer = s2ap(net, "test-every")
    closure_for(net, optimizer)()
    with pytest.raises(RuntimeError, match=r"ascend\(\): Every decides itself when and where to move; call step\(closure\)"):
        optimizer.ascend()


def test_a_step_within_an_ascent_by_hand():
    net = pruned_net()
    optimizer = s2ap(net, "exact")
    closure = closure_for(net, optimizer)
    closure()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match=r"step\(\) was called between ascend\(\) and descend\(\)"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match=r"state_tensors\(\) was called between ascend\(\) and descend\(\)"):
        optimizer.state_tensors()


WRONG = {
    "never": (lambda at, backward: None, RuntimeError, "ascent: Wrong has called no backward"),
    "too early": (lambda at, backward: (at.zero_grad(), at.move()), RuntimeError, "gradient to ascend along"),
    "twice": (lambda at, backward: (backward(), at.move(), at.move()), RuntimeError, "the model has moved in this step already"),
    "strange": (
        lambda at, backward: at.move({"9.scores": torch.zeros(1)}),
        ValueError,
        "along: expected names of perturbed parameters, got '9.scores'; there are 0.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("make", [S2AP, AWP])
def test_wrong_ascents(make, what):
    step, error, message = WRONG[what]

    class Wrong(Ascent):
        def step(self, at, backward):
            step(at, backward)

    net = sparsify(small_net(), 0.9)
    optimizer = make(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.3)
    optimizer.ascent = Wrong()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(error, match=message):
        optimizer.step(closure_for(net, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_move_with_a_gamma_of_another_form():
    net = pruned_net()
    optimizer = s2ap(net, "exact")
    closure_for(net, optimizer)()
    with pytest.raises(ValueError, match=r"gamma: expected float64 of shape \(3,\), got shape \(2,\)"):
        optimizer.move(gamma=torch.zeros(2, dtype=torch.float64))
