"""What a method has to say."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..nn import Pruned, pruned_layers, sparsify
from ..parts import Part


class Method(Part):
    """One way to search a mask.

    An object serves one model: :meth:`sparsify` is called once, then :meth:`parameters`, and then the others as training goes on. Only
    :meth:`parameters` must be given; all else has the behaviour of HYDRA's.

    Attributes:
        stages: the training stages of a run, in order, of ``"pretrain"``, ``"prune"`` and ``"finetune"``.
    """

    kind: ClassVar[str] = "method"

    @property
    def stages(self) -> tuple[str, ...]:
        return ("pretrain", "prune", "finetune")

    def sparsify(self, model: nn.Module, sparsity: float, *, generator: torch.Generator | None = None, **how: Any) -> None:
        """Turns the layers of the dense ``model`` into pruned ones, in place, with their first scores and numbers of kept weights.

        Args:
            model: a dense model.
            sparsity: the fraction of weights removed, in [0, 1].
            generator: of all random numbers that the method draws here, on the CPU; None takes torch's own.
            how: ``allocation``, ``granularity`` and ``exclude``, as for :func:`s2ap_ext.sparsify`, which raises what this raises.
        """
        sparsify(model, sparsity, **how)

    @abstractmethod
    def parameters(self, model: nn.Module, *, perturbed: bool) -> list[dict[str, Any]]:
        """Sets ``requires_grad`` on the parameters of the pruned ``model`` and returns the optimizer's groups.

        Args:
            model: what :meth:`sparsify` made.
            perturbed: the steps will be S2AP's, which need gradients on the scores.

        Returns:
            groups as torch's optimizers take them: ``params``, and what differs from the stage's settings, such as ``weight_decay``.
        """

    def penalty(self, epoch: int) -> Tensor | None:
        """A term that is added to the loss of each step of ``epoch`` (from 0), with its graph; None for no term."""
        return None

    def after_step(self, model: nn.Module) -> None:
        """What follows each step of the optimizer."""
        return

    def finish(self, model: nn.Module) -> None:
        """The search is over: what the method has put on ``model`` besides its tensors is taken off again."""
        return

    def metrics(self) -> dict[str, float]:
        """What the record of an epoch says of the method itself."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What the method remembers beside the model and the optimizer: saved with them when a run is stopped."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` returned."""
        return


def train_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Only ``parameters`` of ``model`` require gradients from now on. Returns each of them once."""
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    return list(dict.fromkeys(parameters))


def scores_of(model: nn.Module) -> list[nn.Parameter]:
    """The scores of the pruned layers of ``model``, each once."""
    return list(dict.fromkeys(layer.scores for layer in pruned_layers(model).values()))


def listen(model: nn.Module, listener: Callable[[Pruned, Tensor], None]) -> list[RemovableHandle]:
    """Calls ``listener(layer, grad)`` in every backward for each pruned layer, with the gradient of its masked weight."""

    def of(layer: Pruned) -> Callable[[Tensor, Tensor], None]:
        return lambda scores, grad: listener(layer, grad)

    return [layer.mask_state.listen(of(layer)) for layer in pruned_layers(model).values()]


def batchnorm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales and shifts of the BatchNorm layers of ``model``."""
    return [p for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()]
