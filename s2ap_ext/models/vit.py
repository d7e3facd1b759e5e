"""A small vision transformer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..parts import register
from ..settings import key
from .base import Model, check_positive
from .normalization import Normalize

EXPANSION = 4  # the hidden layer of a block's MLP is so many times as wide as the block
POOLINGS = ("token", "mean")
POSITIONS = 0.5  # standard deviation of the first positions: as large as the patches' part of a token, since SGD moves them slowly


class _Block(nn.Module):
    """Self-attention and an MLP, each behind a LayerNorm and with a shortcut around both: [N, T, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """A vision transformer with learned positions and LayerNorm in front of each part of a block. No dropout.

    [N, in_channels, H, W] in [0, 1] -> logits [N, num_classes], for the H and W of ``image_size`` only. Images are normalised by 0.5 and
    0.5, cut into patches, and each patch becomes a token.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: H and W of the images, multiples of ``patch``.
        patch: side of a patch in pixels.
        width: size of a token, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads of a block.
        pooling: what the last layer sees: ``"token"``, a learned token that goes through the blocks with the patches, or ``"mean"``, the
            average over the patches.

    Raises:
        ValueError: a size below 1; a patch that does not divide the image; heads that do not divide the width; an unknown pooling.

    Source: Dosovitskiy et al., arXiv 2010.11929. The defaults are the sizes of ViT-Ti (Touvron et al., arXiv 2012.12877) with patches
    for images of 32x32: 5,362,762 parameters.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        patch: int = 4,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        pooling: str = "token",
    ) -> None:
        height, breadth = image_size
        check_positive(num_classes=num_classes, in_channels=in_channels, image_height=height, image_width=breadth)
        check_positive(patch=patch, width=width, depth=depth, heads=heads)
        if height % patch or breadth % patch:
            raise ValueError(f"patch: expected a divisor of the images' sides, {height} and {breadth}, got {patch}")
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width, {width}, got {heads}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        super().__init__()
        tokens = (height // patch) * (breadth // patch)
        self.normalize = Normalize([0.5], [0.5], in_channels=in_channels)
        self.embedding = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if pooling == "token" else None
        self.position = nn.Parameter(torch.empty(1, tokens + (pooling == "token"), width))
        nn.init.normal_(self.position, std=POSITIONS)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.embedding(self.normalize(x)).flatten(2).transpose(1, 2)  # [N, patches, width]
        if self.token is not None:
            out = torch.cat([self.token.expand(out.shape[0], -1, -1), out], dim=1)
        out = self.norm(self.blocks(out + self.position))
        logits: Tensor = self.head(out.mean(dim=1) if self.token is None else out[:, 0])
        return logits


@register("vit")
class ViTModel(Model):
    """:class:`ViT`."""

    @dataclass(frozen=True)
    class Settings:
        patch: int = key(4, "side of a patch in pixels; it divides the images' sides", low=1)
        width: int = key(192, "size of a token, a multiple of heads", low=1)
        depth: int = key(12, "blocks", low=1, high=1000)
        heads: int = key(3, "attention heads of a block", low=1)
        pooling: str = key("token", "what the last layer sees: a learned token, or the mean over the patches", choices=POOLINGS)

    def build(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int] = (32, 32)) -> nn.Module:
        return ViT(num_classes=num_classes, in_channels=in_channels, image_size=image_size, **asdict(self.settings))
