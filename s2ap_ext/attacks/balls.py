"""The sets that attacks search: the images within distance eps of ``x`` and within [0, 1], in the linf, l2 and l1 norms.

A ball gives a random point of itself and takes steps along gradients. It works in float64 until the last rounding, which is always
towards ``x``: no point leaves the ball or the range of images, not even by a bit of half precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Ball(ABC):
    """The images within distance ``eps`` of the images ``x`` [N, ...] and within [0, 1].

    Args:
        x: the centres, in [0, 1].
        eps: the radius.
        step_size: the length of a step, in the same norm.
    """

    @abstractmethod
    def __init__(self, x: Tensor, eps: float, step_size: float) -> None: ...

    @abstractmethod
    def random_start(self, generator: torch.Generator | None) -> Tensor:
        """A uniformly random point of the whole ball, clipped to [0, 1], for each image."""

    @abstractmethod
    def step(self, x_adv: Tensor, gradient: Tensor) -> None:
        """Moves ``x_adv`` in place by one step of steepest ascent, and back into the ball. A gradient of 0 moves nothing."""


class Linf(Ball):
    """The linf ball: every pixel within eps. With the range of images it is a box. Steps go along the signs of the gradient."""

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


class L2(Ball):
    """The l2 ball: Euclidean distance eps. Steps go along each image's gradient, scaled to length 1."""

    def __init__(self, x: Tensor, eps: float, step_size: float) -> None:
        # The margin is for the rounding of whoever computes the distance in the images' own precision.
        self.eps = eps * (1 - 4 * torch.finfo(x.dtype).eps)
        self.x, self.step_size = x, step_size

    def random_start(self, generator: torch.Generator | None) -> Tensor:
        """A Gaussian direction, and a radius whose d-th power is uniform."""
        direction = _unit(torch.randn(self.x.shape, dtype=torch.float64, device=self.x.device, generator=generator))
        radius = torch.rand(self.x.shape[0], dtype=torch.float64, device=self.x.device, generator=generator)
        radius = self.eps * radius ** (1 / self.x[0].numel())
        return self._project(self.x + direction * _per_image(radius, self.x))

    def step(self, x_adv: Tensor, gradient: Tensor) -> None:
        x_adv.copy_(self._project(x_adv + self.step_size * _unit(gradient.double())))

    def _project(self, moved: Tensor) -> Tensor:
        """Onto the ball, then onto [0, 1], which brings no pixel further from ``x``."""
        shift = moved - self.x
        norm = shift.flatten(1).norm(dim=1).clamp_(min=torch.finfo(shift.dtype).tiny)
        shift *= _per_image((self.eps / norm).clamp_(max=1), shift)
        point = (self.x + shift).clamp_(0, 1).to(self.x.dtype)
        return _inward(point, self.x, shift.abs())


class L1(Ball):
    """The l1 ball: the sum of all pixels' distances at most eps.

    Steepest ascent in this norm would move a single pixel by the whole step. As in SLIDE a step is instead spread evenly over the 1 % of
    the pixels with the largest gradients, without those that the range of images lets move no further. (l1-APGD starts with 20 % and
    lowers that as it goes on; without such a schedule 20 % is a weak attack: the projection takes off again what it adds to so many.)

    Source: the steps are those of Tramer and Boneh, arXiv 1904.13000; the exact projection onto the ball and the range of images together,
    without which the steps are wasted, is that of Croce and Hein, Mind the box, arXiv 2103.01208.
    """

    MOVED = 0.01

    def __init__(self, x: Tensor, eps: float, step_size: float) -> None:
        # The margin is for the rounding of whoever sums up the distance in the images' own precision (halves are summed in float32).
        dtype, pixels = x.dtype, x[0].numel()
        rounding = 4 * torch.finfo(dtype).eps + pixels**0.5 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        self.eps = eps * (1 - rounding)
        self.x, self.step_size = x, step_size
        self.moved = max(1, round(self.MOVED * pixels))

    def random_start(self, generator: torch.Generator | None) -> Tensor:
        """Signed exponential numbers, divided by the sum of their sizes and of one more: uniform in the ball."""
        images, pixels = self.x.flatten(1).shape
        sizes = torch.empty(images, pixels + 1, dtype=torch.float64, device=self.x.device).exponential_(generator=generator)
        signs = torch.randint(2, (images, pixels), device=self.x.device, generator=generator) * 2 - 1
        shift = self.eps * signs * sizes[:, :-1] / sizes.sum(dim=1, keepdim=True)
        return self._project(self.x + shift.view(self.x.shape))

    def step(self, x_adv: Tensor, gradient: Tensor) -> None:
        size = gradient.double().abs()
        size[((x_adv <= 0) & (gradient < 0)) | ((x_adv >= 1) & (gradient > 0))] = 0
        largest, where = size.flatten(1).topk(self.moved, dim=1)
        moves = (largest > 0).double()
        moves *= self.step_size / moves.sum(dim=1, keepdim=True).clamp_(min=1)
        direction = gradient.double().sign()
        step = torch.zeros_like(size).flatten(1).scatter_(1, where, moves).view(size.shape) * direction
        x_adv.copy_(self._project(x_adv + step))

    def _project(self, moved: Tensor) -> Tensor:
        """The nearest point, in the Euclidean sense, that is in the ball and in [0, 1]."""
        shift = (moved - self.x).flatten(1)
        room = torch.where(shift > 0, 1 - self.x.flatten(1).double(), self.x.flatten(1).double())
        kept = _kept_distances(shift.abs(), room, self.eps).view(self.x.shape)
        point = (self.x + kept * shift.view(self.x.shape).sign()).clamp_(0, 1).to(self.x.dtype)
        return _inward(point, self.x, kept)


BALLS: dict[str, type[Ball]] = {"linf": Linf, "l2": L2, "l1": L1}
ORDERS = {"linf": torch.inf, "l2": 2, "l1": 1}


def distances(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """How far each image of ``x_adv`` is from that of ``x`` in the norm, float64 [N]."""
    shift = (x_adv.double() - x.double()).flatten(1)
    found: Tensor = torch.linalg.vector_norm(shift, ORDERS[norm], dim=1)
    return found


def _kept_distances(sizes: Tensor, room: Tensor, eps: float) -> Tensor:
    """The distances that pixels keep in the projection onto an l1 ball and the range of images.

    Every pixel gives up the same distance, down to none and up to its room: ``kept = (sizes - given_up).clamp(0, room)``, with the
    smallest ``given_up >= 0`` for which the sum of ``kept`` is at most ``eps``. The sum is piecewise linear in ``given_up``; it bends
    where a pixel reaches 0 and where it leaves its room. With the bends sorted downwards, running totals give the sum at each of them.

    Args:
        sizes: how far each pixel wants to move, float64 [N, pixels], >= 0.
        room: how far the range of images lets it, float64 [N, pixels].
        eps: the radius.
    """
    bends = torch.cat([sizes, sizes - room], dim=1).clamp_(min=0)
    bends, order = bends.sort(dim=1, descending=True)
    # Just below a bend one pixel more is between 0 and its room, or one fewer.
    between = torch.where(order < sizes.shape[1], 1.0, -1.0).to(bends.dtype).cumsum(dim=1)
    sums = torch.zeros_like(bends)
    sums[:, 1:] = ((bends[:, :-1] - bends[:, 1:]) * between[:, :-1]).cumsum(dim=1)
    # The sum reaches eps between the bend before `reached` and that one: there the line is followed back up.
    reached = torch.searchsorted(sums, torch.full_like(sums[:, :1], eps)).clamp_(1, sums.shape[1] - 1)
    start = reached - 1
    bend, before, slope = (t.gather(1, start) for t in (bends, sums, between))
    given_up = torch.where(sums[:, -1:] <= eps, 0, bend - (eps - before) / slope.clamp(min=1))
    kept = torch.minimum((sizes - given_up).clamp_(min=0), room)
    # The difference of two numbers much larger than eps may be wrong in the last digits of eps.
    return kept * (eps / kept.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(kept.dtype).tiny)).clamp_(max=1)


def _inward(point: Tensor, x: Tensor, limit: Tensor | float) -> Tensor:
    """``point``, moved by its last bit towards ``x`` wherever rounding left it further than ``limit`` from there."""
    too_far = (point.double() - x.double()).abs() > limit
    return torch.where(too_far, torch.nextafter(point, x), point)


def _round_down(eps: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``eps`` (8/255 in float32 is)."""
    return _inward(torch.tensor(eps, dtype=dtype), torch.tensor(0.0, dtype=dtype), eps).item()


def _unit(gradient: Tensor) -> Tensor:
    """Each image's gradient scaled to length 1; zero stays zero. The largest entry is divided out first, lest squares underflow."""
    tiny = torch.finfo(gradient.dtype).tiny
    gradient = gradient / _per_image(gradient.flatten(1).abs().amax(dim=1).clamp_(min=tiny), gradient)
    return gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp_(min=tiny), gradient)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    """``values`` [N] shaped to multiply ``images`` [N, ...]."""
    return values.view(-1, *[1] * (images.dim() - 1))
