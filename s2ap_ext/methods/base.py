"""What a method has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from ..nn import sparsify


class Method(ABC):
    """One way to search a mask. A subclass says which tensors train, and what follows each optimizer step."""

    def prune(self, model: nn.Module, sparsity: float, *, granularity: str = "weight", exclude: Sequence[str] = ()) -> None:
        """Makes the dense ``model`` sparse in place: pruned layers, with scores that start from the weights.

        Arguments and errors are those of :func:`s2ap_ext.sparsify`.
        """
        sparsify(model, sparsity, granularity=granularity, exclude=exclude)

    @abstractmethod
    def prepare(self, model: nn.Module, *, s2ap: bool) -> list[nn.Parameter]:
        """Sets ``requires_grad`` on the parameters of the pruned ``model`` and returns those the optimizer trains.

        Args:
            model: a model with pruned layers.
            s2ap: the steps will be S2AP's, which needs gradients on the scores.
        """

    def after_step(self, model: nn.Module) -> None:
        """What follows each optimizer step; as a rule nothing."""
        return
