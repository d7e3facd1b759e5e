"""Layers whose weights are masked by learned scores.

A pruned layer computes with ``w * m``, where the mask ``m`` keeps the entries with the largest ``|scores|``. The gradient passes
straight through the mask: ``dL/dscores = dL/d(w*m) * w * sign(scores)`` for every entry, kept or not, and
``dL/dweight = dL/d(w*m) * m``. So a plain ``loss.backward(); optimizer.step()`` trains scores, weights or both.

**One selection per change.** A layer remembers its masked weight and selects anew only when ``scores``, ``weight`` or ``kept`` has
changed, which it sees by autograd's version counters and the address of the data. The ten forwards of a PGD attack select
nothing, and the first forward after a step selects for all layers of the model in one call. Writes that bypass the counters (in
place through ``.data`` or ``.numpy()``) cannot be seen: call ``layer.invalidate()`` after them. Assigning a new tensor to ``.data``
is seen. Any number of threads may call a model at once while nobody changes it.

Under ``torch.compile`` the selection is part of the compiled graph and runs in every forward; :class:`s2ap_ext.nn.Accelerated` compiles
a model without its selections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..reference import CUT_COLUMNS, SINGLE_WEIGHTS, Pattern, score_grad
from ..sparsity import granularity_of, kept_in_pattern, pattern_for, score_init, sparsity_of, units
from .convolution import prefers_sparse, sparse_conv2d
from .kept_weights import KeptWeights, convolution_of
from .mask_state import MaskGroup, MaskState, Perturbation, Selection, can_remember
from .selection import mask_of, select_stale, selection_of

if TYPE_CHECKING:
    from typing_extensions import Self

P = TypeVar("P", bound="Pruned")


class _StraightThrough(torch.autograd.Function):
    """Gives the masked weight its straight-through gradients with respect to scores and weight."""

    @staticmethod
    def forward(
        scores: Tensor,
        weight: Tensor,
        masked: Tensor,
        mask: Tensor | None,
        perturbation: Perturbation | None,
        state: MaskState | None,
    ) -> Tensor:
        return masked.detach()  # an alias with the same version counter, but no view in the eyes of autograd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scores, weight, _, mask, ctx.perturbation, ctx.state = inputs
        ctx.save_for_backward(scores, weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, weight, mask = ctx.saved_tensors
        collected = ctx.state is not None and ctx.state.tell(scores, grad)
        grad_scores = grad_weight = None
        if ctx.needs_input_grad[0] and not collected:
            grad_scores = score_grad(grad, weight, scores if ctx.perturbation is None else ctx.perturbation.position(scores, weight))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.where(mask, grad, 0)
        return grad_scores, grad_weight, None, None, None, None


class Pruned(nn.Module):
    """What all pruned layers share: ``scores``, ``kept``, the mask and the masked weight. ``weight`` is the layer's own."""

    weight: Tensor
    scores: nn.Parameter
    kept: Tensor
    mask_state: MaskState

    def _start_pruning(
        self,
        sparsity: float,
        pattern: Pattern = SINGLE_WEIGHTS,
        scores: nn.Parameter | None = None,
        kept: Tensor | None = None,
        group: MaskGroup | None = None,
    ) -> None:
        self._begin_mask(MaskState(type(self).__name__, pattern, group))  # sparsify labels it with the layer's name within the model
        self.scores = nn.Parameter(score_init(self.weight)) if scores is None else scores
        if kept is None:
            kept = torch.tensor(kept_in_pattern(pattern, self.weight.numel(), sparsity), device=self.weight.device)
        self.register_buffer("kept", kept)

    def _begin_mask(self, state: MaskState) -> None:
        self.mask_state = state
        state.group.add(self)

    @property
    def sparsity(self) -> float:
        """The fraction of weights (or of channels, heads, each window's weights) that ``kept`` removes. Assigning it changes ``kept``.

        Reading it waits for a CUDA device.
        """
        return sparsity_of(self.mask_state.pattern, self.weight.numel(), int(self.kept))

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        self.kept.fill_(kept_in_pattern(self.mask_state.pattern, self.weight.numel(), value))

    def _density(self) -> float:
        """The fraction of weights that stay, of a layer on the CPU that has weights."""
        return int(self.kept) / units(self.mask_state.pattern, self.weight.numel())

    @property
    def granularity(self) -> str:
        """What is removed as one, as :func:`sparsify` calls it. Reading it waits for a CUDA device."""
        return granularity_of(self.mask_state.pattern, self.weight.shape, int(self.kept))

    @property
    def weights_per_entry(self) -> int:
        """How many weights one entry of the mask decides on."""
        return 1

    @property
    def masked_parameters(self) -> tuple[Tensor, ...]:
        """The weights that the mask decides on."""
        return (self.weight,)

    def masked_values(self) -> dict[Tensor, Tensor]:
        """For each of ``masked_parameters`` its values where they stay, and 0 elsewhere."""
        return {self.weight: self.masked_weight}

    @property
    def magnitudes(self) -> Tensor:
        """Scores by which the mask would keep the largest weights, of the scores' shape."""
        return self.weight.detach()

    @property
    def mask(self) -> Tensor:
        """The mask in force, bool, of weight's shape. A fresh tensor is made for each selection."""
        if not can_remember(self):
            return self._select_functionally()[1]
        return mask_of(self, selection_of(self))

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

    def bake(self) -> nn.Parameter:
        """The masked weight as a parameter of its own, for a dense layer."""
        return nn.Parameter(self.masked_weight.detach(), requires_grad=self.weight.requires_grad)

    def invalidate(self) -> None:
        """Forgets the selection, after a change that autograd cannot see (in place through ``.data`` or ``.numpy()``)."""
        self.mask_state.selection = None

    def _masked_weight(self) -> Tensor:
        """The masked weight as the forward uses it. It shares memory with the next selection's: use it and let it go."""
        if self.mask_state.made is not None:
            return self.mask_state.made
        scores, weight = self.scores, self.weight
        made, mask = None, None
        if torch.compiler.is_compiling() or not can_remember(self):
            masked, mask = self._select_functionally()
        else:
            made = selection_of(self)
            masked = made.masked
        if not (torch.is_grad_enabled() and (scores.requires_grad or weight.requires_grad)):
            return masked
        if not weight.requires_grad:
            mask = None  # not needed then
        elif mask is None and made is not None:
            mask = mask_of(self, made)
        state = None if torch.compiler.is_compiling() else self.mask_state
        passed: Tensor = _StraightThrough.apply(scores, weight, masked, mask, self.mask_state.perturbation, state)
        return passed

    def _select_functionally(self) -> tuple[Tensor, Tensor]:
        """Masked weight and mask without remembering anything, in ops that a compiler can trace."""
        state, weight = self.mask_state, self.weight.detach()
        at, weight = state.position(self.scores, weight).contiguous(), weight.contiguous()
        masked = torch.empty_like(weight)
        cuts = torch.zeros(1, CUT_COLUMNS, dtype=torch.int64, device=weight.device)
        torch.ops.s2ap.select([at], [weight], self.kept.view(1), list(state.pattern), [masked], cuts)
        return masked, ops.mask_from_cut(at, cuts[0], state.pattern)

    def extra_repr(self) -> str:
        has_value = type(self.kept) is Tensor and not self.kept.is_meta
        return ", ".join(filter(None, (super().extra_repr(), f"sparsity={self.sparsity:.4g}" if has_value else "")))

    # What follows keeps the remembered selection out of everything that moves, copies or stores a layer.

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.mask_state.forget()
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        return applied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has no types here
        self._begin_mask(self.mask_state.fresh(self.mask_state.group))

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]  # torch has no types here
        replica._begin_mask(self.mask_state.fresh())
        return replica


class S2APConv2d(Pruned, nn.Conv2d):
    """``nn.Conv2d`` that computes with its ``kept`` highest scored weights.

    Args:
        *args, **kwargs: as for ``nn.Conv2d``.
        sparsity: the fraction of weights removed, in [0, 1].
        granularity: what is removed as one, as in :func:`sparsify`.

    Attributes:
        scores (Parameter): importance scores, of weight's shape; at first they rank as the magnitudes do.
        kept (buffer): number of weights that stay, int64; of channels, or of weights in each window, where that is the granularity.
        mask (bool): the mask in force, of weight's shape.
        masked_weight: ``weight * mask``.

    Raises:
        ValueError: ``sparsity`` outside [0, 1]; a ``granularity`` that is unknown or does not fit the weight or the sparsity.

    Equivalent to (forward)::

        F.conv2d(x, torch.where(layer.mask, layer.weight, 0), layer.bias, layer.stride, ...)
    """

    def __init__(self, *args: Any, sparsity: float = 0.9, granularity: str = "weight", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_pruning(sparsity, pattern_for(granularity, self.weight.shape, sparsity))

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and can_remember(self) and prefers_sparse(self, input, self._density):
            every_weight = self.scores.requires_grad or self.mask_state.has_listeners
            # Gradients at the kept weights alone need no mask: they are the weight's own.
            weight = self._masked_weight() if every_weight else self.weight
            kept, channels = self._kept_weights(selection_of(self)), self.mask_state.sampled_channels
            return sparse_conv2d(self, input, weight, kept, every_weight=every_weight, sampled_channels=channels)
        out: Tensor = self._conv_forward(input, self._masked_weight(), self.bias)
        return out

    def _kept_weights(self, made: Selection) -> KeptWeights:
        """Of the layer's selection, made once for each; only their values where only the weights have changed."""
        if made.kept_weights is None:
            earlier = made.same_mask  # read once: another thread may be here too
            with torch.no_grad():
                if earlier is not None and earlier.kept_weights is not None:
                    made.kept_weights = earlier.kept_weights.with_values_of(made.masked)
                else:  # where weights train, a kept one that happens to be 0 needs its gradient too
                    made.kept_weights = KeptWeights.of(
                        made.masked, mask_of(self, made) if self.weight.requires_grad else None, convolution_of(self)
                    )
            made.same_mask = None
        return made.kept_weights

    @classmethod
    def from_dense(cls, module: nn.Conv2d, *, sparsity: float = 0.9, granularity: str = "weight") -> S2APConv2d:
        """A pruned layer that shares ``module``'s weight and bias."""
        return _from_dense(cls, nn.Conv2d, module, sparsity, granularity)

    def to_dense(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with the zeros baked in; it shares nothing with this layer."""
        return to_dense_class(copy.deepcopy(self))


class S2APLinear(Pruned, nn.Linear):
    """``nn.Linear`` that computes with its ``kept`` highest scored weights.

    Arguments, attributes and errors are those of :class:`S2APConv2d`, with ``nn.Linear``'s arguments in place of ``nn.Conv2d``'s.

    Equivalent to (forward)::

        F.linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias)
    """

    def __init__(self, *args: Any, sparsity: float = 0.9, granularity: str = "weight", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_pruning(sparsity, pattern_for(granularity, self.weight.shape, sparsity))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self._masked_weight(), self.bias)

    @classmethod
    def from_dense(cls, module: nn.Linear, *, sparsity: float = 0.9, granularity: str = "weight") -> S2APLinear:
        """A pruned layer that shares ``module``'s weight and bias."""
        return _from_dense(cls, nn.Linear, module, sparsity, granularity)

    def to_dense(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the zeros baked in; it shares nothing with this layer."""
        return to_dense_class(copy.deepcopy(self))


DENSE_TO_PRUNED: dict[type, type] = {nn.Conv2d: S2APConv2d, nn.Linear: S2APLinear}


def pruned_layers(model: nn.Module) -> dict[str, Pruned]:
    """The pruned layers of ``model`` by name, in module order, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Pruned)}


def refresh(layers: nn.Module | Iterable[Pruned]) -> None:
    """Brings the masked weights of all given layers up to date, in one fused call for those whose scores changed.

    Layers do this by themselves in their forward, those that one :func:`sparsify` has made all at once.

    Args:
        layers: a model, or pruned layers.

    Raises:
        ValueError: NaN in the scores of a layer that is on the CPU. On CUDA looking would wait for the
            device; :class:`s2ap_ext.S2AP` looks at the end of a step.
    """
    select_stale(pruned_layers(layers).values() if isinstance(layers, nn.Module) else layers)


def baked_weight(layer: Pruned, baked: dict[tuple[int, int], nn.Parameter]) -> nn.Parameter:
    """The masked weight as a parameter; layers that share weight and scores share it too, by way of ``baked``.

    Raises:
        RuntimeError: the layer stands at perturbed scores.
    """
    if layer.mask_state.perturbation is not None:
        raise RuntimeError(f"{layer.mask_state.label}: the layer stands at perturbed scores; call descend() first")
    key = (id(layer.weight), id(layer.scores))
    if key not in baked:
        with torch.no_grad():
            baked[key] = layer.bake()
    return baked[key]


def to_dense_class(layer: P, baked: dict[tuple[int, int], nn.Parameter] | None = None) -> P:
    """Changes ``layer`` into its dense class, with the zeros baked into its weight (:func:`baked_weight`)."""
    layer.weight = baked_weight(layer, {} if baked is None else baked)
    layer.mask_state.group.discard(layer)
    del layer.scores, layer.kept, layer.mask_state
    layer.__class__ = next(dense for dense, pruned in DENSE_TO_PRUNED.items() if isinstance(layer, pruned))
    return layer


def _from_dense(cls: type[P], dense: type[nn.Module], module: nn.Conv2d | nn.Linear, sparsity: float, granularity: str) -> P:
    if type(module) is not dense:
        raise TypeError(f"module: expected {dense.__name__}, got {type(module).__name__}")
    layer = cls.__new__(cls)  # an object of its own that shares module's tensors
    layer.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()})
    layer._start_pruning(sparsity, pattern_for(granularity, module.weight.shape, sparsity))
    return layer
