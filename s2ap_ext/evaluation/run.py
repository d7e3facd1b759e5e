"""The evaluation itself: attack after attack, batch after batch, of which the finished ones are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attacks import Attack
from ..attacks.balls import BALLS, distances
from ..engine import compile_sparse
from ..modes import evaluation_mode
from ..nn import densify, pruned_layers
from ..parts import find
from .kept import Kept
from .result import Evaluation

ENGINES = ("torch", "sparse")
ROUNDING = 1e-3, 1e-6  # by how much of eps, and by how much at all, an attack that computes in float32 may be off
Tell = Callable[[str, int, int, float], None]


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    attacks: Iterable[str | Attack] = ("pgd",),
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 250,
    engine: str = "torch",
    keep: str | Path | None = None,
    tell: Tell = lambda label, done, total, held: None,
) -> Evaluation:
    """Which of ``images`` the model classifies rightly as they are, and under each attack.

    Images that are classified wrongly are not attacked. The attacks of one that consists of several (``"autoattack"``) each run over all
    images that are left, in batches, as their authors do it. Every adversarial image is looked at here: whether the model is wrong
    about it, and whether it lies within the ball.

    Args:
        model: gives logits [N, K]; in evaluation mode within this function, and as found after it.
        images: [N, ...], floating point, in [0, 1], on any device; they move to the model's, batch by batch.
        labels: the classes, int64 [N].
        attacks: their names (``s2ap_ext.parts.names("attack")`` lists them), or attacks with settings of your own. What is right without
            an attack is always found, and called ``"clean"``.
        eps: radius of the ball, in units where images lie in [0, 1].
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        seed: all random numbers follow from it. Each attack starts each batch with it.
        batch_size: images that are attacked together.
        engine: ``"torch"``: the model computes with dense weights, a pruned one as its copy that :func:`s2ap_ext.densify` makes; or
            ``"sparse"``: what :func:`s2ap_ext.compile_sparse` makes of it takes its place, on the CPU, in attacks and verdicts.
        keep: a folder for the results of finished batches, from where the same call goes on after it was stopped, to the same results. A
            call with another model, other images or other settings has a file of its own there.
        tell: called after each batch with what runs, how many images it has done, how many there are for it, and the fraction of all
            images that hold so far. What it raises ends the call.

    Raises:
        ImportError: a package that an attack needs is missing.
        TypeError: images that are not floating point.
        ValueError: no images, or labels that do not fit them; an unknown attack, norm or engine; an attack that is not defined for this
            norm or model; a damaged file in ``keep``, or a model without a ``state_dict`` to tell it by; what an attack raises. All but the
            last before anything runs.
        RuntimeError: an attack that left the ball.
    """
    _check(images, labels, eps, norm, batch_size, engine)
    parts = chosen(attacks, norm, eps)
    device = next((p.device for p in model.parameters()), images.device) if isinstance(model, nn.Module) else images.device
    # There are attacks that seed torch's own generators. Inference tensors, in which gradients are off for ever, would be in their way.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network = _network(model, images, engine)
        with evaluation_mode(network, freeze=True), torch.no_grad():
            for attack in parts.values():
                attack.check(network, images[:1].to(device))
            settings = {name: [repr(part), part.implementation] for name, part in parts.items()}
            about = {"norm": norm, "eps": eps, "seed": seed, "batch_size": batch_size, "engine": engine, "attacks": settings}
            results = Kept(keep, model, images, labels, about)
            runner = _Runner(network, images, labels, device, eps, norm, seed, batch_size, results, tell)
            everything = torch.ones(len(images), dtype=torch.bool)
            held, after = {"clean": runner.stage("clean", None, everything)}, {}
            for name, attack in parts.items():
                stages = attack.stages()
                left, accuracies = held["clean"], {}
                for stage, part in stages.items():
                    left = runner.stage(name if len(stages) == 1 else f"{name} {stage}", part, left)
                    accuracies[stage] = int(left.sum()) / len(images)
                held[name] = left
                if len(stages) > 1:
                    after[name] = accuracies
    own = {"clean": "no attack"}
    return Evaluation(
        norm=norm,
        eps=eps,
        seed=seed,
        labels=labels.cpu(),
        held=held,
        implementations=own | {name: part.implementation for name, part in parts.items()},
        stages=after,
        engine=engine,
    )


def chosen(attacks: Iterable[str | Attack], norm: str, eps: float) -> dict[str, Attack]:
    """The attacks by name, without ``"clean"``; raises ValueError for an unknown one, one that is for another ball, and two of a name."""
    parts: dict[str, Attack] = {}
    for attack in attacks:
        if attack == "clean":
            continue
        if isinstance(attack, str):
            found = find("attack", attack)
            assert issubclass(found, Attack)
            part = found.within(norm=norm, eps=eps)
        else:
            part = attack
            for name, wanted in {"norm": norm, "eps": eps}.items():
                if getattr(part.settings, name, wanted) != wanted:
                    raise ValueError(f"attack {part.name}: {name}: expected {wanted}, got {getattr(part.settings, name)}")
        if part.name in parts:
            raise ValueError(f"attacks: expected each once, got {part.name} twice")
        parts[part.name] = part
    return parts


class _Runner:
    """Runs one attack after the other over the images that are left."""

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        device: torch.device,
        eps: float,
        norm: str,
        seed: int,
        batch_size: int,
        results: Kept,
        tell: Tell,
    ) -> None:
        self.network, self.images, self.labels, self.device = network, images, labels, device
        self.eps, self.norm, self.seed, self.batch_size = eps, norm, seed, batch_size
        self.results, self.tell = results, tell

    def stage(self, label: str, attack: Attack | None, left: Tensor) -> Tensor:
        """Whether each image is still classified rightly, bool [N], of those that ``left`` says; ``attack`` None: as it is."""
        indices = left.nonzero().squeeze(1)
        held, done = self.results.of(label, left)
        while done < len(indices):
            batch = indices[done : done + self.batch_size].to(self.images.device)
            x, y = self.images[batch].to(self.device), self.labels[batch.to(self.labels.device)].to(self.device)
            x_adv = x if attack is None else self._attacked(label, attack, x, y)
            held[batch.cpu()] = (self._classes(x_adv) == y).cpu()
            done += len(batch)
            self.results.put(label, held, done)
            self.tell(label, done, len(indices), int(held.sum()) / len(held))
        return held

    def _attacked(self, label: str, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(self.seed)
        # The network is a model in all but its type where it is a plain callable; attacks take both.
        x_adv = attack(self.network, x, y, generator=generator)  # type: ignore[arg-type]
        furthest = distances(x_adv, x, self.norm).max().item()
        # So that NaN, which is neither below nor above anything, is refused too.
        if not (furthest <= self.eps * (1 + ROUNDING[0]) + ROUNDING[1] and x_adv.min() >= 0 and x_adv.max() <= 1):
            where = f"got one at {furthest:g} with values in [{x_adv.min().item():g}, {x_adv.max().item():g}]"
            raise RuntimeError(f"attack {label}: expected images in [0, 1] within {self.norm} distance {self.eps:g}, {where}")
        return x_adv

    def _classes(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        if logits.dim() != 2 or len(logits) != len(x):
            raise ValueError(f"model: expected logits of shape ({len(x)}, classes), got {tuple(logits.shape)}")
        return logits.argmax(dim=1)


def _network(model: nn.Module | Callable[[Tensor], Tensor], images: Tensor, engine: str) -> Callable[[Tensor], Tensor]:
    """What computes the logits."""
    if not isinstance(model, nn.Module):
        if engine == "sparse":
            raise ValueError(f"engine: expected torch for a model that is no nn.Module but {type(model).__name__}, got sparse")
        return model
    if engine == "sparse":
        return compile_sparse(model, images[:1])
    return densify(copy.deepcopy(model)) if pruned_layers(model) else model


def _check(images: Tensor, labels: Tensor, eps: float, norm: str, batch_size: int, engine: str) -> None:
    """Raises what is wrong with an argument of :func:`evaluate`."""
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")
    if not len(images) or not images.numel():
        raise ValueError(f"images: expected at least one, got shape {tuple(images.shape)}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images: expected values in [0, 1], got some in [{images.min().item():g}, {images.max().item():g}]")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels: expected int64 of shape {tuple(images.shape[:1])}, one for each image, got {got}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    for name, value, known in (("norm", norm, tuple(BALLS)), ("engine", engine, ENGINES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
