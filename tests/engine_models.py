"""Models that the sparse engine is tested with, in the styles of the libraries that cannot be imported beside every torch; and how."""

import torch
import torch.nn.functional as F
from torch import nn

from s2ap_ext import sparsify
from s2ap_ext.models import build_model


class BasicBlock(nn.Module):
    """torchvision: in-place ReLU, ``+=``, a downsample that may be None."""

    expansion = 1

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.downsample = shortcut(c_in, c, stride)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in, c, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(c_in, 4 * c, stride)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def shortcut(c_in, c, stride):
    return None if stride == 1 and c_in == c else nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c))


class ResNet(nn.Module):
    """A 7x7 stem with max pooling."""

    def __init__(self, block, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        wide = width * block.expansion
        self.layer1 = nn.Sequential(block(width, width), block(wide, width))
        self.layer2 = nn.Sequential(block(wide, 2 * width, 2), block(2 * wide, 2 * width))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(2 * wide, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class VGG(nn.Module):
    """Max pooling, convolutions with bias, a classifier with dropout, ``view`` with the size of the batch."""

    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for c in (8, "M", 16, 16, "M", 24, "M"):
            if c == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
                c_in = c
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(24 * 16, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(True), nn.Linear(32, 10)
        )

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class WideBlock(nn.Module):
    """Pre-activation; with a shortcut convolution the activation is shared with it."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.equal = c_in == c
        self.shortcut = None if self.equal else nn.Conv2d(c_in, c, 1, stride, bias=False)
        self.drop = 0.3

    def forward(self, x):
        if not self.equal:
            x = F.relu(self.bn1(x))
            out = F.relu(self.bn2(self.conv1(x)))
        else:
            out = F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))
        out = F.dropout(out, p=self.drop, training=self.training)
        return torch.add(x if self.equal else self.shortcut(x), self.conv2(out))


class WideResNet(nn.Module):
    """Normalises its input, as models for robustness benchmarks do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mu", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(WideBlock(8, 16, 1), WideBlock(16, 16, 1), WideBlock(16, 24, 2), WideBlock(24, 24, 1))
        self.bn1, self.fc = nn.BatchNorm2d(24), nn.Linear(24, 10)

    def forward(self, x):
        out = F.relu(self.bn1(self.blocks(self.conv1((x - self.mu) / self.sigma))))
        out = F.avg_pool2d(out, 8)
        return self.fc(out.view(-1, 24))


class Odd(nn.Module):
    """Groups, dilation, strides, paddings of each side, even kernels, poolings; sums of a value with itself; reused layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, (3, 5), (1, 2), (1, 2))
        self.b = nn.Conv2d(12, 12, 3, 1, 2, dilation=2, groups=3)
        self.c = nn.Conv2d(12, 12, 1)
        self.d = nn.Conv2d(12, 16, 2, 2)
        self.e = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.bn = nn.BatchNorm2d(12)

    def forward(self, x):
        x = self.a(x)
        x = self.bn(self.b(x)).relu_() + 0.25 * self.c(x)
        x = self.c(F.relu(x)) + x
        x = x + x
        x = self.e(F.max_pool2d(self.d(x), 3, 1, padding=1)) * 2 - 0.5
        x = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2, 2, 1), 1) + F.adaptive_max_pool2d(x, 1)
        return x.flatten(1)


class InPlace(nn.Module):
    """What is written in place is what later readers see."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.a(x)
        y = F.relu(x, True)  # x too is 0 or more from here on
        y = self.b(y) + x
        z = y
        y.mul_(0.5)
        return (self.b(z) + y).mean((2, 3))


class NormAct(nn.BatchNorm2d):
    """timm: BatchNorm and activation in one, in terms of functions."""

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps)
        return F.relu(x, inplace=True)


def norm_act():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), NormAct(8), nn.AvgPool2d(2), NormAct(8), nn.Conv2d(8, 8, 3), nn.Flatten()
    )


class Block(nn.Module):
    """A transformer's block, with torch's attention, and tokens scaled channel by channel."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(c), nn.MultiheadAttention(c, 4, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(c), nn.Sequential(nn.Linear(c, 3 * c), nn.GELU(), nn.Linear(3 * c, c))
        self.scale = nn.Parameter(torch.rand(c))

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.scale * self.mlp(self.norm2(x))


class FusedBlock(nn.Module):
    """timm's block: one layer for queries, keys and values."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(c, elementwise_affine=False), nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return F.silu(x)


class ViT(nn.Module):
    """Patches as tokens; the result is that of a token of its own, or of the mean."""

    def __init__(self, block=Block, token=True, c=16):
        super().__init__()
        self.patches = nn.Conv2d(3, c, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, c)) if token else None
        self.position = nn.Parameter(torch.randn(1, 20 + token, c))
        self.blocks = nn.Sequential(block(c), block(c))
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.position))
        return self.head(x.mean(dim=1) if self.token is None else x[:, 0])


class ConvNext(nn.Module):
    """A 7x7 depthwise convolution, then layers on channels that come last."""

    def __init__(self, c=8):
        super().__init__()
        self.stem, self.depth, self.norm = nn.Conv2d(3, c, 2, 2), nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
        self.up, self.act, self.down = nn.Linear(c, 4 * c), nn.GELU(approximate="tanh"), nn.Linear(4 * c, c)
        self.scale, self.head = nn.Parameter(torch.rand(c)), nn.Linear(c, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(self.act(self.up(self.norm(self.depth(x).permute(0, 2, 3, 1)))))
        x = x + (self.scale * y).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def seeded(make):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = 1
    return model


# name -> (model, size of an image, sparsity)
MODELS = {
    "digits_cnn": (lambda: build_model("digits_cnn", num_classes=10, width=8), (1, 8, 8), 0.9),
    "resnet18": (lambda: build_model("resnet18", num_classes=10, width=8), (3, 16, 16), 0.9),
    "torchvision_basic": (lambda: ResNet(BasicBlock), (3, 32, 32), 0.8),
    "torchvision_bottleneck": (lambda: ResNet(Bottleneck, 4), (3, 33, 35), 0.8),
    "vgg_bn": (VGG, (3, 32, 32), 0.8),
    "wide_resnet": (WideResNet, (3, 16, 16), 0.9),
    "odd": (Odd, (3, 11, 17), 0.5),
    "norm_act": (norm_act, (3, 12, 12), 0.5),
    "in_place": (InPlace, (3, 6, 7), 0.5),
    "vit": (ViT, (3, 8, 10), 0.8),
    "vit_mean": (lambda: ViT(token=False), (3, 8, 10), 0.8),
    "convnext": (ConvNext, (3, 16, 12), 0.8),
    "almost_empty": (lambda: build_model("digits_cnn", num_classes=10, width=4), (1, 8, 8), 0.999),
}


def pruned(name):
    """The model, with the statistics of some images: what it computes depends on its input then, far beyond rounding."""
    make, size, sparsity = MODELS[name]
    model = sparsify(seeded(make), sparsity)
    with torch.no_grad():
        model(images(32, size, seed=99))
    return model.eval(), size


def images(n, size, seed=0):
    return torch.rand(n, *size, generator=torch.Generator().manual_seed(seed))


class Strange(nn.Module):
    """Operations without a step: Softplus, a gate, a shuffle of channels, groups normalised, padding by reflection, something in place."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.Softplus()
        self.norm = nn.GroupNorm(2, 8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.c = nn.Conv2d(8, 8, 3, stride=3)
        self.scale = nn.Parameter(torch.rand(8, 1, 5))

    def forward(self, x):
        x = self.norm(self.act(self.a(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = self.b(x).chunk(2, dim=1)
        x = F.hardswish(torch.cat([right, left], dim=1), True)
        x = F.relu(self.c(x)) * self.scale
        return x.flatten(1)


class Looks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.inner = nn.Sequential(nn.ReLU(), Looks())

    def forward(self, x):
        return self.inner(self.conv(x)).flatten(1)


def all_sparse(layer):
    return "sparse"


def all_dense(layer):
    return "dense"


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def gradient(model, x, direction):
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad((y * direction).sum(), x)
    return y.detach(), dx
