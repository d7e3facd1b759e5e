"""Pruned heads and neurons: one score for each, whose gate is at the columns of the block's last layer.

The masked weight of a :class:`PrunedUnits` is a vector of gates, 1 for a unit that stays and 0 for one that does not. The last layer
computes with its weight times the gates of its columns, so a unit without its gate adds nothing, whatever its rows are: the function is
the one that :func:`s2ap_ext.densify` writes down by setting its rows, biases and columns to 0.

**The gradient.** It is the straight-through one of the gates, ``dL/dgate * sign(s)``, where ``dL/dgate`` is the sum of
``dL/d(w * gate) * w`` over the unit's columns. A unit's output is linear in its gate, so this tells of a pruned unit too what it would
do. With the rows masked as well, gates would meet as a product, whose gradient is 0 for every pruned unit: none would ever come back.
It is the importance of Michel et al., NeurIPS 2019, arXiv 1905.10650, section 4.2, with its sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..allocations import Layer
from ..reference import GROUP, Pattern
from ..sparsity import score_init
from .mask_state import MaskGroup
from .pruned_weight import PrunedChild
from .structure import Block, Units, candidates, looks_like_attention
from .tracing import NotRunnable, Trace


class PrunedUnits(PrunedChild):
    """The weight of a block's last layer, of which the columns of pruned units are 0. It is called without arguments.

    Attributes:
        block: what each unit ties.
        columns (Parameter): the last layer's weight, before it is masked.
        scores (Parameter): one for each unit, [units]; at first they rank as the means of ``|w|`` over a unit's weights do.
        weight (buffer): the gates before they are masked: ones, [units].
        kept (buffer): number of units that stay, int64.
        mask (bool): the mask in force, [units].

    Equivalent to (forward)::

        layer.columns * layer.mask.repeat_interleave(layer.columns.shape[1] // len(layer.mask))
    """

    def __init__(self, block: Block, *, kept: Tensor, group: MaskGroup) -> None:
        super().__init__()
        self.block = block
        self.columns = block.columns.weight
        self.register_buffer("weight", torch.ones(block.count, dtype=self.columns.dtype, device=self.columns.device))
        self._start_pruning(0, scores=nn.Parameter(self._first_scores()), kept=kept, group=group)

    def forward(self) -> Tensor:
        return self.columns * self._masked_weight().repeat_interleave(self.columns.shape[1] // self.block.count)

    @property
    def granularity(self) -> str:
        return self.block.kind

    @property
    def weights_per_entry(self) -> int:
        """The weights of a unit, without its biases."""
        return sum(weight.numel() for weight in self.masked_parameters) // self.block.count

    @property
    def masked_parameters(self) -> tuple[Tensor, ...]:
        return self.columns, *(rows.tensor for rows in self.block.rows if rows.tensor.dim() > 1)

    @torch.no_grad()
    def masked_values(self) -> dict[Tensor, Tensor]:
        values: dict[Tensor, Tensor] = {self.columns: self.bake().detach()}
        for rows in self.block.rows:
            stays = self.mask.view(-1, *[1] * rows.tensor.dim())
            values[rows.tensor] = torch.where(stays, rows.by_unit(self.block.count), 0).view_as(rows.tensor)
        return values

    @property
    def magnitudes(self) -> Tensor:
        """Of each unit the mean of ``|w|`` over its weights."""
        weights = self.block.weights(self.columns)
        return weights.abs().mean(dim=1, dtype=torch.promote_types(weights.dtype, torch.float32)).to(weights.dtype)

    def reset_scores(self) -> None:
        with torch.no_grad():
            self.scores.copy_(self._first_scores())

    def _first_scores(self) -> Tensor:
        """As :func:`s2ap_ext.sparsity.score_init` of the units' magnitudes; the inputs of a unit are its weights."""
        return score_init(self.magnitudes.view(-1, 1)).view(-1) / math.sqrt(self.weights_per_entry)

    def bake(self) -> nn.Parameter:
        stays = self.mask.repeat_interleave(self.columns.shape[1] // self.block.count)
        return nn.Parameter(torch.where(stays, self.columns.detach(), 0), requires_grad=self.columns.requires_grad)

    @torch.no_grad()
    def clear_rows(self) -> None:
        """Sets the rows and biases of the units that are pruned to 0."""
        for tensor, value in self.masked_values().items():
            if tensor is not self.columns:
                tensor.copy_(value)


def unit_layers(blocks: Sequence[Block]) -> Iterator[Layer]:
    """What allocations are told about blocks: a row of weights for each unit."""
    for block in blocks:
        weights = block.weights()
        yield Layer(block.name or type(block.module).__name__, weights, Pattern(GROUP, *weights.shape))


class Refused(NamedTuple):
    """What may hold units that can be pruned and does not.

    Attributes:
        names: of the module, and of its layers in question.
        why: in words, with the names.
    """

    names: list[str]
    why: str


def unit_blocks(model: nn.Module, kind: str, told: Units | Sequence[Units], example: Any) -> tuple[list[Block], list[Refused]]:
    """The blocks of ``model`` that hold heads or neurons, and what looks like one and cannot be pruned.

    Args:
        kind: ``"head"`` or ``"neuron"``.
        told, example: the ``structure`` and ``example`` of :func:`s2ap_ext.sparsify`.

    Raises:
        ValueError: an entry of ``told`` that does not fit the model.
    """
    told = [told] if isinstance(told, Units) else told
    possible = candidates(model, kind, told)
    trace = Trace(model, [forms[0] for forms in possible if forms[0].origin != "known"], example)
    blocks: list[Block] = []
    why_not: dict[tuple[nn.Module, ...], Refused] = {}
    place = {module: i for i, module in enumerate(model.modules())}
    name_of = {module: name for name, module in model.named_modules()}
    taken: set[nn.Module] = set()
    for forms in possible:
        if not taken.isdisjoint(forms[0].layers()):
            continue
        block, why = forms[0], _why_not(model, forms[0])
        if not why:
            block, why = _form_that_holds(trace, forms)
        if not why:
            blocks.append(block)
            taken.update(block.layers())
        elif block.origin == "user":
            raise ValueError(f"structure: {block.name}: {why}")
        else:
            layers = [name_of[layer] for layer in block.layers()]
            text = f"{block.name or 'the model'} ({', '.join(name.removeprefix(f'{block.name}.') for name in layers)}: {why})"
            why_not.setdefault(tuple(block.layers()), Refused([block.name, *layers], text))
    blocks.sort(key=lambda block: place[block.columns])
    refused = [why_not[layers] for layers in sorted(why_not, key=lambda layers: place[layers[-1]]) if taken.isdisjoint(layers)]
    if kind == "head":
        names = [f"{name}." for name in [*(block.name for block in blocks), *(forms[0].name for forms in possible)]]
        unknown = [name for name in looks_like_attention(model) if not any(_within(f"{name}.", other) for other in names)]
        refused += [Refused([name], f"{name} (its q, k, v and output layers are not recognised)") for name in unknown]
    return blocks, refused


def _within(one: str, other: str) -> bool:
    """Whether one of two modules is the other or a part of it."""
    return one.startswith(other) or other.startswith(one)


def _form_that_holds(trace: Trace, forms: Sequence[Block]) -> tuple[Block, str]:
    """The first form that is right, or one that is not and why."""
    if forms[0].origin == "known":
        return forms[0], ""
    try:
        for block in forms:
            if trace.holds(block):
                return block, ""
    except NotRunnable as error:
        if forms[0].origin == "user":
            return forms[0], ""
        return forms[0], f"it cannot be tried out, {error}; an example of the model's input may help"
    return forms[0], f"run with other numbers, its {forms[0].kind}s turn out not to be independent of one another"


def _why_not(model: nn.Module, block: Block) -> str:
    """Why a block cannot be pruned whatever its structure is; empty if it can."""
    for module, name in [*((rows.module, rows.name) for rows in block.rows), (block.columns, "weight")]:
        if name not in module._parameters:
            return f"expected the {name} of its {type(module).__name__} to be a parameter, but it is computed"
    ours = {id(rows.tensor) for rows in block.rows} | {id(block.columns.weight)}
    uses = [id(p) for module in model.modules() for p in module._parameters.values() if id(p) in ours]
    if len(uses) > len(set(uses)):
        return "another layer has one of its weights too"
    layers = block.layers()
    places = [child for module in model.modules() for child in module._modules.values() if child in layers]
    return "one of its layers is in two places" if len(places) > len(set(places)) or len(layers) < 2 else ""
