"""Layers whose weights are masked by learned scores, and the conversion of whole models.

A pruned layer computes with ``w * m``, where the mask ``m`` keeps the entries with the largest ``|scores|``. The gradient passes
straight through the mask: ``dL/dscores = dL/d(w*m) * w * sign(scores)`` for every entry, kept or not, and
``dL/dweight = dL/d(w*m) * m``. So a plain ``loss.backward(); optimizer.step()`` trains scores, weights or both.

**One selection per change.** A layer remembers its masked weight and selects anew only when ``scores``, ``weight`` or ``kept`` has
changed, which it sees by autograd's version counters and the address of the data. The ten forwards of a PGD attack select
nothing. Writes that bypass the counters (in place through ``.data`` or ``.numpy()``) cannot be seen: call
``layer.invalidate()`` after them. Assigning a new tensor to ``.data`` is seen.

Under ``torch.compile`` the selection is part of the compiled graph and runs in every forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..reference import CUT_COLUMNS, NANS, perturbed
from ..sparsity import check_sparsity, kept_count, score_init


class _StraightThrough(torch.autograd.Function):
    """Gives the masked weight its straight-through gradients with respect to scores and weight."""

    @staticmethod
    def forward(scores, weight, masked, mask, ascent_grad, ascent_scale):
        return masked.detach()  # an alias with the same version counter, but no view in the eyes of autograd

    @staticmethod
    def setup_context(ctx, inputs, output):
        scores, weight, _, mask, ascent_grad, ascent_scale = inputs
        ctx.save_for_backward(scores, weight, mask, ascent_grad, ascent_scale)

    @staticmethod
    def backward(ctx, grad):
        scores, weight, mask, ascent_grad, ascent_scale = ctx.saved_tensors
        grad_scores = grad_weight = None
        if ctx.needs_input_grad[0]:
            at = scores if ascent_grad is None else perturbed(scores, ascent_grad, ascent_scale)
            grad_scores = grad * weight * at.sign()
        if ctx.needs_input_grad[1]:
            grad_weight = torch.where(mask, grad, 0)
        return grad_scores, grad_weight, None, None, None, None


class _Snapshot:
    """Tells whether a tensor is still what it was. Holds its storage, so that no later tensor can take the same address."""

    __slots__ = ("alias", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.detach()
        self.version = tensor._version

    def matches(self, tensor: Tensor) -> bool:
        return tensor._version == self.version and tensor.data_ptr() == self.alias.data_ptr()


class _Selection:
    """What a layer's masked weight was made from."""

    __slots__ = ("cut", "kept", "mask", "scores", "weight")

    def __init__(self, layer: Pruned, cut: Tensor, mask: Tensor | None = None) -> None:
        self.scores, self.weight, self.kept = _Snapshot(layer.scores), _Snapshot(layer.weight), _Snapshot(layer.kept)
        self.cut = cut  # int64 [5], see reference.py
        self.mask = mask  # bool, made from the cut when first asked for

    def matches(self, layer: Pruned) -> bool:
        return self.mask_matches(layer) and self.weight.matches(layer.weight)

    def mask_matches(self, layer: Pruned) -> bool:
        return self.scores.matches(layer.scores) and self.kept.matches(layer.kept)


def _has_identity(tensor: Tensor) -> bool:
    """Whether version and address of ``tensor`` mean anything: not for fake, inference and functorch tensors."""
    return (
        type(tensor) in (nn.Parameter, Tensor) and not tensor.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


class Pruned:
    """What all pruned layers share: ``scores``, ``kept``, the mask and the masked weight. ``weight`` is the layer's own."""

    weight: Tensor
    scores: nn.Parameter
    kept: Tensor

    def _start_pruning(self, sparsity: float, scores: nn.Parameter | None = None, kept: Tensor | None = None) -> None:
        self._sparsity = check_sparsity(sparsity)
        self._label = type(self).__name__  # what errors call this layer; sparsify sets its name within the model
        self._masked: Tensor | None = None  # the masked weight; selections write into the same memory again and again
        self._selection: _Selection | None = None  # what it was made from; None: out of date
        self._ascent: tuple[Tensor, Tensor] | None = None  # (gradient, scale) while the layer stands at s + z
        self.scores = nn.Parameter(score_init(self.weight)) if scores is None else scores
        if kept is None:
            kept = torch.tensor(kept_count(self.weight.numel(), sparsity), device=self.weight.device)
        self.register_buffer("kept", kept)

    @property
    def sparsity(self) -> float:
        """The fraction of weights removed. Assigning it changes ``kept``."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        self._sparsity = check_sparsity(value)
        self.kept.fill_(kept_count(self.weight.numel(), value))

    @property
    def mask(self) -> Tensor:
        """The mask in force, bool, of weight's shape. A fresh tensor is made for each selection."""
        if not self._can_remember():
            return self._select_functionally()[1]
        refresh([self])
        return self._mask()

    @property
    def masked_weight(self) -> Tensor:
        """A copy of ``weight * mask`` with the layer's straight-through gradients; of weight's shape.

        Equivalent to::

            torch.where(layer.mask, layer.weight, 0)
        """
        return self._masked_weight().clone()

    def reset_scores(self) -> None:
        """Starts the scores anew from the weights (:func:`s2ap_ext.sparsity.score_init`)."""
        with torch.no_grad():
            self.scores.copy_(score_init(self.weight))

    def invalidate(self) -> None:
        """Forgets the selection, after a change that autograd cannot see (in place through ``.data`` or ``.numpy()``)."""
        self._selection = None

    def _can_remember(self) -> bool:
        return _has_identity(self.scores) and _has_identity(self.weight)

    def _stale(self) -> bool:
        stale = self._selection is None or not self._selection.matches(self)
        if stale and self._ascent is not None:
            raise RuntimeError(f"{self._label}: scores, weight or kept changed between ascend() and descend()")
        return stale

    def _mask(self) -> Tensor:
        made = self._selection
        if made.mask is None:
            with torch.inference_mode(False), torch.no_grad():
                made.mask = ops.mask_from_cut(self._position(), made.cut)
        return made.mask

    def _position(self) -> Tensor:
        """The scores the mask is taken at: ``s``, or ``s + z`` between ascend() and descend()."""
        return self.scores.detach() if self._ascent is None else perturbed(self.scores.detach(), *self._ascent)

    def _masked_weight(self) -> Tensor:
        """The masked weight as the forward uses it. It shares memory with the next selection's: use it and let it go."""
        scores, weight = self.scores, self.weight
        if torch.compiler.is_compiling() or not self._can_remember():
            masked, mask = self._select_functionally()
        else:
            refresh([self])
            masked, mask = self._masked, None
        if not (torch.is_grad_enabled() and (scores.requires_grad or weight.requires_grad)):
            return masked
        if not weight.requires_grad:
            mask = None  # not needed then
        elif mask is None:
            mask = self._mask()
        return _StraightThrough.apply(scores, weight, masked, mask, *(self._ascent or (None, None)))

    def _select_functionally(self) -> tuple[Tensor, Tensor]:
        """Masked weight and mask without remembering anything, in ops that a compiler can trace."""
        at, weight = self._position().contiguous(), self.weight.detach().contiguous()
        masked = torch.empty_like(weight)
        cuts = torch.zeros(1, CUT_COLUMNS, dtype=torch.int64, device=weight.device)
        torch.ops.s2ap.select([at], [weight], self.kept.view(1), [masked], cuts)
        return masked, ops.mask_from_cut(at, cuts[0])

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"sparsity={self._sparsity:g}")))

    # What follows keeps the remembered selection out of everything that moves, copies or stores a layer.

    def _apply(self, fn: Callable, recurse: bool = True):
        self._selection = self._masked = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_selection": None, "_masked": None, "_ascent": None}

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._selection = replica._masked = None
        return replica

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        numel = self.weight.numel()
        if numel and int(self.kept) != kept_count(numel, self._sparsity):
            self._sparsity = 1 - int(self.kept) / numel


class S2APConv2d(Pruned, nn.Conv2d):
    """``nn.Conv2d`` that computes with its ``kept`` highest scored weights.

    Args:
        *args, **kwargs: as for ``nn.Conv2d``.
        sparsity: the fraction of weights removed, in [0, 1].

    Attributes:
        scores (Parameter): importance scores, of weight's shape; at first they rank as the magnitudes do.
        kept (buffer): number of weights that stay, int64.
        mask (bool): the mask in force, of weight's shape.
        masked_weight: ``weight * mask``.

    Raises:
        ValueError: ``sparsity`` outside [0, 1].

    Equivalent to (forward)::

        F.conv2d(x, torch.where(layer.mask, layer.weight, 0), layer.bias, layer.stride, ...)
    """

    def __init__(self, *args, sparsity: float = 0.9, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._start_pruning(sparsity)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._masked_weight(), self.bias)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, sparsity: float = 0.9) -> S2APConv2d:
        """A pruned layer that shares ``module``'s weight and bias."""
        return _from_dense(cls, nn.Conv2d, module, sparsity)

    def to_dense(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with the zeros baked in; it shares nothing with this layer."""
        return bake(copy.deepcopy(self))


class S2APLinear(Pruned, nn.Linear):
    """``nn.Linear`` that computes with its ``kept`` highest scored weights.

    Arguments, attributes and errors are those of :class:`S2APConv2d`, with ``nn.Linear``'s arguments in place of ``nn.Conv2d``'s.

    Equivalent to (forward)::

        F.linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias)
    """

    def __init__(self, *args, sparsity: float = 0.9, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._start_pruning(sparsity)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self._masked_weight(), self.bias)

    @classmethod
    def from_dense(cls, module: nn.Linear, *, sparsity: float = 0.9) -> S2APLinear:
        """A pruned layer that shares ``module``'s weight and bias."""
        return _from_dense(cls, nn.Linear, module, sparsity)

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the zeros baked in; it shares nothing with this layer."""
        return bake(copy.deepcopy(self))


class PrunedWeight(Pruned, nn.Module):
    """The same for any other module's weight, as a ``torch.nn.utils.parametrize`` parametrization.

    :func:`sparsify` uses it where a subclass of a convolution or linear layer, or ``nn.MultiheadAttention``, reads its weight by name.
    """

    def __init__(self, weight: Tensor, *, sparsity: float = 0.9) -> None:
        super().__init__()
        self.__dict__["weight"] = weight  # the owner registers it; here it is only looked at
        self._start_pruning(sparsity)

    def forward(self, weight: Tensor) -> Tensor:
        self.__dict__["weight"] = weight if weight.is_leaf else weight.detach()
        return self._masked_weight()


DENSE_TO_PRUNED: dict[type, type] = {nn.Conv2d: S2APConv2d, nn.Linear: S2APLinear}


def sparse_layers(model: nn.Module) -> dict[str, Pruned]:
    """The pruned layers of ``model`` by name, in module order, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Pruned)}


def refresh(layers: nn.Module | Iterable[Pruned]) -> None:
    """Brings the masked weights of all given layers up to date, in one fused call for those whose scores changed.

    Layers do this by themselves, one by one, in their forward. At the start of a training step ``refresh(model)`` does it for all at once.

    Args:
        layers: a model, or pruned layers.

    Raises:
        ValueError: NaN in the scores of a layer that is on the CPU. On CUDA looking would wait for the
            device; :class:`s2ap_ext.S2AP` looks at the end of a step.
    """
    if isinstance(layers, nn.Module):
        layers = sparse_layers(layers).values()
    stale = [layer for layer in layers if layer._can_remember() and layer._stale()]
    if not stale:
        return
    # What is remembered outlives this call, so it must not be born as inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        reweighted = [layer for layer in stale if layer._selection is not None and layer._selection.mask_matches(layer)]
        for layer in reweighted:  # only the weights changed: the mask stands
            mask, cut = layer._mask(), layer._selection.cut
            layer._masked = torch.where(mask, layer.weight, 0)
            layer._selection = _Selection(layer, cut, mask)
        for group in _groups(layer for layer in stale if layer not in reweighted):
            _, cuts = ops.select(
                [layer.scores for layer in group],
                [layer.weight for layer in group],
                torch.stack([layer.kept for layer in group]),
                out=_memory(group),
            )
            if cuts.device.type == "cpu":
                ops.check_finite(cuts, [layer._label for layer in group])
            for layer, cut in zip(group, cuts, strict=True):
                layer._selection = _Selection(layer, cut)


# Moving to s + z and back, for s2ap_ext.optim.


@torch.no_grad()
def ascend(layers: Iterable[Pruned], *, gamma: float, eps: float) -> list[tuple[list[str], Tensor]]:
    """Moves the layers to ``s + z``, ``z`` along the gradients of their scores: masks, masked weights and gradients are those there.

    Returns:
        ``(names, cuts)`` for each fused call; ``cuts``, int64 [L, 5], hold the counts of NaN, of flipped mask entries and of changed signs.

    Raises:
        ValueError: NaN at ``s + z`` in a layer that is on the CPU; no layer has moved then.
    """
    layers = list(layers)
    refresh(layers)
    seen = []
    for group in _groups(layers):
        grads = [layer.scores.grad for layer in group]
        _, cuts, scales = ops.perturb(
            [layer.scores for layer in group],
            grads,
            [layer.weight for layer in group],
            torch.stack([layer.kept for layer in group]),
            torch.stack([layer._selection.cut for layer in group]),
            gamma=gamma,
            eps=eps,
            out=_memory(group),
        )
        names = [layer._label for layer in group]
        for layer, cut, grad, scale in zip(group, cuts, grads, scales, strict=True):
            layer._ascent = (grad, scale)
            layer._selection = _Selection(layer, cut)
        seen.append((names, cuts))
    for names, cuts in seen:
        if cuts.device.type == "cpu" and not _finite(cuts):
            descend(layers)
            ops.check_finite(cuts, names)
    return seen


def descend(layers: Iterable[Pruned]) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
    """Moves the layers back to ``s``, which was never overwritten.

    Returns:
        for the scores of each layer that had moved, the gradient and the scale whose product is ``z``.
    """
    moved = {layer.scores: layer._ascent for layer in layers if layer._ascent is not None}
    for layer in layers:
        layer._ascent = layer._selection = None
    return moved


def check_scores(layers: Iterable[Pruned]) -> None:
    """Raises ValueError naming the layers whose last selection met NaN. Waits for a CUDA device."""
    for group in _groups(layer for layer in layers if layer._selection is not None):
        ops.check_finite(torch.stack([layer._selection.cut for layer in group]), [layer._label for layer in group])


def _finite(cuts: Tensor) -> bool:
    return not cuts[:, NANS].any()


def _groups(layers: Iterable[Pruned]) -> list[list[Pruned]]:
    """The layers by device and dtype: what one call of an op can take."""
    groups: dict[tuple, list[Pruned]] = {}
    for layer in layers:
        groups.setdefault((layer.scores.device, layer.scores.dtype), []).append(layer)
    return list(groups.values())


def _memory(layers: Sequence[Pruned]) -> list[Tensor]:
    """The memory for the layers' masked weights, in the layout of their weights."""
    for layer in layers:
        buffer, weight = layer._masked, layer.weight
        like = buffer is not None and (buffer.shape, buffer.dtype, buffer.device) == (weight.shape, weight.dtype, weight.device)
        if not like or buffer.stride() != weight.stride():
            layer._masked = torch.empty_like(weight, requires_grad=False)
    return [layer._masked for layer in layers]


def bake(layer, baked: dict | None = None):
    """Changes ``layer`` into its dense class; ``baked`` keeps shared weights shared."""
    if layer._ascent is not None:
        raise RuntimeError(f"{layer._label}: the layer stands at perturbed scores; call descend() first")
    baked = {} if baked is None else baked
    key = (id(layer.weight), id(layer.scores))
    if key not in baked:
        with torch.no_grad():
            baked[key] = nn.Parameter(layer.masked_weight, requires_grad=layer.weight.requires_grad)
    layer.weight = baked[key]
    del layer.scores, layer.kept
    for name in ("_sparsity", "_label", "_masked", "_selection", "_ascent"):
        del layer.__dict__[name]
    layer.__class__ = next(dense for dense, pruned in DENSE_TO_PRUNED.items() if isinstance(layer, pruned))
    return layer


def _from_dense(cls: type, dense: type, module: nn.Module, sparsity: float):
    if type(module) is not dense:
        raise TypeError(f"module: expected {dense.__name__}, got {type(module).__name__}")
    layer = cls.__new__(cls)  # an object of its own that shares module's tensors
    layer.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()})
    layer._start_pruning(sparsity)
    return layer
