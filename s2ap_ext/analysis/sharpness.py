"""How sharp a loss is at a model: eigenvalues and trace of its Hessian, and its curvature over a distance that flips mask entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from .space import Loss, Space, norm, open_space


@dataclass(frozen=True)
class Spectrum:
    """The top of a Hessian's spectrum.

    Attributes:
        space: ``"scores"`` or ``"weights"``.
        size: how many numbers vary: all scores, or the kept weights.
        eigenvalues: the largest ones, in falling order.
        trace: the sum of all eigenvalues, estimated.
        trace_error: the standard error of that estimate; 0 with a single probe, which has none.
    """

    space: str
    size: int
    eigenvalues: tuple[float, ...]
    trace: float
    trace_error: float

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[0]


def spectrum(model: nn.Module, loss: Loss, *, space: str = "scores", top: int = 5, probes: int = 16, seed: int = 0) -> Spectrum:
    """The largest eigenvalues and the trace of the Hessian of ``loss``, without ever forming it.

    With ``R(u)`` the loss as a function of the masked weights ``u = w * m``:

    * ``space="weights"``: the Hessian of ``R`` in the weights at the mask in force, ``M R''(u) M``. Pruned weights do not vary.
    * ``space="scores"``: the loss itself is piecewise constant in the scores, and its Hessian 0. This is the exact Hessian of its
      straight-through relaxation, ``R`` at ``u(s) = w * (m + |s| - |s0|)``, whose gradient at ``s0`` is the straight-through one:
      ``D R''(u) D`` with ``D = diag(w * sign(s0))``, over kept and pruned entries alike. No mask entry flips in it; for what flips do see
      :func:`score_sharpness`.

    The eigenvalues are found by Lanczos iterations (``scipy.sparse.linalg.eigsh``), the trace by Hutchinson's estimator with probes of +1
    and -1. The model is taken in evaluation mode, so BatchNorm is a fixed affine map.

    Args:
        model: its parameters, gradients, mode and BatchNorm statistics are left as found. In weight space it may be dense.
        loss: maps the model to a scalar, on fixed data, and can be differentiated twice. A robust loss is taken at fixed adversarial
            examples.
        space: ``"scores"`` or ``"weights"``.
        top: how many eigenvalues, at least 1; there are never more than the space has dimensions.
        probes: of the trace, at least 1.
        seed: of the starting vector and the probes.

    Raises:
        ValueError: an argument out of range; a model without pruned layers in score space; a loss whose Hessian is not finite.
        MissingExtra: SciPy is not installed.

    Equivalent to (in weight space, of a dense model with a single weight)::

        hessian = torch.func.hessian(lambda w: loss(torch.func.functional_call(model, {"weight": w})))(weight)
        torch.linalg.eigvalsh(hessian.view(n, n)).flip(0)[:top], hessian.view(n, n).trace()

    Source: Hutchinson, Communications in Statistics 1990 (trace); Lehoucq, Sorensen and Yang, ARPACK Users' Guide, 1998 (Lanczos).
    """
    for name, value in {"top": top, "probes": probes}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    with open_space(model, loss, space) as at:
        generator = torch.Generator().manual_seed(seed)
        eigenvalues = _largest(at, top, generator)
        trace, error = _trace(at, probes, generator)
        return Spectrum(space, at.size, eigenvalues, trace, error)


def _largest(at: Space, top: int, generator: torch.Generator) -> tuple[float, ...]:
    linalg = optional("scipy.sparse.linalg")
    first, size = at.parameters[0], at.size
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

    def product(vector: Any) -> Any:
        along = torch.from_numpy(vector).reshape(-1).to(first)
        return at.hessian_product(along).to("cpu", dtype).numpy()

    if size <= max(2 * top + 1, 20):  # no larger than the basis that Lanczos would build
        columns = [at.hessian_product(row) for row in torch.eye(size, dtype=first.dtype, device=first.device)]
        values = torch.linalg.eigvalsh(torch.stack(columns).double()).flip(0)
    else:
        start = at.flat(at.random(generator)).to("cpu", dtype).numpy()
        if not product(start).any():  # of a random vector: the Hessian is 0, which Lanczos cannot start on
            return (0.0,) * top
        operator = linalg.LinearOperator((size, size), matvec=product, dtype=start.dtype)
        try:
            found = linalg.eigsh(operator, k=top, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)
        except linalg.ArpackError as error:
            raise ValueError(f"loss: Lanczos iterations found no eigenvalues of its Hessian in the {at.name} ({error})") from None
        values = torch.from_numpy(found).sort(descending=True).values
    return tuple(values[:top].tolist())


def _trace(at: Space, probes: int, generator: torch.Generator) -> tuple[float, float]:
    """Hutchinson's estimate and its standard error."""
    first, size = at.parameters[0], at.size
    found = []
    for _ in range(probes):
        probe = (2 * torch.randint(2, (size,), generator=generator) - 1).to(first)
        found.append(float((probe.double() * at.hessian_product(probe).double()).sum()))
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(probes) if probes > 1 else 0.0
    return float(values.mean()), error


def score_sharpness(model: nn.Module, loss: Loss, *, radius: float = 1e-2, iterations: int = 20, seed: int = 0) -> float:
    """The largest curvature (by magnitude) of ``loss`` in score space over a distance that flips mask entries, by power iteration.

    The loss is piecewise constant in the scores, so the second derivative is taken of the straight-through gradient ``g``, with central
    differences over a distance that flips mask entries: ``H v = (g(s + h v) - g(s - h v)) / 2h`` with ``h = radius * ||s||`` over all
    layers together. This map is neither linear nor symmetric: what is found depends on ``radius`` and is no eigenvalue of a matrix. It
    compares masks that were found in the same way. :func:`spectrum` gives eigenvalues, of a relaxation in which nothing flips.

    Args:
        model: with pruned layers. Its scores, gradients, mode and BatchNorm statistics are left as found (the loss is taken in eval mode).
        loss: maps the model to a scalar, on fixed data.
        radius: distance of the differences relative to the norm of the scores, > 0.
        iterations: of the power method, >= 1.
        seed: of the starting direction.

    Raises:
        ValueError: ``radius`` or ``iterations`` out of range; a model without pruned layers.

    Source: S2AP, arXiv 2510.18381 (lambda_max of the score-space Hessian as the measure of sharpness).
    """
    if not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    with open_space(model, loss, "scores") as at:
        h = radius * norm(at.start)
        if h == 0:
            raise ValueError("model: all scores are 0, so a radius relative to them is 0 too")
        v = at.random(torch.Generator().manual_seed(seed))
        curvature = 0.0
        for _ in range(iterations):
            length = norm(v)
            if length == 0:  # the gradient does not change within the radius
                return 0.0
            v = [x / length for x in v]
            ahead, behind = (at.gradient([sign * h * x for x in v]) for sign in (1, -1))
            hv = [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
            curvature = float(torch.stack([_dot(x, y) for x, y in zip(v, hv, strict=True)]).sum())
            v = hv
        return curvature


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum().double()
