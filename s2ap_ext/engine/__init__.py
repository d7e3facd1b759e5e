"""Networks that compute with their kept weights only, on the CPU: for deployment, and under attacks."""

from .attack import for_attack
from .choice import Layer
from .lowering import DensePart
from .network import SparseNetwork, compile_sparse

__all__ = ["DensePart", "Layer", "SparseNetwork", "compile_sparse", "for_attack"]
