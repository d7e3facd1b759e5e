"""The specification of the sparse convolutions, in plain PyTorch: every op for one layer, with no tricks.

**Entries.** The kept weights of a layer, as a CSR matrix: ``starts`` (int32 [rows + 1]), ``columns`` (int32 [entries], ascending within a
row) and ``values`` (float32 [entries]). Forward, a row is an output channel and a column a flat index into its weight
``[inputs / groups, *kernel]``. For the gradient with respect to the input, a row is an input channel and a column a flat index into
``[outputs / groups, *kernel]``.

**Activations** are images, logical shape (N, C, H, W) with any strides, or *blocks*: contiguous
``[N / lanes, C, H + 2 * halo, W + 2 * halo, lanes]``, whose halo is zeros and stays so. The kernels read blocks where they are; ``lanes``
is the machine's, here it may be any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_pattern(weight: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The places of the kept weights: those in ``mask``, or without one those that are not 0.

    Returns:
        ``(starts, columns, input_starts, input_columns, order)``: the rows of output channels, those of input channels, and for each entry
        of the latter (int32) which entry of the former it is.
    """
    outputs, inputs = weight.shape[:2]
    kept = (weight != 0 if mask is None else mask).reshape(outputs, inputs, -1)
    number = torch.full(kept.shape, -1, dtype=torch.int32, device=weight.device)
    number[kept] = torch.arange(int(kept.sum()), dtype=torch.int32, device=weight.device)
    by_input = _exchanged(kept, groups)
    starts, columns = _rows(kept)
    input_starts, input_columns = _rows(by_input)
    return starts, columns, input_starts, input_columns, _exchanged(number, groups)[by_input]


def _rows(kept: Tensor) -> tuple[Tensor, Tensor]:
    flat = kept.flatten(1)
    starts = torch.zeros(len(flat) + 1, dtype=torch.int32, device=kept.device)
    starts[1:] = flat.sum(dim=1).cumsum(0)
    return starts, flat.nonzero()[:, 1].to(torch.int32)


def _exchanged(weight: Tensor, groups: int) -> Tensor:
    """[outputs, inputs / groups, taps] -> [inputs, outputs / groups, taps], and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def dense_weight(starts: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The entries as a weight of the given shape, [rows, ...], with zeros elsewhere."""
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1, device=starts.device), starts.diff().long())
    weight = values.new_zeros(shape[0], int(torch.tensor(shape[1:]).prod()))
    weight[rows, columns.long()] = values
    return weight.view(*shape)


def to_blocks(images: Tensor, lanes: int, halo: int) -> Tensor:
    """(N, C, H, W) as blocks; the last block is filled up with zeros."""
    n, c, h, w = images.shape
    blocks = images.new_zeros((n + lanes - 1) // lanes, c, h + 2 * halo, w + 2 * halo, lanes)
    inside = blocks[:, :, halo : halo + h, halo : halo + w]
    whole = n // lanes * lanes
    inside[: n // lanes] = images[:whole].unflatten(0, (-1, lanes)).permute(0, 2, 3, 4, 1)
    if whole < n:
        inside[-1, ..., : n - whole] = images[whole:].permute(1, 2, 3, 0)
    return blocks


def from_blocks(blocks: Tensor, halo: int, batch: int) -> Tensor:
    """The first ``batch`` images of blocks, (N, C, H, W); a view of their memory where it can be one."""
    h, w = blocks.shape[2] - 2 * halo, blocks.shape[3] - 2 * halo
    return blocks[:, :, halo : halo + h, halo : halo + w].permute(0, 4, 1, 2, 3).flatten(0, 1)[:batch]


def _images(activation: Tensor | None, halo: int) -> Tensor | None:
    if activation is None or activation.dim() == 4:
        return activation
    return from_blocks(activation, halo, activation.shape[0] * activation.shape[4])


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    which: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Those of ``x`` and of ``weight``. (``torch.nn.grad`` hands on tensors without memory of their own, of which torch 2.13 reads
    garbage where the others are channels_last.)"""
    tensors = grad.float().contiguous(), x.contiguous(), weight.contiguous()
    return torch.ops.aten.convolution_backward(*tensors, None, stride, padding, dilation, False, [0, 0], groups, [*which, False])[:2]


def _write(images: Tensor, halo: int, out: Tensor) -> None:
    out.copy_(images if out.dim() == 4 else to_blocks(images, out.shape[4], halo))


def sparse_conv(
    input: Tensor,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    halo: int,
    relu: bool,
    out: Tensor,
) -> None:
    """``out = conv2d(input, weight) + bias + residual``, then ReLU if asked for."""
    x = _images(input, halo)
    weight = dense_weight(starts, columns, values, (out.shape[1], x.shape[1] // groups, *kernel))
    y = F.conv2d(x.float(), weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + _images(residual, halo).float()
    _write(y.relu() if relu else y, halo, out)


def sparse_conv_input_grad(
    grad: Tensor,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    halo: int,
    out: Tensor,
) -> None:
    """``out``: the gradient with respect to the input, plus ``residual``; 0 where ``gate`` is given and is 0 or less."""
    g = _images(grad, halo)
    like = _images(out, halo)
    weight = _exchanged(dense_weight(starts, columns, values, (like.shape[1], g.shape[1] // groups, *kernel)).flatten(2), groups)
    x = torch.zeros(like.shape, device=g.device)
    result, _ = _gradients(g, x, weight.unflatten(2, tuple(kernel)), stride, padding, dilation, groups, (True, False))
    if residual is not None:
        result = result + _images(residual, halo).float()
    if gate is not None:
        result = torch.where(_images(gate, halo) <= 0, 0, result)
    _write(result, halo, out)


def sparse_conv_weight_grad(
    input: Tensor,
    grad: Tensor,
    starts: Tensor,
    columns: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: Tensor,
) -> None:
    """``out`` (float32 [entries]): the gradient with respect to the values, rows being output channels; images only."""
    weight = torch.zeros(grad.shape[1], input.shape[1] // groups, *kernel, device=input.device)
    _, weight = _gradients(grad, input.float(), weight, stride, padding, dilation, groups, (False, True))
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1, device=starts.device), starts.diff().long())
    out.copy_(weight.flatten(1)[rows, columns.long()])
