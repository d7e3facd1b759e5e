"""Ways to search a mask, one small file each: what is scored, what trains, and what follows a step.

How many weights are kept is the recipe's ``prune.sparsity``, the loss its ``prune.loss``; whether the gradient is taken at perturbed
scores (S2AP) is independent of the method.
"""

from .base import Method
from .hydra import Hydra
from .magnitude import Magnitude

METHODS: dict[str, type[Method]] = {"hydra": Hydra, "magnitude": Magnitude}

__all__ = ["METHODS", "Hydra", "Magnitude", "Method"]
