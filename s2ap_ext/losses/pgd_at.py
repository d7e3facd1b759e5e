"""Adversarial training."""

from ..parts import register
from .base import Loss


@register("pgd_at")
class PgdAt(Loss):
    """Cross entropy on adversarial examples: the saddle point of Madry et al.

    Source: Madry et al., arXiv 1706.06083, equation 2.1.

    Equivalent to::

        F.cross_entropy(model(adversary(model, x, y)), y)
    """
