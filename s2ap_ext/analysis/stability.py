"""How far apart two models are in what they compute: their gradients and their predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .space import Loss, norm, open_space


def gradient_cosine(before: nn.Module, after: nn.Module, loss: Loss, *, space: str = "scores") -> float:
    """The cosine of the angle between the gradients of ``loss`` at two models, such as one before and after its mask changes.

    In score space these are the straight-through gradients. A cosine near 1 says that a step computed at one mask also fits the other.

    Args:
        before, after: models of the same architecture, which are left as found and taken in evaluation mode.
        loss, space: as for :func:`s2ap_ext.analysis.spectrum`.

    Returns:
        A number in [-1, 1]; 0 where one of the gradients is 0.

    Raises:
        ValueError: models whose parameters have different shapes; an unknown space; a model without pruned layers in score space.
    """
    gradients = []
    for model in (before, after):
        with open_space(model, loss, space) as at:
            gradients.append([g.double() for g in at.gradient()])
    first, second = gradients
    if [g.shape for g in first] != [g.shape for g in second]:
        raise ValueError(f"before, after: expected {space} of the same shapes, got models of different ones")
    lengths = norm(first) * norm(second)
    if lengths == 0:
        return 0.0
    return float(torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()) / lengths


def functional_distance(before: Tensor, after: Tensor) -> float:
    """The mean Kullback-Leibler divergence from the predictions ``after`` to those ``before``, in nats per image.

    Unlike a distance of masks it says how much of what the network computes has changed: 0 where all predictions are the same.

    Args:
        before, after: logits of the same images, floating point [N, K].

    Raises:
        ValueError: logits of different shapes, or none.

    Equivalent to::

        F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    """
    if before.shape != after.shape or before.dim() != 2 or not len(before):
        raise ValueError(f"logits: expected two tensors of one shape [N, K], got {tuple(before.shape)} and {tuple(after.shape)}")
    p, q = (logits.double().log_softmax(dim=1) for logits in (before, after))
    return max(float((p.exp() * (p - q)).sum(dim=1).mean()), 0.0)  # rounding may bring it below 0
