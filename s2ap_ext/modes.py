"""Evaluation mode for a while, and everything as it was found afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(model: nn.Module | Callable[..., Any], *, freeze: bool) -> Iterator[None]:
    """Within it ``model`` is in evaluation mode; after it, also after an exception, each module has the mode that it had before.

    The flags are set directly, since a module's own ``train()`` may do other things, and since a model may be a mixture of modes, such
    as one whose BatchNorm layers are frozen. A callable that is not an ``nn.Module`` is left alone.

    Args:
        model: the model, with all its modules.
        freeze: whether the parameters also stop to require a gradient. Autograd then neither stores what gradients of the weights would
            need nor computes them.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    frozen = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) and freeze else []
    try:
        for module in modules:
            module.training = False
        for p in frozen:
            p.requires_grad_(False)
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for p in frozen:
            p.requires_grad_(True)
