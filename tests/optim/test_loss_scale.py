"""The loss scale: no bit of a step depends on it, and a step that overflows changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, assert_same_state, images, small_net

from s2ap_ext import S2AP, sparsify
from s2ap_ext.nn import dense_kernels, train_scores, train_weights
from s2ap_ext.optim import AWP, LossScale, Overflow, Plain


def make(kind):
    net = sparsify(small_net(), 0.5)
    train_weights(net) if kind == "awp" else train_scores(net)
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=5e-4)
    steppers = {"plain": Plain, "s2ap": lambda *a: S2AP(*a, gamma=0.05), "awp": lambda *a: AWP(*a, gamma=0.05)}
    return net, steppers[kind](net, base)


def step(net, stepper, backward):
    def closure():
        stepper.zero_grad()
        loss = F.cross_entropy(net(images()), LABELS)
        backward(loss)
        return loss

    with dense_kernels():
        return stepper.step(closure)


def parameters(stepper):
    return [p for group in stepper.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", ["plain", "s2ap", "awp"])
@pytest.mark.parametrize("power", [0, 10, 16])
def test_no_bit_depends_on_the_scale(kind, power):
    (net, stepper), (twin, other) = make(kind), make(kind)
    scale = LossScale(2.0**power)
    for _ in range(3):
        step(net, stepper, lambda loss: loss.backward())
        step(twin, other, lambda loss: scale.backward(loss, parameters(other)))
    assert_same_state(net, twin)


@pytest.mark.parametrize("kind", ["s2ap", "awp"])
@pytest.mark.parametrize("overflowing", [1, 2])
def test_a_step_that_overflows_restores_everything(kind, overflowing):
    net, stepper = make(kind)
    step(net, stepper, lambda loss: loss.backward())
    before, momentum = copy.deepcopy(net.state_dict()), copy.deepcopy(stepper.base_optimizer.state_dict()["state"])
    scale, calls = LossScale(), []

    def backward(loss):
        calls.append(loss)
        large = 1e38 if len(calls) == overflowing else 0
        trained = parameters(stepper)[0]
        scale.backward(loss + (trained * large - (trained * large).detach()).sum(), parameters(stepper))

    with pytest.raises(Overflow, match="loss scale of 65536"):
        step(net, stepper, backward)
    after = net.state_dict()
    for name in before:
        if "running" not in name and "tracked" not in name:  # the first forward of a step moves them, taken or not
            assert torch.equal(before[name], after[name]), name
    for index, entries in stepper.base_optimizer.state_dict()["state"].items():
        assert torch.equal(entries["momentum_buffer"], momentum[index]["momentum_buffer"])
    step(net, stepper, lambda loss: loss.backward())  # and the next step is one like any other


def test_the_scale_falls_and_rises():
    scale = LossScale(4.0, interval=2)
    scale.update(overflowed=True)
    assert scale.scale == 2
    scale.update(overflowed=False)
    again = LossScale(4.0, interval=2)
    again.load_state(scale.state())
    for either in (scale, again):
        either.update(overflowed=False)
        assert either.scale == 4
    scale.update(overflowed=True)
    scale.update(overflowed=True)
    with pytest.raises(FloatingPointError, match="even at a loss scale of 1"):
        scale.update(overflowed=True)


def test_what_cannot_be_is_refused():
    for wrong in (3.0, 0.5, -2.0):
        with pytest.raises(ValueError, match=f"scale: expected a power of two from 1 on, got {wrong}"):
            LossScale(wrong)
    with pytest.raises(ValueError, match="interval: expected an integer >= 1, got 0"):
        LossScale(interval=0)
    with pytest.raises(ValueError, match="loss scale: not a state of its own"):
        LossScale().load_state({"scale": torch.tensor(1.0)})
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got inf"):
        LossScale().backward(torch.tensor(torch.inf, requires_grad=True), [])
