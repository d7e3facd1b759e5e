"""How sparse a model is, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..sparsity import kept_weights
from .layers import Pruned
from .pruned_weight import PrunedChild


@dataclass(frozen=True)
class SparsityRow:
    """One layer.

    Attributes:
        layer: its name.
        weights: how many it has; biases and normalisation parameters do not count.
        kept: how many of them stay.
        sparsity: the fraction removed.
        granularity: what is removed as one, as in :func:`sparsify`; ``"dense"`` for a layer that is not pruned.
    """

    layer: str
    weights: int
    kept: int
    sparsity: float
    granularity: str


@dataclass(frozen=True)
class SparsityTable:
    """All layers of a model. ``str(table)`` is a text table, and ``dataclasses.asdict(table)`` is ready for JSON.

    Attributes:
        rows: the layers in module order, each weight once.
        weights, kept, sparsity: those of all rows together.
    """

    rows: tuple[SparsityRow, ...]
    weights: int
    kept: int
    sparsity: float

    def __str__(self) -> str:
        lines = [("layer", "weights", "kept", "sparsity", "granularity")]
        lines += [(r.layer, f"{r.weights:,}", f"{r.kept:,}", f"{r.sparsity:.2%}", r.granularity) for r in self.rows]
        lines += [("all", f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.2%}", "")]
        name, weights, kept, sparsity, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(f"{a:{name}}  {b:>{weights}}  {c:>{kept}}  {d:>{sparsity}}  {e}".rstrip() for a, b, c, d, e in lines)


def sparsity_table(model: nn.Module) -> SparsityTable:
    """How many weights each layer of ``model`` has and keeps.

    The counts of pruned layers follow from ``kept`` and the granularity; no mask is made. Layers that are not pruned count too: every
    parameter of more than one dimension is a row of its own. Heads and neurons are a row for each block, of all weights that they tie,
    under the name of the module that holds them. Tied weights are counted once, under the name of the first pruned layer
    that has them, or of the first layer where none is pruned.
    """
    pruned = [module for module in model.modules() if isinstance(module, Pruned)]
    seen = {
        id(tensor) for layer in pruned for tensor in (*layer.masked_parameters, layer.scores)
    }  # parameters that make no row of a dense layer
    counted: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, Pruned):
            if id(module.scores) not in counted:
                counted.add(id(module.scores))
                entries, each = module.weight.numel(), module.weights_per_entry
                kept = kept_weights(module.mask_state.pattern, entries, int(module.kept))
                label = module.mask_state.label if isinstance(module, PrunedChild) else name or type(module).__name__
                rows.append(_row(label, each * entries, each * kept, module.granularity))
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                label = ".".join(filter(None, (name, parameter_name))).removesuffix(".weight")
                rows.append(_row(label, parameter.numel(), parameter.numel(), "dense"))
    weights, kept = sum(row.weights for row in rows), sum(row.kept for row in rows)
    return SparsityTable(tuple(rows), weights, kept, _sparsity(weights, kept))


def _row(layer: str, weights: int, kept: int, granularity: str) -> SparsityRow:
    return SparsityRow(layer, weights, kept, _sparsity(weights, kept), granularity)


def _sparsity(weights: int, kept: int) -> float:
    return (weights - kept) / weights if weights else 0.0
