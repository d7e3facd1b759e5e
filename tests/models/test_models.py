"""The models: sizes, shapes, keys, seeds, and models of a user's own module."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state

from s2ap_ext import compile_sparse, densify, parts, sparsify
from s2ap_ext.data import Split
from s2ap_ext.models import VGG16, DigitsCNN, Normalize, ResNet18, ResNet50, ViT, WideResNet, build_model
from s2ap_ext.pipeline import checkpoint, load_model, load_recipe, open_data
from s2ap_ext.pipeline.model_file import save_model
from s2ap_ext.pipeline.recipe import to_table


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


def test_resnet50_is_the_one_of_imagenet():
    with torch.device("meta"):
        model = build_model("resnet50", num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert len(prunable(model)) == 54
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    expected = {"conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "fc.weight": (1000, 2048), "fc.bias": (1000,)}
    expected |= {"layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer1.0.downsample.1.num_batches_tracked": ()}
    expected |= {"layer2.0.conv1.weight": (128, 256, 1, 1), "layer2.0.conv2.weight": (128, 128, 3, 3), "layer4.2.bn3.bias": (2048,)}
    assert shapes.items() >= expected.items()
    assert len(shapes) == 320  # as in torchvision: nothing of the normalisation is stored
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 4, 6, 3]
    assert {key for key in shapes if "downsample.0" in key} == {f"layer{i}.0.downsample.0.weight" for i in (1, 2, 3, 4)}


def test_resnet50_by_hand():
    """Its first half against the order of layers, written out; the 3x3 convolution of a stage's first block halves the image."""
    torch.manual_seed(0)
    model = ResNet50(num_classes=7, width=2).eval()
    x = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normed = (x - mean[:, None, None]) / std[:, None, None]
    stem = F.max_pool2d(model.bn1(F.conv2d(normed, model.conv1.weight, stride=2, padding=3)).relu(), 3, 2, 1)
    block = model.layer2[0]
    inside = model.layer1(stem)
    out = block.bn1(F.conv2d(inside, block.conv1.weight)).relu()
    out = block.bn2(F.conv2d(out, block.conv2.weight, stride=2, padding=1)).relu()
    out = block.bn3(F.conv2d(out, block.conv3.weight))
    shortcut = block.downsample[1](F.conv2d(inside, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(inside), (out + shortcut).relu())
    assert [tuple(t.shape[1:]) for t in (stem, inside, out)] == [(2, 16, 16), (8, 16, 16), (16, 8, 8)]
    rest = model.layer4(model.layer3(model.layer2(inside)))
    torch.testing.assert_close(model(x), model.fc(rest.mean(dim=(2, 3))))


@pytest.mark.parametrize("channels", [3, 1])
def test_normalization(channels):
    mean, std = [0.2, 0.3, 0.7], [0.1, 0.2, 0.6]
    x = torch.rand(2, channels, 4, 4)
    means, stds = (mean, std) if channels == 3 else ([0.4], [0.3])
    expected = torch.stack([(x[:, c] - means[c]) / stds[c] for c in range(channels)], dim=1)
    torch.testing.assert_close(Normalize(mean, std, in_channels=channels)(x), expected)
    assert list(Normalize(mean, std).state_dict()) == []
    assert list(Normalize(mean, std, persistent=True).state_dict()) == ["mean", "std"]


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_vit_by_hand(pooling):
    """Its one block in plain PyTorch, with softmax(q k' / sqrt(d)) v for each head."""
    torch.manual_seed(0)
    model = ViT(num_classes=5, in_channels=2, image_size=(4, 6), patch=2, width=8, depth=1, heads=2, pooling=pooling)
    x = torch.rand(3, 2, 4, 6)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 6, 8)  # [N, patch, channel and pixel]
    tokens = (2 * patches - 1) @ model.embedding.weight.view(8, 8).T + model.embedding.bias
    if pooling == "token":
        tokens = torch.cat([model.token.expand(3, 1, 8), tokens], dim=1)
    tokens = tokens + model.position
    block = model.blocks[0]
    q, k, v = (block.norm1(tokens) @ block.attention.in_proj_weight.T + block.attention.in_proj_bias).chunk(3, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        heads.append((q[..., h] @ k[..., h].transpose(1, 2) / 2).softmax(dim=-1) @ v[..., h])
    tokens = tokens + block.attention.out_proj(torch.cat(heads, dim=-1))
    up, _, down = block.mlp
    tokens = tokens + down(F.gelu(up(block.norm2(tokens))))
    seen = model.norm(tokens)[:, 0] if pooling == "token" else model.norm(tokens).mean(dim=1)
    torch.testing.assert_close(model(x), model.head(seen))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.head(seen), rtol=1e-4, atol=1e-5)


def test_vit_has_the_size_of_vit_ti():
    with torch.device("meta"):
        model = build_model("vit", num_classes=10)
    block = 4 * 192 * 192 + 2 * 4 * 192 * 192 + (3 + 1 + 4 + 1 + 4) * 192  # weights; biases and two LayerNorms
    assert sum(p.numel() for p in model.parameters()) == 12 * block + 48 * 192 + 192 + 192 + 65 * 192 + 2 * 192 + 1930 == 5_362_762


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patch: expected a divisor of the images' sides, 32 and 32, got 3"),
        ({"image_size": (32, 30)}, "patch: expected a divisor of the images' sides, 32 and 30, got 4"),
        ({"image_size": (0, 8)}, "image_height: expected an integer >= 1, got 0"),
        ({"heads": 5}, "heads: expected a divisor of the width, 192, got 5"),
        ({"depth": 0}, "depth: expected an integer >= 1, got 0"),
        ({"pooling": "max"}, "pooling: expected one of token, mean, got 'max'"),
    ],
)
def test_what_a_vit_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ViT(**options)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_a_vit_prunes_and_comes_back_dense(pooling):
    model = ViT(image_size=(8, 8), width=16, depth=2, heads=2, pooling=pooling).eval()
    x = torch.rand(2, 3, 8, 8)
    sparsify(model, 0.5)
    expected = model(x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(densify(model)(x), expected, rtol=0, atol=0)


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
        ("resnet50", {"width": 4}, (2, 3, 64, 64)),
        ("resnet50", {"width": 2, "in_channels": 1, "num_classes": 7}, (2, 1, 32, 32)),
        ("vit", {"width": 12, "depth": 2}, (2, 3, 32, 32)),
        ("vit", {"in_channels": 1, "image_size": (8, 4), "patch": 2, "width": 8, "depth": 1, "heads": 2, "pooling": "mean"}, (3, 1, 8, 4)),
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
        ("resnet19", {}, r"expected one of digits_cnn, .*package.module:attribute.*, got 'resnet19'; did you mean resnet18 or resnet50\?"),
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

def sized(*, num_classes, in_channels, image_size=(2, 2)):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_classes))

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


def test_own_function_that_asks_for_the_size_of_images(own):
    model = build_model(f"{own}:sized", num_classes=5, in_channels=2, image_size=(3, 4))
    assert model(torch.rand(3, 2, 3, 4)).shape == (3, 5)
    assert build_model(f"{own}:sized", num_classes=5, in_channels=2)[1].in_features == 8
    assert build_model(f"{own}:build", num_classes=5, in_channels=2, image_size=(3, 4))[1].in_features == 32  # it does not ask


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


# ---------------------------------------------------------------------------------------------------------------- in files


def test_a_file_holds_the_size_of_images_where_the_model_asks_for_it(tmp_path):
    recipe = load_recipe("digits", ["model.name=vit", "model.patch=2", "model.width=8", "model.depth=1", "model.heads=2"])
    data = open_data(recipe)
    model = build_model("vit", num_classes=10, in_channels=1, image_size=(8, 8), patch=2, width=8, depth=1, heads=2)
    save_model(tmp_path / "vit.safetensors", model, "dense", recipe, "0", data)
    again, _, _ = load_model(tmp_path / "vit.safetensors", data=data)
    assert_same_state(again, model)
    larger = replace(data, train=Split(torch.rand(2, 1, 16, 16), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"the model is for 8x8 pixels, 1 channels and 10 classes, digits has 16x16 pixels, 1 channels"):
        load_model(tmp_path / "vit.safetensors", data=larger)
    recipe = load_recipe("digits", ["model.width=2"])
    cnn = build_model("digits_cnn", num_classes=10, width=2)
    save_model(tmp_path / "cnn.safetensors", cnn, "dense", recipe, "0", data)
    assert_same_state(load_model(tmp_path / "cnn.safetensors", data=larger)[0], cnn)


@pytest.mark.parametrize("size", [None, 8, [8], [8, 8, 8], [8, "8"], [8, 0], [8, 2**40], [8.0, 8], [True, 8], {}])
def test_a_file_with_a_wrong_size_of_images(size, tmp_path):
    recipe = load_recipe("digits", ["model.name=vit", "model.patch=2", "model.width=8", "model.depth=1", "model.heads=2"])
    about = {"model": "dense", "recipe": to_table(recipe), "shape": {"num_classes": 10, "in_channels": 1, "image_size": size}, "run": "0"}
    checkpoint.save(tmp_path / "vit.safetensors", {"head.bias": torch.zeros(10)}, about)
    with pytest.raises(ValueError, match="shape: expected image_size and in_channels and num_classes from 1 to 65536, got "):
        load_model(tmp_path / "vit.safetensors")
