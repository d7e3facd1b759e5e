"""s2ap_ext: fused C++/CUDA kernels and drop-in layers for adversarially robust pruning with S2AP."""

from ._library import backend
from .engine import compile_sparse
from .nn import S2APConv2d, S2APLinear, densify, sparsify
from .optim import AWP, S2AP

__version__ = "0.1.0"
__all__ = ["AWP", "S2AP", "S2APConv2d", "S2APLinear", "backend", "compile_sparse", "densify", "sparsify"]
