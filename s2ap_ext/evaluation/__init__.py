"""Robustness under several attacks, image by image, in a way that a reviewer accepts.

:func:`evaluate` says which images hold under which attack, whose code each attack is, the worst case over all of them and how certain
that is. The attacks themselves are the parts of :mod:`s2ap_ext.attacks`.
"""

from .gradients import GradientCheck, check_gradients
from .result import Evaluation
from .run import chosen, evaluate

__all__ = ["Evaluation", "GradientCheck", "check_gradients", "chosen", "evaluate"]
