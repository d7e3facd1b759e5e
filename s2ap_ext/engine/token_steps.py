"""Steps that transformers need beside those of convolutional networks.

Tokens are images of one row: [N, C, 1, tokens], or blocks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import inside, per_channel
from .run import Run, Target
from .steps import Recorded, Step
from .views import TOKENS, seen, unseen

aten = torch.ops.aten

# What computes each, and its gradient from that of its result and what it read. All give 0 for 0, so the halo of blocks stays 0.
ACTIVATIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.out, aten.gelu_backward.grad_input, {"approximate": "none"}),
    "gelu_tanh": (aten.gelu.out, aten.gelu_backward.grad_input, {"approximate": "tanh"}),
    "silu": (aten.silu.out, aten.silu_backward.grad_input, {}),
}


@dataclass(frozen=True)
class Activation(Step):
    """A smooth function of each number."""

    kind: str = "gelu"

    @property
    def saves(self) -> tuple[int, ...]:
        return self.sources

    def run(self, run: Run) -> None:
        compute, _, how = ACTIVATIONS[self.kind]
        compute(run.values[self.sources[0]], **how, out=run.new(self.out))

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        _, gradient, how = ACTIVATIONS[self.kind]
        out = run.take(targets[0].slot)
        gradient(grad, run.values[self.sources[0]], **how, grad_input=out)
        run.contribute(targets[0], out)


@dataclass(frozen=True)
class LayerNorm(Step):
    """Normalises over the channels of each position, then scales and shifts each channel."""

    weights: int = 0
    eps: float = 1e-5

    @property
    def saves(self) -> tuple[int, ...]:
        return self.sources

    def run(self, run: Run) -> None:
        w, x, out = run.weights[self.weights], inside(run.values[self.sources[0]], run.halo), inside(run.new(self.out), run.halo)
        torch.sub(x, x.mean(1, keepdim=True), out=out)
        out.mul_(self._scale(out))
        torch.addcmul(per_channel(w.shift, x), out, per_channel(w.scale, x), out=out)

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        result = run.take(targets[0].slot)
        x, out, grad = inside(run.values[self.sources[0]], run.halo), inside(result, run.halo), inside(grad, run.halo)
        centred = x - x.mean(1, keepdim=True)
        scale = self._scale(centred)
        normal = centred.mul_(scale)
        torch.mul(grad, per_channel(run.weights[self.weights].scale, grad), out=out)
        along = (out * normal).mean(1, keepdim=True)
        out.sub_(out.mean(1, keepdim=True)).sub_(normal.mul_(along)).mul_(scale)
        run.contribute(targets[0], result)

    def _scale(self, centred: Tensor) -> Tensor:
        return centred.square().mean(1, keepdim=True).add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class Attention(Recorded):
    """Self-attention of ``heads`` heads: the source has queries, keys and values of each token one after another; by torch, in images."""

    heads: int = 1

    def compute(self, run: Run, *values: Tensor) -> Tensor:
        q, k, v = torch.unflatten(seen(values[0], TOKENS), 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return unseen(tokens, TOKENS, run.slots[self.out].shape)


@dataclass(frozen=True)
class Prepend(Step):
    """Puts tokens that are the same for every image in front of those of the source."""

    weights: int = 0

    def run(self, run: Run) -> None:
        first = run.weights[self.weights].values
        x, out = inside(run.values[self.sources[0]], run.halo), inside(run.new(self.out), run.halo)
        out[:, :, :, : first.shape[2]] = _for_all(first, out)
        out[:, :, 0, first.shape[2] :] = x.flatten(2, 3)

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        result = run.take(targets[0].slot)
        out, count = inside(result, run.halo), run.weights[self.weights].values.shape[2]
        out.copy_(torch.unflatten(inside(grad, run.halo)[:, :, 0, count:], 2, out.shape[2:4]))
        run.contribute(targets[0], result)


@dataclass(frozen=True)
class Shift(Step):
    """Adds what is the same for every image: the positions of tokens."""

    weights: int = 0

    def run(self, run: Run) -> None:
        x, out = inside(run.values[self.sources[0]], run.halo), inside(run.new(self.out), run.halo)
        constant = run.weights[self.weights].values.flatten(1).view(-1, *x.shape[2:4])
        torch.add(x, _for_all(constant, x), out=out)

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        run.pass_on(targets[0], grad)


@dataclass(frozen=True)
class Select(Step):
    """One position of the source, counted row by row, as an image of one position."""

    position: int = 0

    def run(self, run: Run) -> None:
        out = inside(run.new(self.out), run.halo)
        out[:, :, 0, 0] = self._of(inside(run.values[self.sources[0]], run.halo))

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        result = run.take(targets[0].slot).zero_()
        self._of(inside(result, run.halo)).copy_(inside(grad, run.halo)[:, :, 0, 0])
        run.contribute(targets[0], result)

    def _of(self, x: Tensor) -> Tensor:
        row, column = divmod(self.position, x.shape[3])
        return x[:, :, row, column]


def _for_all(values: Tensor, activation: Tensor) -> Tensor:
    """Numbers [C, H, W], to be combined with images or blocks."""
    return values.unsqueeze(-1) if activation.dim() == 5 else values


TOKEN_STEPS = (Activation, LayerNorm, Attention, Prepend, Shift, Select)
