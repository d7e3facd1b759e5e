"""What all steps share that take their gradient at a perturbed point: moving there and back, by an ascent or by hand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._arguments import check_size
from ..parts import make
from .ascents import Ascent
from .ascents.exact import Exact
from .stepper import Stepper


class Perturbed(Stepper):
    """A step whose gradient is taken at a perturbed point ``p + v``, with ``v`` along a gradient and its size relative to ``p``.

    :meth:`step` leaves the order of the step to an :class:`Ascent`, which uses :meth:`move`, :meth:`gradients` and
    :meth:`perturbed_parameters`. With :meth:`ascend` and :meth:`descend` the caller makes the two backward passes. BatchNorm statistics
    move with the first forward of a step only.

    Args:
        model, base_optimizer: as for :class:`Stepper`. What the base optimizer holds beside the perturbed parameters is stepped with its
            gradient at the perturbed point, and not moved.
        ascent: the name of a registered ascent, or an ascent.
        eps: added to the gradient's norm.
        warmup_epochs: plain steps in so many first epochs; :meth:`set_epoch` tells which it is.

    Raises:
        ValueError: ``eps`` or ``warmup_epochs`` negative or not finite; an unknown ``ascent``.
        TypeError: ``base_optimizer`` is not a ``torch.optim.Optimizer``, or ``ascent`` neither a text nor an :class:`Ascent`.
    """

    gamma: Any  # the size of the perturbation relative to what is perturbed; its form is the subclass's
    given: Mapping[str, Tensor] | None = None  # during a step, the gradients that it was given

    def __init__(
        self, model: nn.Module, base_optimizer: torch.optim.Optimizer, *, ascent: str | Ascent, eps: float, warmup_epochs: int
    ) -> None:
        super().__init__(model, base_optimizer)
        check_size("eps", eps)
        check_size("warmup_epochs", warmup_epochs)
        if not isinstance(ascent, (str, Ascent)):
            raise TypeError(f"ascent: expected a name or an Ascent, got {type(ascent).__name__}")
        self.ascent: Ascent = make("ascent", ascent) if isinstance(ascent, str) else ascent
        self.eps = eps
        self.warmup_epochs = warmup_epochs
        self._moved = False
        self._statistics: Statistics | None = None  # between ascend() and descend()

    @property
    def plain(self) -> bool:
        """Whether a step is the base optimizer's own: ``gamma`` is 0, or the epoch is one of the warm-up."""
        if self.warmup_epochs and self.epoch is None:
            raise RuntimeError(f"warmup_epochs is {self.warmup_epochs}: call set_epoch(epoch) at the start of each epoch")
        return self._gamma_is_zero() or (self.epoch is not None and self.epoch < self.warmup_epochs)

    # By hand

    @torch.no_grad()
    def ascend(self) -> None:
        """Moves the model to the perturbed point, using the gradients that the first backward left, and clears them.

        BatchNorm statistics have moved with the first forward; what the second adds is taken back by :meth:`descend`.

        Raises:
            RuntimeError: called twice, or without a backward before; the ascent is not ``exact``, so only :meth:`step` can follow it.
        """
        if self._statistics is not None:
            raise RuntimeError("ascend() was called twice; call descend() first")
        if not isinstance(self.ascent, Exact):
            raise RuntimeError(f"ascend(): {type(self.ascent).__name__} decides itself when and where to move; call step(closure)")
        self._begin()
        if not self.plain:
            self.move()
        self._statistics = Statistics(self.model)
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        """Moves the model back, exactly, and takes one step of the base optimizer with the gradients of the second backward.

        Raises:
            RuntimeError: called without :meth:`ascend`.
            ValueError: NaN scores, named by layer.
        """
        if self._statistics is None:
            raise RuntimeError("descend() was called without ascend()")
        self._statistics.restore()
        self._statistics = None
        self._finish()
        self._check_scores()

    # By an ascent

    def wanted_gradients(self) -> dict[str, nn.Parameter]:
        """The perturbed parameters, where the ascent takes the direction from the caller and the next step is not a plain one."""
        return self.perturbed_parameters() if self.ascent.wants_gradients and not self.plain else {}

    def _take(self, backward: Callable[[], Tensor], along: Mapping[str, Tensor] | None) -> None:
        if self._statistics is not None:
            raise RuntimeError("step() was called between ascend() and descend(); call descend() first")
        plain = self.plain
        self._begin()
        self.given = along
        try:
            passes = _Backward(self.model, backward)
            if plain:
                passes()
            else:
                self.ascent.step(self, passes)
            if not passes.count:
                raise RuntimeError(f"ascent: {type(self.ascent).__name__} has called no backward in its step")
        except BaseException:
            self._moved = False
            self._return()
            raise
        finally:
            self.given = None
        self._finish()

    @torch.no_grad()
    def move(self, along: Mapping[str, Tensor] | None = None, gamma: Any = None) -> None:
        """Moves the model to the perturbed point, once in a step unless :meth:`back` takes it back.

        For ascents; :meth:`ascend` is the one to call by hand.

        Args:
            along: the directions, by the names of :meth:`perturbed_parameters`; parameters without one stay. None: the gradients that
                the last backward left.
            gamma: in place of the optimizer's own, and of the form of ``self.gamma``.

        Raises:
            RuntimeError: the model has moved already, or there is no direction to move along.
            ValueError: a name in ``along`` is not that of a perturbed parameter.
        """
        if self._moved:
            raise RuntimeError("move(): the model has moved in this step already")
        directions = None
        if along is not None:
            known = self.perturbed_parameters()
            if strange := [name for name in along if name not in known]:
                raise ValueError(f"along: expected names of perturbed parameters, got {strange[0]!r}; there are {', '.join(known)}")
            directions = {known[name]: direction for name, direction in along.items()}
        self._move(directions, gamma)
        self._moved = True

    @torch.no_grad()
    def back(self) -> None:
        """Takes the move back, exactly, so that another one can follow in the same step. For ascents that look where a move would lead.

        Raises:
            RuntimeError: the model has not moved.
        """
        if not self._moved:
            raise RuntimeError("back(): the model has not moved in this step")
        self._moved = False
        self._return()

    @abstractmethod
    def perturbed_parameters(self) -> dict[str, nn.Parameter]:
        """What is perturbed, by the names of ``model.named_parameters()``."""

    def unchanged(self) -> bool:
        """Whether the move has for certain changed neither the loss nor its gradient. Here it never knows."""
        return False

    def gradients(self) -> dict[str, Tensor]:
        """The present gradients of the perturbed parameters, by name; those without a gradient are left out.

        They are the ``.grad`` tensors themselves: what is written into them in place is what the base optimizer steps with. Clone what
        should outlive the next backward.
        """
        return {name: p.grad for name, p in self.perturbed_parameters().items() if p.grad is not None}

    # What a subclass says

    @abstractmethod
    def _gamma_is_zero(self) -> bool:
        """Whether nothing would move. Does not wait for the device."""

    @abstractmethod
    def _move(self, along: dict[nn.Parameter, Tensor] | None, gamma: Any | None) -> None:
        """Moves the model; None means along the present gradients, and by the optimizer's own gamma."""

    @abstractmethod
    def _return(self) -> None:
        """Moves the model back, if it was moved."""

    def _return_and_step(self) -> None:
        """Moves the model back, if it was moved, and steps."""
        self._return()
        self.base_optimizer.step()

    def _begin(self) -> None:
        """Forgets what is told about the last step."""

    def _finish(self) -> None:
        self._moved = False
        self._return_and_step()

    # State

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, the epoch and the ascent's state.

        Raises:
            RuntimeError: called between :meth:`ascend` and :meth:`descend`.
        """
        self._check_at_rest("state_dict")
        return super().state_dict() | {"ascent": self.ascent.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ascent.load_state(state["ascent"])

    def state_tensors(self) -> dict[str, Tensor]:
        """As :meth:`Stepper.state_tensors`, and the ascent's state by ``ascent.name``.

        Raises:
            RuntimeError: called between :meth:`ascend` and :meth:`descend`.
        """
        self._check_at_rest("state_tensors")
        return super().state_tensors() | {f"{ASCENT}{name}": value for name, value in self.ascent.state().items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_tensors({name: value for name, value in tensors.items() if not name.startswith(ASCENT)})
        self.ascent.load_state({name.removeprefix(ASCENT): value for name, value in tensors.items() if name.startswith(ASCENT)})

    def _check_at_rest(self, method: str) -> None:
        if self._statistics is not None:
            raise RuntimeError(f"{method}() was called between ascend() and descend(); call descend() first")


ASCENT = "ascent."


class Statistics:
    """The BatchNorm statistics of the modules in training mode: what they are now, to take back what a forward adds."""

    def __init__(self, model: nn.Module) -> None:
        self._values = [
            (buffer, buffer.clone())
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.training
            for buffer in module.buffers(recurse=False)
        ]

    def restore(self) -> None:
        for buffer, value in self._values:
            buffer.copy_(value)


class _Backward:
    """The closure of one step. BatchNorm statistics move with its first call only."""

    def __init__(self, model: nn.Module, backward: Callable[[], Tensor]) -> None:
        self.model, self.backward = model, backward
        self.count = 0

    def __call__(self) -> Tensor:
        first = self.count == 0
        self.count += 1
        statistics = None if first else Statistics(self.model)
        try:
            return self.backward()
        finally:
            if statistics is not None:
                statistics.restore()
