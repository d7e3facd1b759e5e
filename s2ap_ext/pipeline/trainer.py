"""The training loop of every stage: batches, clock, records, stopping and going on.

It knows a loss, a stepper, a model, and :class:`Callbacks` for what a stage does besides; it does not know which stage it trains.

Randomness: every batch starts from a seed of its own, made of the recipe's seed, the stage, the epoch and the number of the batch. So the
same recipe gives the same bits on the same machine, and a stage that was stopped between two batches goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import accuracy, pgd
from ..averaging import WeightAverage, reestimate_batchnorm
from ..data import Batches, Dataset, seeded_generator
from ..losses import Loss
from ..nn import matmul_precision, refresh
from ..optim import Overflow, Stepper
from ..settings import shown
from . import checkpoint, progress
from .drift import Drift
from .forwards import forwards, loss_scale
from .model_file import RECENT, identity
from .plan import number_of
from .progress import Stopped
from .run_folder import METRICS, RunFolder
from .sections import Recipe, Training


@dataclass
class Session:
    """What the stages share.

    Attributes:
        recipe: what to do.
        data: the images.
        folder: where everything is written.
        show: how progress is shown.
        stop: asked after every batch; when it says True the run is saved and :class:`Stopped` raised.
    """

    recipe: Recipe
    data: Dataset
    folder: RunFolder
    show: progress.Silent = field(default_factory=progress.Silent)
    stop: Callable[[], bool] = lambda: False

    @functools.cached_property
    def identity(self) -> str:
        """What tells this run from others (:func:`.model_file.identity`)."""
        return identity(self.recipe, self.data)


class Callbacks:
    """What a stage does besides training; here nothing."""

    def start_epoch(self) -> None:
        """An epoch begins."""

    def around_step(self) -> AbstractContextManager[None]:
        """What a step runs in, from its attack on."""
        return contextlib.nullcontext()

    def penalty(self, epoch: int) -> Tensor | None:
        """A term that is added to the loss, with its graph."""
        return None

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def metrics(self) -> dict[str, Any]:
        """What the record of an epoch tells besides losses and accuracies."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What must be saved for the stage to go on in the middle of an epoch."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state` returned."""


@dataclass
class EpochProgress:
    """How far a stage has come, with the sums of the epoch so far."""

    epoch: int = 0  # from 0
    batch: int = 0
    images: int = 0
    loss: float = 0.0  # sum over images
    right: int = 0  # of the attacked training images
    seconds: float = 0.0

    @classmethod
    def read(cls, table: Any, epochs: int, batches: int) -> EpochProgress:
        """What ``asdict`` gave; raises ValueError for anything that is no place in a stage of so many epochs of so many batches."""
        types = {f.name: type(f.default) for f in fields(cls)}
        fits = isinstance(table, dict) and table.keys() == types.keys() and all(type(table[name]) is types[name] for name in types)
        if not fits or min(table.values()) < 0 or table["epoch"] > epochs or table["batch"] > batches:
            raise ValueError(f"progress: expected a place within {epochs} epochs of {batches} batches, got {str(table)[:200]}")
        return cls(**table)


class Trainer:
    """Trains ``model`` in place, from where the session's folder says the stage stands.

    Args:
        session: what the stages share.
        stage: the name of the stage.
        settings: the stage's section of the recipe.
        model: what is trained.
        stepper: holds the parameters that train.
        callbacks: what the stage does besides.
    """

    def __init__(
        self, session: Session, stage: str, settings: Training, model: nn.Module, stepper: Stepper, callbacks: Callbacks | None = None
    ) -> None:
        recipe = session.recipe
        self.session, self.stage, self.settings, self.model, self.stepper = session, stage, settings, model, stepper
        self.callbacks = callbacks or Callbacks()
        self.loss: Loss = settings.loss.make(adversary=recipe.attack.make(), label_smoothing=settings.label_smoothing)
        self.device = next(model.parameters()).device
        self.number = number_of(stage)
        self.forwards, self.watched_forwards = forwards(recipe, model, settings.batch_size)
        self.loss_scale = loss_scale(recipe)
        self.batches = Batches(
            session.data.train,
            settings.batch_size,
            device=self.device,
            seed=1000 * recipe.seed + self.number,  # the stages shuffle each in its own way
            shift=recipe.data.shift,
            flip=recipe.data.flip,
        )
        few = session.data.test.first(recipe.evaluate.images_per_epoch)
        self.watched = Batches(few, recipe.evaluate.batch_size, device=self.device)
        self.average = WeightAverage(model, settings.averaging) if settings.averaging else None
        self.recent: deque[Tensor] = deque(maxlen=RECENT)  # images that the loss has shown the model
        self.drift = Drift(self.watched, len(few))
        self.initial_lr = [group["lr"] for group in stepper.param_groups]
        self.progress = EpochProgress()

    def fit(self) -> None:
        """Trains to the end of the last epoch.

        Raises:
            Stopped: ``session.stop`` said so; the state is saved.
            ValueError: NaN in images or scores.
            FloatingPointError: a loss or a parameter that is not finite; in fp16, gradients that are not, whatever the loss scale.
        """
        resumed = self._restore()
        with matmul_precision(self.session.recipe.precision):
            self._fit(resumed)

    def _fit(self, resumed: bool) -> None:
        show, epochs = self.session.show, self.settings.epochs
        show.start(self.stage, epochs * len(self.batches), self.progress.epoch * len(self.batches) + self.progress.batch)
        try:
            while self.progress.epoch < epochs:
                lr = self._set_lr()
                self.stepper.set_epoch(self.progress.epoch, epochs)
                if not resumed:
                    self.callbacks.start_epoch()
                resumed = False
                self._train_epoch()
                self._check_finite()
                record = self._record(lr)
                self.session.folder.log(record)
                self.progress = EpochProgress(epoch=self.progress.epoch + 1)
                self._store()
                show.epoch(record, epochs)
        finally:
            show.stop()
        if self.average is not None and epochs:
            self.average.keep()
            self._settle_statistics()

    def _train_epoch(self) -> None:
        done, saved = self.progress, time.monotonic()
        self.model.train()
        # From the batch on before which the run was stopped.
        for number, (x, y) in enumerate(self.batches.epoch(done.epoch, done.batch), done.batch):
            started = time.perf_counter()
            seed(self.session.recipe.seed, self.number, done.epoch, number)
            for _ in range(self.loss.replays):
                self._train_step(x, y)
            done.batch += 1
            done.seconds += time.perf_counter() - started
            note = f"loss {done.loss / done.images:.3f}  robust {progress.percent(done.right / done.images)}"
            self.session.show.advance(f"{self.stage} {done.epoch + 1}/{self.settings.epochs}", note)
            stop = self.session.stop()
            if stop or time.monotonic() - saved > self.session.recipe.save_every:
                self._store()
                saved = time.monotonic()
            if stop:
                raise Stopped

    def _train_step(self, x: Tensor, y: Tensor) -> None:
        """One step of the optimizer; the sums take the loss and the logits of the unperturbed point."""
        done = self.progress
        try:
            with self.callbacks.around_step():
                loss, logits, stepped = self._step(x, y)
        except (ValueError, FloatingPointError) as error:
            kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
            raise kind(f"{self.stage}, epoch {done.epoch + 1}, step {done.batch + 1}: {error}") from error
        if stepped:
            self.callbacks.after_step()
            if self.average is not None:
                self.average.update()
        done.images += len(y)
        done.loss += loss * len(y)
        done.right += int((logits.argmax(dim=1) == y).sum())

    def _step(self, x: Tensor, y: Tensor) -> tuple[float, Tensor, bool]:
        """Loss and logits of the unperturbed point, and whether the step was taken: one whose gradients overflow is not."""
        refresh(self.model)
        wanted, along = self.stepper.wanted_gradients(), None
        if wanted:
            x_adv, along = self.loss.attack_with_gradients(self.forwards, x, y, wanted)
        else:
            x_adv = self.loss.attack(self.forwards, x, y)
        first: list[tuple[Tensor, Tensor]] = []
        stepped = True

        def closure() -> Tensor:
            self.stepper.zero_grad()
            loss, logits = self.loss(self.forwards, x, x_adv, y)
            penalty = self.callbacks.penalty(self.progress.epoch)
            if penalty is not None:
                loss = loss + penalty.to(loss.dtype)
            is_first = not first
            if is_first:
                first.append((loss.detach(), logits.detach()))
            if self.loss_scale is None:
                loss.backward()
            else:
                self.loss_scale.backward(loss, [p for group in self.stepper.param_groups for p in group["params"]])
            if is_first:
                self.loss.after_backward(x, x_adv)
            return loss

        try:
            self.stepper.step(closure, along)
        except Overflow:
            stepped = False
        if self.loss_scale is not None:
            self.loss_scale.update(overflowed=not stepped)
        loss, logits = first[0][0].item(), first[0][1]
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite number, got {loss}; lower the learning rate")
        if self._settles:
            self.recent.extend(images.detach() for images in self.loss.images(x, x_adv))
        return loss, logits, stepped

    # ----------------------------------------------------------------------------------------------------------- the end of an epoch

    def _record(self, lr: float) -> dict[str, Any]:
        done, besides = self.progress, self.callbacks.metrics()  # of the model that trains, not of the average
        with self.average.swapped() if self.average is not None else contextlib.nullcontext():
            self._settle_statistics()
            seed(self.session.recipe.seed, 0)
            found = accuracy(self.watched_forwards, self.watched, evaluation_attack(self.session.recipe))
            return {
                "stage": self.stage,
                "epoch": done.epoch + 1,
                "lr": lr,
                "loss": done.loss / done.images,
                "train_robust": done.right / done.images,
                "clean": found.clean,
                "robust": found.robust,
                "seconds": done.seconds,
                "steps": done.batch * self.loss.replays,
                **self.drift.since_last(self.model),
                **besides,
            }

    @property
    def _settles(self) -> bool:
        """Whether BatchNorm's statistics are taken anew: where the recipe says so, and for averaged weights, which have seen no batch."""
        return self.settings.reestimate_batchnorm or self.average is not None

    def _settle_statistics(self) -> None:
        """Takes BatchNorm's statistics anew, from the last images of the epoch.

        The running ones lag behind: a mask that flips changes the activations faster than the statistics follow.
        """
        if self._settles and self.recent:
            reestimate_batchnorm(self.watched_forwards, self.recent)

    def _set_lr(self) -> float:
        """Sets the epoch's learning rates: a function of the epoch alone, so a resumed run needs no scheduler's state."""
        factor = 1.0
        if self.settings.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * self.progress.epoch / self.settings.epochs))
        for group, lr in zip(self.stepper.param_groups, self.initial_lr, strict=True):
            group["lr"] = lr * factor
        return self.settings.lr * factor

    def _check_finite(self) -> None:
        """Nothing that is not finite gets into a checkpoint."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{self.stage}, epoch {self.progress.epoch + 1}: {name} is no longer finite; lower {self.stage}.lr"
                )

    # -------------------------------------------------------------------------------------------------------------- stopping, going on

    def _keepers(self) -> dict[str, Any]:
        """What has a state beside the model and the optimizer, by the name that its tensors have in the file."""
        keepers = {"loss": self.loss, "stage": self.callbacks, "drift": self.drift}
        sometimes = {"average": self.average, "loss_scale": self.loss_scale}
        return keepers | {name: keeper for name, keeper in sometimes.items() if keeper is not None}

    def _store(self) -> None:
        """Writes state.safetensors: the model, the optimizer, the place, and all else that the rest of the stage depends on."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer/{name}": t for name, t in self.stepper.state_tensors().items()}
        for part, keeper in self._keepers().items():
            tensors |= {f"{part}/{name}": t for name, t in keeper.state().items()}
        tensors |= {f"recent/{i}": images for i, images in enumerate(self.recent)}
        about = {"stage": self.stage, "progress": asdict(self.progress), "run": self.session.identity, "tensors": sorted(tensors)}
        self.session.folder.save_state(tensors, about)

    def _restore(self) -> bool:
        """Puts everything where state.safetensors says the stage stands. Returns whether that is in the middle of an epoch.

        Raises:
            ValueError: a state of another run, or one that is damaged with none before it that is not.
        """
        tensors, about, path = self.session.folder.load_state(self.session.identity, self.session.show.say)
        if not about or number_of(about["stage"]) < self.number:  # that of the stage before, whose model is there
            return False
        try:
            if about["stage"] != self.stage:
                raise ValueError(f"expected the state of {self.stage}, found the state of {about['stage']}")
            self._take(tensors, about)
        except ValueError as error:
            raise ValueError(f"checkpoint {path}: {error}") from None
        return self.progress.batch > 0

    def _take(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Takes what :meth:`_store` wrote; raises ValueError for anything else."""
        if different := sorted(tensors.keys() ^ set(map(str, about.get("tensors") or ()))):
            raise ValueError(f"expected the tensors that its header lists, but only one of both has {shown(different[0])}")
        states: dict[str, dict[str, Tensor]] = {part: {} for part in ("model", "optimizer", "recent", *self._keepers())}
        for full_name, tensor in tensors.items():
            part, _, name = full_name.partition("/")
            if part not in states:
                raise ValueError(f"expected tensors of {', '.join(states)}, got {shown(full_name)}")
            states[part][name] = tensor if part == "model" else tensor.to(self.device)
        done = EpochProgress.read(about["progress"], self.settings.epochs, len(self.batches))
        recorded = {record.get("epoch") for record in self.session.folder.find(self.stage)}
        if missing := set(range(1, done.epoch + 1)) - recorded:
            raise ValueError(f"expected {METRICS} to have all finished epochs of {self.stage}, found none of epoch {min(missing)}")
        checkpoint.check_tensors(states["model"], self.model.state_dict(), "does not fit the model")
        self.model.load_state_dict(states["model"])
        self.stepper.load_state_tensors(states["optimizer"])
        for part, keeper in self._keepers().items():
            keeper.load_state(states[part])
        recent, count = states["recent"], len(states["recent"])
        shapes = {images.shape[1:] for images in recent.values()}
        if recent.keys() != {str(i) for i in range(count)} or count > RECENT or shapes - {torch.Size(self.session.data.shape)}:
            raise ValueError(f"recent: expected up to {RECENT} batches of images of shape {self.session.data.shape}, got something else")
        self.recent.extend(recent[str(i)] for i in range(count))
        self.progress = done


def evaluation_attack(recipe: Recipe) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The attack on the test images: PGD in the ball of the training attack."""
    test = recipe.evaluate
    return functools.partial(pgd, eps=recipe.attack.eps, norm=recipe.attack.norm, step_size=test.step_size, steps=test.steps)


def seed(*key: int) -> None:
    """Seeds torch, on every device, with a function of ``key``."""
    torch.manual_seed(seeded_generator(*key).initial_seed())
