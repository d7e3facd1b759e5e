"""Whole models: dense to pruned and back, and which parameters train."""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..allocations import Allocation, Layer, allocate
from ..allocations.mapping import name_matches
from ..sparsity import check_sparsity, input_multiple, pattern_for
from .layers import DENSE_TO_PRUNED, Pruned, S2APConv2d, S2APLinear, baked_weight, pruned_layers, refresh, to_dense_class
from .layout import forget_layout, keep_layout
from .mask_state import MaskGroup
from .pruned_weight import PrunedWeight, pruned_weights, put_in, take_out
from .shrink import shrink_channels
from .tied import TiedWeight, layers_that_are_added, side_by_side

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    allocation: str | Allocation | Mapping[str, float] = "uniform",
    granularity: str = "weight",
    exclude: Sequence[str] = (),
    tied: bool = False,
    example: Any = None,
) -> nn.Module:
    """Turns the convolutions and linear layers of ``model`` into pruned layers, in place.

    ``nn.Conv2d`` and ``nn.Linear`` become :class:`S2APConv2d` and :class:`S2APLinear`: the same objects, with the same
    weights, of another class. Their subclasses, other convolutions and ``nn.MultiheadAttention`` keep their forward, and each weight moves
    into a child, a :class:`PrunedWeight`: ``conv.weight`` is masked then, and ``conv.pruned_weight.weight`` is the parameter. So it is in
    the linear layers of ``nn.TransformerEncoderLayer``, which reads their weights itself. Layers that share a weight share its scores, and
    the weight counts once. Scores start from the weights, so call this after the weights are loaded.

    Args:
        model: any module; it may itself be a layer.
        sparsity: the fraction of weights removed, in [0, 1].
        allocation: how the kept weights are spread over the layers. ``"uniform"``: the same sparsity everywhere. ``"erk"``: large layers
            are pruned more than small ones. ``"lamp"`` and ``"global"``: by one ranking of the weights of all layers. These three meet
            ``sparsity`` exactly over all pruned layers (channels and heads: as nearly as whole ones allow, never removing more), and leave
            something in each. Also an :class:`s2ap_ext.allocations.Allocation`, or a mapping of layers to sparsities of their own,
            ``{"conv1": 0.5, "layer4.*": 0.95}``: the first key that matches a layer or a module around it decides, ``*`` and ``?``
            match, and ``sparsity`` is that of the layers without a key.
        granularity: what is removed as one, and among what. ``"weight"``: single weights of the layer. ``"channel"``: all weights of an
            output; channels rank by the sum of their ``|scores|``. ``"head"``: an attention head, in the q, k and v projections of
            ``nn.MultiheadAttention``; all other layers stay dense. ``"N:M"`` such as ``"2:4"``: N weights of every M neighbouring
            inputs stay; ``sparsity`` has to be ``1 - N / M`` and ``allocation`` uniform. Layers whose inputs are not a multiple of M stay
            dense, and a warning names them.
        tied: for ``"channel"``: layers whose results are added together share one mask, so that :func:`densify` can remove their channels.
            Their weights lie side by side in one :class:`PrunedWeight`, and channels rank by the sum of their ``|scores|`` in all of them.
        example: for ``tied``, an input of the model, with which its operations are recorded: images [N, C, H, W], a tuple of arguments, or
            a mapping of named ones.
        exclude: names of layers or modules to leave dense, as in ``named_modules()``; ``*`` and ``?`` match. ``":first"`` and
            ``":last"`` are the first and the last of the layers that can be pruned, in module order.

    Returns:
        ``model``.

    Raises:
        TypeError: an ``allocation`` that is none of those above.
        ValueError: ``sparsity`` outside [0, 1]; an unknown ``allocation`` or ``granularity``, or one that does not fit ``sparsity`` or
            a layer; a weight that is no parameter (one with a torch parametrization, say); an ``exclude`` that matches no module; a model
            without a layer to prune, or with a layer that is pruned already; ``tied`` with another granularity, without an ``example``, or
            of a model whose operations cannot be recorded. The model is unchanged then.

    Warns:
        UserWarning: layers stay dense because ``"N:M"`` does not divide their inputs. Naming them in ``exclude`` says that they should.
    """
    check_sparsity(sparsity)
    if already := list(pruned_layers(model)):
        raise ValueError(f"model: layer {already[0] or '(the model itself)'} is pruned already; densify(model) first")
    targets, left_out = _targets(model, sparsity, granularity, [exclude] if isinstance(exclude, str) else exclude)
    if tied:
        targets = _tied(targets, model, sparsity, granularity, example)
    layers: dict[int, Layer] = {}  # each weight once, as the first layer that has it
    for target in targets:
        layers.setdefault(id(target.layer.weight), target.layer)
    kept = dict(zip(layers, allocate(allocation, list(layers.values()), sparsity), strict=True))
    if left_out:
        why = f"granularity {granularity!r} does not divide the inputs of these layers, which stay dense"
        warnings.warn(f"{why}: {', '.join(left_out)}", stacklevel=2)

    read_by_name = {part for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer) for part in module.children()}
    group = MaskGroup()
    shared: dict[int, Pruned] = {}  # the first pruned layer of each weight
    for target in targets:
        weight, pattern = target.layer.weight, target.layer.pattern
        first = shared.get(id(weight))
        same = {"kept": torch.tensor(kept[id(weight)], device=weight.device)}
        if first is not None:
            same = {"kept": first.kept, "scores": first.scores}
        if target.parts:
            pruned = PrunedWeight(weight, sparsity=sparsity, pattern=pattern, group=group, **same)
            first_column = 0
            for part in target.parts:
                own = part.layer.weight
                put_in(part.module, part.weight, TiedWeight(pruned, first_column, own.shape))
                first_column += own[0].numel()
        elif type(target.module) in DENSE_TO_PRUNED and target.module not in read_by_name:
            pruned = target.module
            pruned.__class__ = DENSE_TO_PRUNED[type(pruned)]
            pruned._start_pruning(sparsity, pattern, group=group, **same)
        else:
            pruned = PrunedWeight(weight, sparsity=sparsity, pattern=pattern, group=group, **same)
            put_in(target.module, target.weight, pruned)
        pruned.mask_state.label = target.layer.name
        shared.setdefault(id(weight), pruned)
    keep_layout(model)
    return model


class _Target(NamedTuple):
    """A layer that :func:`sparsify` prunes: ``module``'s tensor of the name ``weight``; or the ``parts`` that share a mask."""

    layer: Layer
    module: nn.Module
    weight: str
    parts: tuple[_Target, ...] = ()


def _tied(targets: list[_Target], model: nn.Module, sparsity: float, granularity: str, example: Any) -> list[_Target]:
    """``targets``, those whose channels are added together as one, in the place of the first."""
    if granularity != "channel":
        raise ValueError(f"tied: it is for granularity 'channel', got {granularity!r}")
    if example is None:
        raise ValueError("example: expected an input of the model, with which tied finds the layers that are added together, got None")
    owners = Counter(id(target.layer.weight) for target in targets)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {name_of[id(target.layer.weight)]: target for target in targets if owners[id(target.layer.weight)] == 1}
    for names in layers_that_are_added(model, example):
        parts = tuple(target for name, target in own.items() if name in names)
        if len(parts) < 2:
            continue
        weight = side_by_side([part.layer.weight for part in parts])
        layer = Layer(" + ".join(part.layer.name for part in parts), weight, pattern_for("channel", weight.shape, sparsity))
        first, *others = parts
        targets = [first._replace(layer=layer, parts=parts) if target is first else target for target in targets if target not in others]
    return targets


def _targets(model: nn.Module, sparsity: float, granularity: str, exclude: Sequence[str]) -> tuple[list[_Target], list[str]]:
    """What :func:`sparsify` prunes, each module once, and the layers it leaves out since ``granularity`` does not divide their inputs."""
    multiple = input_multiple(granularity)
    targets, left_out = [], []
    for name, module, weight_name in _candidates(model, granularity, exclude):
        weight = getattr(module, weight_name)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: layer {name} is lazy and has no weights yet; run one batch through the model first")
        label = (name if weight_name == "weight" else ".".join(filter(None, (name, weight_name)))) or type(module).__name__
        if weight_name not in module._parameters:
            raise ValueError(
                f"layer {label}: expected its {weight_name} to be a parameter, but it is computed; remove what does, or exclude it"
            )
        if weight.shape[1] % multiple:
            left_out.append(f"{label} ({weight.shape[1]})")
            continue
        heads = (module.num_heads, module.head_dim) if isinstance(module, nn.MultiheadAttention) else None
        try:
            pattern = pattern_for(granularity, weight.shape, sparsity, heads=heads)
        except ValueError as error:
            raise ValueError(f"layer {label}: {error}") from None
        targets.append(_Target(Layer(label, weight, pattern), module, weight_name))
    if not targets:
        why = f"; {granularity!r} does not divide the inputs of {', '.join(left_out)}" if left_out else ""
        raise ValueError(f"model: expected a layer to prune (a convolution, linear or attention layer), found none{why}")
    return targets, left_out


def _candidates(model: nn.Module, granularity: str, exclude: Sequence[str]) -> list[tuple[str, nn.Module, str]]:
    """The layers that are not excluded: (name of the module, module, name of its weight)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found += [(name, module, weight) for weight in ATTENTION_WEIGHTS if getattr(module, weight) is not None]
        elif isinstance(module, WEIGHTED) and granularity != "head":
            found.append((name, module, "weight"))
    ends = {":first": found[0][0], ":last": found[-1][0]} if found else {}
    names = [name for name, _ in model.named_modules()]
    for pattern in exclude:
        if pattern not in ends and not fnmatch.filter(names, pattern):
            raise ValueError(f"exclude: no module is named {pattern!r}; there are {', '.join(names[1:6])}, ...")

    def excluded(name: str) -> bool:
        return any(name == ends[pattern] if pattern in ends else name_matches(name, pattern) for pattern in exclude)

    return [candidate for candidate in found if not excluded(candidate[0])]


def densify(model: nn.Module, *, shrink: bool = False, example: Any = None) -> nn.Module:
    """Turns pruned layers back into plain modules with the zeros baked in, in place; logits stay equal to the bit.

    Nothing of this package is left: neither in the classes nor in the state_dict. A weight that a pruned layer shared with a dense
    one (a tied embedding) is a parameter of its own afterwards.

    Args:
        model: a model with pruned layers.
        shrink: channels that are gone are taken out, so that the layers become smaller (:func:`s2ap_ext.nn.shrink.shrink_channels`). Logits
            stay equal up to rounding.
        example: for ``shrink``, an input of the model, as for :func:`sparsify`.

    Returns:
        ``model``.

    Raises:
        RuntimeError: called between ``ascend()`` and ``descend()``; a model that cannot be made smaller, which is dense then, with the
            zeros baked in.
        ValueError: ``shrink`` without an ``example``, which changes nothing; or of a model whose operations cannot be recorded, which is
            dense then.
    """
    if shrink and example is None:
        raise ValueError("example: expected an input of the model, with which shrink finds the channels that are gone, got None")
    refresh(model)
    baked: dict[tuple[int, int], nn.Parameter] = {}
    for layer in pruned_layers(model).values():
        baked_weight(layer, baked)  # all of them before the first layer changes
    for module in list(model.modules()):
        if isinstance(module, (S2APConv2d, S2APLinear)):
            to_dense_class(module, baked)
        elif pruned := pruned_weights(module):
            take_out(module, {name: _baked(child, baked) for name, child in pruned})
    forget_layout(model)
    if example is not None and shrink:
        shrink_channels(model, example)
    return model


def _baked(child: PrunedWeight | TiedWeight, baked: dict[tuple[int, int], nn.Parameter]) -> nn.Parameter:
    if isinstance(child, PrunedWeight):
        return baked_weight(child, baked)
    together = baked_weight(child.together, baked)
    return nn.Parameter(child.own(together.detach()).clone(), requires_grad=together.requires_grad)


def train_scores(model: nn.Module) -> nn.Module:
    """For a mask search: the scores of the pruned layers train, their weights are frozen. Returns ``model``."""
    return _train(model, scores=True)


def train_weights(model: nn.Module) -> nn.Module:
    """For finetuning under a fixed mask: the weights of the pruned layers train, their scores are frozen. Returns ``model``."""
    return _train(model, scores=False)


def _train(model: nn.Module, *, scores: bool) -> nn.Module:
    for layer in pruned_layers(model).values():
        layer.scores.requires_grad_(scores)
        layer.weight.requires_grad_(not scores)
    return model
