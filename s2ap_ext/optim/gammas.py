"""One gamma for each pruned layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch
from torch import Tensor

from .._arguments import check_size
from ..nn.layers import Pruned

Gamma = float | Mapping[str, float] | Tensor


def gamma_per_layer(gamma: Gamma, layers: Mapping[str, Pruned]) -> list[float]:
    """The gamma of each layer.

    Args:
        gamma: one for all layers; or by patterns of layer names, in which ``*`` and ``?`` match and the first that fits counts; or
            float64 [L], in the layers' order.
        layers: L pruned layers by name.

    Raises:
        ValueError: a value that is negative or not finite; a pattern without a layer; a layer without a pattern; a tensor of another
            dtype or shape; layers that share their scores and differ in gamma.
    """
    names = list(layers)
    if isinstance(gamma, Mapping):
        for pattern in gamma:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"gamma: no pruned layer is named {pattern!r}; there are {', '.join(names)}")
        values = [_of_pattern(gamma, name) for name in names]
    elif isinstance(gamma, Tensor):
        if gamma.dtype != torch.float64 or gamma.shape != (len(names),):
            raise ValueError(f"gamma: expected float64 of shape ({len(names)},), got {gamma.dtype} of shape {tuple(gamma.shape)}")
        values = gamma.tolist()
    else:
        check_size("gamma", gamma)
        return [float(gamma)] * len(names)

    first: dict[Tensor, tuple[str, float]] = {}
    for name, value in zip(names, values, strict=True):
        check_size(f"gamma of layer {name}", value)
        other, expected = first.setdefault(layers[name].scores, (name, value))
        if value != expected:
            raise ValueError(f"gamma: layers {other} and {name} share their scores, but have {expected} and {value}")
    return values


def _of_pattern(gamma: Mapping[str, float], name: str) -> float:
    for pattern, value in gamma.items():
        if fnmatch.fnmatchcase(name, pattern):
            return value
    raise ValueError(f'gamma: no pattern fits layer {name}; the last may be "*"')
