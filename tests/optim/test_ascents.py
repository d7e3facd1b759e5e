"""Ascents: one from outside the package by its name, what an ascent can ask for, its state, and its errors."""

from dataclasses import dataclass

import pytest
import torch
from helpers import closure_for, images, small_net

from s2ap_ext import AWP, S2AP, sparsify
from s2ap_ext.nn import train_scores
from s2ap_ext.optim import Ascent
from s2ap_ext.parts import make, register
from s2ap_ext.settings import key


@register("test-every")
class OwnEvery(Ascent):
    """Ascends twice as far in every k-th step; the others are plain."""

    @dataclass(frozen=True)
    class Settings:
        k: int = key(2, "steps from one ascent to the next", low=1)

    def __init__(self, settings=None, **options):
        super().__init__(settings, **options)
        self.count = 0

    def step(self, at, backward):
        backward()
        if self.count % self.settings.k == 0:
            at.move(gamma=2 * at.gamma)
            backward()
        self.count += 1


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
    with pytest.raises(RuntimeError, match=r"ascend\(\): OwnEvery decides itself when and where to move; call step\(closure\)"):
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
