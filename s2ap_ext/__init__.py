"""s2ap_ext: fused C++/CUDA kernels and drop-in layers for adversarially robust pruning with S2AP."""

from ._library import backend

__version__ = "0.1.0"
__all__ = ["backend"]
