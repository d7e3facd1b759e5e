"""How the weights that a model keeps are spread over its layers, one small file each: uniform, ERK, LAMP, global magnitude, by name.

An allocation sees the layers as they are before pruning (:class:`Layer`) and says how many units each of them keeps; which ones these
are is decided by the scores, layer by layer. A new allocation is a class in a file of its own::

    @register("front_loaded")
    class FrontLoaded(Allocation):
        def kept(self, layers, sparsity):
            return [...]

    sparsify(model, 0.9, allocation="front_loaded")
"""

from ..parts import import_all
from .base import Allocation, Layer, allocate

import_all(__name__, __path__)

__all__ = ["Allocation", "Layer", "allocate"]
