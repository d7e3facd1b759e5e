"""Weights averaged over training, and BatchNorm statistics that fit them.

Between them they give the model that a training ends with::

    average = WeightAverage(model, decay=0.9995)
    for x, y in batches:
        ...
        optimizer.step()
        average.update()
    with average.swapped():
        reestimate_batchnorm(model, images)
        evaluate(model)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modes import evaluation_mode

__all__ = ["WeightAverage", "reestimate_batchnorm"]


class WeightAverage:
    """An exponential moving average of a model's parameters: after n updates, with the parameters w_i at the i-th, ::

        sum of decay**(n - i) * w_i  /  sum of decay**(n - i)

    So where the training started has no weight, and the first updates need no warm-up: as long as n is small beside 1 / (1 - decay)
    this is the plain mean of all w_i. Averaged are the floating-point parameters that require a gradient when the object is made, in at
    least float32, where steps of 1 - decay do not vanish in rounding. BatchNorm statistics are not: see :func:`reestimate_batchnorm`.

    Args:
        model: the model that is trained. Its parameters stay the same objects from here on: prune it before, not after.
        decay: the share of the average that an update keeps, in [0, 1). 0.9995 is usual for a hundred epochs.

    Raises:
        ValueError: ``decay`` out of range.

    Source: Izmailov et al., arXiv 1803.05407 (averages of weights); Gowal et al., arXiv 2010.03593 (moving ones in adversarial training).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9995) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.model, self.decay, self.updates = model, decay, 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
        self._averages = {name: p.detach().to(_precision(p), copy=True) for name, p in self._parameters.items()}
        self._is_swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters as they are now: to be called after each step of the optimizer.

        Raises:
            RuntimeError: the averages themselves are in the model (:meth:`swapped`).
        """
        if self._is_swapped:
            raise RuntimeError("update() was called within swapped(), where the model holds the averages")
        self.updates += 1
        # The share of the newest parameters in the normalised sum. The first is 1, and they fall towards 1 - decay.
        share = (1 - self.decay) / -math.expm1(self.updates * math.log(self.decay)) if self.decay else 1.0
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].to(average), share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model holds the averages; after it, bit for bit, the parameters and BatchNorm statistics that it had before.

        The averages are written in place, so pruned layers select their masks for them, and anew afterwards. Before the first
        update they are the parameters that the model started with.
        """
        norms = [buffer for module in self.model.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers(recurse=False)]
        saved = [(t, t.detach().clone()) for t in (*self._parameters.values(), *norms)]
        was_swapped, self._is_swapped = self._is_swapped, True
        try:
            with torch.no_grad():
                for name, average in self._averages.items():
                    self._parameters[name].copy_(average)
            yield
        finally:
            self._is_swapped = was_swapped
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)

    @torch.no_grad()
    def keep(self) -> None:
        """Puts the averages into the model for good: what ends a training."""
        for name, average in self._averages.items():
            self._parameters[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, and the number of updates: with it a training that was stopped goes on to the same bits."""
        return {f"average/{name}": t for name, t in self._averages.items()} | {"updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` returned; raises ValueError if it is of other parameters than this model's."""
        expected = {name: t.shape for name, t in self.state().items()}
        if different := sorted(expected.keys() ^ tensors.keys()):
            raise ValueError(f"averages: expected those of this model's parameters, but only one of both has {', '.join(different)}")
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(f"averages: expected {name} of shape {tuple(shape)}, got {tuple(tensors[name].shape)}")
        if (updates := int(tensors["updates"])) < 0:
            raise ValueError(f"averages: expected a number of updates >= 0, got {updates}")
        for name, average in self._averages.items():
            average.copy_(tensors[f"average/{name}"])
        self.updates = updates


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Sets BatchNorm's running statistics to their exact mean over some batches, for weights that they were not gathered with.

    Those layers normalise with each batch's own statistics, as in training; all other modules are in evaluation mode, so that the
    statistics are those of the network that will be evaluated and no dropout draws random numbers. Each batch counts alike, whatever its
    size, and earlier statistics count nothing.

    Args:
        model: the model, in training mode. BatchNorm layers that are in evaluation mode count as frozen and keep their statistics, as do
            those that track none.
        batches: images [N, ...], clean or adversarial, whichever the statistics shall be those of. Adversarial ones have to be there
            before the call: while it runs the statistics that an attack would see are incomplete.

    Returns:
        The number of layers whose statistics were set. Their ``num_batches_tracked`` is then the number of batches; their momentum and
        all modes are as before.

    Raises:
        ValueError: no batches. As after any exception, all statistics are then as before.

    Equivalent to::

        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average
        for x in batches:
            model(x)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, [(buffer, buffer.clone()) for buffer in norm.buffers(recurse=False)]) for norm in norms]
    count = 0
    try:
        with evaluation_mode(model, freeze=False):
            for norm in norms:
                norm.training, norm.momentum = True, None
                norm.reset_running_stats()
            for x in batches:
                model(x)
                count += 1
        if not count:
            raise ValueError("batches: expected at least one batch of images, got none")
    except BaseException:
        for _, buffers in before:
            for buffer, value in buffers:
                buffer.copy_(value)
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
    return len(norms)


def _precision(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
