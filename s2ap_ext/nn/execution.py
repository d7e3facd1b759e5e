"""Where the sparse kernels may run: what layers that train, attacks and networks for inference all ask first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .._library import backend

_enabled: ContextVar[bool] = ContextVar("sparse kernels", default=True)


@contextmanager
def dense_kernels() -> Iterator[None]:
    """Within it nothing in this thread runs sparse unless it is told to.

    Pruned layers compute with torch's dense convolutions, attacks call the models themselves, and
    :func:`s2ap_ext.engine.compile_sparse` chooses ``"dense"`` for every layer. A network that is compiled already stays as it is.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def sparse_kernels_run() -> bool:
    """Whether there are sparse kernels, and no :func:`dense_kernels` around."""
    return _enabled.get() and backend().cpu == "C++"


def takes(x: Tensor) -> bool:
    """Whether the sparse kernels may run for ``x``: plain float32 images [N, C, H, W] on the CPU, N >= 1, outside of autocast."""
    if not sparse_kernels_run() or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    plain = type(x) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and x.dim() == 4 and len(x) > 0
