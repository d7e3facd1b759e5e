"""Networks that compute with their kept weights only, on the CPU: for deployment, and under attacks."""

from .attack import disabled, for_attack
from .lowering import DensePart, Layer
from .network import SparseNetwork, compile_sparse, sparse_where_it_pays

__all__ = ["DensePart", "Layer", "SparseNetwork", "compile_sparse", "disabled", "for_attack", "sparse_where_it_pays"]
