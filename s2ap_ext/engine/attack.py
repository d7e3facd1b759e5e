"""The engine under an attack: a network for each model that is attacked, made when it pays and kept as long as the model lives."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import pruned_layers
from ..nn.execution import takes
from .network import SparseNetwork, compile_model

# For each model what it looked like, with the size of the images, and the network compiled for it; None where there is none to use.
# Kept beside the models and not on them, so that nothing is copied, pickled or found in a state_dict.
_compiled: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...] | None, SparseNetwork | None]] = weakref.WeakKeyDictionary()


def for_attack(model: nn.Module, x: Tensor) -> SparseNetwork | None:
    """A network that gives the logits of ``model`` in evaluation mode, with the gradient with respect to ``x``; or None.

    There is one where the compiled kernels run, for float32 images [N, C, H, W] and a float32 model on the CPU with pruned layers, of
    which at least one convolution runs sparse; no module has hooks, autocast and :func:`s2ap_ext.nn.dense_kernels` are off, and the
    engine has a step for everything in the model. It is made at the first call and takes the model's weights and masks again whenever
    they have changed.
    """
    if not _applies(model, x):
        return None
    looks = _looks(model), tuple(x.shape[1:])
    looked, network = _compiled.get(model, (None, None))
    if looked != looks:
        network = _made(model, x)
        _compiled[model] = looks, network
    elif network is not None and not network.is_current():
        try:
            network.refresh()
        except ValueError:  # weights that are not finite
            del _compiled[model]
            return None
    return network


def _looks(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that steers the model's code and is no tensor: its modules, and their settings."""
    return [(id(module), type(module), [item for item in vars(module).items() if _is_setting(*item)]) for module in model.modules()]


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, type(None))) and name != "training"


def _applies(model: nn.Module, x: Tensor) -> bool:
    if not isinstance(model, nn.Module) or isinstance(model, SparseNetwork) or not takes(x):
        return False
    if not pruned_layers(model) or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    return not any(_hooks(module) for module in model.modules()) and not _hooks_of_all()


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _hooks_of_all() -> bool:
    everywhere = torch.nn.modules.module
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(everywhere, f"_global_{kind}") for kind in kinds)


def _made(model: nn.Module, x: Tensor) -> SparseNetwork | None:
    try:
        network = compile_model(model, x[:1], weak=True)  # one that held its model would keep it in the dictionary for ever
    except (ValueError, RuntimeError):  # torch.fx cannot trace it, or not rightly
        return None
    return network if "sparse" in network.layers.values() and not network.dense_parts else None
