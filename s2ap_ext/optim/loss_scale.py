"""A loss scale for training in half precision (fp16), where small gradients would vanish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .._files import check_tensors


class Overflow(ArithmeticError):
    """A backward has given gradients that are not finite, so that its step must not be taken."""


class LossScale:
    """A dynamic loss scale: the loss is multiplied by it before each backward, and the gradients are divided by it right after.

    So every step sees gradients of the loss itself, and what it makes of them, such as the perturbation of S2AP or AWP, does not depend on
    the scale. Scales are powers of two, by which no float32 gradient is rounded. A backward whose gradients are not finite ends the step
    with :class:`Overflow`: a :class:`s2ap_ext.optim.Stepper` then moves scores or weights back to where they were and takes no step. The
    scale falls by half after such a step, and is doubled after ``interval`` steps without one. Looking at the gradients waits for the
    device, once per backward.

    The gradients must be where the base optimizer looks for them, so S2AP must not defer them (``defer_grads=False``).

    Args:
        scale: the first scale, a power of two.
        interval: steps from one doubling to the next.

    Attributes:
        scale: the present one.

    Raises:
        ValueError: ``scale`` is not a power of two from 1 on; ``interval`` below 1.

    Source: Micikevicius et al., Mixed precision training, arXiv 1710.03740; start and interval are those of ``torch.amp.GradScaler``.
    It cannot serve here: it unscales once per step, and a step of S2AP or AWP has two backwards.

    Equivalent to::

        (loss * scale).backward()
        for p in parameters:
            p.grad /= scale
    """

    LARGEST = 2.0**24

    def __init__(self, scale: float = 2.0**16, interval: int = 2000) -> None:
        if scale < 1 or torch.frexp(torch.tensor(scale, dtype=torch.float64)).mantissa != 0.5:
            raise ValueError(f"scale: expected a power of two from 1 on, got {scale}")
        if interval < 1:
            raise ValueError(f"interval: expected an integer >= 1, got {interval}")
        self.scale, self.interval = scale, interval
        self._good = 0  # steps since the scale last changed

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """The backward of ``loss``, with gradients of the loss itself in ``parameters``, which had none before.

        Raises:
            Overflow: a gradient is not finite.
            FloatingPointError: the loss itself is not finite: no scale can help.
        """
        if not loss.isfinite():
            raise FloatingPointError(f"loss: expected a finite number, got {loss.item()}; lower the learning rate")
        (loss * self.scale).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.scale)
        if gradients and not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            raise Overflow(f"gradients that are not finite at a loss scale of {self.scale:g}")

    def update(self, *, overflowed: bool) -> None:
        """What follows each step, taken or not.

        Raises:
            FloatingPointError: the gradients overflow without any scale.
        """
        self._good = 0 if overflowed else self._good + 1
        if overflowed and self.scale <= 1:
            raise FloatingPointError("gradients: expected finite numbers, got others even at a loss scale of 1; train in bf16 or fp32")
        if overflowed:
            self.scale /= 2
        elif self._good == self.interval:
            self.scale, self._good = min(2 * self.scale, self.LARGEST), 0

    def state(self) -> dict[str, Tensor]:
        """What has to be saved for going on later with the same bits."""
        return {"scale": torch.tensor(self.scale, dtype=torch.float64), "good": torch.tensor(self._good)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` returned; raises ValueError for anything else."""
        check_tensors(state, self.state(), "loss scale: not a state of its own")
        self.scale, self._good = float(state["scale"]), int(state["good"])
