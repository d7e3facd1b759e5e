"""Whether a model's gradients lead attacks to what they look for, or hide it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack, Pgd, pgd
from ..modes import evaluation_mode
from ..parts import make
from .run import Tell, evaluate

STEPS = (1, 5, 20)
RADII = (0.5, 1, 2, 4)  # relative to eps; and one that reaches every image
STARTS = 5
# Fractions of the images from which on a finding is told.
BETTER_IN_ONE_STEP = 0.02
LEFT_IN_THE_WHOLE_RANGE = 0.05
MORE_BY_RESTARTS = 0.03
ONLY_BY_BLACK_BOX = 0.01


@dataclass(frozen=True)
class GradientCheck:
    """What :func:`check_gradients` found; of all fractions, the images that were classified rightly without an attack are the whole.

    Attributes:
        images: how many these are.
        zero_gradients: the fraction whose gradient is 0 in every pixel, so that no attack along it can move.
        loss: the mean cross entropy after so many steps of PGD.
        held_by_steps: the fraction that holds after one step of length eps, and after 20 steps of a quarter of it.
        held_by_radius: the fraction that holds in balls of so many times eps; infinite is the whole range of images.
        held_by_starts: the fraction that holds under PGD from one random start, and from 5.
        only_black_box: the fraction that holds under PGD from 5 random starts, and does not under Square, which sees no gradient.
        warnings: what of it is a sign that gradients are masked, in words; none is a good sign and no proof.
    """

    images: int
    zero_gradients: float
    loss: dict[int, float]
    held_by_steps: dict[int, float]
    held_by_radius: dict[float, float]
    held_by_starts: dict[int, float]
    only_black_box: float
    warnings: tuple[str, ...]


def check_gradients(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch_size: int = 250,
    queries: int = 1000,
    tell: Tell = lambda label, done, total, held: None,
) -> GradientCheck:
    """Looks for signs of gradient masking: a model that is not robust but hard to attack along its gradients.

    Such a model looks robust under PGD and falls to other attacks. The signs: gradients that are 0; a loss that does not grow with the
    steps; one large step that fools more than many small ones; images that hold whatever the radius; random starts that find much more
    than one; and an attack without gradients that finds what those with gradients do not.

    Args:
        model, images, labels, eps, norm, seed, batch_size: as for :func:`evaluate`. Some hundred images are enough.
        queries: of Square, for each image.
        tell: as for :func:`evaluate`.

    Raises:
        ImportError: the package that brings Square is missing.
        ValueError: as :func:`evaluate`; no image that is classified rightly.

    Source: Athalye et al., arXiv 1802.00420; Carlini et al., On evaluating adversarial robustness, arXiv 1902.06705.
    """
    clean = evaluate(model, images, labels, (), eps=eps, norm=norm, seed=seed, batch_size=batch_size).held["clean"]
    if not clean.any():
        raise ValueError(f"images: expected some that the model classifies rightly, got {len(images)} that it does not")
    images, labels = images[clean.to(images.device)], labels[clean.to(labels.device)]

    def held(attack: Attack, label: str, radius: float = eps) -> Tensor:
        def told(stage: str, done: int, total: int, held: float) -> None:
            if stage != "clean":
                tell(label, done, total, held)

        found = evaluate(model, images, labels, [attack], eps=radius, norm=norm, seed=seed, batch_size=batch_size, tell=told)
        return found.held[attack.name]

    def along(radius: float, steps: int = STEPS[-1], step: float = 0.25, restarts: int = 1) -> Tensor:
        attack = Pgd(norm=norm, eps=radius, steps=steps, step_size=step * radius, restarts=restarts)
        return held(attack, f"pgd, eps {radius:g}, {steps} steps, {restarts} starts", radius)

    square = make("attack", "square", eps=eps, norm=norm, queries=queries)
    assert isinstance(square, Attack)
    black = held(square, f"square, {queries} queries")
    whole = float({"linf": 1.0, "l2": images[0].numel() ** 0.5, "l1": images[0].numel()}[norm])
    starts = {1: along(eps), STARTS: along(eps, restarts=STARTS)}
    check = GradientCheck(
        images=len(images),
        zero_gradients=_zero_gradients(model, images, labels, batch_size),
        loss={steps: _loss(model, images, labels, batch_size, steps, eps=eps, norm=norm) for steps in (0, *STEPS)},
        held_by_steps={1: _share(along(eps, steps=1, step=1.0)), STEPS[-1]: _share(starts[1])},
        held_by_radius={radius: _share(along(radius * eps)) for radius in RADII} | {torch.inf: _share(along(whole))},
        held_by_starts={count: _share(left) for count, left in starts.items()},
        only_black_box=_share(starts[STARTS] & ~black),
        warnings=(),
    )
    return replace(check, warnings=tuple(_signs(check)))


def _signs(check: GradientCheck) -> list[str]:
    """What is a sign of gradient masking, in words."""
    signs = []
    if check.zero_gradients:
        signs.append(
            f"the gradient of {check.zero_gradients:.1%} of the images is 0 in every pixel (logits far apart saturate the softmax; "
            "rounding and steps have no gradient): attacks along it do not move there"
        )
    for before, after in itertools.pairwise(STEPS):
        if check.loss[after] < check.loss[before]:
            fall = f"from {check.loss[before]:.3f} after {before} steps of PGD to {check.loss[after]:.3f} after {after}"
            signs.append(f"the loss falls {fall}, where more steps should raise it")
    one, many = check.held_by_steps.values()
    if many - one > BETTER_IN_ONE_STEP:
        signs.append(f"one large step fools more than {STEPS[-1]} small ones: {one:.1%} against {many:.1%} hold")
    if (left := check.held_by_radius[torch.inf]) > LEFT_IN_THE_WHOLE_RANGE:
        signs.append(f"{left:.1%} hold although the attack may change every pixel as it likes, where none should")
    radii = list(check.held_by_radius.items())
    for (small, first), (large, second) in itertools.pairwise(radii):
        if second - first > MORE_BY_RESTARTS:
            signs.append(f"more images hold in the larger ball: {first:.1%} at {small:g} eps, {second:.1%} at {large:g} eps")
    one, many = check.held_by_starts.values()
    if one - many > MORE_BY_RESTARTS:
        signs.append(f"{STARTS} random starts find much more than one: {many:.1%} against {one:.1%} hold; a single start is no evaluation")
    if check.only_black_box > ONLY_BY_BLACK_BOX:
        signs.append(f"{check.only_black_box:.1%} hold under PGD and fall to Square, which sees no gradient: do not trust PGD here")
    return signs


def _share(held: Tensor) -> float:
    return int(held.sum()) / len(held)


def _zero_gradients(model: nn.Module | Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int) -> float:
    count = 0
    with torch.inference_mode(False), evaluation_mode(model, freeze=True), torch.enable_grad():
        for x, y in _batches(model, images, labels, batch_size):
            x = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x).float(), y, reduction="sum"), x)
            count += int((gradient == 0).flatten(1).all(dim=1).sum())
    return count / len(images)


def _loss(
    model: nn.Module | Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int, steps: int, *, eps: float, norm: str
) -> float:
    """The mean cross entropy after PGD from the images themselves."""
    total = 0.0
    for x, y in _batches(model, images, labels, batch_size):
        x_adv = pgd(model, x, y, eps=eps, norm=norm, steps=steps, step_size=eps / 4, random_start=False)  # type: ignore[arg-type]
        with evaluation_mode(model, freeze=True), torch.no_grad():
            total += F.cross_entropy(model(x_adv).float(), y, reduction="sum").item()
    return total / len(images)


def _batches(model: nn.Module | Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    device = next((p.device for p in model.parameters()), images.device) if isinstance(model, nn.Module) else images.device
    starts = range(0, len(images), batch_size)
    return [(images[i : i + batch_size].to(device), labels[i : i + batch_size].to(device)) for i in starts]
