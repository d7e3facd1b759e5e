"""How many weights a layer keeps, and where its scores start."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from .reference import GROUP, LARGEST_WINDOW, SINGLE_WEIGHTS, WEIGHT, WINDOW, Pattern

__all__ = [
    "check_sparsity",
    "granularity_of",
    "input_multiple",
    "kept_count",
    "kept_in_pattern",
    "kept_weights",
    "pattern_for",
    "score_init",
    "sparsity_of",
    "units",
]

Count = TypeVar("Count", int, Tensor)
OF_SEVERAL_LAYERS = ("head", "neuron")  # granularities whose units are parts of several layers at once


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


def pattern_for(granularity: str, shape: Sequence[int], sparsity: float) -> Pattern:
    """What ``kept`` counts in a weight of this ``shape`` (outputs first, then inputs).

    Args:
        granularity: ``"weight"``; ``"channel"``, all weights of an output; ``"N:M"`` such as ``"2:4"``, N weights of every M
            neighbouring inputs.
        sparsity: the fraction removed; for ``"N:M"`` it has to be ``1 - N / M``.

    Raises:
        ValueError: an unknown ``granularity``, or one that does not fit ``shape`` or ``sparsity``.

    >>> pattern_for("2:4", (64, 16, 3, 3), 0.5)
    Pattern(kind=2, size=4, block=9)
    """
    if granularity == "weight":
        return SINGLE_WEIGHTS
    if 0 in shape:
        raise ValueError(f"granularity: expected 'weight' for a weight without elements, got {granularity!r}")
    if granularity == "channel":
        return Pattern(GROUP, shape[0], math.prod(shape[1:]))
    if granularity in OF_SEVERAL_LAYERS:
        raise ValueError(f"granularity: {granularity!r} is of several layers together, so it is for sparsify() and not for one layer")
    stays, window = _window(granularity)
    if shape[1] % window:
        raise ValueError(f"granularity: expected a multiple of {window} inputs for {granularity!r}, got {shape[1]}")
    pattern = Pattern(WINDOW, window, math.prod(shape[2:]))
    if kept_in_pattern(pattern, math.prod(shape), sparsity) != stays:
        raise ValueError(f"sparsity: expected {1 - stays / window:g} for granularity {granularity!r}, got {sparsity}")
    return pattern


def input_multiple(granularity: str) -> int:
    """The number that a layer's inputs have to be a multiple of: M for ``"N:M"``, 1 for any other granularity.

    Raises:
        ValueError: an unknown ``granularity``.
    """
    return 1 if granularity in ("weight", "channel", *OF_SEVERAL_LAYERS) else _window(granularity)[1]


def granularity_of(pattern: Pattern, shape: Sequence[int], kept: int) -> str:
    """What :func:`pattern_for` made ``pattern`` from, for a weight of this ``shape`` that keeps ``kept``.

    >>> granularity_of(pattern_for("2:4", (64, 16), 0.5), (64, 16), 2)
    '2:4'
    """
    if pattern.kind == WEIGHT:
        return "weight"
    if pattern.kind == WINDOW:
        return f"{kept}:{pattern.size}"
    return "channel"


def _window(granularity: str) -> tuple[int, int]:
    """N and M of ``"N:M"``."""
    match = re.fullmatch(r"(\d+):(\d+)", granularity)
    if not match or not 0 < int(match[1]) < int(match[2]) <= LARGEST_WINDOW:
        known = f"'weight', 'channel', 'head', 'neuron' or 'N:M' such as '2:4' (M at most {LARGEST_WINDOW})"
        raise ValueError(f"granularity: expected {known}, got {granularity!r}")
    return int(match[1]), int(match[2])


def units(pattern: Pattern, numel: int) -> int:
    """The largest that ``kept`` can be: the number of weights, of groups, or of weights in a window."""
    return numel if pattern.kind == WEIGHT else pattern.size


def kept_weights(pattern: Pattern, numel: int, kept: Count) -> Count:
    """How many of ``numel`` weights stay where ``kept`` counts what ``pattern`` says.

    >>> kept_weights(pattern_for("channel", (8, 4, 3, 3), 0.5), 288, 4)
    144
    """
    return kept if pattern.kind == WEIGHT else kept * (numel // pattern.size)


def kept_in_pattern(pattern: Pattern, numel: int, sparsity: float) -> int:
    """:func:`kept_count` of what ``pattern`` counts: of the elements, of the groups, or of the elements of a window.

    Raises:
        ValueError: ``sparsity`` outside [0, 1], or for windows not a multiple of one element's share.
    """
    if pattern.kind != WINDOW:
        return kept_count(units(pattern, numel), sparsity)
    pruned = check_sparsity(sparsity) * pattern.size
    if not math.isclose(pruned, round(pruned), abs_tol=1e-9):
        raise ValueError(f"sparsity: expected a multiple of 1/{pattern.size} for windows of {pattern.size} weights, got {sparsity}")
    return pattern.size - round(pruned)


def sparsity_of(pattern: Pattern, numel: int, kept: int) -> float:
    """The sparsity at which ``kept`` stay: the inverse of :func:`kept_in_pattern`, which gives ``kept`` for it again.

    >>> sparsity_of(Pattern(), 10, 1)
    0.9
    """
    count = units(pattern, numel)
    if count == 0:
        return 0.0
    sparsity = (count - kept) / count
    rounded_down = Fraction(repr(sparsity)) * count < count - kept  # then it would stand for one pruned element less
    return math.nextafter(sparsity, math.inf) if rounded_down else sparsity


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
