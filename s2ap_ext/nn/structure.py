"""Which weights belong to one attention head, or to one neuron of an MLP.

A :class:`Block` ties, unit by unit, the rows of some layers to the columns of a later one: those of q, k and v to the output projection of
attention, those of the first layer of an MLP to the second. Of torch's own modules the ties are known. Elsewhere names and shapes make
*candidates*, which :mod:`s2ap_ext.nn.tracing` accepts or refuses by running them; or the user tells them (:class:`Units`).

With **grouped-query attention** several query heads share one k and v head. A unit is then the k and v head with all of its query heads:
it is the smallest one that can go away while the others compute as before and the ratio of the two numbers of heads stays.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .attention import Attention

SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("query_proj", "key_proj", "value_proj"),
)
PACKED = ("qkv", "qkv_proj", "to_qkv", "Wqkv", "in_proj", "query_key_value")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "dim_head", "key_value_proj_dim")
ELEMENTWISE = (
    nn.Dropout,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.ELU,
    nn.Hardswish,
)


@dataclass(frozen=True)
class Units:
    """Tells where heads or neurons are, in one line.

    For example ``Units("layers.*.attn", rows=("wq", "wk", "wv"), columns="wo", count=8)`` for eight heads in each of these modules, and
    ``Units("layers.*", rows=("w1",), columns="w2")`` for the neurons between two linear layers.

    Attributes:
        within: the modules that hold the layers, as in ``named_modules()``; ``*`` and ``?`` match, and of the modules that do those without
            such layers do not count.
        rows: the linear layers whose rows (and biases) belong to units, by their names within that module.
        columns: the linear layer whose columns do.
        count: how many units there are; None makes every column a unit of its own.
    """

    within: str
    rows: Sequence[str]
    columns: str
    count: int | None = None


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor, of a weight or a bias, of which each unit owns rows.

    Attributes:
        module, name: whose tensor it is, and its name there.
        parts: so many times the rows of all units follow one another; 3 where q, k and v are packed one after another.
    """

    module: nn.Module
    name: str
    parts: int = 1

    @property
    def tensor(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.module, self.name))

    def by_unit(self, count: int) -> Tensor:
        """A view of the tensor, [parts, units, rows of a unit, ...]."""
        tensor = self.tensor
        return tensor.view(self.parts, count, -1, *tensor.shape[1:])


@dataclass(frozen=True, eq=False)
class Block:
    """Units that are pruned against each other.

    Attributes:
        name: as errors call it: that of ``module``.
        kind: ``"head"`` or ``"neuron"``.
        module: the smallest module that holds all of the layers.
        rows: the tensors of which each unit owns rows.
        columns: the layer of whose weight each unit owns as many neighbouring columns.
        count: the number of units.
        origin: ``"known"`` where the ties are certain (torch's own modules, and :class:`s2ap_ext.nn.attention.Attention`), ``"user"``, or
            ``"found"``.
    """

    name: str
    kind: str
    module: nn.Module
    rows: tuple[Rows, ...]
    columns: nn.Linear
    count: int
    origin: str = "found"

    def weights(self, columns: Tensor | None = None) -> Tensor:
        """The weights (not the biases) of each unit as a row, [units, weights of a unit]; of ``columns`` where that was moved away."""
        last = self.columns.weight if columns is None else columns
        weights = [rows.by_unit(self.count).transpose(0, 1).flatten(1) for rows in self.rows if rows.tensor.dim() > 1]
        return torch.cat([*weights, last.view(len(last), self.count, -1).transpose(0, 1).flatten(1)], dim=1).detach()

    def layers(self) -> list[nn.Module]:
        """The modules whose tensors are tied."""
        return list(dict.fromkeys([*(rows.module for rows in self.rows), self.columns]))


def candidates(model: nn.Module, kind: str, told: Sequence[Units]) -> list[list[Block]]:
    """The blocks that there may be, the likeliest first: several forms of each, of which at most one is right; one of those that are known.

    Blocks may overlap; of such at most one is right too.

    Raises:
        ValueError: an entry of ``told`` that does not fit the model.
    """
    found = [forms for units in told for forms in _told(model, kind, units)]
    attention = list(_attention(model))
    if kind == "head":
        return found + attention
    return found + list(_mlps(model, {layer for forms in attention for layer in forms[0].layers()}))


def looks_like_attention(model: nn.Module) -> list[str]:
    """The names of the innermost modules whose classes are called attention and that hold weights."""
    named = {
        name: module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and any(p.dim() > 1 for p in module.parameters())
    }
    return [name for name in named if not any(other.startswith(f"{name}.") for other in named)]


def _told(model: nn.Module, kind: str, units: Units) -> Iterator[list[Block]]:
    names = (*units.rows, units.columns)
    modules = {
        name: module
        for name, module in model.named_modules()
        if fnmatch.fnmatchcase(name, units.within) and all(_layer(module, layer) is not None for layer in names)
    }
    if not modules:
        raise ValueError(f"structure: no module is named {units.within!r} and has layers {', '.join(names)}")
    for name, module in modules.items():
        layers = []
        for layer_name in names:
            layer = _layer(module, layer_name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"structure: expected {name}.{layer_name} to be an nn.Linear, got {type(layer).__name__}")
            layers.append(layer)
        *rows, columns = layers
        count = units.count or columns.in_features
        forms = _forms(name, kind, module, rows, columns, count, "user")
        if not forms:
            sizes = f"{[layer.out_features for layer in rows]} rows and {columns.in_features} columns"
            raise ValueError(f"structure: {name}: {count} units do not divide {sizes}")
        yield forms


def _layer(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _forms(
    name: str, kind: str, module: nn.Module, rows: Sequence[nn.Linear], columns: nn.Linear, count: int, origin: str = "found"
) -> list[Block]:
    """How units may lie in these layers; none if their shapes do not fit."""
    width = columns.in_features
    fewest = min(layer.out_features for layer in rows)
    if fewest < width:  # grouped-query attention
        if width % fewest or count * fewest % width:
            return []
        count = count * fewest // width
    if count < 1 or width % count or any(layer.out_features % count for layer in rows):
        return []
    packed = [(1,) if layer.out_features % width or layer.out_features <= width else (layer.out_features // width, 1) for layer in rows]
    forms = []
    for parts in itertools.product(*packed):
        tensors = [
            Rows(layer, tensor, n)
            for layer, n in zip(rows, parts, strict=True)
            for tensor in ("weight", "bias")
            if getattr(layer, tensor) is not None
        ]
        forms.append(Block(name, kind, module, tuple(tensors), columns, count, origin))
    return forms


def _attention(model: nn.Module) -> Iterator[list[Block]]:
    parents = {child: (name, parent) for name, parent in model.named_modules() for child in parent.children()}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield [_torch_attention(name, module)]
            continue
        linear = {key: child for key, child in module.named_children() if isinstance(child, nn.Linear)}
        separate = [trio for trio in SEPARATE if all(key in linear for key in trio)]
        packed = [(key,) for key in PACKED if key in linear]
        names = next(iter([*separate, *packed]), ())
        if not names:
            continue
        rows = [linear[key] for key in names]
        for around_name, around in ((name, module), parents.get(module, (name, module))):
            others = [part for part in around.modules() if isinstance(part, nn.Linear) and part not in rows]
            fitting = [part for part in others if part.in_features * (3 if len(rows) == 1 else 1) == rows[0].out_features]
            if len(fitting) == 1:
                count = _head_count(module, fitting[0].in_features)
                origin = "known" if type(module) is Attention else "found"
                if forms := _forms(around_name, "head", around, rows, fitting[0], count, origin):
                    yield forms
                break


def _torch_attention(name: str, module: nn.MultiheadAttention) -> Block:
    weights = [Rows(module, "in_proj_weight", 3)]
    if module.in_proj_weight is None:
        weights = [Rows(module, f"{part}_proj_weight") for part in "qkv"]
    biases = [Rows(module, "in_proj_bias", 3)] if module.in_proj_bias is not None else []
    origin = "known" if type(module).forward is nn.MultiheadAttention.forward else "found"
    return Block(name, "head", module, (*weights, *biases), module.out_proj, module.num_heads, origin)


def _head_count(module: nn.Module, width: int) -> int:
    """The number of heads that ``module``, or its configuration, tells; 0 if it does not."""
    for holder in (module, getattr(module, "config", None)):
        for name in HEAD_COUNTS:
            if isinstance(count := getattr(holder, name, None), int):
                return count
        for name in HEAD_WIDTHS:
            if isinstance(size := getattr(holder, name, None), int) and size > 0:
                return width // size
    return 0


def _mlps(model: nn.Module, others: set[nn.Module]) -> Iterator[list[Block]]:
    """Linear layers, none of ``others``, of which one follows another in the same module or in neighbours within it."""
    for name, module in reversed(list(model.named_modules())):  # inner modules before those around them
        of_torch = True
        if type(module) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
            pairs = [([module.linear1], module.linear2)]
        elif type(module) is nn.Sequential:
            pairs = list(_in_sequence(module))
        else:
            of_torch, pairs = False, list(_neighbours(module))
        for rows, columns in pairs:
            if not others.isdisjoint([*rows, columns]):
                continue
            plain = all(type(layer).forward is nn.Linear.forward for layer in (*rows, columns))
            origin = "known" if of_torch and plain else "found"
            if forms := _forms(name, "neuron", module, rows, columns, columns.in_features, origin):
                yield forms


def _in_sequence(module: nn.Sequential) -> Iterator[tuple[list[nn.Linear], nn.Linear]]:
    """Two linear layers with nothing between them but what treats each number on its own."""
    first = None
    for layer in module:
        if isinstance(layer, nn.Linear):
            if first is not None and first.out_features == layer.in_features:
                yield [first], layer
            first = layer
        elif type(layer) not in ELEMENTWISE:
            first = None


def _neighbours(module: nn.Module) -> Iterator[tuple[list[nn.Linear], nn.Linear]]:
    """Linear layers among the children of ``module`` and their children, in the order of their registration."""
    within = [part for child in module.children() for part in (child, *child.children())]
    layers = [part for part in within if isinstance(part, nn.Linear)]
    for a, b, columns in zip(layers, layers[1:], layers[2:], strict=False):  # a gated MLP: the product of two layers' outputs
        if (a.in_features, a.out_features) == (b.in_features, b.out_features) and a.out_features == columns.in_features != b.in_features:
            yield [a, b], columns
    for a, columns in itertools.pairwise(layers):
        packed = a.out_features == 2 * columns.in_features and a.in_features == columns.out_features  # the two in one layer
        if a.out_features == columns.in_features or packed:
            yield [a], columns
