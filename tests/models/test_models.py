"""The models: sizes, shapes, keys, seeds, and models of a user's own module."""

import sys

import pytest
import torch

from s2ap_ext import compile_sparse, densify, parts, sparsify
from s2ap_ext.models import VGG16, DigitsCNN, ResNet18, WideResNet, build_model


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


def test_vgg16_is_the_one_of_the_adversarial_pruning_benchmark():
    """The layout was read off the benchmark's code: a checkpoint of either loads into the other with strict keys."""
    convolutions = {0: (3, 64), 3: (64, 64), 7: (64, 128), 10: (128, 128), 14: (128, 256), 17: (256, 256), 20: (256, 256)}
    convolutions |= {24: (256, 512)} | dict.fromkeys((27, 30, 34, 37, 40), (512, 512))
    expected = {}
    for n, (c_in, c_out) in convolutions.items():
        expected[f"features.{n}.weight"] = (c_out, c_in, 3, 3)
        expected |= {f"features.{n + 1}.{key}": (c_out,) for key in ("weight", "bias", "running_mean", "running_var")}
        expected[f"features.{n + 1}.num_batches_tracked"] = ()
    for n, (c_in, c_out) in {0: (2048, 256), 2: (256, 256), 4: (256, 10)}.items():
        expected |= {f"classifier.{n}.weight": (c_out, c_in), f"classifier.{n}.bias": (c_out,)}
    model = build_model("vgg16", num_classes=10)
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == expected
    assert len(prunable(model)) == 16
    assert sum(p.numel() for p in prunable(model)) == 15_302_848


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [("wrn28_4", 10, 5_849_050), ("wrn28_4", 100, 5_872_180), ("wrn34_10", 10, 46_160_474)],  # 5.85M, 5.87M, 46.16M in the literature
)
def test_wide_resnets_are_those_of_the_literature(name, classes, parameters):
    with torch.device("meta"):
        model = build_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_wide_resnet_has_the_keys_of_the_robust_pruning_codes():
    block = {"bn1.weight", "bn1.running_mean", "conv1.weight", "bn2.bias", "conv2.weight"}
    keys = set(WideResNet(depth=16, widen=2).state_dict())
    assert {f"block{i}.layer.{j}.{key}" for i in (1, 2, 3) for j in (0, 1) for key in block} <= keys
    assert {key for key in keys if "Shortcut" in key} == {f"block{i}.layer.0.convShortcut.weight" for i in (1, 2, 3)}
    assert {key for key in keys if "block" not in key and "bn" not in key} == {"conv1.weight", "fc.weight", "fc.bias"}
    assert "bn1.running_var" in keys


def test_wide_resnet_by_hand():
    """The first block against the paper's order of layers, written out; the stages halve the image where they widen."""
    torch.manual_seed(0)
    model = WideResNet(depth=10, widen=2).eval()
    x = model.conv1(torch.rand(2, 3, 8, 8))
    block = model.block2.layer[0]
    wide = model.block1(x)
    active = block.bn1(wide).relu()
    expected = block.conv2(block.bn2(block.conv1(active)).relu()) + block.convShortcut(active)
    torch.testing.assert_close(block(wide), expected)
    assert [tuple(t.shape[1:]) for t in (wide, expected, model.block3(expected))] == [(32, 8, 8), (64, 4, 4), (128, 2, 2)]
    same = WideResNet(depth=16, widen=1).eval().block1.layer[1]
    torch.testing.assert_close(same(x), x + same.conv2(same.bn2(same.conv1(same.bn1(x).relu())).relu()))


@pytest.mark.parametrize(
    ("model", "size"), [(lambda: VGG16(num_classes=10), 32), (lambda: WideResNet(depth=10, widen=2), 16)], ids=["vgg16", "wide_resnet"]
)
def test_new_networks_prune_and_compile(model, size):
    torch.manual_seed(0)
    model = model().eval()
    x = torch.rand(2, 3, size, size)
    sparsify(model, 0.9)
    with torch.no_grad():
        expected = model(x)
        assert 0 < expected.abs().max() < 100
        network = compile_sparse(model, x)
        assert network.dense_parts == []
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(densify(model)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("digits_cnn", {}, (3, 1, 8, 8)),
        ("digits_cnn", {"width": 4, "in_channels": 2, "num_classes": 3}, (2, 2, 8, 8)),
        ("resnet18", {"width": 4}, (2, 3, 32, 32)),
        ("resnet18", {"width": 2, "in_channels": 1, "num_classes": 7}, (3, 1, 8, 8)),
        ("vgg16", {}, (2, 3, 32, 32)),
        ("vgg16", {"in_channels": 1, "num_classes": 7}, (2, 1, 16, 16)),
        ("wrn28_4", {}, (1, 3, 32, 32)),
        ("wrn28_4", {"in_channels": 1, "num_classes": 7}, (2, 1, 8, 8)),
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


@pytest.mark.parametrize(
    ("name", "options", "sums"),
    [
        ("digits_cnn", {}, {0: 71.46775537504246, 3: 65.6540690045521}),
        ("digits_cnn", {"width": 4, "in_channels": 2, "num_classes": 3}, {0: 7.633037398733617, 3: 8.616864344239987}),
        ("resnet18", {}, {0: 1907.28317567784}),
        ("resnet18", {"width": 4, "in_channels": 1, "num_classes": 7}, {0: 119.52647043233961, 3: 115.13337052805579}),
    ],
)
def test_initial_weights_are_pinned(name, options, sums):
    """Runs with the same seed are compared across versions of this package: draws keep their order. Weighted, so that it counts."""
    for seed, expected in sums.items():
        model = build_model(name, **{"num_classes": 10, **options}, seed=seed)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        weighted = weights * torch.arange(1, len(weights) + 1, dtype=torch.float64) / len(weights)
        assert weighted.sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["digits_cnn", "resnet18"])
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
        ("resnet19", {}, r"model: expected one of digits_cnn, package.module:attribute, .*, got 'resnet19'; did you mean resnet18\?"),
        ("resnet18", {"blocks": 3}, "model resnet18: unknown key blocks; it takes width"),
        ("vgg16", {"width": 8}, "model vgg16: unknown key width; it takes none"),
        ("resnet18", {"width": 0}, "model resnet18: width: expected an integer >= 1, got 0"),
        ("digits_cnn", {"width": 2.5}, "model digits_cnn: width: expected an integer, got 2.5"),
        ("vgg16", {"num_classes": 0}, "num_classes: .* got 0"),
        ("wrn28_4", {"in_channels": 0}, "in_channels: .* got 0"),
        ("digits_cnn", {"in_channels": -1}, "in_channels: .* got -1"),
        ("digits_cnn", {"num_classes": 0}, "num_classes: .* got 0"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **{"num_classes": 10, **options})


@pytest.mark.parametrize("network", [DigitsCNN, ResNet18])
def test_a_network_by_itself_takes_no_width_below_1(network):
    with pytest.raises(ValueError, match="width: expected an integer >= 1, got 0"):
        network(width=0)


@pytest.mark.parametrize("depth", [4, 9, 29])
def test_a_wide_resnet_has_whole_blocks(depth):
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 4 with n >= 1, such as 28 or 34, got {depth}"):
        WideResNet(depth=depth, widen=1)


# ---------------------------------------------------------------------------------------------------------------- a user's own

OWN = """
import torch
from dataclasses import dataclass
from torch import nn
from s2ap_ext.models import Model
from s2ap_ext.settings import key

torch.rand(3)  # a module may draw numbers when it is imported

def build(*, num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, num_classes))

class Tiny(Model):
    @dataclass(frozen=True)
    class Settings:
        hidden: int = key(4, "units", low=1)

    def build(self, *, num_classes, in_channels):
        hidden = self.settings.hidden
        return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

ready = build(num_classes=3, in_channels=3)

def nothing(*, num_classes, in_channels):
    return None

def depth(depth):
    return nn.Linear(depth, 1)

number = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of the user's with a module of models in it; gives the module's name."""
    folder = tmp_path / "own_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "nets.py").write_text(OWN)
    (folder / "needy.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_package.nets"
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[name]


def test_own_function(own):
    first = build_model(f"{own}:build", num_classes=5, in_channels=2, seed=1)
    assert first(torch.rand(3, 2, 4, 4)).shape == (3, 5)
    again = build_model(f"{own}:build", num_classes=5, in_channels=2, seed=1)  # the module is imported by now
    assert torch.equal(first[1].weight, again[1].weight)
    assert build_model(f"{own}:build", num_classes=5)[1].in_features == 48


def test_own_part(own):
    model = build_model(f"{own}:Tiny", num_classes=5, in_channels=1, hidden=3)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() > 1] == [(3, 16), (5, 3)]
    part = parts.find("model", f"{own}:Tiny")
    assert part.name == f"{own}:Tiny"
    assert part().settings.hidden == 4
    with pytest.raises(ValueError, match=r"own_package.nets:Tiny: hidden: expected an integer >= 1, got 0"):
        build_model(f"{own}:Tiny", num_classes=5, hidden=0)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_package.nets:build", ValueError, r"model no_such_package.nets:build: no module no_such_package on Python's path"),
        ("own_package.nots:build", ValueError, r"model own_package.nots:build: no module own_package.nots on Python's path"),
        (".nets:build", ValueError, r"model: expected one of .*package.module:attribute.*, got '.nets:build'"),
        ("own_package.nets:biuld", ValueError, r"model .*: own_package.nets has no biuld; did you mean build\?"),
        ("own_package.nets:number", ValueError, r"model .*:number: expected a class derived from .* or a function .*, got int"),
        ("own_package.nets:ready", ValueError, r"model .*:ready: expected a class derived from .* or a function .*, got Sequential"),
        ("own_package.nets:nothing", ValueError, r"model .*:nothing: expected an nn.Module from it, got NoneType"),
        ("own_package.nets:depth", ValueError, r"model .*:depth: expected a function that takes \(num_classes=, in_channels=\) \(.*depth"),
        ("own_package.needy:build", ModuleNotFoundError, r"a_package_that_nobody_has"),
    ],
)
@pytest.mark.usefixtures("own")
def test_own_errors(name, error, message):
    with pytest.raises(error, match=message):
        build_model(name, num_classes=5)


@pytest.mark.usefixtures("own")
def test_own_function_takes_no_settings():
    with pytest.raises(ValueError, match=r"model own_package.nets:build: unknown key width; it takes none"):
        build_model("own_package.nets:build", num_classes=5, width=3)
