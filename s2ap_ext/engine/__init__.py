"""Networks that compute with their kept weights only, on the CPU: for deployment, and under attacks."""

from .attack import for_attack
from .builder import DensePart
from .choice import Layer
from .network import SparseNetwork, compile_sparse

__all__ = ["DensePart", "Layer", "SparseNetwork", "compile_sparse", "for_attack"]
