"""Convolutions of pruned layers on their kept weights only, while they train on the CPU.

The forward and the gradient with respect to the input take the kept weights alone (``csrc/cpu/sparse_conv.h``). The weight's gradient is
dense where scores train, since every pruned weight's score needs one, and at the kept positions only where the weights train.

Results have the batch innermost in memory (:mod:`s2ap_ext.nn.layout`), which is what the kernels read and write by whole vectors.
They differ from the dense ones by rounding, so only recorded forwards take this path: without gradients a layer gives the bits that its
dense counterpart gives, and a network for inference is :func:`s2ap_ext.engine.compile_sparse`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._library import backend
from ..sparse_reference import rows_of
from . import cost
from .layout import empty_batch_innermost

_ENABLED: ContextVar[bool] = ContextVar("sparse kernels in layers", default=True)


@contextmanager
def dense_kernels() -> Iterator[None]:
    """Within it pruned layers compute with torch's dense convolutions, whatever pays."""
    token = _ENABLED.set(False)
    try:
        yield
    finally:
        _ENABLED.reset(token)


Convolution = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Kernel size, stride, padding, dilation and groups."""


def convolution_of(layer: nn.Conv2d) -> Convolution:
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups


class Entries(NamedTuple):
    """The kept weights of a layer as the ops take them (:mod:`s2ap_ext.sparse_reference`)."""

    starts: Tensor
    columns: Tensor
    input_starts: Tensor
    input_columns: Tensor
    order: Tensor  # int64: the entries of the rows of inputs, among those of the rows of outputs
    flat: Tensor  # int64: where each entry is in the flat weight
    values: Tensor
    input_values: Tensor

    @classmethod
    def of(cls, masked: Tensor, mask: Tensor | None, convolution: Convolution) -> Entries:
        """``mask``: which weights are kept; None: those that are not 0."""
        weight = masked.contiguous()
        starts, columns, input_starts, input_columns, order = torch.ops.s2ap.sparse_pattern(
            weight, None if mask is None else mask.contiguous(), *convolution
        )
        flat, order = rows_of(starts, len(weight)) * weight[0].numel() + columns, order.long()
        values = weight.flatten()[flat]
        return cls(starts, columns, input_starts, input_columns, order, flat, values, values[order])

    def refreshed(self, masked: Tensor) -> Entries:
        """The same places with the values of now."""
        values = masked.contiguous().flatten()[self.flat]
        return self._replace(values=values, input_values=values[self.order])


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries, convolution: Convolution, every_weight: bool
    ) -> Tensor:
        kernel, stride, padding, dilation, _ = convolution
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
        ]
        out = empty_batch_innermost((len(x), len(weight), *size), x)
        torch.ops.s2ap.sparse_conv(x, entries.starts, entries.columns, entries.values, bias, None, *convolution, 0, False, out)
        ctx.save_for_backward(x, weight)
        ctx.entries, ctx.convolution, ctx.every_weight = entries, convolution, every_weight
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        entries, convolution = ctx.entries, ctx.convolution
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = empty_batch_innermost(x.shape, x)
            torch.ops.s2ap.sparse_conv_input_grad(
                grad, entries.input_starts, entries.input_columns, entries.input_values, None, None, *convolution, 0, grad_x
            )
        if ctx.needs_input_grad[1] and ctx.every_weight:
            _, stride, padding, dilation, groups = convolution
            _, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad.contiguous(), x.contiguous(), weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
            )
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            torch.ops.s2ap.sparse_conv_weight_grad(x, grad, entries.starts, entries.columns, *convolution, grad_weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None, None


def pays(layer: nn.Conv2d, x: Tensor, density: float) -> bool:
    """Whether a recorded forward of ``layer`` and its backward are faster on the kept weights alone."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _ENABLED.get() or backend().cpu != "C++":
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or layer.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if type(x) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if x.dim() != 4 or layer.padding_mode != "zeros" or isinstance(layer.padding, str) or not layer.weight.is_contiguous():
        return False
    return cost.prefers_sparse(cost.Shape.of(layer, x), density)


def sparse_conv2d(layer: nn.Conv2d, x: Tensor, weight: Tensor, entries: Entries, *, every_weight: bool) -> Tensor:
    """``layer``'s convolution with the kept weights ``entries``.

    Args:
        x: float32 [N, C, H, W] on the CPU.
        weight: what gets the weight's gradient, of its shape: the masked weight, or the weight itself.
        every_weight: that gradient is wanted at all weights, and not only at the kept ones (0 elsewhere).

    Returns:
        [N, C', H', W'], the batch innermost in memory.

    Equivalent to::

        layer._conv_forward(x, torch.where(mask, weight, 0), layer.bias)
    """
    return _SparseConv2d.apply(x, weight, layer.bias, entries, convolution_of(layer), every_weight)
