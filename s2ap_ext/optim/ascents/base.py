"""What an ascent has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...parts import Part
from ...settings import key


class Step(Protocol):
    """What an ascent sees of the step in progress: a :class:`s2ap_ext.optim.Perturbed`, which explains each."""

    model: nn.Module
    gamma: Any
    epoch: int | None
    epochs: int | None
    base_optimizer: torch.optim.Optimizer
    given: Mapping[str, Tensor] | None

    def move(self, along: Mapping[str, Tensor] | None = None, gamma: Any = None) -> None: ...

    def back(self) -> None: ...

    def unchanged(self) -> bool: ...

    def gradients(self) -> dict[str, Tensor]: ...

    def perturbed_parameters(self) -> dict[str, nn.Parameter]: ...


class Ascent(Part, ABC):
    """How one perturbed step goes: which backward passes it makes, and when, along what and how far it moves between them.

    A subclass writes that down as a program, :meth:`step`. An ascent that keeps something from step to step says so in :meth:`state`, and
    a run that was stopped goes on with the same bits. An ascent belongs to one optimizer.
    """

    kind = "ascent"
    wants_gradients: ClassVar[bool] = False  # whether the caller of the optimizer's step has to give gradients, as ``at.given``

    @abstractmethod
    def step(self, at: Step, backward: Callable[[], Tensor]) -> None:
        """All of a step but its end. Called under ``torch.no_grad()``, and not in plain steps (warm-up, gamma 0).

        When it returns, the model is moved back, if it was moved, and the base optimizer steps with the gradients that are there.

        Args:
            at: the step in progress. ``at.move(along, gamma)`` moves the model, once unless ``at.back()`` takes that back;
                ``at.gradients()`` are the present gradients and may be written into; ``at.model``, ``at.gamma``, ``at.epoch`` (of
                ``at.epochs``), ``at.perturbed_parameters()`` and ``at.base_optimizer`` tell the rest. After a move, ``at.unchanged()`` says
                whether a second pass would be the first again.
            backward: clears the gradients, computes those of the loss where the model stands, and returns the loss, detached. It has to be
                called at least once. The optimizer's ``step`` returns the loss of the first call.
        """

    def state(self) -> dict[str, Tensor]:
        """What has to be saved for going on later; as a rule nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` returned, on any device.

        Raises:
            ValueError: a state that another kind of ascent has left.
        """
        self._read(state)

    def _read(self, state: Mapping[str, Tensor], *names: str, by_parameter: str = "") -> dict[str, Tensor]:
        """Checks that ``state`` holds ``names``, and beside them only tensors called ``by_parameter.NAME``; returns those by NAME."""
        prefix = f"{by_parameter}."
        found = {name.removeprefix(prefix): value for name, value in state.items() if by_parameter and name.startswith(prefix)}
        others = [name for name in state if not (by_parameter and name.startswith(prefix))]
        if sorted(others) != sorted(names):
            expected = ", ".join([*names, *([f"{prefix}NAME"] if by_parameter else [])]) or "no saved state"
            raise ValueError(f"ascent {self.name or type(self).__name__}: expected {expected}, got {', '.join(state) or 'none'}")
        return found


class Climb(Ascent):
    """What the ascents share that, in some steps, take a second backward pass at a point above the first."""

    @dataclass(frozen=True)
    class Settings:
        skip: bool = key(False, "leave the second pass out where no mask entry flipped and no score changed its sign")

    def climb(self, at: Step, backward: Callable[[], Tensor], along: Mapping[str, Tensor] | None = None) -> None:
        """Moves ``along`` the gradients of the first backward (or others), and makes the second where it has something to tell."""
        at.move(along)
        if not (self.settings.skip and at.unchanged()):
            backward()
