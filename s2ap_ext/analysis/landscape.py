"""The loss around a model: along lines and over planes, through its scores or through its weights."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .masks import layer_masks
from .space import Loss, Space, open_space, scores_of

DIRECTIONS = ("ascent", "random")


class Line(NamedTuple):
    """The loss along a line.

    Attributes:
        steps: positions, relative to the norm of what is displaced, float64 [points].
        losses: float64 [points].
        flips: how many mask entries differ from those in force at step 0, int64 [points]; 0 in weight space.
    """

    steps: Tensor
    losses: Tensor
    flips: Tensor


def line(
    model: nn.Module, loss: Loss, *, along: str = "ascent", space: str = "scores", radius: float = 5e-2, points: int = 21, seed: int = 0
) -> Line:
    """The loss, as it is and of no relaxation, on a line through the scores or the weights.

    Args:
        model, loss, space: as for :func:`s2ap_ext.analysis.spectrum`.
        along: ``"ascent"``: along the gradient, in each layer scaled to the norm of its scores or kept weights, so that a step is the
            ``gamma`` of S2AP, or in weight space of AWP; of the scores it is the straight-through gradient. ``"random"``: along normally
            distributed numbers, scaled as the axes of :func:`landscape`.
        radius: half the length of the line, relative to the norm of what is displaced, > 0.
        points: on the line, >= 2. An odd number has the model itself in the middle.
        seed: of a random direction.

    Raises:
        ValueError: an argument out of range; a model without pruned layers in score space.
    """
    _check(radius, points)
    if along not in DIRECTIONS:
        raise ValueError(f"along: expected one of {', '.join(DIRECTIONS)}, got {along!r}")
    steps = torch.linspace(-radius, radius, points, dtype=torch.float64)
    losses, flips = torch.empty_like(steps), torch.zeros(points, dtype=torch.int64)
    with open_space(model, loss, space) as at:
        direction = at.ascent() if along == "ascent" else _axis(at, torch.Generator().manual_seed(seed))
        at.place()
        before = layer_masks(model)
        for i, step in enumerate(steps.tolist()):
            losses[i] = at.value([step * d for d in direction])
            if space == "scores":
                flips[i] = sum(int((mask != before[name]).sum()) for name, mask in layer_masks(model).items())
    return Line(steps, losses, flips)


def landscape(
    model: nn.Module, loss: Loss, *, space: str = "scores", radius: float = 5e-2, points: int = 21, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss, as it is and of no relaxation, over a plane through the scores or the weights, along two random directions.

    In score space each layer's part of a direction is scaled to the norm of its scores. In weight space each filter's part is scaled to the
    norm of the filter's kept weights, and the mask stays.

    Args:
        model, loss, space: as for :func:`s2ap_ext.analysis.spectrum`.
        radius: half the side of the plane, relative to the norm of what is displaced, > 0.
        points: of the grid along each side, >= 2.
        seed: of the directions.

    Returns:
        ``(steps, losses)``: the positions along a side, float64 [points], and the losses, float64 [points, points].

    Raises:
        ValueError: an argument out of range; a model without pruned layers in score space.

    Source: the filter normalisation of Li et al., NeurIPS 2018, arXiv 1712.09913, for scores taken per layer.
    """
    _check(radius, points)
    steps = torch.linspace(-radius, radius, points, dtype=torch.float64)
    losses = torch.empty(points, points, dtype=torch.float64)
    with open_space(model, loss, space) as at:
        generator = torch.Generator().manual_seed(seed)
        first, second = _axis(at, generator), _axis(at, generator)
        for i, x in enumerate(steps.tolist()):
            for j, y in enumerate(steps.tolist()):
                losses[i, j] = at.value([x * a + y * b for a, b in zip(first, second, strict=True)])
    return steps, losses


def ascended(model: nn.Module, loss: Loss, gamma: float) -> nn.Module:
    """A copy of ``model`` at the scores to which S2AP perturbs them: each layer's moved by ``gamma`` times their norm along the gradient.

    Args:
        model, loss: as for :func:`s2ap_ext.analysis.score_sharpness`.
        gamma: size of the perturbation relative to the norm of the layer's scores, >= 0.

    Raises:
        ValueError: ``gamma`` negative; a model without pruned layers.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma: expected a number >= 0, got {gamma}")
    with open_space(model, loss, "scores") as at:
        scores = [s + gamma * d for s, d in zip(at.start, at.ascent(), strict=True)]
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for own, value in zip(scores_of(moved), scores, strict=True):
            own.copy_(value)
    return moved


def _axis(at: Space, generator: torch.Generator) -> list[Tensor]:
    return at.normalised(at.random(generator), filters=at.name == "weights")


def _check(radius: float, points: int) -> None:
    if not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius}")
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
