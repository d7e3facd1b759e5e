"""Small transformers in the forms that they are written in, with weights large enough that every unit matters."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class GatedMlp(nn.Module):
    """The product of two layers' outputs, which may be packed into one layer."""

    def __init__(self, width, hidden, packed=False):
        super().__init__()
        self.packed = packed
        if packed:
            self.w12 = nn.Linear(width, 2 * hidden)
        else:
            self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, dim=-1) if self.packed else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class PackedAttention(nn.Module):
    """q, k and v from one layer: one after another (as timm writes it), or head by head."""

    def __init__(self, width, heads, by_head=False):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.by_head = heads, width // heads, width, by_head
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, tokens, _ = x.shape
        if self.by_head:
            q, k, v = self.qkv(x).view(n, tokens, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = self.qkv(x).view(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.proj(heads.transpose(1, 2).reshape(n, tokens, self.attn_dim))


class GroupedAttention(nn.Module):
    """Two query heads for each k and v head."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, heads // 2, width // heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(heads.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim))


class TorchAttention(nn.Module):
    def __init__(self, width, heads, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Unknown(nn.Module):
    """Nothing here is called what anybody else calls it."""

    def __init__(self, width, heads):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))
        self.h = heads

    def forward(self, x, *, scale):
        q, k, v = (layer(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for layer in (self.a, self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * scale


class UnknownAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.inner = Unknown(width, heads)

    def forward(self, x):
        return self.inner(x, scale=2.0)


ATTENTIONS = {
    "torch": TorchAttention,
    "torch, other widths of k and v": functools.partial(TorchAttention, kdim=16, vdim=16),
    "torch, no bias": functools.partial(TorchAttention, bias=False),
    "packed": PackedAttention,
    "packed by head": functools.partial(PackedAttention, by_head=True),
    "grouped": GroupedAttention,
}
MLPS = {"gated": GatedMlp, "gated and packed": functools.partial(GatedMlp, packed=True)}


class Block(nn.Module):
    def __init__(self, width, attention, mlp):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), attention, mlp

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Pre-norm, of images with sides of 8: patches of 4, two blocks, the mean of the tokens."""

    def __init__(self, *, width=16, heads=4, attention=TorchAttention, mlp=Mlp, in_channels=1, num_classes=10):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, width))
        self.blocks = nn.Sequential(*(Block(width, attention(width, heads), mlp(width, 2 * width)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def tiny_vit(seed=0, **options):
    torch.manual_seed(seed)
    net = TinyViT(**options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def build(*, num_classes, in_channels):
    """The model of a recipe."""
    return TinyViT(num_classes=num_classes, in_channels=in_channels)


def digits(n=8, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
