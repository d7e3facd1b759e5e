"""Pruned layers, and the conversion of whole models."""

from .convert import densify, sparsify, train_scores, train_weights
from .convolution import dense_kernels
from .layers import Pruned, PrunedWeight, S2APConv2d, S2APLinear, refresh, sparse_layers
from .table import SparsityRow, SparsityTable, sparsity_table

__all__ = [
    "Pruned",
    "PrunedWeight",
    "S2APConv2d",
    "S2APLinear",
    "SparsityRow",
    "SparsityTable",
    "dense_kernels",
    "densify",
    "refresh",
    "sparse_layers",
    "sparsify",
    "sparsity_table",
    "train_scores",
    "train_weights",
]
