"""Activations with the batch innermost in memory: logical shape (N, C, H, W), memory order C, H, W, N.

Sparse convolutions read and write such activations by whole vectors of images. Element-wise operations of torch keep the layout by
themselves, forward and backward. BatchNorm and pooling do not, so :func:`s2ap_ext.sparsify` gives these modules the classes below, which
look at the same memory in a way that torch's own kernels are good at, and :func:`s2ap_ext.densify` takes them back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def empty_batch_innermost(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A new tensor of this logical shape, no view of another, so that it may be changed in place where it is the output of a function."""
    return torch.empty_permuted(shape, (1, 2, 3, 0), dtype=like.dtype, device=like.device)


def is_batch_innermost(x: Tensor) -> bool:
    """Also where the batch is one image: that is the usual layout, and needs nothing special."""
    return x.dim() == 4 and len(x) > 1 and x.stride(0) == 1 and x.permute(1, 2, 3, 0).is_contiguous()


class _BatchNorm2d(nn.BatchNorm2d):
    """Normalises over all images of a channel, so to it they are one wide image."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_batch_innermost(input):
            return super().forward(input)
        n, c, h, w = input.shape
        return super().forward(input.permute(1, 2, 3, 0).reshape(1, c, h, w * n)).view(c, h, w, n).permute(3, 0, 1, 2)


class _Pool2d(nn.Module):
    """Pools each plane on its own, so images and channels may change places: then the memory is channels_last."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_batch_innermost(input):
            pooled: Tensor = super().forward(input)
            return pooled
        pooled = super().forward(input.transpose(0, 1))
        return pooled.transpose(0, 1)


class _MaxPool2d(_Pool2d, nn.MaxPool2d):
    pass


class _AvgPool2d(_Pool2d, nn.AvgPool2d):
    pass


class _AdaptiveAvgPool2d(_Pool2d, nn.AdaptiveAvgPool2d):
    pass


KEEPING = {
    nn.BatchNorm2d: _BatchNorm2d,
    nn.MaxPool2d: _MaxPool2d,
    nn.AvgPool2d: _AvgPool2d,
    nn.AdaptiveAvgPool2d: _AdaptiveAvgPool2d,
}


TORCH_CLASSES = {keeping: given for given, keeping in KEEPING.items()}


def keep_layout(model: nn.Module) -> None:
    """The modules of ``model`` that would lose the layout keep it from now on; nothing else about them changes."""
    for module in model.modules():
        module.__class__ = KEEPING.get(type(module), type(module))


def forget_layout(model: nn.Module) -> None:
    """Undoes :func:`keep_layout`."""
    for module in model.modules():
        module.__class__ = TORCH_CLASSES.get(type(module), type(module))
