"""Layers that are added together share one mask, and their channels go away together."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from engine_models import MODELS, images, seeded
from torch import nn

from s2ap_ext import S2AP, densify, sparsify
from s2ap_ext.nn import pruned_layers, sparsity_table, train_scores, train_weights
from s2ap_ext.nn.shrink import size_of
from s2ap_ext.nn.tied import layers_that_are_added


def tied(name="resnet18", **how):
    make, size, _ = MODELS[name]
    x = images(4, size)
    return sparsify(seeded(make), 0.5, granularity="channel", tied=True, example=x, exclude=[":last"], **how), x


class Residual(nn.Module):
    """Two layers whose results are added, of different shapes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = self.a(x)
        return self.head(F.relu(self.c(F.relu(x + self.b(F.relu(x))))).mean((2, 3)))


def small():
    torch.manual_seed(0)
    x = images(4, (3, 8, 8))
    return sparsify(Residual(), 0.5, granularity="channel", tied=True, example=x, exclude=["head"]), x


def test_which_layers_are_added():
    make, size, _ = MODELS["resnet18"]
    streams = [["conv1", "layer1.0.conv2", "layer1.1.conv2"]]
    streams += [[f"layer{i}.0.conv2", f"layer{i}.0.shortcut.0", f"layer{i}.1.conv2"] for i in (2, 3, 4)]
    found = [sorted(name.removesuffix(".weight") for name in names) for names in layers_that_are_added(seeded(make), images(2, size))]
    assert sorted(found) == streams


def masks(model):
    return {name: (module.weight != 0).flatten(1).any(1) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_they_share_a_mask():
    model, _ = tied()
    labels = [row.layer for row in sparsity_table(model).rows]
    assert "layer2.0.conv2 + layer2.0.shortcut.0 + layer2.1.conv2" in labels
    assert len(pruned_layers(model)) == 21 - 8 - 1  # three layers each, four times, in one; the last layer is dense
    together = pruned_layers(model)["layer2.0.conv2.pruned_weight.together"]
    assert together.weight.shape == together.scores.shape == (16, 16 * 9 + 8 + 16 * 9)
    sums = together.scores.detach().abs().sum(1)
    of = masks(densify(copy.deepcopy(model)))
    assert torch.equal(of["layer2.0.conv2"], sums >= sums.sort().values[8])
    assert torch.equal(of["layer2.0.conv2"], of["layer2.1.conv2"])
    assert torch.equal(of["layer2.0.conv2"], of["layer2.0.shortcut.0"])
    assert all(mask.sum() == len(mask) // 2 for mask in of.values())


@pytest.mark.parametrize("train", [train_scores, train_weights])
def test_gradients_and_steps_are_those_of_the_layers_own_weights(train):
    model, x = small()
    train(model)
    twin, y = densify(copy.deepcopy(model)).requires_grad_(True), torch.arange(4)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    together = pruned_layers(model)["a.pruned_weight.together"]
    dense = torch.cat([twin.get_submodule(n).weight.grad.flatten(1) for n in ("a", "b")], dim=1)
    if train is train_scores:
        expected = dense * together.weight.detach() * together.scores.detach().sign()
        torch.testing.assert_close(together.scores.grad, expected)
    else:
        torch.testing.assert_close(together.weight.grad, dense * together.mask)


def test_a_search_step_and_there_and_back():
    model, x = small()
    train_scores(model)
    optimizer = S2AP(model, torch.optim.SGD([layer.scores for layer in pruned_layers(model).values()], lr=0.5), gamma=0.3, defer_grads=True)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    other, _ = small()
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    names = set(Residual().state_dict())
    logits = model(x)
    assert torch.equal(densify(model)(x), logits)
    assert set(model.state_dict()) == names
    assert type(model.a) is type(model.c) is nn.Conv2d


@pytest.mark.parametrize("name", ["torchvision_bottleneck", "wide_resnet"])
def test_half_of_a_residual_stream_goes(name):
    model, x = tied(name)
    with torch.no_grad():
        model(images(32, MODELS[name][1], seed=9))
    dense = densify(copy.deepcopy(model.eval()))
    logits, before = dense(x), size_of(dense, x)
    assert densify(model, shrink=True, example=x) is model
    after = size_of(model, x)
    assert (model(x) - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert after.flops < 0.45 * before.flops


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"granularity": "weight", "example": torch.zeros(2, 3, 16, 16)}, "tied: it is for granularity 'channel', got 'weight'"),
        ({"granularity": "channel"}, "example: expected an input of the model"),
    ],
)
def test_what_tied_needs(how, message):
    model = seeded(MODELS["resnet18"][0])
    with pytest.raises(ValueError, match=message):
        sparsify(model, 0.5, tied=True, **how)
    assert not pruned_layers(model)


def test_shrink_needs_an_example():
    model, _ = small()
    with pytest.raises(ValueError, match="example: expected an input of the model"):
        densify(model, shrink=True)
    assert pruned_layers(model)
