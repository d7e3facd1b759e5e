"""Pruned layers, and the conversion of whole models."""

from .convert import densify, sparsify, train_scores, train_weights
from .convolution import dense_kernels
from .layers import Pruned, S2APConv2d, S2APLinear, refresh, sparse_layers
from .pruned_weight import PrunedWeight

__all__ = [
    "Pruned",
    "PrunedWeight",
    "S2APConv2d",
    "S2APLinear",
    "dense_kernels",
    "densify",
    "refresh",
    "sparse_layers",
    "sparsify",
    "train_scores",
    "train_weights",
]
