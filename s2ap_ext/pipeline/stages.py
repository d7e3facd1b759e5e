"""The training stages, pretrain, prune and finetune: what trains in each, and with which steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis import by_layer, churn, jaccard, layer_masks, mask_distance
from ..methods import Method
from ..nn import pruned_layers, sampled_gradients, train_weights
from ..optim import AWP, S2AP, Plain, Stepper
from .checkpoint import check_tensors
from .model_file import make_sparse
from .sections import Recipe, Training
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
    method, stepper = start_search(session.recipe, model, session.data.shape, session.show.say)
    Trainer(session, "prune", settings, model, stepper, Search(method, model, stepper, settings.sampled_gradients)).fit()
    method.finish(model)
    return model


def start_search(
    recipe: Recipe, model: nn.Module, image: tuple[int, int, int], tell: Callable[[str], None] = lambda line: None
) -> tuple[Method, Stepper]:
    """Makes the dense ``model`` sparse, in place, and returns the recipe's method with what makes its steps.

    Args:
        image: the shape of an image, [channels, height, width].
        tell: takes what there is to say about layers that stay dense.
    """
    settings = recipe.prune
    method = make_sparse(model, recipe, image, tell)
    on_weights = settings.s2ap and settings.perturbs == "weights"
    base = _sgd(method.parameters(model, perturbed=settings.s2ap and not on_weights), settings)
    if not settings.s2ap:
        return method, Plain(model, base)
    if on_weights:
        for layer in pruned_layers(model).values():
            layer.weight.requires_grad_(True)  # wanted for the perturbation only, where the method does not train them
        return method, AWP(model, base, gamma=float(settings.gamma), warmup_epochs=settings.warmup_epochs)
    how: dict[str, Any] = {"gamma": settings.gamma, "ascent": settings.ascent.make(), "warmup_epochs": settings.warmup_epochs}
    return method, S2AP(model, base, defer_grads=recipe.precision != "fp16", **how)  # a loss scale works on .grad


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
    """What a mask search does besides training: what its method asks for, and how the mask moves."""

    def __init__(self, method: Method, model: nn.Module, stepper: Stepper, sampled: float) -> None:
        self.method, self.model, self.stepper, self.sampled = method, model, stepper, sampled
        self.masks: dict[str, Tensor] = {}  # at the start of the epoch
        self.earlier: dict[str, Tensor] = {}  # what any mask has kept at the start of an epoch before
        self.steps = self.passes = 0  # of this epoch
        self.unflipped = 0  # layers, counted in each step, whose mask no perturbation changed
        self.flips: Counter[str] = Counter()  # of this epoch and by perturbations, layer by layer

    def start_epoch(self) -> None:
        now = layer_masks(self.model)
        if self.masks:
            self.earlier = {name: mask | self.masks[name] for name, mask in self.earlier.items()}
        else:
            self.earlier = {name: torch.zeros_like(mask) for name, mask in now.items()}
        self.masks = now
        self.steps = self.passes = self.unflipped = 0
        self.flips.clear()

    def around_step(self) -> AbstractContextManager[None]:
        return sampled_gradients(self.model, self.sampled)

    def penalty(self, epoch: int) -> Tensor | None:
        return self.method.penalty(epoch)

    def after_step(self) -> None:
        self.steps += 1
        flips = self.stepper.layer_flips()
        self.flips.update(flips)
        self.unflipped += sum(not count for count in flips.values())
        self.passes += self.stepper.passes
        self.method.after_step(self.model)

    def metrics(self) -> dict[str, Any]:
        now = layer_masks(self.model)
        kept = {name: int(mask.sum()) for name, mask in now.items()}
        per_step = {name: self.flips[name] / max(count * self.steps, 1) for name, count in kept.items()}  # of the kept weights
        sequence = [self.earlier, self.masks, now]  # what comes back in this epoch
        return {
            "mask_distance": mask_distance(self.masks, now),
            "flips": self.flips.total() / max(sum(kept.values()) * self.steps, 1),
            "passes": self.passes / max(self.steps, 1),  # backward passes per step
            "unflipped": self.unflipped / max(len(now) * self.steps, 1),  # of the layers, on average over the steps
            "jaccard": jaccard(self.masks, now),
            "churn": churn(sequence),
            "layer_distance": by_layer(mask_distance, self.masks, now),
            "layer_jaccard": by_layer(jaccard, self.masks, now),
            "layer_churn": {name: churn([{name: masks[name]} for masks in sequence]) for name in now},
            "layer_flips": per_step,
            "layer_density": {name: count / max(now[name].numel(), 1) for name, count in kept.items()},
            **self._gamma(),
            **self.method.metrics(),
        }

    def _gamma(self) -> dict[str, dict[str, float]]:
        """The gamma of each layer, as it stands at the end of the epoch; nothing in an epoch of plain steps."""
        gammas = self.stepper.gammas()
        return {"gamma": {name: float(f"{gamma:.4g}") for name, gamma in gammas.items()}} if gammas else {}

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"mask/{name}": mask for name, mask in self.masks.items()},
            **{f"earlier/{name}": mask for name, mask in self.earlier.items()},
            "counts": torch.tensor([self.steps, self.passes, self.unflipped, *(self.flips[name] for name in self.masks)]),
            **{f"method/{name}": t for name, t in self.method.state().items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        def under(part: str) -> dict[str, Tensor]:
            return {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}

        own = {name: tensor for name, tensor in state.items() if not name.startswith("method/")}
        now = layer_masks(self.model)
        masks = {f"{part}/{name}": mask for part in ("mask", "earlier") for name, mask in now.items()}
        counts = {"counts": torch.zeros(3 + len(now), dtype=torch.int64)}
        check_tensors(own, masks | counts, "mask search: not a state of its own")
        self.masks, self.earlier = under("mask/"), under("earlier/")
        self.steps, self.passes, self.unflipped, *flips = state["counts"].tolist()
        self.flips = Counter(dict(zip(now, flips, strict=True)))
        self.method.load_state(under("method/"))


def _sgd(groups: list[dict[str, Any]], settings: Training) -> torch.optim.SGD:
    """SGD with the stage's settings; a group may set its own, or ``lr_scale``, its learning rate relative to the stage's."""
    scaled = [{name: value for name, value in group.items() if name != "lr_scale"} for group in groups]
    for group, given in zip(scaled, groups, strict=True):
        group["lr"] = settings.lr * given.get("lr_scale", 1.0)
    return torch.optim.SGD(scaled, momentum=settings.momentum, weight_decay=settings.weight_decay)
