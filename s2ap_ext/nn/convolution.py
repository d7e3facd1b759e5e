"""Convolutions of pruned layers on their kept weights only, while they train on the CPU.

The forward and the gradient with respect to the input take the kept weights alone (``csrc/cpu/sparse_conv.h``). The weight's gradient is
dense where scores train, since every pruned weight's score needs one, or dense in some output channels
(:func:`s2ap_ext.nn.sampled_gradients`); it is taken at the kept positions only where the weights train.

Results have the batch innermost in memory (:mod:`s2ap_ext.nn.layout`), which is what the kernels read and write by whole vectors.
They differ from the dense ones by rounding, so only recorded forwards take this path: without gradients a layer gives the bits that its
dense counterpart gives, and a network for inference is :func:`s2ap_ext.engine.compile_sparse`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import cost
from .execution import takes
from .kept_weights import Convolution, KeptWeights, convolution_of
from .layout import empty_batch_innermost


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: KeptWeights,
        convolution: Convolution,
        every_weight: bool,
        sampled_channels: Tensor | None,
    ) -> Tensor:
        kernel, stride, padding, dilation, _ = convolution
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
        ]
        out = empty_batch_innermost((len(x), len(weight), *size), x)
        torch.ops.s2ap.sparse_conv(x, kept.starts, kept.columns, kept.values, bias, None, *convolution, 0, False, out)
        ctx.save_for_backward(x, weight)
        ctx.kept, ctx.convolution, ctx.every_weight, ctx.sampled_channels = kept, convolution, every_weight, sampled_channels
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kept, convolution = ctx.kept, ctx.convolution
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = empty_batch_innermost(x.shape, x)
            torch.ops.s2ap.sparse_conv_input_grad(
                grad, kept.input_starts, kept.input_columns, kept.input_values, None, None, *convolution, 0, grad_x
            )
        if ctx.needs_input_grad[1] and ctx.every_weight and ctx.sampled_channels is None:
            grad_weight = _dense_weight_grad(grad, x, weight, convolution)
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            torch.ops.s2ap.sparse_conv_weight_grad(x, grad, kept.starts, kept.columns, *convolution, grad_weight)
            if ctx.every_weight:
                _add_pruned_weights(grad_weight, ctx.sampled_channels, grad, x, weight, kept, convolution)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _dense_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, convolution: Convolution) -> Tensor:
    _, stride, padding, dilation, groups = convolution
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        grad.contiguous(), x.contiguous(), weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    return gradients[1]


def _add_pruned_weights(
    grad_weight: Tensor, channels: Tensor, grad: Tensor, x: Tensor, weight: Tensor, kept: KeptWeights, convolution: Convolution
) -> None:
    """Adds to ``grad_weight``, which holds the gradients of the kept weights, those of the pruned ones in the output ``channels``."""
    exact = grad_weight.view(-1)[kept.flat]
    dense = _dense_weight_grad(grad[:, channels], x, weight[channels], convolution)
    grad_weight[channels] = dense * (len(weight) / len(channels))
    grad_weight.view(-1)[kept.flat] = exact


def prefers_sparse(layer: nn.Conv2d, x: Tensor, density: Callable[[], float]) -> bool:
    """Whether ``layer`` is to compute on its kept weights alone: in a forward that is recorded, where that and its backward are faster."""
    if not torch.is_grad_enabled() or not takes(x):
        return False
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32 or not layer.weight.is_contiguous():
        return False
    return cost.is_faster_sparse(cost.Shape.of(layer, x), density())


def sparse_conv2d(
    layer: nn.Conv2d, x: Tensor, weight: Tensor, kept: KeptWeights, *, every_weight: bool, sampled_channels: Tensor | None = None
) -> Tensor:
    """``layer``'s convolution with the kept weights.

    Args:
        x: float32 [N, C, H, W] on the CPU.
        weight: what gets the weight's gradient, of its shape: the masked weight, or the weight itself.
        every_weight: that gradient is wanted at all weights, and not only at the kept ones (0 elsewhere).
        sampled_channels: with ``every_weight``, the output channels, int64, in which pruned weights get it, scaled by the number of
            channels over theirs; None: in all of them.

    Returns:
        [N, C', H', W'], the batch innermost in memory.

    Equivalent to::

        layer._conv_forward(x, torch.where(mask, weight, 0), layer.bias)
    """
    out: Tensor = _SparseConv2d.apply(x, weight, layer.bias, kept, convolution_of(layer), every_weight, sampled_channels)
    return out
