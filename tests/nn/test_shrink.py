"""Channels that are gone are taken out: the network computes what it did, and is an ordinary smaller one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_models import MODELS, Looks, images, seeded
from helpers import assert_same_state
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext.models import build_model
from s2ap_ext.nn.shrink import shrink_channels, size_of


class Dense(nn.Module):
    """DenseNet: every layer reads all earlier results, side by side, through BatchNorm and ReLU; a transition averages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 6 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 6 * i, 6, 3, padding=1, bias=False) for i in range(3))
        self.transition, self.fc = nn.Conv2d(26, 12, 1, bias=False), nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.fc(F.avg_pool2d(self.transition(x), 2).flatten(1))


class Inverted(nn.Module):
    """MobileNet: 1x1 up, depthwise, squeeze-and-excitation, 1x1 down, a residual sum."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(
            nn.Conv2d(4 * c, 4 * c, 3, padding=1, groups=4 * c, bias=False), nn.BatchNorm2d(4 * c), nn.ReLU6(inplace=True)
        )
        self.squeeze, self.excite = nn.Conv2d(4 * c, c, 1), nn.Conv2d(c, 4 * c, 1)
        self.down = nn.Sequential(nn.Conv2d(4 * c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        y = self.depth(self.up(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.down(y)


def mobile():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Inverted(8), Inverted(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def grouped():
    """ResNeXt's convolutions, and one that makes several channels of each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, groups=24), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 8, 1, groups=2, bias=False)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 10)),
    )


class Mixer(nn.Module):
    """ConvNext and a transformer's neurons: depthwise 7x7, LayerNorm over channels, GELU, a scale for each channel; tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth, self.norm = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.up, self.middle, self.down = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 8)
        self.scale, self.inner = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(32))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1)).flatten(1, 2)
        y = self.down(F.gelu(self.middle(F.gelu(self.up(y)) * self.inner)))
        y = (y * self.scale).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.fc((x + y).mean((2, 3)))


KNOWN = ("resnet18", "vgg_bn", "wide_resnet", "odd", "in_place")
NETWORKS = {name: MODELS[name][:2] for name in KNOWN} | {
    "dense": (Dense, (3, 8, 8)),
    "mobile": (mobile, (3, 8, 8)),
    "grouped": (grouped, (3, 8, 8)),
    "mixer": (Mixer, (3, 8, 8)),
}
WHOLE = {"odd", "in_place"}  # here sums and layers that are used twice join each channel with one that stays


def masked(make, size, *, sparsity=0.5, seed=0, granularity="channel"):
    """The network with channel masks, densified, with random statistics: many removed channels hold a number other than 0."""
    model = seeded(make)
    last = next(name for name, module in reversed(list(model.named_modules())) if isinstance(module, nn.Conv2d | nn.Linear))
    sparsify(model, sparsity, granularity=granularity, exclude=[last])
    with torch.no_grad():
        torch.manual_seed(seed)
        model(images(32, size, seed=99))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.add_(torch.randn_like(module.running_mean) * 0.1)
                module.running_var.mul_(torch.rand_like(module.running_var) + 0.5).add_(0.01)
    return densify(model).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_results_stay_and_the_network_is_smaller(name):
    make, size = NETWORKS[name]
    model, x = masked(make, size), images(5, size)
    expected, before, keys = model(x), size_of(model, x), set(model.state_dict())
    assert shrink_channels(model, x[:2]) is model
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    after = size_of(model, x)
    if name in WHOLE:
        assert after == before
    else:
        assert after.parameters < before.parameters
        assert after.flops < before.flops
    assert all(key.endswith(".bias") for key in set(model.state_dict()) ^ keys)
    assert not any(type(module).__module__.startswith("s2ap_ext.nn") for module in model.modules())
    F.cross_entropy(model.train()(x).flatten(1), torch.arange(5)).backward()  # and it trains
    assert all(p.grad is not None for p in model.parameters())


def channels(model):
    return {name: len(module.weight) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def test_of_a_chain_half_of_the_channels_go():
    make, size = NETWORKS["vgg_bn"]
    model = masked(make, size)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(module.bias, -0.01)  # every constant is 0 after the ReLU
            nn.init.zeros_(module.running_mean)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.bias)
    shrink_channels(model, images(2, size))
    assert channels(model) == {f"features.{i}": n for i, n in zip((0, 4, 7, 11), (4, 8, 8, 12), strict=True)} | {
        "classifier.0": 16, "classifier.3": 16, "classifier.6": 10
    }  # fmt: skip


def pair(padding, bias=False):
    """Two convolutions, BatchNorm and ReLU between them; half of the channels between them are gone and hold numbers above 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=padding, bias=bias)).eval()
    with torch.no_grad():
        model[0].weight[:4] = model[0].bias[:4] = 0
        model[1].bias.copy_(torch.linspace(0.1, 0.8, 8))
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_constants_go_into_the_bias(bias):
    model, x = pair(0, bias), images(3, (3, 8, 8))
    expected = model(x)
    shrink_channels(model, x)
    torch.testing.assert_close(model(x), expected)
    assert channels(model) == {"0": 4, "3": 5}
    assert model[3].bias.shape == (5,)


def test_where_zeros_are_padded_one_constant_channel_stays_for_all():
    model, x = pair(1), images(3, (3, 8, 8))
    expected = model(x)
    shrink_channels(model, x)
    torch.testing.assert_close(model(x), expected)
    assert channels(model) == {"0": 5, "3": 5}
    assert model[3].bias is None


def test_channels_that_nobody_reads_go():
    model, x = pair(1), images(3, (3, 8, 8))
    with torch.no_grad():
        model[3].weight[:, 3:6] = 0
    expected = model(x)
    shrink_channels(model, x)
    torch.testing.assert_close(model(x), expected)
    assert channels(model) == {"0": 3, "3": 5}  # the constants of three channels, and two that are read


def test_a_layer_keeps_a_channel():
    model, x = masked(*NETWORKS["vgg_bn"], sparsity=0), images(2, (3, 32, 32))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
    expected = model(x)
    shrink_channels(model, x)
    torch.testing.assert_close(model(x), expected)
    assert set(channels(model).values()) >= {1}


class Words(nn.Module):
    """Takes two arguments, and gives several results by name."""

    def __init__(self):
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(10, 4), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, words, weights):
        hidden = F.gelu(self.a(self.embedding(words)))
        return {"logits": self.b(hidden).mean(1), "longest": words.sum(1) > 3, "weights": weights}


@pytest.mark.parametrize("named", [False, True])
def test_other_inputs_and_results(named):
    torch.manual_seed(0)
    model, words, weights = Words().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2)
    with torch.no_grad():
        model.a.weight[:3] = 0
    expected = model(words, weights)["logits"]
    example = {"words": words, "weights": weights} if named else (words, weights)
    before = size_of(model, example)
    shrink_channels(model, example)
    torch.testing.assert_close(model(words, weights)["logits"], expected)
    assert channels(model) == {"a": 5, "b": 3}
    assert before.parameters - size_of(model, example).parameters == 3 * (4 + 1 + 3)


class Single(nn.Module):
    """Images without a batch in the middle, and an operation that the analysis does not know."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = torch.stack([self.b(image) for image in x])
        return self.c(F.softmax(x, dim=1))


def test_what_is_not_known_stays():
    torch.manual_seed(0)
    model, x = Single().eval(), images(2, (3, 8, 8))
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[:4] = 0
    expected, before = model(x), channels(model)
    shrink_channels(model, x)
    assert torch.equal(model(x), expected)
    assert channels(model) == before


def test_groups_lose_equally_many():
    model, x = masked(grouped, (3, 8, 8)), images(2, (3, 8, 8))
    shrink_channels(model, x)
    conv = model[3]
    assert (conv.groups, conv.in_channels, conv.out_channels) == (4, 4 * conv.weight.shape[1], len(conv.weight))
    assert model[6].groups == model[6].in_channels == model[3].out_channels


class Shared(nn.Module):
    """A layer that is used twice, and one that has the weight of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.c.weight = self.b.weight
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.b(F.relu(self.b(F.relu(self.a(x)))))
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


def test_shared_layers_are_cut_together():
    torch.manual_seed(0)
    model, x = Shared().eval(), images(2, (3, 8, 8))
    with torch.no_grad():
        for layer in (model.a, model.b, model.c):
            layer.weight[2:5] = layer.bias[2:5] = 0
    expected = model(x)
    shrink_channels(model, x)
    torch.testing.assert_close(model(x), expected)
    assert channels(model) == {"a": 5, "b": 5, "c": 5, "fc": 4}
    assert model.b.weight is model.c.weight


def test_what_does_not_train_stays_so():
    model, x = masked(*NETWORKS["vgg_bn"]).requires_grad_(False), images(2, (3, 32, 32))
    model.features[0].train()
    shrink_channels(model, x)
    assert not any(p.requires_grad for p in model.parameters())
    assert [name for name, module in model.named_modules() if module.training] == ["features.0"]


class Counted(nn.Module):
    """Its code looks at the number of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        if x.shape[1] != 8:
            raise RuntimeError(f"{x.shape[1]} channels")
        return self.b(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sparsify(Shared(), 0.5, granularity="channel"), ValueError, r"model: layer a is pruned; densify\(model\) first"),
        (Looks, ValueError, "model: torch.export cannot record its operations"),
    ],
)
def test_models_that_cannot_be_shrunk(make, error, message):
    with pytest.raises(error, match=message):
        shrink_channels(make(), images(2, (3, 8, 8)))


def test_code_that_does_not_take_fewer_channels_leaves_the_model_as_it_was():
    model, x = Counted().eval(), images(2, (3, 8, 8))
    with torch.no_grad():
        model.a.weight[:4] = model.a.bias[:4] = 0
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="model: its code does not take fewer channels, so it stays as it was: 4 channels"):
        shrink_channels(model, x)
    assert_same_state(model, before)
    assert channels(model) == channels(before)
    assert repr(model) == repr(before)


def test_attention_in_one_operation_counts_too():
    """nn.MultiheadAttention takes a fused one where no parameter wants a gradient."""
    model, x = build_model("vit", num_classes=10, depth=1, seed=0).eval(), torch.rand(1, 3, 32, 32)
    assert size_of(model, x) == size_of(model.requires_grad_(False), x)
    assert torch.backends.mha.get_fastpath_enabled()
