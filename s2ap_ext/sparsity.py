"""How many weights a layer keeps, and where its scores start."""

from __future__ import annotations

import math
import numbers
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["check_sparsity", "kept_count", "score_init"]


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Returns ``sparsity`` as a float; raises ValueError naming ``name`` unless it lies in [0, 1]."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(sparsity).__name__}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1] (the fraction removed), got {sparsity}")
    return float(sparsity)


def kept_count(numel: int, sparsity: float) -> int:
    """The number of entries that stay of ``numel`` at ``sparsity``: ``numel - floor(sparsity * numel)``.

    The product is taken of the decimal number that ``sparsity`` prints as, so 0.29 of 100 is 29 although the float product is 28.999...

    Raises:
        ValueError: ``sparsity`` outside [0, 1].

    >>> kept_count(100, 0.29), kept_count(30, 0.1), kept_count(10, 0.9)
    (71, 27, 1)
    """
    return numel - math.floor(Fraction(repr(check_sparsity(sparsity))) * numel)


@torch.no_grad()
def score_init(weight: Tensor) -> Tensor:
    """Scaled initial scores: ``sqrt(6 / fan_in) * w / max|w|``, of weight's shape; zeros for an all-zero weight.

    They rank as the magnitudes do, so the first mask is the layer's magnitude mask. ``fan_in`` is the number of inputs of one output,
    ``numel / shape[0]``.

    Raises:
        ValueError: ``weight`` has fewer than two dimensions.

    Source: HYDRA, Sehwag et al., NeurIPS 2020, arXiv 2002.10509.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight: expected at least two dimensions, got shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        return torch.zeros_like(weight)
    fan_in = weight.numel() // weight.shape[0]
    compute = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    largest = compute.abs().amax()
    scale = torch.where(largest > 0, math.sqrt(6 / fan_in) / largest, 0.0)
    return (compute * scale).to(weight.dtype)
