"""Pruned layers, and the conversion of whole models."""

from .accelerated import Accelerated, matmul_precision
from .convert import densify, sparsify, train_scores, train_weights
from .execution import dense_kernels
from .layers import Pruned, S2APConv2d, S2APLinear, pruned_layers, refresh
from .pruned_weight import PrunedWeight
from .sampled_gradients import sampled_gradients
from .table import SparsityRow, SparsityTable, sparsity_table

__all__ = [
    "Accelerated",
    "Pruned",
    "PrunedWeight",
    "S2APConv2d",
    "S2APLinear",
    "SparsityRow",
    "SparsityTable",
    "dense_kernels",
    "densify",
    "matmul_precision",
    "pruned_layers",
    "refresh",
    "sampled_gradients",
    "sparsify",
    "sparsity_table",
    "train_scores",
    "train_weights",
]
