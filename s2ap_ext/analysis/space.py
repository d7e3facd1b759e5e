"""Where a loss is looked at: the scores, or the weights at a fixed mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..modes import evaluation_mode
from ..nn import dense_kernels, pruned_layers

Loss = Callable[[nn.Module], Tensor]
"""Maps a model to a scalar, on fixed data."""

SPACES = ("scores", "weights")


class Space:
    """The scores, or the weights, of a model, which the methods displace from where they were. Made by :func:`open_space`.

    Attributes:
        name: ``"scores"``: the scores of the pruned layers. ``"weights"``: all parameters of more than one dimension but the scores, at the
            mask in force.
        start: the tensors as they were found.
        kept: for each of them what the mask keeps, bool; None where nothing is pruned, as in score space.
    """

    def __init__(self, model: nn.Module, loss: Loss, name: str) -> None:
        if name not in SPACES:
            raise ValueError(f"space: expected one of {', '.join(SPACES)}, got {name!r}")
        self.model, self.loss, self.name = model, loss, name
        layers = pruned_layers(model).values()
        scores = scores_of(model)
        if name == "scores":
            if not scores:
                raise ValueError("model: expected pruned layers, found none; call s2ap_ext.sparsify(model, sparsity) first")
            self.parameters = scores
            self.kept: list[Tensor | None] = [None for _ in scores]
        else:
            self.parameters = [p for p in model.parameters() if p.dim() > 1 and p not in set(scores)]
            if not self.parameters:
                raise ValueError("model: expected weights of more than one dimension, found none")
            masks = {layer.weight: layer.mask for layer in layers}
            self.kept = [masks.get(p) for p in self.parameters]
        self.start = [p.detach().clone() for p in self.parameters]
        self._gradients: list[Tensor] | None = None  # with their graph

    @property
    def size(self) -> int:
        """How many numbers vary in this space: all scores, or the kept weights."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [p.numel() if kept is None else int(kept.sum()) for p, kept in zip(self.parameters, self.kept, strict=True)]

    @torch.no_grad()
    def place(self, displacement: Sequence[Tensor] | None = None) -> None:
        """Moves the model to ``start`` plus ``displacement``."""
        self._gradients = None
        for i, (p, at) in enumerate(zip(self.parameters, self.start, strict=True)):
            p.copy_(at if displacement is None else at + displacement[i])

    def value(self, displacement: Sequence[Tensor] | None = None) -> float:
        """The loss at a displacement."""
        self.place(displacement)
        with torch.no_grad():
            return float(self.loss(self.model))

    def gradient(self, displacement: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The gradient at a displacement; for scores the straight-through one."""
        self.place(displacement)
        with torch.enable_grad():
            return list(torch.autograd.grad(self.loss(self.model), self.parameters, materialize_grads=True))

    def hessian_product(self, vector: Tensor) -> Tensor:
        """The Hessian at ``start`` times ``vector``, both flat [size], by differentiating the gradient once more.

        For scores that is the Hessian of the straight-through relaxation, see :func:`s2ap_ext.analysis.spectrum`. The graph of the gradient
        is made once for all products.
        """
        with torch.enable_grad():
            if self._gradients is None:
                self.place()
                with dense_kernels():  # the kernels of the kept weights are not differentiable twice
                    loss = self.loss(self.model)
                    self._gradients = list(torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True))
            along = (g * v for g, v in zip(self._gradients, self.split(vector), strict=True))
            slope = torch.stack([product.sum() for product in along]).sum()
            if not slope.requires_grad:  # a loss that is linear
                return torch.zeros_like(vector)
            products = torch.autograd.grad(slope, self.parameters, retain_graph=True, materialize_grads=True)
        return self.flat(products)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector [size] as tensors of the parameters' shapes, 0 at pruned weights."""
        parts = torch.split(vector, self._sizes())
        return [
            part.view_as(p) if kept is None else torch.zeros_like(p).masked_scatter_(kept, part)
            for part, p, kept in zip(parts, self.parameters, self.kept, strict=True)
        ]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        return torch.cat([(t if kept is None else t[kept]).detach().flatten() for t, kept in zip(tensors, self.kept, strict=True)])

    def random(self, generator: torch.Generator) -> list[Tensor]:
        """Standard normal numbers of the parameters' shapes, 0 at pruned weights; the generator is one of the CPU."""
        return [
            _masked(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p), kept)
            for p, kept in zip(self.parameters, self.kept, strict=True)
        ]

    def normalised(self, direction: Sequence[Tensor], *, filters: bool) -> list[Tensor]:
        """``direction`` scaled to the norm of what it is added to, 0 where it is 0.

        Args:
            filters: whether each filter (index of the first dimension) is scaled by itself, and not each tensor as a whole.
        """
        scaled = []
        for d, at, kept in zip(direction, self.start, self.kept, strict=True):
            dims = tuple(range(1, at.dim())) if filters else tuple(range(at.dim()))
            of_d, of_at = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (d, _masked(at, kept)))
            scaled.append(torch.where(of_d > 0, d * (of_at / of_d), 0))
        return scaled

    def ascent(self) -> list[Tensor]:
        """The gradient at ``start``, in each tensor scaled to the norm of the scores, or of the kept weights.

        It is the perturbation of S2AP, or in weight space of AWP, for ``gamma`` 1.
        """
        return self.normalised([_masked(g, kept) for g, kept in zip(self.gradient(), self.kept, strict=True)], filters=False)


@contextmanager
def open_space(model: nn.Module, loss: Loss, name: str) -> Iterator[Space]:
    """The space of ``model`` called ``name``, with the model in evaluation mode; afterwards the model is as it was found.

    Raises:
        ValueError: an unknown name; a model without pruned layers, or without weights.
    """
    space = Space(model, loss, name)
    required = [p.requires_grad for p in space.parameters]
    with evaluation_mode(model, freeze=False):
        try:
            for p in space.parameters:
                p.requires_grad_(True)
            yield space
        finally:
            space.place()
            for p, was_required in zip(space.parameters, required, strict=True):
                p.requires_grad_(was_required)


def scores_of(model: nn.Module) -> list[nn.Parameter]:
    """The scores of the pruned layers of ``model``, each once."""
    return list(dict.fromkeys(layer.scores for layer in pruned_layers(model).values()))


def norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all numbers of ``tensors``, summed in float64."""
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def _masked(tensor: Tensor, kept: Tensor | None) -> Tensor:
    return tensor if kept is None else torch.where(kept, tensor, 0)
