"""What all steppers share: the plain step, state as tensors, parameters that are not perturbed, and steps that fail."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, assert_same_state, closure_for, images, small_net
from torch import nn

from s2ap_ext import AWP, S2AP, sparsify
from s2ap_ext._files import load, save
from s2ap_ext.optim import Plain

STEPPERS = [Plain, S2AP, AWP]
BASES = [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4), lambda p: torch.optim.Adam(p, lr=0.01)]


def pruned_net():
    return sparsify(small_net(), 0.9)


@pytest.mark.parametrize("base", BASES, ids=["SGD", "Adam"])
@pytest.mark.parametrize("net", [small_net, pruned_net])
def test_plain_has_the_bits_of_the_bare_optimizer(net, base):
    one = net()
    two = copy.deepcopy(one)
    optimizer, bare = Plain(one, base(one.parameters())), base(two.parameters())
    for seed in range(3):
        x = images(seed=seed)
        loss = optimizer.step(closure_for(one, optimizer, x))
        expected = bare.step(closure_for(two, bare, x))
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
    assert_same_state(one, two)
    assert optimizer.flips == 0
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups


@pytest.mark.parametrize("make", STEPPERS)
@pytest.mark.parametrize("base", BASES, ids=["SGD", "Adam"])
def test_state_tensors_resume_bit_for_bit(make, base, tmp_path):
    net = pruned_net()
    optimizer = make(net, base(net.parameters()))
    for seed in range(2):
        optimizer.step(closure_for(net, optimizer, images(seed=seed)))
    save(tmp_path / "state", optimizer.state_tensors(), {})
    other = pruned_net()
    other.load_state_dict(net.state_dict())
    resumed = make(other, base(other.parameters()))
    resumed.load_state_tensors(load(tmp_path / "state")[0])
    for n, o in ((net, optimizer), (other, resumed)):
        o.step(closure_for(n, o))
    assert_same_state(net, other)


def test_names_of_state_tensors():
    net = nn.Linear(3, 2)
    optimizer = Plain(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    assert optimizer.state_tensors() == {}
    net(torch.ones(1, 3)).sum().backward()
    optimizer.base_optimizer.step()
    assert {name: t.shape for name, t in optimizer.state_tensors().items()} == {"0.momentum_buffer": (2, 3), "1.momentum_buffer": (2,)}


@pytest.mark.parametrize("name", ["2.momentum_buffer", "0", "0.", "-1.x", "x.y", "ascent.x"])
def test_state_tensors_of_another_optimizer(name):
    net = nn.Linear(3, 2)
    optimizer = Plain(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match=rf"optimizer state: expected index\.name with an index below 2, got '{name}'"):
        optimizer.load_state_tensors({name: torch.zeros(2, 3)})


def test_state_that_is_no_tensor():
    class Counting(torch.optim.SGD):
        def step(self):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["count"] = 1

    net = small_net()
    optimizer = Plain(net, Counting(net.parameters(), lr=0.1))
    optimizer.step(closure_for(net, optimizer))
    with pytest.raises(TypeError, match="base_optimizer: expected a state of tensors, Counting keeps count as int"):
        optimizer.state_tensors()


@pytest.mark.parametrize("make", STEPPERS)
def test_other_parameters_are_stepped_but_not_perturbed(make):
    net = pruned_net()
    net.rate = nn.Parameter(torch.tensor(2.0))
    temperature = nn.Parameter(torch.tensor([3.0]))  # in no module
    settings = {} if make is Plain else {"gamma": 0.3}
    optimizer = make(net, torch.optim.SGD([*net.parameters(), temperature], lr=0.1), **settings)
    seen, gradients = [], []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net.rate * net(images()) / temperature, LABELS)
        loss.backward()
        seen.append((net.rate.item(), temperature.item()))
        gradients.append((net.rate.grad.clone(), temperature.grad.clone()))
        return loss

    optimizer.step(closure)
    assert set(seen) == {(2.0, 3.0)}
    assert len(seen) == (1 if make is Plain else 2)
    if make is not Plain:
        assert gradients[0][0] != gradients[1][0]
    assert torch.equal(net.rate.detach(), 2 - 0.1 * gradients[-1][0])
    assert torch.equal(temperature.detach(), 3 - 0.1 * gradients[-1][1])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("make", STEPPERS)
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_step_that_fails_leaves_the_model_where_it_was(make, how):
    """But for the BatchNorm statistics, which the first forward has moved."""
    net = pruned_net()
    settings = {} if make is Plain else {"gamma": 0.3}
    optimizer = make(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), **settings)
    last = 1 if make is Plain else 2
    expected = copy.deepcopy(net)
    expected(images())
    twin = make(expected, torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), **settings)
    calls = []

    def failing():
        loss = closure_for(net, optimizer)()
        calls.append(loss)
        if len(calls) == last and how == "raises":
            raise Interrupted
        return loss * math.nan if len(calls) == last else loss

    with pytest.raises(Interrupted if how == "raises" else FloatingPointError):
        optimizer.step(failing)
    assert len(calls) == last
    assert_same_state(net, expected)
    for n, o in ((net, optimizer), (expected, twin)):
        o.step(closure_for(n, o))
    assert_same_state(net, expected)


def test_the_base_optimizer_is_one():
    with pytest.raises(TypeError, match=r"base_optimizer: expected a torch\.optim\.Optimizer, got str"):
        Plain(nn.Linear(3, 2), "sgd")
