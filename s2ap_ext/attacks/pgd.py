"""Projected gradient descent, as a function and as an attack."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import engine
from ..modes import evaluation_mode
from ..parts import register
from ..settings import key
from .balls import BALLS
from .base import Attack

LOSSES = ("ce", "kl")


@register("pgd")
class Pgd(Attack):
    """Projected gradient descent from a random start (:func:`pgd`)."""

    @dataclass(frozen=True)
    class Settings:
        norm: str = key("linf", "the norm of the ball", choices=BALLS)
        eps: float = key(8 / 255, "radius of the ball, in units where images lie in [0, 1]", low=0)
        step_size: float = key(2 / 255, "length of one step, in the same norm", low=0)
        steps: int = key(10, "number of gradient steps", low=0)
        restarts: int = key(1, "random starts, each for the images that those before it did not fool", low=1)

    settings: Any

    @classmethod
    def within(cls, *, norm: str, eps: float, **options: Any) -> Attack:
        """20 steps of a quarter of ``eps`` from each of 5 random starts, as far as ``options`` do not say otherwise."""
        return super().within(norm=norm, eps=eps, **{"steps": 20, "step_size": eps / 4, "restarts": 5, **options})

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None, *, loss: str = "ce", generator: torch.Generator | None = None
    ) -> Tensor:
        how = {**self._search_settings(), "loss": loss, "generator": generator}
        x_adv = pgd(model, x, y, **how)
        if self.settings.restarts == 1 or not len(x):
            return x_adv
        if y is None:
            raise ValueError(f"y: expected classes, which tell who is fooled, since there are {self.settings.restarts} restarts; got None")
        with evaluation_mode(model, freeze=True), torch.no_grad():
            for _ in range(self.settings.restarts - 1):
                left = (model(x_adv).argmax(dim=1) == y).nonzero().squeeze(1)
                if not len(left):
                    break
                x_adv[left] = pgd(model, x[left], y[left], **how)
        return x_adv

    def _search_settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.settings).items() if name != "restarts"}

    def with_gradients(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor | None,
        parameters: Mapping[str, nn.Parameter],
        *,
        loss: str = "ce",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.settings.steps == 0 or self.settings.restarts > 1:
            got = "in 0 steps" if self.settings.steps == 0 else f"with {self.settings.restarts} restarts"
            raise ValueError(f"attack pgd: takes no gradients of parameters {got}")
        if frozen := [name for name, p in parameters.items() if not p.requires_grad]:
            raise ValueError(f"parameters: expected such as require a gradient, {frozen[0]} does not")
        how: dict[str, Any] = {"loss": loss, "random_start": True, "generator": generator}
        x_adv, gradients = _search(model, x, y, **self._search_settings(), **how, parameters=list(parameters.values()))
        return x_adv, {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}

    with_gradients.__doc__ = Attack.with_gradients.__doc__


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    loss: str = "ce",
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial examples by projected gradient ascent on the loss.

    Args:
        model: gives logits [N, K] for images [N, ...]. It is called ``steps`` times, and once more for ``loss="kl"``.
        x: images [N, ...], floating point, in [0, 1].
        y: classes, int64 [N]. Not used by ``loss="kl"``, where it may be None.
        eps: radius of the ball around each image.
        step_size: length of a step, in the same norm.
        steps: number of gradient steps; 0 returns the starting point.
        norm: ``"linf"`` (steps along the sign of the gradient), ``"l2"`` (along the gradient of each image, scaled to length 1) or
            ``"l1"`` (spread evenly over the 1 % of the pixels with the largest gradients, of those that can still move).
        loss: ``"ce"``, cross entropy with ``y``; or ``"kl"``, KL(p(x) || p(x_adv)) with p(x) evaluated once, as in TRADES. The
            gradient of the latter is zero at ``x`` itself, so it needs the random start (there is a warning without).
        random_start: start from a uniformly random point of the ball, clipped to [0, 1], and not from ``x``.
        generator: source of the random start, on the device of ``x``; torch's default one if None.

    Returns:
        x_adv, a new tensor of x's shape and dtype, within [0, 1] and within the ball. Rounding is always towards
        ``x``, so this also holds exactly, in half precision too.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: a setting that makes no sense; ``x`` outside [0, 1]; ``y`` of the wrong shape or dtype; logits of the wrong shape;
            a NaN loss or gradient; a loss that does not depend on ``x``.

    Source: Madry et al., arXiv 1706.06083; KL: Zhang et al. (TRADES), arXiv 1901.08573; l1: :class:`s2ap_ext.attacks.balls.L1`.

    Equivalent to (linf, CE)::

        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            g, = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = (x_adv.detach() + step_size * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    """
    how: dict[str, Any] = {"eps": eps, "step_size": step_size, "steps": steps, "norm": norm}
    return _search(model, x, y, **how, loss=loss, random_start=random_start, generator=generator)[0]


def _search(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str,
    loss: str,
    random_start: bool,
    generator: torch.Generator | None,
    parameters: Sequence[nn.Parameter] = (),
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """:func:`pgd`, and the gradients of ``parameters`` in its last step, None for those that the logits do not depend on."""
    _check(eps, step_size, steps, norm, loss)
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating point images in [0, 1], got {x.dtype}")
    if loss == "ce" and (y is None or y.shape != x.shape[:1] or y.dtype != torch.int64):
        got = "None" if y is None else f"{y.dtype} of shape {tuple(y.shape)}"
        raise ValueError(f"y: expected int64 classes of shape {tuple(x.shape[:1])}, got {got}")
    if loss == "kl" and not random_start:
        warnings.warn("pgd: the KL loss has no gradient at x, so without random_start the first step follows rounding errors", stacklevel=3)

    if x.numel() == 0:
        return x.detach().clone(), [None] * len(parameters)
    # Autograd must be on, and nothing may be an inference tensor, whatever mode the caller is in.
    with torch.inference_mode(False), evaluation_mode(model, freeze=True):
        x = x.detach().clone()
        of_parameters: Sequence[Tensor | None] = ()
        faster = engine.for_attack(model, x) or model  # the same on the kept weights only; it has no parameters
        outside = ((x < 0) | (x > 1) | x.isnan()).any()
        ball = BALLS[norm](x, eps, step_size)
        with torch.no_grad():
            objective = _cross_entropy(y.clone()) if loss == "ce" and y is not None else _divergence(_logits(faster, x))
            x_adv = ball.random_start(generator) if random_start else x.clone()
        nans = torch.zeros(2, dtype=torch.int64, device=x.device)  # steps with NaN in the loss, in the gradient
        with torch.enable_grad():
            for step in range(steps):
                x_adv.requires_grad_(True)
                wanted = parameters if step == steps - 1 else ()
                for p in wanted:
                    p.requires_grad_(True)
                value = objective(_logits(model if wanted else faster, x_adv))
                gradient = None
                if value.requires_grad:
                    gradient, *of_parameters = torch.autograd.grad(value, (x_adv, *wanted), allow_unused=True)
                if gradient is None:
                    raise ValueError("model: the logits do not depend on x in a way that autograd can differentiate")
                nans += torch.stack([value.detach().isnan(), gradient.isnan().any()])
                x_adv = x_adv.detach()
                ball.step(x_adv, gradient)
        # One look at the end, and not one per step: each would wait for the device.
        found_outside, *counts = torch.cat([outside.view(1), nans]).tolist()
    if found_outside:
        raise ValueError(f"x: expected images in [0, 1], got values in [{x.min().item():g}, {x.max().item():g}]")
    for what, count in zip(("loss", "gradient"), counts, strict=True):
        if count:
            raise ValueError(f"{what}: NaN in {count} of {steps} steps of the attack; look at the model's weights")
    return x_adv, of_parameters


def _check(eps: float, step_size: float, steps: int, norm: str, loss: str) -> None:
    """Raises ValueError naming the first setting that makes no sense."""
    for name, value in {"eps": eps, "step_size": step_size}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer >= 0, got {steps}")
    for name, chosen, known in (("norm", norm, tuple(BALLS)), ("loss", loss, LOSSES)):
        if chosen not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {chosen!r}")


def _logits(model: Callable[..., Any], x: Tensor) -> Tensor:
    """The logits in at least float32, where sums over a batch do not overflow."""
    logits: Tensor = model(x)
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(f"model: expected logits of shape ({x.shape[0]}, classes), got {tuple(logits.shape)}")
    return logits if logits.dtype == torch.float64 else logits.float()


# Sums and not means: an image's gradient must not shrink with the batch, least of all in half precision.


def _cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def _divergence(clean_logits: Tensor) -> Callable[[Tensor], Tensor]:
    clean = F.log_softmax(clean_logits, dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum", log_target=True)
