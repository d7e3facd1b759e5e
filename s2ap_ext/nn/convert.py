"""Whole models: dense to pruned and back, and which parameters train."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from ..reference import Pattern
from ..sparsity import check_sparsity, pattern_for
from .layers import DENSE_TO_PRUNED, Pruned, S2APConv2d, S2APLinear, baked_weight, pruned_layers, refresh, to_dense_class
from .layout import forget_layout, keep_layout
from .mask_state import MaskGroup
from .pruned_weight import PrunedWeight, pruned_weights, put_in, take_out

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def sparsify(
    model: nn.Module,
    sparsity: float,
    *,
    allocation: str = "uniform",
    granularity: str = "weight",
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Turns the convolutions and linear layers of ``model`` into pruned layers, in place.

    ``nn.Conv2d`` and ``nn.Linear`` become :class:`S2APConv2d` and :class:`S2APLinear`: the same objects, with the same
    weights, of another class. Their subclasses, other convolutions and ``nn.MultiheadAttention`` keep their forward, and each weight moves
    into a child, a :class:`PrunedWeight`: ``conv.weight`` is masked then, and ``conv.pruned_weight.weight`` is the parameter. So it is in
    the linear layers of ``nn.TransformerEncoderLayer``, which reads their weights itself. Layers that share a weight share its scores.
    Scores start from the weights, so call this after the weights are loaded.

    Args:
        model: any module; it may itself be a layer.
        sparsity: the fraction of weights removed, in [0, 1].
        allocation: how the kept weights are spread over the layers. ``"uniform"``: the same sparsity everywhere.
        granularity: what is removed as one, and among what. ``"weight"``: single weights of the layer. ``"channel"``: all weights of an
            output; channels rank by the sum of their ``|scores|``. ``"head"``: an attention head, in the q, k and v projections of
            ``nn.MultiheadAttention``; all other layers stay dense. ``"N:M"`` such as ``"2:4"``: N weights of every M neighbouring
            inputs stay; ``sparsity`` has to be ``1 - N / M``, and every layer's inputs a multiple of M (``exclude`` the others).
        exclude: names of layers or modules to leave dense, as in ``named_modules()``; ``*`` and ``?`` match.

    Returns:
        ``model``.

    Raises:
        ValueError: ``sparsity`` outside [0, 1]; an unknown ``allocation`` or ``granularity``, or one that does not fit ``sparsity`` or
            a layer; a weight that is no parameter (one with a torch parametrization, say); an ``exclude`` that matches no module; a model
            without a layer to prune, or with a layer that is pruned already. The model is unchanged then.
    """
    check_sparsity(sparsity)
    if allocation != "uniform":
        raise ValueError(f"allocation: expected 'uniform', got {allocation!r}")
    if already := list(pruned_layers(model)):
        raise ValueError(f"model: layer {already[0] or '(the model itself)'} is pruned already; densify(model) first")
    targets = _targets(model, [exclude] if isinstance(exclude, str) else exclude)
    if granularity == "head":
        targets = [target for target in targets if isinstance(target[1], nn.MultiheadAttention)]
    if not targets:
        raise ValueError("model: expected a layer to prune (a convolution, linear or attention layer), found none")
    patterns = [_pattern(label, module, getattr(module, name), granularity, sparsity) for label, module, name in targets]

    read_by_name = {part for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer) for part in module.children()}
    group = MaskGroup()
    shared: dict[int, Pruned] = {}  # the first layer of each weight
    for (label, module, name), pattern in zip(targets, patterns, strict=True):
        weight = getattr(module, name)
        first = shared.get(id(weight))
        same = {} if first is None else {"scores": first.scores, "kept": first.kept}
        if type(module) in DENSE_TO_PRUNED and module not in read_by_name:
            layer = module
            layer.__class__ = DENSE_TO_PRUNED[type(module)]
            layer._start_pruning(sparsity, pattern, group=group, **same)
        else:
            layer = PrunedWeight(weight, sparsity=sparsity, pattern=pattern, group=group, **same)
            put_in(module, name, layer)
        layer.mask_state.label = label
        shared.setdefault(id(weight), layer)
    keep_layout(model)
    return model


def _pattern(label: str, module: nn.Module, weight: Tensor, granularity: str, sparsity: float) -> Pattern:
    heads = (module.num_heads, module.head_dim) if isinstance(module, nn.MultiheadAttention) else None
    try:
        return pattern_for(granularity, weight.shape, sparsity, heads=heads)
    except ValueError as error:
        raise ValueError(f"layer {label}: {error}") from None


def _targets(model: nn.Module, exclude: Sequence[str]) -> list[tuple[str, nn.Module, str]]:
    """What :func:`sparsify` prunes: (name of the layer, module, name of its weight), each module once."""
    names = [name for name, _ in model.named_modules()]
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"exclude: no module is named {pattern!r}; there are {', '.join(names[1:6])}, ...")

    def excluded(name: str) -> bool:  # by its own name or that of a module around it
        parents = itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}")
        return any(fnmatch.fnmatchcase(parent, pattern) for parent in parents for pattern in exclude)

    targets = []
    for name, module in model.named_modules():
        if excluded(name):
            continue
        weights = ["weight"] if isinstance(module, WEIGHTED) else []
        if isinstance(module, nn.MultiheadAttention):
            weights = [w for w in ATTENTION_WEIGHTS if getattr(module, w) is not None]
        for weight in weights:
            if isinstance(getattr(module, weight), nn.parameter.UninitializedParameter):
                raise ValueError(f"model: layer {name} is lazy and has no weights yet; run one batch through the model first")
            label = name if weight == "weight" else ".".join(filter(None, (name, weight)))
            label = label or type(module).__name__
            if weight not in module._parameters:
                raise ValueError(
                    f"layer {label}: expected its {weight} to be a parameter, but it is computed; remove what does, or exclude it"
                )
            targets.append((label, module, weight))
    return targets


def densify(model: nn.Module) -> nn.Module:
    """Turns pruned layers back into plain modules with the zeros baked in, in place; logits stay equal to the bit.

    Nothing of this package is left: neither in the classes nor in the state_dict. A weight that a pruned layer shared with a dense
    one (a tied embedding) is a parameter of its own afterwards.

    Returns:
        ``model``.

    Raises:
        RuntimeError: called between ``ascend()`` and ``descend()``.
    """
    refresh(model)
    baked: dict[tuple[int, int], nn.Parameter] = {}
    for layer in pruned_layers(model).values():
        baked_weight(layer, baked)  # all of them before the first layer changes
    for module in list(model.modules()):
        if isinstance(module, (S2APConv2d, S2APLinear)):
            to_dense_class(module, baked)
        elif pruned := pruned_weights(module):
            take_out(module, {name: baked_weight(child, baked) for name, child in pruned})
    forget_layout(model)
    return model


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
