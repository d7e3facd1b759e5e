"""How a mask moves, how sharp the loss is around a model, and how far a model is from another.

:mod:`.masks` compares masks, :mod:`.sharpness` and :mod:`.landscape` look at a loss in score space and in weight space, and
:mod:`.stability` compares what two models compute. The loss is piecewise constant in the scores, so each figure says of which relaxation
it is (docs/analysis-and-report.md).
"""

from .landscape import Line, ascended, landscape, line
from .masks import by_layer, chance_overlap, churn, flip_rate, jaccard, layer_masks, mask_distance, overlap
from .sharpness import Spectrum, score_sharpness, spectrum
from .space import SPACES
from .stability import functional_distance, gradient_cosine

__all__ = [
    "SPACES",
    "Line",
    "Spectrum",
    "ascended",
    "by_layer",
    "chance_overlap",
    "churn",
    "flip_rate",
    "functional_distance",
    "gradient_cosine",
    "jaccard",
    "landscape",
    "layer_masks",
    "line",
    "mask_distance",
    "overlap",
    "score_sharpness",
    "spectrum",
]
