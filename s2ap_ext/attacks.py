"""Projected gradient descent, and the robust accuracy it measures.

Images are floating point in [0, 1]. An attack sees the model in evaluation mode and takes gradients with respect to the images only:
inside it no parameter requires a gradient, so autograd neither stores what weight gradients would need nor computes them. Afterwards
every mode, ``requires_grad``, ``.grad`` and BatchNorm statistic is as it was found, also where an exception ended the attack.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import engine
from .modes import evaluation_mode

__all__ = ["Accuracy", "accuracy", "check_pgd", "pgd"]

NORMS = ("linf", "l2")
LOSSES = ("ce", "kl")

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, x, y) -> x_adv


def check_pgd(eps: float, step_size: float, steps: int, norm: str, loss: str = "ce") -> None:
    """Raises ValueError naming the first of :func:`pgd`'s settings that makes no sense."""
    for name, value in {"eps": eps, "step_size": step_size}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer >= 0, got {steps}")
    for name, value, known in (("norm", norm, NORMS), ("loss", loss, LOSSES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


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
        norm: ``"linf"`` (steps along the sign of the gradient) or ``"l2"`` (along the gradient of each image, scaled to length 1).
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

    Source: Madry et al., arXiv 1706.06083; KL: Zhang et al. (TRADES), arXiv 1901.08573.

    Equivalent to (linf, CE)::

        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_()
            g, = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = (x_adv.detach() + step_size * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    """
    check_pgd(eps, step_size, steps, norm, loss)
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating point images in [0, 1], got {x.dtype}")
    if loss == "ce" and (y is None or y.shape != x.shape[:1] or y.dtype != torch.int64):
        got = "None" if y is None else f"{y.dtype} of shape {tuple(y.shape)}"
        raise ValueError(f"y: expected int64 classes of shape {tuple(x.shape[:1])}, got {got}")
    if loss == "kl" and not random_start:
        warnings.warn("pgd: the KL loss has no gradient at x, so without random_start the first step follows rounding errors", stacklevel=2)

    if x.numel() == 0:
        return x.detach().clone()
    # Autograd must be on, and nothing may be an inference tensor, whatever mode the caller is in.
    with torch.inference_mode(False), evaluation_mode(model, freeze=True):
        x = x.detach().clone()
        model = engine.for_attack(model, x) or model  # the same on the kept weights only, where that is faster
        outside = ((x < 0) | (x > 1) | x.isnan()).any()
        ball = _Linf(x, eps, step_size) if norm == "linf" else _L2(x, eps, step_size)
        with torch.no_grad():
            objective = _cross_entropy(y.clone()) if loss == "ce" else _divergence(_logits(model, x))
            x_adv = ball.random_start(generator) if random_start else x.clone()
        nans = torch.zeros(2, dtype=torch.int64, device=x.device)  # steps with NaN in the loss, in the gradient
        with torch.enable_grad():
            for _ in range(steps):
                x_adv.requires_grad_(True)
                value = objective(_logits(model, x_adv))
                if not value.requires_grad:
                    raise ValueError("model: the logits do not depend on x in a way that autograd can differentiate")
                (gradient,) = torch.autograd.grad(value, x_adv)
                nans += torch.stack([value.detach().isnan(), gradient.isnan().any()])
                x_adv = x_adv.detach()
                ball.step(x_adv, gradient)
        # One look at the end, and not one per step: each would wait for the device.
        outside, *nans = torch.cat([outside.view(1), nans]).tolist()
    if outside:
        raise ValueError(f"x: expected images in [0, 1], got values in [{x.min().item():g}, {x.max().item():g}]")
    for what, count in zip(("loss", "gradient"), nans, strict=True):
        if count:
            raise ValueError(f"{what}: NaN in {count} of {steps} steps of the attack; look at the model's weights")
    return x_adv


def _logits(model: Callable, x: Tensor) -> Tensor:
    """The logits in at least float32, where sums over a batch do not overflow."""
    logits = model(x)
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(f"model: expected logits of shape ({x.shape[0]}, classes), got {tuple(logits.shape)}")
    return logits if logits.dtype == torch.float64 else logits.float()


# Sums and not means: an image's gradient must not shrink with the batch, least of all in half precision.


def _cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def _divergence(clean_logits: Tensor) -> Callable[[Tensor], Tensor]:
    clean = F.log_softmax(clean_logits, dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum", log_target=True)


def _inward(point: Tensor, x: Tensor, limit: Tensor | float) -> Tensor:
    """``point``, moved by its last bit towards ``x`` wherever rounding left it further than ``limit`` from there."""
    too_far = (point.double() - x.double()).abs() > limit
    return torch.where(too_far, torch.nextafter(point, x), point)


def _round_down(eps: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``eps`` (8/255 in float32 is)."""
    return _inward(torch.tensor(eps, dtype=dtype), torch.tensor(0.0, dtype=dtype), eps).item()


class _Linf:
    """The images within eps of ``x`` in every pixel and within [0, 1]: a box."""

    def __init__(self, x: Tensor, eps: float, step_size: float) -> None:
        eps = _round_down(eps, x.dtype)
        self.x, self.eps, self.step_size = x, eps, step_size
        self.low = _inward((x - eps).clamp_(min=0), x, eps)
        self.high = _inward((x + eps).clamp_(max=1), x, eps)

    def random_start(self, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(self.x).uniform_(-self.eps, self.eps, generator=generator)
        return noise.add_(self.x).clamp_(self.low, self.high)

    def step(self, x_adv: Tensor, gradient: Tensor) -> None:
        x_adv.add_(gradient.sign(), alpha=self.step_size).clamp_(self.low, self.high)


class _L2:
    """The images within Euclidean distance eps of ``x`` and within [0, 1]."""

    def __init__(self, x: Tensor, eps: float, step_size: float) -> None:
        # The margin is for the rounding of whoever computes the distance in the images' own precision.
        self.eps = eps * (1 - 4 * torch.finfo(x.dtype).eps)
        self.x, self.step_size = x, step_size

    def random_start(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in the ball: a Gaussian direction, and a radius whose d-th power is uniform."""
        direction = _unit(torch.randn(self.x.shape, dtype=torch.float64, device=self.x.device, generator=generator))
        radius = torch.rand(self.x.shape[0], dtype=torch.float64, device=self.x.device, generator=generator)
        radius = self.eps * radius ** (1 / self.x[0].numel())
        return self._project(self.x + direction * _per_image(radius, self.x))

    def step(self, x_adv: Tensor, gradient: Tensor) -> None:
        x_adv.copy_(self._project(x_adv + self.step_size * _unit(gradient.double())))

    def _project(self, moved: Tensor) -> Tensor:
        """Onto the ball, then onto [0, 1], which brings no pixel further from ``x``. In float64 until the last rounding."""
        shift = moved - self.x
        norm = shift.flatten(1).norm(dim=1).clamp_(min=torch.finfo(shift.dtype).tiny)
        shift *= _per_image((self.eps / norm).clamp_(max=1), shift)
        point = (self.x + shift).clamp_(0, 1).to(self.x.dtype)
        return _inward(point, self.x, shift.abs())


def _unit(gradient: Tensor) -> Tensor:
    """Each image's gradient scaled to length 1; zero stays zero. The largest entry is divided out first, lest squares underflow."""
    tiny = torch.finfo(gradient.dtype).tiny
    gradient = gradient / _per_image(gradient.flatten(1).abs().amax(dim=1).clamp_(min=tiny), gradient)
    return gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp_(min=tiny), gradient)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """``values`` [N] shaped to multiply ``images`` [N, ...]."""
    return values.view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True)
class Accuracy:
    """Fractions of images classified correctly, in [0, 1].

    Attributes:
        clean: as they are.
        robust: as they are and also under the attack (None where there was none): an adversary may leave an image alone.
        images: how many there were.
    """

    clean: float
    robust: float | None
    images: int


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], attack: Attack | None = None) -> Accuracy:
    """Clean and robust accuracy of ``model``.

    Args:
        model: gives logits [N, K].
        batches: pairs of images [N, ...] in [0, 1] and classes, int64 [N].
        attack: ``(model, x, y) -> x_adv``, such as ``functools.partial(pgd, eps=8/255, step_size=2/255, steps=20)``. Only images
            that are classified correctly are attacked.

    Raises:
        ValueError: no images; what the attack raises.
    """
    images = clean = robust = 0
    with evaluation_mode(model, freeze=True), torch.no_grad():
        for x, y in batches:
            right = model(x).argmax(dim=1) == y
            images += len(y)
            clean += int(right.sum())
            if attack is not None and right.any():
                x, y = x[right], y[right]
                robust += int((model(attack(model, x, y)).argmax(dim=1) == y).sum())
    if not images:
        raise ValueError("batches: expected at least one image, got none")
    return Accuracy(clean / images, None if attack is None else robust / images, images)
