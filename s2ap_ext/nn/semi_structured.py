"""Linear layers with 2:4 sparse weights in the form that a GPU's sparse tensor cores compute with: torch's semi-structured tensors."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .layers import Pruned, S2APLinear, pruned_layers

DTYPES = (torch.float16, torch.bfloat16)
Packed = dict[nn.Module, nn.Parameter]


def pack(model: nn.Module) -> Packed:
    """The masked weights of the pruned linear layers of ``model`` as semi-structured parameters, by layer. The model stays as it is.

    Raises:
        ValueError: no layer has such a form; the message names the first and says why.

    Warns:
        UserWarning: some linear layers have none.
    """
    packed: Packed = {}
    reasons: list[str] = []
    for name, layer in pruned_layers(model).items():
        if isinstance(layer, S2APLinear):
            found = _pack(layer)
            if isinstance(found, str):
                reasons.append(f"{name or type(layer).__name__}: {found}")
            else:
                packed[layer] = nn.Parameter(found, requires_grad=False)
    if not packed:
        raise ValueError(f"format 'semi-structured': {reasons[0] if reasons else 'the model has no pruned linear layer'}")
    if reasons:
        warnings.warn(f"format 'semi-structured': these layers stay dense: {'; '.join(reasons)}", stacklevel=3)
    return packed


def _pack(layer: Pruned) -> Tensor | str:
    """The layer's masked weight in the new form, or why it has none."""
    weight = layer.masked_weight.detach()
    if weight.device.type != "cuda":
        return f"expected a weight on a CUDA device, whose tensor cores the form is for, got {weight.device.type}"
    return _form_of(weight)


def _form_of(weight: Tensor) -> Tensor | str:
    if weight.dtype not in DTYPES:
        return f"expected a weight of {' or '.join(map(str, DTYPES))}, got {weight.dtype}; convert the model first, as by model.bfloat16()"
    if weight.shape[1] % 4 or int(weight.view(-1, 4).count_nonzero(dim=1).max()) > 2:
        return "expected at most 2 non-zero weights of every 4 neighbouring inputs, as by sparsify(..., granularity='2:4')"
    try:
        form: Tensor = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    except (RuntimeError, NotImplementedError) as error:  # shapes that the kernels do not take, GPUs and builds without them
        return str(error).splitlines()[0]
    return form


def put_in(packed: Packed) -> None:
    """Gives the layers, which are dense by now, their packed weights."""
    for layer, weight in packed.items():
        layer.weight = weight
