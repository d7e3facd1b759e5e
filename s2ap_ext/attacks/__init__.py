"""Attacks: ways to make adversarial examples, one part per file, and the robust accuracy that they measure.

Images are floating point in [0, 1]. An attack sees the model in evaluation mode and takes gradients with respect to the images only:
inside it no parameter requires a gradient, so autograd neither stores what weight gradients would need nor computes them. Afterwards
every mode, ``requires_grad``, ``.grad`` and BatchNorm statistic is as it was found, also where an exception ended the attack.
"""

from ..parts import import_all
from .base import Attack
from .measure import Accuracy, accuracy
from .pgd import Pgd, pgd

__all__ = ["Accuracy", "Attack", "Pgd", "accuracy", "pgd"]

import_all(__name__, __path__)
