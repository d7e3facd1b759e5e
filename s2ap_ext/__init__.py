"""s2ap_ext: fused C++/CUDA kernels and drop-in layers for adversarially robust pruning with S2AP.

The modules of the package are attributes of it, such as ``s2ap_ext.attacks`` and ``s2ap_ext.pipeline``, and are imported when they are
first asked for.
"""

import importlib
import pkgutil

from ._library import backend
from .engine import compile_sparse
from .nn import S2APConv2d, S2APLinear, densify, sparsify
from .optim import AWP, S2AP

__version__ = "0.1.0"
__all__ = ["AWP", "S2AP", "S2APConv2d", "S2APLinear", "backend", "compile_sparse", "densify", "sparsify"]


def __getattr__(name: str) -> object:
    if name in _modules():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})


def _modules() -> set[str]:
    """The names of the package's public modules."""
    return {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
