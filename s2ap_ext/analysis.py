"""How a mask moves, and how sharp the loss is in score space."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .modes import evaluation_mode
from .nn import pruned_layers

__all__ = ["flip_rate", "landscape", "layer_masks", "mask_distance", "score_sharpness"]

Masks = Mapping[str, Tensor]


def layer_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the pruned layers of ``model`` by name: bool, of the weights' shapes. They do not follow the model."""
    return {name: layer.mask for name, layer in pruned_layers(model).items()}


def mask_distance(a: nn.Module | Masks, b: nn.Module | Masks) -> float:
    """Normalised Hamming distance of two masks: the fraction of all entries in which they differ, in [0, 1].

    Args:
        a, b: models with pruned layers of the same names, or their masks (:func:`layer_masks`).

    Raises:
        ValueError: different layers, or different shapes of a layer.

    Equivalent to::

        sum((a[l] != b[l]).sum() for l in a) / sum(a[l].numel() for l in a)
    """
    a, b = _pair(a, b)
    total = sum(mask.numel() for mask in a.values())
    return _differing(a, b) / total if total else 0.0


def flip_rate(a: nn.Module | Masks, b: nn.Module | Masks) -> float:
    """Entries in which two masks differ, relative to the number that ``a`` keeps.

    A swap of one kept entry for another counts twice, so two disjoint masks of the same size have flip rate 2.

    Args and errors as for :func:`mask_distance`.

    Equivalent to::

        sum((a[l] != b[l]).sum() for l in a) / sum(a[l].sum() for l in a)
    """
    a, b = _pair(a, b)
    kept = sum(int(mask.sum()) for mask in a.values())
    return _differing(a, b) / kept if kept else 0.0


def _pair(a: nn.Module | Masks, b: nn.Module | Masks) -> tuple[Masks, Masks]:
    a, b = (layer_masks(m) if isinstance(m, nn.Module) else m for m in (a, b))
    if a.keys() != b.keys():
        raise ValueError(f"masks: expected the same layers in both, but only one has {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"masks: layer {name} has shape {tuple(a[name].shape)} in one and {tuple(b[name].shape)} in the other")
    return a, b


def _differing(a: Masks, b: Masks) -> int:
    return sum(int((a[name] != b[name]).sum()) for name in a)


def score_sharpness(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, radius: float = 1e-2, iterations: int = 20, seed: int = 0
) -> float:
    """The largest eigenvalue (by magnitude) of the score-space Hessian of ``loss``, by power iteration.

    The loss is piecewise constant in the scores, so its Hessian is taken of the straight-through gradient, with central
    differences over a distance that flips mask entries: ``H v = (g(s + h v) - g(s - h v)) / 2h`` with ``h = radius * ||s||`` over
    all layers together.

    Args:
        model: with pruned layers. Its scores, gradients, mode and BatchNorm statistics are left as found (the loss is taken in eval mode).
        loss: maps the model to a scalar, on fixed data.
        radius: distance of the differences relative to the norm of the scores, > 0.
        iterations: of the power method, >= 1.
        seed: of the starting direction.

    Raises:
        ValueError: ``radius`` or ``iterations`` out of range; a model without pruned layers.

    Source: S2AP, arXiv 2510.18381 (lambda_max of the score-space Hessian as the measure of sharpness).
    """
    if not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    with _probing(model, loss) as probe:
        h = radius * _norm(probe.start)
        if h == 0:
            raise ValueError("model: all scores are 0, so a radius relative to them is 0 too")
        generator = torch.Generator().manual_seed(seed)
        v = [torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s) for s in probe.start]
        eigenvalue = 0.0
        for _ in range(iterations):
            norm = _norm(v)
            if norm == 0:  # the gradient does not change within the radius
                return 0.0
            v = [x / norm for x in v]
            ahead, behind = probe.gradient(v, h), probe.gradient(v, -h)
            hv = [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
            eigenvalue = float(sum((x * y).sum().double() for x, y in zip(v, hv, strict=True)))
            v = hv
        return eigenvalue


def landscape(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, radius: float = 5e-2, points: int = 21, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss along a plane through the scores: two random directions, each layer's part scaled to the norm of its scores.

    Args:
        model, loss, seed: as for :func:`score_sharpness`.
        radius: half the side of the plane, relative to the norm of the scores, > 0.
        points: of the grid along each side, >= 2.

    Returns:
        ``(steps, losses)``: the positions along a side, float64 [points], and the losses, float64 [points, points].

    Raises:
        ValueError: ``radius`` or ``points`` out of range; a model without pruned layers.

    Source: the filter normalisation of Li et al., NeurIPS 2018, arXiv 1712.09913, taken per layer.
    """
    if not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius}")
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
    steps = torch.linspace(-radius, radius, points, dtype=torch.float64)
    losses = torch.empty(points, points, dtype=torch.float64)
    with _probing(model, loss) as probe:
        generator = torch.Generator().manual_seed(seed)
        axes = []
        for _ in range(2):
            directions = [torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s) for s in probe.start]
            axes.append([d * (s.norm() / d.norm()) for d, s in zip(directions, probe.start, strict=True)])
        for i, x in enumerate(steps.tolist()):
            for j, y in enumerate(steps.tolist()):
                losses[i, j] = probe.value([x * a + y * b for a, b in zip(*axes, strict=True)])
    return steps, losses


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors).sqrt())


@contextmanager
def _probing(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Iterator[_Probe]:
    """A probe of ``model`` in evaluation mode; the model is as it was found afterwards."""
    probe = _Probe(model, loss)
    required = [s.requires_grad for s in probe.scores]
    with evaluation_mode(model, freeze=False):
        try:
            for s in probe.scores:
                s.requires_grad_(True)
            yield probe
        finally:
            probe.place(probe.start)
            for s, was_required in zip(probe.scores, required, strict=True):
                s.requires_grad_(was_required)


class _Probe:
    """Evaluates a loss at displaced scores."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.scores = list(dict.fromkeys(layer.scores for layer in pruned_layers(model).values()))
        if not self.scores:
            raise ValueError("model: expected pruned layers, found none; call s2ap_ext.sparsify(model, sparsity) first")
        self.start = [s.detach().clone() for s in self.scores]

    @torch.no_grad()
    def place(self, values: list[Tensor]) -> None:
        for s, value in zip(self.scores, values, strict=True):
            s.copy_(value)

    def value(self, displacement: list[Tensor]) -> float:
        self.place([s + d for s, d in zip(self.start, displacement, strict=True)])
        with torch.no_grad():
            return float(self.loss(self.model))

    def gradient(self, direction: list[Tensor], h: float) -> list[Tensor]:
        self.place([s + h * d for s, d in zip(self.start, direction, strict=True)])
        with torch.enable_grad():
            return list(torch.autograd.grad(self.loss(self.model), self.scores, materialize_grads=True))
