"""Gradients of masked weights that stand for those of scores, so that kernels can form these where they read them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..nn.layers import Pruned
from ..reference import score_grad


class Deferred:
    """Takes the gradients of masked weights from the layers' backward, in place of ``scores.grad``.

    Attributes:
        grads: the masked weights' gradients by scores; those of tied layers add up, as autograd's do.
    """

    def __init__(self) -> None:
        self.grads: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def collecting(self, layers: Iterable[Pruned]) -> Iterator[None]:
        """Within it, the backward of ``layers`` leaves its gradients here. They are gone at its end."""
        with ExitStack() as collecting:
            for layer in layers:
                collecting.enter_context(layer.mask_state.defer(self._take))
            try:
                yield
            finally:
                self.clear()

    def _take(self, scores: nn.Parameter, grad: Tensor) -> None:
        self.grads[scores] = self.grads[scores] + grad if scores in self.grads else grad.detach()

    def clear(self) -> None:
        self.grads = {}

    def form(self, layers: Iterable[Pruned], keep: Container[nn.Parameter] = ()) -> None:
        """Turns the gradients here, but for those to ``keep``, into gradients of the scores where their layers stand."""
        for layer in layers:
            scores = layer.scores
            if scores in self.grads and scores not in keep:
                grad = score_grad(self.grads.pop(scores), layer.weight, layer.mask_state.position(scores, layer.weight))
                scores.grad = grad if scores.grad is None else scores.grad + grad
