"""Attacks that run a model through the sparse engine."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from engine_models import Branches, Strange, assert_close, images, pruned
from torch import nn

from s2ap_ext import backend, densify, engine, sparsify
from s2ap_ext.attacks import accuracy, pgd
from s2ap_ext.engine import compile_sparse
from s2ap_ext.nn import dense_kernels

pytestmark = pytest.mark.skipif(backend().cpu != "C++", reason="attacks use the engine where the C++ kernels run")

SETTINGS = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 4}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_attacks_are_the_same_with_and_without(norm, loss):
    model, size = pruned("resnet18")
    model.train()
    x, y = images(21, size), torch.arange(21) % 10
    assert engine.for_attack(model, x) is not None
    with dense_kernels():
        assert engine.for_attack(model, x) is None
        plain = pgd(model, x, y, **SETTINGS, norm=norm, loss=loss, generator=torch.Generator().manual_seed(0))
    ours = pgd(model, x, y, **SETTINGS, norm=norm, loss=loss, generator=torch.Generator().manual_seed(0))
    if norm == "l2":
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    else:  # where a gradient is 0 up to rounding its sign is anyone's
        assert (ours - plain).abs().gt(1e-6).float().mean() < 1e-3
    with torch.no_grad():
        logits = model.eval()(ours)
        assert_close(engine.for_attack(model, x)(ours), logits)
        assert torch.equal(engine.for_attack(model, x)(ours).argmax(1), logits.argmax(1))


def test_an_attack_follows_the_model():
    model, size = pruned("resnet18")
    x, y = images(9, size), torch.arange(9)

    def ours_and_plain():
        ours = pgd(model, x, y, **SETTINGS, random_start=False)
        with dense_kernels():
            return ours, pgd(model, x, y, **SETTINGS, random_start=False)

    first = engine.for_attack(model, x)
    a = ours_and_plain()[0]
    with torch.no_grad():
        nn.init.normal_(model.layer2[0].conv1.scores)
    b, plain = ours_and_plain()
    assert not torch.equal(a, b)
    assert (b - plain).abs().gt(1e-6).float().mean() < 1e-3
    assert engine.for_attack(model, x) is first  # the graph and the buffers stay
    model.layer1[0] = nn.Identity()
    assert engine.for_attack(model, x) is not first
    b, plain = ours_and_plain()
    assert (b - plain).abs().gt(1e-6).float().mean() < 1e-3


def test_an_attack_sees_settings_of_the_code():
    class Switched(nn.Sequential):
        double = False

        def forward(self, x):
            return super().forward(x) * (2 if self.double else 1)

    torch.manual_seed(0)
    model, x = sparsify(Switched(nn.Conv2d(3, 8, 3), nn.Flatten()), 0.9).eval(), images(9, (3, 9, 9))
    for model.double in (False, True, False):
        assert_close(engine.for_attack(model, x)(x), model(x).detach())


def test_when_attacks_call_the_model_itself():
    model, size = pruned("resnet18")
    x = images(9, size)
    assert engine.for_attack(model, x.double()) is None
    assert engine.for_attack(densify(copy.deepcopy(model)), x) is None
    assert engine.for_attack(lambda x: x, x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine.for_attack(model, x) is None
    handle = model.layer1.register_forward_hook(lambda *args: None)
    assert engine.for_attack(model, x) is None
    handle.remove()
    assert engine.for_attack(model, x) is not None
    with torch.no_grad():
        model.conv1.weight[0] = torch.nan
    assert engine.for_attack(model, x) is None
    assert engine.for_attack(sparsify(Branches(), 0.9), x) is None
    assert engine.for_attack(sparsify(Strange(), 0.9), images(9, (3, 15, 15))) is None


def test_nothing_is_left_on_the_model_or_kept_alive():
    model, size = pruned("resnet18")
    keys, attributes = list(model.state_dict()), set(vars(model))
    network = weakref.ref(engine.for_attack(model, images(9, size)))
    assert list(model.state_dict()) == keys
    assert set(vars(model)) == attributes
    twin = copy.deepcopy(model)
    assert engine.for_attack(twin, images(9, size)) is not network()
    pickle.dumps(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert network() is None


def test_a_network_can_be_attacked_itself():
    model, size = pruned("resnet18")
    network, x, y = compile_sparse(model, images(1, size)), images(21, size), torch.arange(21) % 10
    ours, plain = (pgd(net, x, y, **SETTINGS, random_start=False) for net in (network, model))
    assert (ours - plain).abs().gt(1e-6).float().mean() < 1e-3
    assert accuracy(network, [(ours, y)]) == accuracy(model, [(ours, y)])
