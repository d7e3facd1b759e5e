"""The guard that puts a model into evaluation mode, and everything that relies on it leaving the model as found."""

import pytest
import torch
from torch import nn

from s2ap_ext.modes import evaluation_mode


class Stubborn(nn.Linear):
    def train(self, mode=True):
        raise AssertionError("train() was called")


def mixed():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Dropout(0.5), Stubborn(2, 2)))
    model[1].training = False
    model[0].bias.requires_grad_(False)
    return model


def found(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("freeze", [True, False])
def test_evaluation_mode(freeze):
    model = mixed()
    before = found(model)
    with evaluation_mode(model, freeze=freeze):
        modes, flags = found(model)
        assert not any(modes)
        assert flags == ([False] * len(flags) if freeze else before[1])
    assert found(model) == before


def test_evaluation_mode_ends_with_an_exception():
    model = mixed()
    before = found(model)
    with pytest.raises(RuntimeError, match="out of memory"), evaluation_mode(model, freeze=True):
        raise RuntimeError("out of memory")
    assert found(model) == before


def test_a_callable_that_is_no_module_is_left_alone():
    weight = torch.ones(2, requires_grad=True)
    with evaluation_mode(lambda x: x * weight, freeze=True):
        assert weight.requires_grad
