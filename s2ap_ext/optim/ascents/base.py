"""What an ascent has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...parts import Part

if TYPE_CHECKING:
    from ..perturbed import Perturbed


class Ascent(Part, ABC):
    """How one perturbed step goes: which backward passes it makes, and when, along what and how far it moves between them.

    A subclass writes that down as a program, :meth:`step`. An ascent that keeps something from step to step says so in :meth:`state`, and
    a run that was stopped goes on with the same bits. An ascent belongs to one optimizer.
    """

    kind = "ascent"

    @abstractmethod
    def step(self, at: Perturbed, backward: Callable[[], Tensor]) -> None:
        """All of a step but its end. Called under ``torch.no_grad()``, and not in plain steps (warm-up, gamma 0).

        When it returns, the model is moved back, if it was moved, and the base optimizer steps with the gradients that are there.

        Args:
            at: the step in progress. ``at.move(along, gamma)`` moves the model, at most once; ``at.gradients()`` are the present gradients
                and may be written into; ``at.gamma``, ``at.epoch``, ``at.perturbed_parameters()`` and ``at.base_optimizer`` tell the
                rest. After a move, ``S2AP.changes()`` counts what it changed.
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
        if state:
            raise ValueError(f"ascent {self.name or type(self).__name__}: expected no saved state, got {', '.join(state)}")
