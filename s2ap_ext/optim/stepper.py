"""The interface that all training steps share, and the plain step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import pruned_layers
from ..nn.selection import check_scores
from ..settings import shown


class Stepper(ABC):
    """What a training loop asks of its optimizer.

    Args:
        model: the module that is trained.
        base_optimizer: steps on whatever it holds. Its parameters may also lie outside the model.

    Attributes:
        epoch, epochs: what :meth:`set_epoch` has told; None before.
        passes: how many backward passes the last :meth:`step` made.

    Raises:
        TypeError: ``base_optimizer`` is not a ``torch.optim.Optimizer``.
    """

    def __init__(self, model: nn.Module, base_optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer: expected a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        self.model = model
        self.base_optimizer = base_optimizer
        self.epoch: int | None = None
        self.epochs: int | None = None
        self.passes = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @property
    def flips(self) -> int:
        """Mask entries that the last step's perturbation flipped, over all layers; 0 where the scores are not perturbed."""
        return sum(self.layer_flips().values())

    def layer_flips(self) -> dict[str, int]:
        """The same layer by layer; none where the scores are not perturbed. Waits for the device."""
        return {}

    def gammas(self) -> dict[str, float]:
        """By layer, the size of the perturbation of the scores; none where the present steps perturb no scores. Waits for the device."""
        return {}

    def set_epoch(self, epoch: int, epochs: int | None = None) -> None:
        """Tells which epoch it is, counted from 0, and of how many, which some ascents want to know."""
        self.epoch, self.epochs = epoch, epochs

    def wanted_gradients(self) -> dict[str, nn.Parameter]:
        """The parameters, by name, whose gradients the next :meth:`step` has to be given as ``along``; as a rule there are none."""
        return {}

    def zero_grad(self) -> None:
        """Clears the gradients of the model and of everything the base optimizer holds."""
        self.model.zero_grad()
        self.base_optimizer.zero_grad()

    def step(self, closure: Callable[[], Tensor], along: Mapping[str, Tensor] | None = None) -> Tensor:
        """One training step.

        Args:
            closure: clears the gradients (:meth:`zero_grad`), computes the loss, calls backward and returns the loss. A step may call it
                more than once, on the same minibatch, so craft the adversarial examples before.
            along: gradients of what :meth:`wanted_gradients` names, taken before the step, such as those of
                :meth:`s2ap_ext.attacks.Attack.with_gradients`. A step that wants none passes over them.

        Returns:
            The loss of the first call, detached.

        Raises:
            FloatingPointError: a loss is NaN. On the CPU it is raised before the base optimizer steps, with the model where it was; on
                CUDA, where looking waits for the device, at the end of the step.
            ValueError: NaN scores, named by layer.
        """
        losses: list[Tensor] = []

        def backward() -> Tensor:
            with torch.enable_grad():
                loss = closure().detach()
            if loss.device.type == "cpu":
                _check_losses(loss)
            losses.append(loss)
            return loss

        with torch.no_grad():
            self._take(backward, along)
            self.passes = len(losses)
            self._check_scores()
            if losses[0].device.type != "cpu":
                _check_losses(torch.stack(losses))
        return losses[0]

    @abstractmethod
    def _take(self, backward: Callable[[], Tensor], along: Mapping[str, Tensor] | None) -> None:
        """Calls ``backward`` at least once, and the base optimizer's step. ``along`` is what :meth:`step` was given."""

    def _check_scores(self) -> None:
        """Looks at the NaN counts of the selections in force: on the CPU that was done already, on CUDA it waits for the device."""
        check_scores(pruned_layers(self.model).values())

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, and the epoch. What the constructor takes is given anew at construction."""
        return {"base_optimizer": self.base_optimizer.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` returned."""
        self.base_optimizer.load_state_dict(state["base_optimizer"])
        self.epoch = state["epoch"]

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as tensors by name, for files that hold nothing else. The groups (learning rates and the like) are not in it.

        Returns:
            The tensors of the base optimizer's state by ``index.name``, index being the parameter's place in its groups.

        Raises:
            TypeError: the base optimizer keeps state that is neither a tensor nor None.
        """
        tensors = {}
        for index, entries in self.base_optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{name}"] = value
                elif value is not None:
                    kind = type(self.base_optimizer).__name__
                    raise TypeError(f"base_optimizer: expected a state of tensors, {kind} keeps {name} as {type(value).__name__}")
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_tensors` returned. The groups stay as they are.

        Raises:
            ValueError: a name that does not belong to a parameter of the base optimizer, or a tensor that has not its shape.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, entry = name.partition(".")
            if not (index.isdecimal() and len(index) < 10 and int(index) < len(parameters) and entry):
                raise ValueError(f"optimizer state: expected index.name with an index below {len(parameters)}, got {shown(name)}")
            shape = torch.Size() if entry == "step" else parameters[int(index)].shape  # torch's optimizers count steps in scalars
            if value.shape != shape:
                raise ValueError(f"optimizer state: expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")
            state.setdefault(int(index), {})[entry] = value
        self.base_optimizer.load_state_dict({"state": state, "param_groups": self.base_optimizer.state_dict()["param_groups"]})


class Plain(Stepper):
    """The base optimizer's own step.

    Args and errors are those of :class:`Stepper`.

    Equivalent to::

        loss = closure()
        base_optimizer.step()
    """

    def _take(self, backward: Callable[[], Tensor], along: Mapping[str, Tensor] | None) -> None:
        backward()
        self.base_optimizer.step()


def _check_losses(losses: Tensor) -> None:
    if losses.isnan().any():
        raise FloatingPointError("loss: expected a number, got NaN; lower the learning rate, or look at the data")
