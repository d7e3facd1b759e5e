"""The models: sizes, shapes, seeds."""

import pytest
import torch

from s2ap_ext.models import MODELS, build_model


def prunable(model):
    return [p for p in model.parameters() if p.dim() > 1]


def test_resnet18_is_the_one_of_the_literature():
    model = build_model("resnet18", num_classes=10)
    assert len(prunable(model)) == 21
    assert sum(p.numel() for p in prunable(model)) == 11_164_352
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # with BatchNorm and the last bias
    assert [tuple(p.shape) for p in prunable(model)[:2]] == [(64, 3, 3, 3), (64, 64, 3, 3)]
    names = set(model.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.shortcut.0.weight", "linear.bias"} <= names


def test_digits_cnn_size():
    model = build_model("digits_cnn", num_classes=10)
    assert [p.numel() for p in prunable(model)] == [288, 18_432, 36_864, 10_240]


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("digits_cnn", {}, (3, 1, 8, 8)),
        ("digits_cnn", {"width": 4, "in_channels": 2, "num_classes": 3}, (2, 2, 8, 8)),
        ("resnet18", {"width": 4}, (2, 3, 32, 32)),
        ("resnet18", {"width": 2, "in_channels": 1, "num_classes": 7}, (3, 1, 8, 8)),
    ],
)
def test_forward(name, options, shape):
    options = {"num_classes": 10, **options}
    model = build_model(name, **options)
    x = torch.rand(shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (shape[0], options["num_classes"])
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_resnet18_strides():
    model = build_model("resnet18", num_classes=10, width=2)
    sizes = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    model(torch.rand(2, 3, 32, 32))
    assert sizes == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_seed(name):
    def weights(seed):
        return torch.cat([p.detach().flatten() for p in build_model(name, num_classes=10, width=4, seed=seed).parameters()])

    state = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), state), "a seeded model moved torch's random state"
    torch.rand(5)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))
    torch.manual_seed(3)
    assert torch.equal(first, weights(None))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "model: expected one of digits_cnn, resnet18, got 'resnet19'"),
        ("resnet18", {"depth": 3}, "model resnet18: unknown setting depth; it takes num_classes, width, in_channels"),
        ("resnet18", {"width": 0}, "width: expected an integer >= 1, got 0"),
        ("digits_cnn", {"width": 2.5}, "width: expected an integer >= 1, got 2.5"),
        ("digits_cnn", {"in_channels": -1}, "in_channels: .* got -1"),
        ("digits_cnn", {"num_classes": 0}, "num_classes: .* got 0"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **{"num_classes": 10, **options})
