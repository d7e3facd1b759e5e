"""Heads and neurons that really go away: smaller linear layers in the same modules.

The rows and columns of removed units are left out of the layers' weights, and the numbers that the modules around them hold (of heads,
and of all their outputs) are set to what is left. Where a module holds a parameter with an entry for each head, such as a table of
relative positions, these entries go too. ``nn.MultiheadAttention`` cannot have fewer heads of the same width, so
:class:`s2ap_ext.nn.attention.Attention` takes its place. Every block that may compute in other ways is run before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .attention import Attention
from .structure import HEAD_COUNTS, Block, Rows
from .tracing import NotRunnable, Trace, same

KEY_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "embed_dim")  # of all heads together


def shrink_units(model: nn.Module, units: Sequence[tuple[Block, Tensor]], *, example: Any = None) -> None:
    """Removes units from a dense model, in place. What it computes stays the same up to rounding where their weights are 0.

    A block of which nothing would be left keeps its first unit.

    Args:
        model: a dense model.
        units: blocks of the model, each with which of its units stay, bool [units].
        example: an input of the model, as for :func:`s2ap_ext.sparsify`.

    Raises:
        ValueError: a block that does not compute the same afterwards, or cannot be run. The model is unchanged then.
    """
    trace = Trace(model, [block for block, _ in units if block.origin != "known"], example)
    before = [(module, _state(module)) for module in model.modules()]
    try:
        for block, stays in units:
            _shrink(model, trace, block, _indices(stays))
    except BaseException:
        for module, state in before:
            module.__dict__.clear()
            module.__dict__.update(state)
        raise


def _shrink(model: nn.Module, trace: Trace, block: Block, units: Tensor) -> None:
    if len(units) == block.count:
        return
    if isinstance(block.module, nn.MultiheadAttention):
        _replace(model, block, units)
        return
    name = block.name or "the model"
    try:
        expected = [] if block.origin == "known" else trace.run(block)
    except NotRunnable as error:
        why = "an example of the model's input may help"
        raise ValueError(f"shrink: {name} cannot be run to compare it before and after ({error}); {why}") from None
    if block.kind == "head":
        _adjust(block, units)
    for rows in block.rows:
        _set(rows.module, rows.name, _kept_rows(rows, block.count, units))
        rows.module.__dict__["out_features"] = len(rows.tensor)
    _set(block.columns, "weight", _kept_columns(block, units))
    block.columns.in_features = block.columns.weight.shape[1]
    try:
        fits = block.origin == "known" or same(expected, trace.run(block))
    except (NotRunnable, ValueError) as error:
        raise ValueError(f"shrink: {name} cannot have fewer {block.kind}s: {error}") from None
    if not fits:
        raise ValueError(f"shrink: {name} does not compute the same with fewer {block.kind}s")


def _adjust(block: Block, units: Tensor) -> None:
    """Sets what the modules of an attention block know about its heads, and takes the entries of removed ones from other parameters."""
    width = block.columns.weight.shape[1]
    for module in block.module.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        heads = next((module.__dict__[name] for name in HEAD_COUNTS if isinstance(module.__dict__.get(name), int)), block.count)
        for name in (*HEAD_COUNTS, *KEY_HEAD_COUNTS, *WIDTHS):
            value = module.__dict__.get(name)
            if isinstance(value, int) and value in ((width,) if name in WIDTHS else (heads, block.count)):
                setattr(module, name, value * len(units) // block.count)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and block.count in parameter.shape:
                _set(module, name, parameter.index_select(max(i for i, n in enumerate(parameter.shape) if n == block.count), units))


def _replace(model: nn.Module, block: Block, units: Tensor) -> None:
    """Puts an :class:`Attention` of fewer heads where an ``nn.MultiheadAttention`` is."""
    given = block.module
    if given is model:
        raise ValueError("shrink: the model itself is an nn.MultiheadAttention, which has to be replaced; put it into another module")
    if type(given).forward is not nn.MultiheadAttention.forward:
        raise ValueError(f"shrink: {block.name}: expected an nn.MultiheadAttention, got {type(given).__name__}, which has its own forward")
    if given.bias_k is not None or given.add_zero_attn:
        raise ValueError(f"shrink: {block.name}: expected an nn.MultiheadAttention without add_bias_kv and add_zero_attn")
    weights, biases = [], []
    for rows in block.rows:
        kept = _kept_rows(rows, block.count, units).chunk(rows.parts)
        (weights if rows.tensor.dim() > 1 else biases).extend(kept)
    q, k, v = (_linear(weight, bias, given) for weight, bias in zip(weights, biases or [None] * 3, strict=True))
    out = _linear(_kept_columns(block, units), given.out_proj.bias, given)
    smaller = Attention(q, k, v, out, num_heads=len(units), dropout=given.dropout, batch_first=given.batch_first)
    for around in model.modules():
        if isinstance(around, nn.TransformerEncoder) and given in around.modules():
            around.use_nested_tensor = False  # nested tensors are for a path in C++ that reads the weights of torch's attention
        for name, child in around.named_children():
            if child is given:
                setattr(around, name, smaller.train(given.training))


def _linear(weight: Tensor, bias: Tensor | None, like: nn.MultiheadAttention) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    given = like.out_proj.weight
    layer.weight = nn.Parameter(weight.clone(), requires_grad=given.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=given.requires_grad)
    return layer


def _kept_rows(rows: Rows, count: int, units: Tensor) -> Tensor:
    return rows.by_unit(count)[:, units.to(rows.tensor.device)].detach().flatten(0, 2)


def _kept_columns(block: Block, units: Tensor) -> Tensor:
    weight = block.columns.weight.detach()
    return weight.view(len(weight), block.count, -1)[:, units.to(weight.device)].flatten(1)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    given = getattr(module, name)
    module._parameters[name] = nn.Parameter(value.detach().contiguous(), requires_grad=given.requires_grad)


def _indices(stays: Tensor) -> Tensor:
    units = stays.nonzero().flatten()
    return units if len(units) else units.new_zeros(1)


def _state(module: nn.Module) -> dict[str, Any]:
    """All that a module is, with its own dictionaries of parameters and modules."""
    return {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
