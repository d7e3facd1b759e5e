"""The training stages, pretrain, prune and finetune: what trains in each, and with which steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis import layer_masks, mask_distance
from ..methods import Method
from ..nn import sampled_gradients, train_weights
from ..optim import AWP, S2AP, Plain, Stepper
from .checkpoint import check_tensors
from .model_file import make_sparse
from .sections import Training
from .trainer import Callbacks, Session, Trainer


def pretrain(session: Session, model: nn.Module) -> nn.Module:
    """Trains the dense ``model`` robustly, in place."""
    settings = session.recipe.pretrain
    stepper = Plain(model, _sgd([{"params": list(model.parameters())}], settings))
    Trainer(session, "pretrain", settings, model, stepper).fit()
    return model


def prune(session: Session, model: nn.Module) -> nn.Module:
    """Makes the dense ``model`` sparse, in place, and searches its mask with the recipe's method, plain or with S2AP."""
    settings = session.recipe.prune
    method = make_sparse(model, session.recipe, session.show.say)
    base = _sgd(method.parameters(model, perturbed=settings.s2ap), settings)
    stepper: Stepper = Plain(model, base)
    if settings.s2ap:
        how: dict[str, Any] = {"gamma": settings.gamma, "ascent": settings.ascent.make(), "warmup_epochs": settings.warmup_epochs}
        stepper = S2AP(model, base, defer_grads=session.recipe.precision != "fp16", **how)  # a loss scale works on .grad
    Trainer(session, "prune", settings, model, stepper, Search(method, model, stepper, settings.sampled_gradients)).fit()
    method.finish(model)
    return model


def finetune(session: Session, model: nn.Module) -> nn.Module:
    """Trains the weights of the pruned ``model`` under its mask, in place, with AWP where the recipe says so."""
    settings = session.recipe.finetune
    train_weights(model.requires_grad_(True))
    base = _sgd([{"params": [p for p in model.parameters() if p.requires_grad]}], settings)
    stepper: Stepper = Plain(model, base)
    if settings.awp:
        stepper = AWP(model, base, gamma=settings.gamma, warmup_epochs=settings.warmup_epochs)
    Trainer(session, "finetune", settings, model, stepper).fit()
    return model


TRAIN: dict[str, Callable[[Session, nn.Module], nn.Module]] = {"pretrain": pretrain, "prune": prune, "finetune": finetune}


class Search(Callbacks):
    """What a mask search does besides training: what its method asks for, and how far the mask moves."""

    def __init__(self, method: Method, model: nn.Module, stepper: Stepper, sampled: float) -> None:
        self.method, self.model, self.stepper, self.sampled = method, model, stepper, sampled
        self.masks: dict[str, Tensor] = {}  # at the start of the epoch
        self.steps = self.flips = self.passes = 0  # of this epoch; the flips are those by perturbations

    def start_epoch(self) -> None:
        self.masks = layer_masks(self.model)
        self.steps = self.flips = self.passes = 0

    def around_step(self) -> AbstractContextManager[None]:
        return sampled_gradients(self.model, self.sampled)

    def penalty(self, epoch: int) -> Tensor | None:
        return self.method.penalty(epoch)

    def after_step(self) -> None:
        self.steps += 1
        self.flips += self.stepper.flips
        self.passes += self.stepper.passes
        self.method.after_step(self.model)

    def metrics(self) -> dict[str, Any]:
        now = layer_masks(self.model)
        kept = sum(int(mask.sum()) for mask in now.values())
        flips = self.flips / max(kept * self.steps, 1)  # of the kept weights, per step
        passes = self.passes / max(self.steps, 1)  # backward passes per step
        moved = {"mask_distance": mask_distance(self.masks, now), "flips": flips, "passes": passes}
        return {**moved, **self._gamma(), **self.method.metrics()}

    def _gamma(self) -> dict[str, dict[str, float]]:
        """The gamma of each layer, as it stands at the end of the epoch; nothing in an epoch of plain steps."""
        gammas = self.stepper.gammas()
        return {"gamma": {name: float(f"{gamma:.4g}") for name, gamma in gammas.items()}} if gammas else {}

    def state(self) -> dict[str, Tensor]:
        masks = {f"mask/{name}": mask for name, mask in self.masks.items()}
        return {
            **masks,
            "counts": torch.tensor([self.steps, self.flips, self.passes]),
            **{f"method/{name}": t for name, t in self.method.state().items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        def under(part: str) -> dict[str, Tensor]:
            return {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}

        own = {name: tensor for name, tensor in state.items() if not name.startswith("method/")}
        masks = {f"mask/{name}": mask for name, mask in layer_masks(self.model).items()}
        check_tensors(own, {**masks, "counts": torch.zeros(3, dtype=torch.int64)}, "mask search: not a state of its own")
        self.masks = under("mask/")
        self.steps, self.flips, self.passes = state["counts"].tolist()
        self.method.load_state(under("method/"))


def _sgd(groups: list[dict[str, Any]], settings: Training) -> torch.optim.SGD:
    """SGD with the stage's settings; a group may set its own, or ``lr_scale``, its learning rate relative to the stage's."""
    scaled = [{name: value for name, value in group.items() if name != "lr_scale"} for group in groups]
    for group, given in zip(scaled, groups, strict=True):
        group["lr"] = settings.lr * given.get("lr_scale", 1.0)
    return torch.optim.SGD(scaled, momentum=settings.momentum, weight_decay=settings.weight_decay)
