"""Ways to search a mask, one small file each: what is scored, what trains, how many weights stay where, and what follows a step.

A method is chosen by name: ``prune.method`` in a recipe. The loss, the allocation and the perturbation of the scores (S2AP) are chosen
beside it, and each goes with every method. A method of your own is a class in a file of your own (``docs/your-own-method.md``).
"""

from ..parts import import_all
from .base import Method, batchnorm_parameters, listen, scores_of, train_only

import_all(__name__, __path__)

__all__ = ["Method", "batchnorm_parameters", "listen", "scores_of", "train_only"]
