"""The specification of the sparse convolutions, in plain PyTorch: every op for one layer, with no tricks.

**Entries.** The kept weights of a layer, as CSR matrices, the *parts*, one after the other: ``starts`` (int32 [parts * rows + 1]),
``columns`` (int32 [entries], ascending within a row of a part) and ``values`` (float32 [entries]). Forward, a row is an output channel
and a column a flat index into its weight ``[inputs / groups, *kernel]``; parts are *runs* of input channels. For the gradient with
respect to the input, a row is an input channel and a column a flat index into ``[outputs / groups, *kernel]``; there is a *pass* for
each of the ``stride[0] * stride[1]`` residues that the input's positions have, and its parts are runs of output channels. (The kernels
go through an image part by part, so that a part's inputs are in the cache.)

**Activations** are images, logical shape (N, C, H, W) with any strides, or *blocks*: contiguous
``[N / lanes, C, H + 2 * halo, W + 2 * halo, lanes]``, whose halo is zeros and stays so. The kernels read blocks where they are; ``lanes``
is the machine's, here it may be any.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_pattern(
    weight: Tensor,
    mask: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The places of the kept weights: those in ``mask``, or without one those that are not 0.

    Returns:
        ``(starts, columns, input_starts, input_columns, order)``: the rows of output channels, those of input channels, and for each entry
        of the latter (int32) which entry of the former it is.
    """
    outputs, inputs = weight.shape[:2]
    kept = (weight != 0 if mask is None else mask).reshape(outputs, inputs, kernel[0] * kernel[1])
    passes, entries = stride[0] * stride[1], int(kept.sum())
    starts, columns, where = _rows(kept, _parts(channels_of_run(entries, outputs, inputs, 1), inputs, torch.zeros(kept.shape[2]), 1))
    number = torch.full(kept.shape, -1, dtype=torch.int32, device=weight.device)
    number[where] = torch.arange(entries, dtype=torch.int32, device=weight.device)
    by_input = _exchanged(kept, groups)
    each = channels_of_run(entries, len(by_input), outputs // groups, passes)
    parts = _parts(each, outputs // groups, pass_of_tap(kernel, stride, padding, dilation), passes)
    input_starts, input_columns, where = _rows(by_input, parts)
    return starts, columns, input_starts, input_columns, _exchanged(number, groups)[where]


def channels_of_run(entries: int, rows: int, channels: int, passes: int) -> int:
    """So many of the channels that are read make a run that a row has 20 entries in it on average; 8 at least."""
    each = channels if entries == 0 else min(max(-(-20 * rows * channels * passes // entries), min(8, channels)), channels)
    runs = max(1, -(-channels // max(each, 1)))
    return -(-channels // runs)


def pass_of_tap(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """[taps]: the residue of the input's positions whose gradient a tap reaches."""
    y, x = ((torch.arange(k) * d - p) % s for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True))
    return (y[:, None] * stride[1] + x).flatten()


def _parts(each: int, channels: int, pass_of_tap: Tensor, passes: int) -> list[Tensor]:
    """What belongs to each part, bool [channels, taps]."""
    run = torch.arange(channels) // max(each, 1)
    return [(run[:, None] == r) & (pass_of_tap == p) for p in range(passes) for r in range(max(1, -(-channels // max(each, 1))))]


def _rows(kept: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``(starts, columns, where)``: the last are the indices of the entries in ``kept`` [rows, channels, taps]."""
    starts = torch.zeros(len(parts) * len(kept) + 1, dtype=torch.int32, device=kept.device)
    of_parts = [kept & part.to(kept.device) for part in parts]
    starts[1:] = torch.cat([part.flatten(1).sum(dim=1) for part in of_parts]).cumsum(0)
    rows, channels, taps = (torch.cat(indices) for indices in zip(*(part.nonzero(as_tuple=True) for part in of_parts), strict=True))
    return starts, (channels * kept.shape[2] + taps).to(torch.int32), (rows, channels, taps)


def _exchanged(weight: Tensor, groups: int) -> Tensor:
    """[outputs, inputs / groups, taps] -> [inputs, outputs / groups, taps], and back."""
    exchanged: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return exchanged


def dense_weight(starts: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The entries as a weight of the given shape, [rows, ...], with zeros elsewhere."""
    weight = values.new_zeros(shape[0], int(torch.tensor(shape[1:]).prod()))
    weight[rows_of(starts, shape[0]), columns.long()] = values
    return weight.view(*shape)


def rows_of(starts: Tensor, rows: int) -> Tensor:
    """int64 [entries]: the row of each entry."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1, device=starts.device) % rows, starts.diff().long())


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


def _images(activation: Tensor, halo: int) -> Tensor:
    if activation.dim() == 4:
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
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        *tensors, None, stride, padding, dilation, False, [0, 0], groups, [*which, False]
    )
    return x_grad, weight_grad


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
    assert result is not None
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
    """``out`` (float32 [outputs, inputs / groups, *kernel]): the weight's gradient at the entries, whose rows are output channels, and 0
    elsewhere; images only."""
    _, weight = _gradients(grad, input.float(), torch.zeros_like(out), stride, padding, dilation, groups, (False, True))
    assert weight is not None
    kept = dense_weight(starts, columns, weight.new_ones(len(columns)), weight.shape) != 0
    out.copy_(torch.where(kept, weight, 0))
