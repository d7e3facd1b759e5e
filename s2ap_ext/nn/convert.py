"""Whole models: dense to pruned and back, and which parameters train."""

from __future__ import annotations

import fnmatch
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..allocations import Allocation, Layer, allocate
from ..allocations.mapping import name_matches
from ..sparsity import OF_SEVERAL_LAYERS, check_sparsity, input_multiple, pattern_for
from . import semi_structured
from .layers import DENSE_TO_PRUNED, Pruned, S2APConv2d, S2APLinear, baked_weight, pruned_layers, refresh, to_dense_class
from .layout import forget_layout, keep_layout
from .mask_state import MaskGroup
from .pruned_weight import PrunedChild, PrunedWeight, pruned_weights, put_in, take_out
from .shrink import shrink_channels
from .shrink_units import shrink_units
from .structure import Block, Units
from .tied import TiedWeight, layers_that_are_added, side_by_side
from .units import PrunedUnits, unit_blocks, unit_layers

T = TypeVar("T")
WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
FORMATS = ("dense", "semi-structured")
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    allocation: str | Allocation | Mapping[str, float] = "uniform",
    granularity: str = "weight",
    exclude: Sequence[str] = (),
    tied: bool = False,
    structure: Units | Sequence[Units] = (),
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
            output; channels rank by the sum of their ``|scores|``. ``"head"``: an attention head, that is its rows of the q, k and v
            projections, with their biases, and its columns of the output projection. ``"neuron"``: a hidden unit of an MLP, its row and
            bias in the first layer and its column in the second. Heads and neurons have one score each
            (:class:`s2ap_ext.nn.PrunedUnits`), are found in torch's modules and in those of other libraries (docs/transformers.md), and
            all else stays dense. ``"N:M"`` such as ``"2:4"``: N weights of every M neighbouring inputs stay; ``sparsity`` has to be
            ``1 - N / M`` and ``allocation`` uniform. Layers whose inputs are not a multiple of M stay dense, and a warning names them.
        tied: for ``"channel"``: layers whose results are added together share one mask, so that :func:`densify` can remove their channels.
            Their weights lie side by side in one :class:`PrunedWeight`, and channels rank by the sum of their ``|scores|`` in all of them.
        exclude: names of layers or modules to leave dense, as in ``named_modules()``; ``*`` and ``?`` match. ``":first"`` and
            ``":last"`` are the first and the last of the layers that can be pruned, in module order.
        structure: where heads or neurons are, for modules in which they are not found.
        example: an input of the model, with which blocks are run to see whether heads or neurons are what they seem: a tensor, a tuple of
            arguments or a mapping of named ones. Without one, models of ``transformers`` are run with what their configuration says, and
            blocks of others with random tokens.

    Returns:
        ``model``.

    Raises:
        TypeError: an ``allocation`` that is none of those above.
        ValueError: ``sparsity`` outside [0, 1]; an unknown ``allocation`` or ``granularity``, or one that does not fit ``sparsity`` or
            a layer; a weight that is no parameter (one with a torch parametrization, say); an ``exclude`` that matches no module; a model
            without a layer to prune, or with a layer that is pruned already; a ``structure`` that the model has not, or that is for other
            granularities than heads and neurons; ``tied`` with another granularity, without an ``example``, or of a model whose operations
            cannot be recorded. The model is unchanged then.

    Warns:
        UserWarning: layers stay dense because ``"N:M"`` does not divide their inputs, or blocks because they look like attention or an
            MLP and turn out not to be. Naming them in ``exclude`` says that they should.
    """
    check_sparsity(sparsity)
    if already := list(pruned_layers(model)):
        raise ValueError(f"model: layer {already[0] or '(the model itself)'} is pruned already; densify(model) first")
    if tied and granularity != "channel":
        raise ValueError(f"tied: it is for granularity 'channel', got {granularity!r}")
    exclude = [exclude] if isinstance(exclude, str) else exclude
    if granularity in OF_SEVERAL_LAYERS:
        targets, left_out = _unit_targets(model, granularity, exclude, structure, example)
        why = f"these blocks have no {granularity}s that can be pruned, and stay dense"
    elif structure:
        raise ValueError(f"structure: it is for granularity {' or '.join(map(repr, OF_SEVERAL_LAYERS))}, got {granularity!r}")
    else:
        targets, left_out = _targets(model, sparsity, granularity, exclude)
        if tied and granularity == "channel":
            targets = _tied(targets, model, sparsity, example)
        why = f"granularity {granularity!r} does not divide the inputs of these layers, which stay dense"
    layers: dict[int, Layer] = {}  # each weight once, as the first layer that has it
    for target in targets:
        layers.setdefault(id(target.layer.weight), target.layer)
    kept = dict(zip(layers, allocate(allocation, list(layers.values()), sparsity), strict=True))
    if left_out:
        warnings.warn(f"{why}: {', '.join(left_out)}", stacklevel=2)

    read_by_name = {part for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer) for part in module.children()}
    group = MaskGroup()
    shared: dict[int, Pruned] = {}  # the first pruned layer of each weight
    for target in targets:
        weight, pattern = target.layer.weight, target.layer.pattern
        first = shared.get(id(weight))
        same: dict[str, Any] = {"kept": torch.tensor(kept[id(weight)], device=weight.device)}
        if first is not None:
            same = {"kept": first.kept, "scores": first.scores}
        pruned: Pruned
        if target.block is not None:
            pruned = PrunedUnits(target.block, kept=same["kept"], group=group)
            put_in(target.module, target.weight, pruned)
        elif target.parts:
            assert isinstance(weight, nn.Parameter)
            pruned = PrunedWeight(weight, sparsity=sparsity, pattern=pattern, group=group, **same)
            first_column = 0
            for part in target.parts:
                own = part.layer.weight
                put_in(part.module, part.weight, TiedWeight(pruned, first_column, own.shape))
                first_column += own[0].numel()
        elif type(target.module) in DENSE_TO_PRUNED and target.module not in read_by_name:
            target.module.__class__ = DENSE_TO_PRUNED[type(target.module)]
            assert isinstance(target.module, Pruned)
            pruned = target.module
            pruned._start_pruning(sparsity, pattern, group=group, **same)
        else:
            assert isinstance(weight, nn.Parameter)
            pruned = PrunedWeight(weight, sparsity=sparsity, pattern=pattern, group=group, **same)
            put_in(target.module, target.weight, pruned)
        pruned.mask_state.label = target.layer.name
        shared.setdefault(id(weight), pruned)
    keep_layout(model)
    return model


class _Target(NamedTuple):
    """A layer that :func:`sparsify` prunes: ``module``'s tensor of the name ``weight``.

    For units it is the last of those in ``block``; for layers that share a mask the first of ``parts``.
    """

    layer: Layer
    module: nn.Module
    weight: str
    block: Block | None = None
    parts: tuple[_Target, ...] = ()


def _unit_targets(
    model: nn.Module, granularity: str, exclude: Sequence[str], structure: Units | Sequence[Units], example: Any
) -> tuple[list[_Target], list[str]]:
    """The blocks that :func:`sparsify` prunes, and those that it leaves out, with reasons."""
    blocks, refused = unit_blocks(model, granularity, structure, example)
    name_of = {module: name for name, module in model.named_modules()}
    by_name = [pattern for pattern in exclude if not pattern.startswith(":")]
    exclude = exclude if blocks else by_name  # without blocks there is no first and no last
    kept = _not_excluded(blocks, [[block.name, *(name_of[layer] for layer in block.layers())] for block in blocks], model, exclude)
    left_out = [refusal.why for refusal in _not_excluded(refused, [refusal.names for refusal in refused], model, by_name)]
    if not kept:
        why = f"; not {'; '.join(left_out)}" if left_out else ""
        raise ValueError(f"model: expected {granularity}s to prune, found none{why}. structure= can tell where they are")
    return [_Target(layer, block.columns, "weight", block) for block, layer in zip(kept, unit_layers(kept), strict=True)], left_out


def _tied(targets: list[_Target], model: nn.Module, sparsity: float, example: Any) -> list[_Target]:
    """``targets``, those whose channels are added together as one, in the place of the first."""
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
    for name, module, weight_name in _candidates(model, exclude):
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
        try:
            pattern = pattern_for(granularity, weight.shape, sparsity)
        except ValueError as error:
            raise ValueError(f"layer {label}: {error}") from None
        targets.append(_Target(Layer(label, weight, pattern), module, weight_name))
    if not targets:
        why = f"; {granularity!r} does not divide the inputs of {', '.join(left_out)}" if left_out else ""
        raise ValueError(f"model: expected a layer to prune (a convolution, linear or attention layer), found none{why}")
    return targets, left_out


def _candidates(model: nn.Module, exclude: Sequence[str]) -> list[tuple[str, nn.Module, str]]:
    """The layers that are not excluded: (name of the module, module, name of its weight)."""
    found: list[tuple[str, nn.Module, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found += [(name, module, weight) for weight in ATTENTION_WEIGHTS if getattr(module, weight) is not None]
        elif isinstance(module, WEIGHTED):
            found.append((name, module, "weight"))
    return _not_excluded(found, [[name] for name, _, _ in found], model, exclude)


def _not_excluded(found: Sequence[T], names: Sequence[Sequence[str]], model: nn.Module, exclude: Sequence[str]) -> list[T]:
    """Those of ``found`` that ``exclude`` leaves, where ``names`` says how each may be called.

    Raises:
        ValueError: an entry of ``exclude`` that names no module.
    """
    ends = {":first": names[0][0], ":last": names[-1][0]} if names else {}
    modules = [name for name, _ in model.named_modules()]
    for pattern in exclude:
        if pattern not in ends and not fnmatch.filter(modules, pattern):
            raise ValueError(f"exclude: no module is named {pattern!r}; there are {', '.join(modules[1:6])}, ...")

    def excluded(name: str) -> bool:
        return any(name == ends[pattern] if pattern in ends else name_matches(name, pattern) for pattern in exclude)

    return [thing for thing, called in zip(found, names, strict=True) if not any(map(excluded, called))]


def densify(model: nn.Module, *, shrink: bool = False, example: Any = None, format: str = "dense") -> nn.Module:
    """Turns pruned layers back into plain modules with the zeros baked in, in place; logits stay equal to the bit.

    Nothing of this package is left: neither in the classes nor in the state_dict. A weight that a pruned layer shared with a dense
    one (a tied embedding) is a parameter of its own afterwards.

    Args:
        model: a model with pruned layers.
        shrink: what is pruned goes away, so that the layers become smaller: heads and neurons (:func:`s2ap_ext.nn.shrink_units`), or
            channels that are gone (:func:`s2ap_ext.nn.shrink.shrink_channels`). Logits stay equal up to rounding.
        example: for ``shrink``, an input of the model, as for :func:`sparsify`. Without pruned heads and neurons there has to be one.
        format: ``"dense"``; or ``"semi-structured"``: on CUDA, in float16 or bfloat16, linear layers that keep at most 2 of every 4
            neighbouring inputs (granularity ``"2:4"``) get weights in torch's semi-structured form, which sparse tensor cores compute with.
            Their logits equal the masked ones up to rounding at that precision, and they no longer train. All other layers are dense.

    Returns:
        ``model``.

    Raises:
        RuntimeError: called between ``ascend()`` and ``descend()``; a model that cannot be made smaller, which is dense then, with the
            zeros baked in.
        ValueError: a block that cannot be shrunk, or a model whose operations cannot be recorded: it is dense then. ``shrink`` of channels
            without an ``example``, an unknown ``format``, or no layer that has the semi-structured form, with the reason: the model is
            unchanged then.

    Warns:
        UserWarning: some of the pruned linear layers do not have the semi-structured form, with the reasons.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    units = [layer for layer in model.modules() if isinstance(layer, PrunedUnits)]
    if shrink and not units and example is None:
        raise ValueError("example: expected an input of the model, with which shrink finds the channels that are gone, got None")
    refresh(model)
    packed = semi_structured.pack(model) if format == "semi-structured" else {}
    baked: dict[tuple[int, int], nn.Parameter] = {}
    for layer in pruned_layers(model).values():
        baked_weight(layer, baked)  # all of them before the first layer changes
    for module in list(model.modules()):
        if isinstance(module, (S2APConv2d, S2APLinear)):
            to_dense_class(module, baked)
        elif pruned := pruned_weights(module):
            take_out(module, {name: _baked(child, baked) for name, child in pruned})
    for layer in units:
        layer.clear_rows()
    forget_layout(model)
    if shrink and units:
        shrink_units(model, [(layer.block, layer.mask) for layer in units], example=example)
    elif shrink:
        shrink_channels(model, example)
    semi_structured.put_in(packed)
    return model


def _baked(child: PrunedChild | TiedWeight, baked: dict[tuple[int, int], nn.Parameter]) -> nn.Parameter:
    if not isinstance(child, TiedWeight):
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
        for weight in layer.masked_parameters:
            weight.requires_grad_(not scores)
    return model
