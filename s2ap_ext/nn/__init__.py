"""Pruned layers, and the conversion of whole models."""

from .accelerated import Accelerated, matmul_precision
from .convert import densify, sparsify, train_scores, train_weights
from .execution import dense_kernels
from .layers import Pruned, S2APConv2d, S2APLinear, pruned_layers, refresh
from .pruned_weight import PrunedWeight
from .sampled_gradients import sampled_gradients
from .shrink_units import shrink_units
from .structure import Units
from .table import SparsityRow, SparsityTable, sparsity_table
from .units import PrunedUnits

__all__ = [
    "Accelerated",
    "Pruned",
    "PrunedUnits",
    "PrunedWeight",
    "S2APConv2d",
    "S2APLinear",
    "SparsityRow",
    "SparsityTable",
    "Units",
    "dense_kernels",
    "densify",
    "matmul_precision",
    "pruned_layers",
    "refresh",
    "sampled_gradients",
    "shrink_units",
    "sparsify",
    "sparsity_table",
    "train_scores",
    "train_weights",
]
