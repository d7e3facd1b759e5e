"""Where one step of a mask search goes: the measurements behind ``s2ap profile --step``."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # torch does not list it
from torch.profiler import ProfilerActivity, profile, record_function

from ..baselines import SELECTION, mask_every_forward
from ..data import Batches, Dataset
from ..methods.base import batchnorm_parameters
from ..nn import refresh
from ..speed import in_turn, peak_extra_bytes
from .model_file import new_model
from .runner import reproducible
from .sections import Recipe
from .stages import start_search

PHASES = ("data", "attack", "forward", "backward", "select", "perturb", "update")
MARK = "step: "  # what the names of phases start with in the profiler's events
# What else is known by its name: kernels of this package, torch's optimizers, and the masks of the other form.
KNOWN = {"s2ap::select": "select", "s2ap::sparse_pattern": "select", SELECTION: "select", "s2ap::perturb": "perturb"}
KNOWN |= {"s2ap::update": "update", "s2ap::update_select": "update"}
GAMMA = 1e-3  # of the other form's S2AP, where the recipe gives a budget of flips


@dataclass(frozen=True)
class StepCost:
    """What a step takes.

    Attributes:
        form: whose step it is.
        phases: milliseconds of each phase, without those of phases within it, as the profiler sees them.
        step: milliseconds of the whole step without the profiler, the median of several.
        peak: bytes in use at the step's peak beyond those before it; None where the system does not tell.
    """

    form: str
    phases: dict[str, float]
    step: float
    peak: int | None


def profile_step(recipe: Recipe, data: Dataset, *, batch: int | None = None, steps: int = 3) -> list[StepCost]:
    """Measures a step of the recipe's mask search after its warm-up, and the same in the form that sorts all scores in every forward.

    The other form trains the scores and BatchNorm on uniformly pruned single weights, and its steps are plain or those of S2AP's exact
    ascent, as the recipe says.

    Args:
        batch: images of a step; None: as the recipe says.
        steps: how many the profiler looks at, at least 1.

    Raises:
        ValueError: a recipe whose model, data or method do not fit each other.
    """
    forms: list[_Step] = [_Ours(recipe, data, batch), _Sorting(recipe, data, batch)]
    with reproducible(recipe):
        times = in_turn([form.whole for form in forms])
        return [
            StepCost(form.name, _phases(form, steps), 1e3 * seconds, peak_extra_bytes(form.whole, form.device))
            for form, seconds in zip(forms, times, strict=True)
        ]


class _Step(ABC):
    """A step that can be taken again and again, with its phases marked."""

    name: str

    def __init__(self, recipe: Recipe, data: Dataset, batch: int | None) -> None:
        self.settings = recipe.prune
        self.model = new_model(recipe, data)
        self.device = next(self.model.parameters()).device
        self.loss = self.settings.loss.make(adversary=recipe.attack.make(), label_smoothing=self.settings.label_smoothing)
        size, shift, flip = batch or self.settings.batch_size, recipe.data.shift, recipe.data.flip
        batches = Batches(data.train, size, device=self.device, seed=recipe.seed, shift=shift, flip=flip)
        self._batches: Iterator[tuple[Tensor, Tensor]] = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))

    def whole(self) -> None:
        """One step, which is over when this returns, also on CUDA."""
        self.model.train()
        with self.phase("data"):
            x, y = next(self._batches)
        self.take(x, y)
        self._wait()

    @abstractmethod
    def take(self, x: Tensor, y: Tensor) -> None:
        """The step itself, on one minibatch."""

    def phase(self, name: str) -> Any:
        """Marks what is done within it. Nothing that was asked for before is still running when it begins."""
        self._wait()
        return record_function(f"{MARK}{name}")

    def passes(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """A forward and a backward pass; the loss."""
        with self.phase("forward"):
            loss, _ = self.loss(self.model, x, x_adv, y)
            self._wait()
        with self.phase("backward"):
            loss.backward()
            self._wait()
        found: Tensor = loss
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Ours(_Step):
    """The step that training takes."""

    name = "s2ap_ext"

    def __init__(self, recipe: Recipe, data: Dataset, batch: int | None) -> None:
        super().__init__(recipe, data, batch)
        self.method, self.stepper = start_search(recipe, self.model, data.shape)
        self.stepper.set_epoch(self.settings.warmup_epochs, max(self.settings.epochs, self.settings.warmup_epochs + 1))

    def take(self, x: Tensor, y: Tensor) -> None:
        with self.phase("select"):
            refresh(self.model)
        wanted, along = self.stepper.wanted_gradients(), None
        with self.phase("attack"):
            if wanted:
                x_adv, along = self.loss.attack_with_gradients(self.model, x, y, wanted)
            else:
                x_adv = self.loss.attack(self.model, x, y)
            self._wait()

        def closure() -> Tensor:
            self.stepper.zero_grad()
            return self.passes(x, x_adv, y)

        self.stepper.step(closure, along)
        self.method.after_step(self.model)


class _Sorting(_Step):
    """The same in the form of the research code: in every forward each layer sorts its scores."""

    name = "sorting in every forward"

    def __init__(self, recipe: Recipe, data: Dataset, batch: int | None) -> None:
        super().__init__(recipe, data, batch)
        mask_every_forward(self.model, self.settings.sparsity)
        self.model.to(self.device)
        self.scores = [p for name, p in self.model.named_parameters() if name.endswith(".scores")]
        trained = [*self.scores, *batchnorm_parameters(self.model)]
        self.model.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        self.optimizer = torch.optim.SGD(
            trained, lr=self.settings.lr, momentum=self.settings.momentum, weight_decay=self.settings.weight_decay
        )
        self.gamma = self.settings.gamma if isinstance(self.settings.gamma, float) else GAMMA

    def take(self, x: Tensor, y: Tensor) -> None:
        with self.phase("attack"):
            x_adv = self.loss.attack(self.model, x, y)
            self._wait()
        self.optimizer.zero_grad()
        self.passes(x, x_adv, y)
        if self.settings.s2ap:
            with self.phase("perturb"), torch.no_grad():
                before = [s.clone() for s in self.scores]
                for s, grad in [(s, s.grad) for s in self.scores]:
                    if grad is not None:
                        s.add_(grad * (self.gamma * s.norm() / (grad.norm() + 1e-12)))
                self._wait()
            self.optimizer.zero_grad()
            self.passes(x, x_adv, y)
            with self.phase("perturb"), torch.no_grad():
                for s, value in zip(self.scores, before, strict=True):
                    s.copy_(value)
                self._wait()
        with self.phase("update"):
            self.optimizer.step()
            self._wait()


def _phases(form: _Step, steps: int) -> dict[str, float]:
    """Milliseconds per step of each phase, without those of the phases within it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if form.device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            form.whole()
    spent = dict.fromkeys(PHASES, 0.0)
    for event in found.events() or ():
        phase = _phase_of(event)
        if phase is None:
            continue
        taken = _microseconds(event, form.device)
        spent[phase] += taken
        above = event.cpu_parent
        while above is not None and _phase_of(above) is None:
            above = above.cpu_parent
        if above is not None:
            outer = _phase_of(above)
            assert outer is not None
            spent[outer] -= taken
    return {phase: max(value, 0.0) / 1e3 / steps for phase, value in spent.items()}


def _phase_of(event: Any) -> str | None:
    """The phase that an event of the profiler's belongs to by its name."""
    if event.device_type != DeviceType.CPU:
        return None
    name = str(event.name)
    if name.startswith(MARK):
        return name.removeprefix(MARK)
    return "update" if name.startswith("Optimizer.step#") else KNOWN.get(name)


def _microseconds(event: Any, device: torch.device) -> float:
    """The time of an event: of a phase, which waits for the device, the host's; of a kernel on CUDA the device's."""
    on_device = device.type == "cuda" and str(event.name).startswith("s2ap::")
    return float(event.device_time_total if on_device else event.cpu_time_total)
