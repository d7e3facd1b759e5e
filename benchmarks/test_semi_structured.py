"""The linear layers of ViT-B, half of their weights pruned 2:4: torch's semi-structured form against dense and masked ones, in bfloat16.

pytest benchmarks/test_semi_structured.py --device cuda
"""

import pytest
import torch
from torch import nn

from s2ap_ext import densify, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")

WIDTH, BLOCKS, TOKENS = 768, 12, 197
SHAPES = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))  # q, k, v together; projection; the two of the MLP


class Block(nn.Module):
    """The linear layers of one block, one after the other, on inputs of their shapes."""

    def __init__(self, shrink):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(inputs // shrink, outputs // shrink) for inputs, outputs in SHAPES)

    def forward(self, x):
        qkv, projection, up, down = self.linear
        x = x + projection(qkv(x)[..., : x.shape[-1]])
        return x + down(torch.nn.functional.gelu(up(x)))


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_vit(side_by_side, quick, device, batch):
    shrink, blocks, batch = (12, 1, 1) if quick else (1, BLOCKS, batch)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(*(Block(shrink) for _ in range(blocks))).to(device, torch.bfloat16).requires_grad_(False)

    def pruned():
        return sparsify(network(), 0.5, granularity="2:4")

    x = torch.randn(batch, TOKENS, WIDTH // shrink, device=device, dtype=torch.bfloat16)
    forms = {"dense": network(), "2:4, zeros baked in": densify(pruned()), "2:4, masked": pruned()}
    if device.type == "cuda":  # elsewhere there is no such form
        forms = {"2:4, semi-structured": densify(pruned(), format="semi-structured")} | forms

    def without_gradients(model):
        def run():
            with torch.no_grad():
                return model(x)

        return run

    side_by_side(
        {name: without_gradients(model) for name, model in forms.items()},
        rounds=9,
        what=f"the linear layers of ViT-B, batch {batch}, bfloat16",
    )
