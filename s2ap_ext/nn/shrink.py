"""Channels that are gone are taken out of the network, which becomes an ordinary smaller one.

What a channel mask has set to zero is found again in the operations of the network (:mod:`s2ap_ext.nn.channels`), and the parameters are
cut. Torch-Pruning's dependency graph (Fang et al., arXiv 2301.12900) answers only which layers have to be cut together. Exactness asks
for more: what number a channel holds after its BatchNorm and its activation function, whether every layer that reads the channel finds
that number, and where it can go. A graph that carries these numbers along finds the dependencies on the way, so there is none but ours.

**Constants.** A channel without weights still holds ``relu(beta - gamma * mean / std)`` after BatchNorm and ReLU. A layer that reads it
and does not pad its input takes ``constant * sum(weights)`` into its bias, and gets one where it has none. Where zeros are padded, that
is wrong at the border. There one constant channel stays, and the weights of the others are added to its own, each times the ratio of the
constants: all these channels have the same shape, zeros around a plane of one number, so the sum is exact there too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..modes import evaluation_mode
from .channels import analyse, arguments
from .coupling import Coupling, Reader
from .layers import pruned_layers


class Size(NamedTuple):
    """Of a network.

    Attributes:
        parameters: how many numbers they have.
        flops: floating point operations of one forward, as :mod:`torch.utils.flop_counter` counts them (a multiply-add is two).
    """

    parameters: int
    flops: int


def size_of(model: nn.Module, example: Any) -> Size:
    """The size of ``model`` in evaluation mode, for an input of it as :func:`shrink_channels` takes it."""
    args, kwargs = arguments(example)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention may be one operation then, of which the counter knows nothing
    try:
        with evaluation_mode(model, freeze=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Size(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def shrink_channels(model: nn.Module, example: Any) -> nn.Module:
    """Removes the channels of ``model`` that no result depends on, in place; in evaluation mode it computes what it did, up to rounding.

    Removed are outputs of convolutions and linear layers that hold one number for every image, because their weights are zero, and those
    that are only multiplied by zeros; with their BatchNorm and the inputs of the layers that read them. Activations that are added or
    multiplied lose a channel together or not at all, so a channel of a residual stream goes only where every layer that is added to
    it has lost it. Of a grouped convolution each group loses equally many; every layer keeps a channel. What the analysis does not know
    (attention, LayerNorm, channels that change places) keeps the channels that it reads.

    Args:
        model: without pruned layers: what :func:`s2ap_ext.densify` gives. Its modules keep their names; parameters that change become new
            ones, so an optimizer has to be made after this.
        example: an input of the model, on its device: images [N, C, H, W], a tuple of arguments, or a mapping of named ones. The model is
            run on it before and after, to see that it computes the same.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` has pruned layers; :func:`torch.export.export` cannot record it.
        RuntimeError: the smaller network fails or computes something else, as where the model's code has the number of channels written
            in it. The model is unchanged then.
    """
    if pruned := list(pruned_layers(model)):
        raise ValueError(f"model: layer {pruned[0] or '(the model itself)'} is pruned; densify(model) first")
    with evaluation_mode(model, freeze=False), torch.no_grad():
        expected = _outputs(model, example)
        for written in (False, True):
            before = {module: _contents(module) for module in model.modules()}
            try:
                _cut(model, analyse(model, example, numbers_are_written=written))
                _compare(_outputs(model, example), expected)
                break
            except (RuntimeError, AssertionError) as error:
                for module, contents in before.items():
                    module.__dict__.update(contents)
                if written:
                    raise RuntimeError(f"model: its code does not take fewer channels, so it stays as it was: {error}") from error
    return model


def _contents(module: nn.Module) -> dict[str, object]:
    return {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = arguments(example)
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _compare(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        tolerance = 0.0
        if other.is_floating_point() and other.numel():
            # Rounding that deep networks amplify: two memory formats of one ResNet-50 may differ by hundreds of units in the last place.
            tolerance = 1e4 * torch.finfo(other.dtype).eps * float(other.nan_to_num(0.0, 0.0, 0.0).abs().max())
        torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _cut(model: nn.Module, found: Coupling) -> None:
    gone = found.removed()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    changed: dict[str, Tensor] = {}
    for reader in found.readers:
        _fold(reader, gone[reader.units], tensors, changed)
    for name, (units, groups) in found.grouped.items():
        changed[name] = _cut_groups(changed.get(name, tensors[name]), ~gone[units], groups)
    for (name, axis), units in found.axes.items():
        if gone[units].any():
            tensor = changed.get(name, tensors[name])
            changed[name] = tensor.index_select(axis, (~gone[units]).nonzero().flatten().to(tensor.device))
    for reader in found.readers:  # a bias that is new
        if reader.bias is None and (name := _bias_of(reader)) in changed:
            changed[name] = changed[name][(~gone[found.axes[reader.weight, 0]]).to(changed[name].device)]
    _put(model, tensors, changed, found.depthwise)


def _bias_of(reader: Reader) -> str:
    return reader.bias or reader.weight.removesuffix("weight") + "bias"


def _fold(reader: Reader, gone: Tensor, tensors: dict[str, Tensor], changed: dict[str, Tensor]) -> None:
    """Makes up for the channels that are ``gone``, bool [C]: by one that stays, or by the bias."""
    if not (gone & reader.folded).any():
        return
    old = changed.get(reader.weight, tensors[reader.weight])
    weight = old.double().cpu().clone()
    by_group = weight.view(reader.groups, -1, *weight.shape[1:])  # views of weight
    shifts = []
    sides = (t.chunk(reader.groups) for t in (reader.constant, gone & reader.folded, ~gone))
    for own, constant, goes, stays in zip(by_group, *sides, strict=True):
        weighted = own[:, goes] * constant[goes].view(1, -1, *[1] * (own.dim() - 2))
        if not reader.padded:
            shifts.append(weighted.flatten(1).sum(1))
        elif goes.any():
            instead = int(torch.where(stays, constant.nan_to_num().abs(), 0.0).argmax())
            own[:, instead] += weighted.sum(1) / constant[instead]
    if reader.padded:
        changed[reader.weight] = weight.to(old)
        return
    name = _bias_of(reader)
    bias = changed.get(name, tensors.get(name))
    shift = torch.cat(shifts)
    changed[name] = shift.to(old) if bias is None else (bias.double().cpu() + shift).to(bias)


def _cut_groups(weight: Tensor, stays: Tensor, groups: int) -> Tensor:
    """Other inputs of each group; as many."""
    by_group = zip(weight.chunk(groups), stays.chunk(groups), strict=True)
    return torch.cat([own[:, own_stays.to(weight.device)] for own, own_stays in by_group])


def _put(model: nn.Module, old: dict[str, Tensor], changed: dict[str, Tensor], depthwise: Iterable[str]) -> None:
    """Sets the changed tensors wherever the old ones are, new ones by their names, and the sizes that modules remember."""
    new = {id(old[name]): _like(old[name], tensor) for name, tensor in changed.items() if name in old}
    for module in list(model.modules()):
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: new[id(tensor)] for key, tensor in tensors.items() if id(tensor) in new})  # type: ignore[misc]
    for name, tensor in changed.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if name not in old:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=module.get_parameter("weight").requires_grad)
        if name in depthwise and isinstance(module, nn.modules.conv._ConvNd):
            module.groups = module.groups * len(tensor) // len(old[name])
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.batchnorm._NormBase) and (own := [*module.parameters(False), *module.buffers(False)]):
            module.num_features = len(own[0])


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
