"""What a pruned layer remembers besides its tensors: its masked weight, what that was made from, and who wants its gradient.

One :class:`MaskState` per layer holds all of it. :mod:`s2ap_ext.nn.selection` brings it up to date, :mod:`s2ap_ext.nn.layers` computes
with it. Nothing here is part of a ``state_dict``, and a copy of a layer starts without it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..reference import Pattern, perturbed, score_grad

if TYPE_CHECKING:
    from .kept_weights import KeptWeights

Listener = Callable[[nn.Parameter, Tensor], None]
"""Takes ``(scores, gradient of the masked weight)``."""


class PrunedLayer(Protocol):
    """What selections need of a layer."""

    scores: nn.Parameter
    weight: Tensor
    kept: Tensor  # int64 scalar, see reference.Pattern
    mask_state: MaskState


class Snapshot:
    """Tells whether a tensor is still what it was. Holds its storage, so that no later tensor can take the same address."""

    __slots__ = ("alias", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.detach()
        self.version = tensor._version

    def matches(self, tensor: Tensor) -> bool:
        return tensor._version == self.version and tensor.data_ptr() == self.alias.data_ptr()


class ValueSnapshot(Snapshot):
    """The same for a small tensor that may be overwritten with what it holds.

    DistributedDataParallel does that to every buffer before each forward, at least with torch 2.11.
    """

    __slots__ = ("value",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.value = self.alias.clone()

    def matches(self, tensor: Tensor) -> bool:
        if super().matches(tensor):
            return True
        if tensor.data_ptr() != self.alias.data_ptr() or not torch.equal(tensor, self.value):
            return False
        self.version = tensor._version
        return True


class Origin(NamedTuple):
    """What a masked weight was made from."""

    scores: Snapshot
    weight: Snapshot
    kept: ValueSnapshot

    @classmethod
    def of(cls, layer: PrunedLayer) -> Origin:
        return cls(Snapshot(layer.scores), Snapshot(layer.weight), ValueSnapshot(layer.kept))

    def matches(self, layer: PrunedLayer) -> bool:
        """Whether the layer's tensors are still what they were."""
        return self.mask_matches(layer) and self.weight.matches(layer.weight)

    def mask_matches(self, layer: PrunedLayer) -> bool:
        """Whether those that the mask depends on are."""
        return self.scores.matches(layer.scores) and self.kept.matches(layer.kept)


class Selection:
    """A finished selection. It is made whole before any other thread can see it."""

    __slots__ = ("cut", "kept_weights", "mask", "masked", "origin", "same_mask", "square")

    def __init__(self, origin: Origin, masked: Tensor, cut: Tensor, *, mask: Tensor | None = None, square: Tensor | None = None) -> None:
        self.origin = origin
        self.masked = masked  # the masked weight
        self.cut = cut  # int64 [5], see reference.py
        self.mask = mask  # bool, made from the cut when it is first asked for
        self.square = square  # float64, the scores' sum of squares where update_select has returned it
        self.kept_weights: KeptWeights | None = None  # made by convolutions that compute with them
        self.same_mask: Selection | None = None  # an earlier selection that may have kept weights with this mask


class Perturbation(NamedTuple):
    """How a layer came to stand at ``s + z``, ``z = scale * g``."""

    grad: Tensor  # g, or with straight_through the gradient of the masked weight that g is formed from
    scale: Tensor  # float64
    straight_through: bool
    cut: Tensor  # that of s

    def position(self, scores: Tensor, weight: Tensor) -> Tensor:
        """``s + z``"""
        return perturbed(scores, score_grad(self.grad, weight, scores) if self.straight_through else self.grad, self.scale)


class MaskGroup:
    """The pruned layers of one model. When the first of them is found out of date, all of them are brought up to date in one call.

    It knows its layers weakly, and a copy of it is empty: the copies of the layers enter it by themselves.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[PrunedLayer, None] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskGroup, ()

    def add(self, layer: PrunedLayer) -> None:
        self._layers[layer] = None

    def discard(self, layer: PrunedLayer) -> None:
        self._layers.pop(layer, None)

    def layers(self) -> list[PrunedLayer]:
        """In the order that they came in."""
        return [layer for reference in self._layers.keyrefs() if (layer := reference()) is not None]


class MaskState:
    """The mask of one layer.

    Attributes:
        label: what errors call the layer.
        pattern: what the layer's ``kept`` counts.
        group: the layers that are selected together with it; by default it is alone.
        memory: where selections write the masked weight, again and again; None before the first.
        selection: the last one; None where it is out of date for certain.
        perturbation: while the layer stands at ``s + z``, how it came there.
        made: a masked weight, with its graph, that the forward is to use in place of making one: an input of a compiled graph.
        sampled_channels: int64, the output channels in which pruned weights get a gradient; None: in all
            (:func:`s2ap_ext.nn.sampled_gradients`).
    """

    def __init__(self, label: str, pattern: Pattern, group: MaskGroup | None = None) -> None:
        self.label = label
        self.pattern = pattern
        self.group = MaskGroup() if group is None else group
        self.memory: Tensor | None = None
        self.selection: Selection | None = None
        self.perturbation: Perturbation | None = None
        self.made: Tensor | None = None
        self.sampled_channels: Tensor | None = None
        self._listeners: OrderedDict[int, Listener] = OrderedDict()
        self._collectors: OrderedDict[int, Listener] = OrderedDict()  # one at most

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskState, (self.label, self.pattern, self.group)

    def fresh(self, group: MaskGroup | None = None) -> MaskState:
        """The state of a copy of the layer, which stands at its scores and has neither selected nor anybody who listens."""
        return MaskState(self.label, self.pattern, group)

    def forget(self) -> None:
        """Lets go of the selection and of the memory for the next."""
        self.selection = self.memory = None

    def position(self, scores: Tensor, weight: Tensor) -> Tensor:
        """The scores the mask is taken at: ``s``, or ``s + z`` between ascend() and descend()."""
        scores, weight = scores.detach(), weight.detach()
        return scores if self.perturbation is None else self.perturbation.position(scores, weight)

    # Who wants the gradient of the masked weight

    def listen(self, listener: Listener) -> RemovableHandle:
        """Calls ``listener(scores, grad)`` whenever a backward has the gradient of the layer's masked weight.

        It is called in the backward of every forward that runs from now on with scores or weight that require a gradient, once for each use
        of the masked weight, so the gradients of a layer that is used twice add up to its whole one. There may be several listeners.
        Compiled forwards (``torch.compile``) do not call them.

        Args:
            listener: takes the layer's scores and ``dL/d(w*m)``, of weight's shape, which it must not change.

        Returns:
            A handle; ``handle.remove()`` ends it.
        """
        return _added(self._listeners, listener)

    def defer(self, collector: Listener) -> RemovableHandle:
        """Gives the gradient of the masked weight to ``collector(scores, grad)`` in place of forming that of the scores.

        Raises:
            RuntimeError: somebody collects already.
        """
        if self._collectors:
            raise RuntimeError(f"{self.label}: the gradients are deferred already; two optimizers cannot take those of one layer")
        return _added(self._collectors, collector)

    @property
    def has_listeners(self) -> bool:
        return bool(self._listeners)

    def tell(self, scores: nn.Parameter, grad: Tensor) -> bool:
        """Passes on a gradient of the masked weight. Returns whether it was collected, so that the scores are to get none."""
        for listener in (*self._listeners.values(), *self._collectors.values()):
            listener(scores, grad)
        return bool(self._collectors)


def _added(listeners: OrderedDict[int, Listener], listener: Listener) -> RemovableHandle:
    handle = RemovableHandle(listeners)
    listeners[handle.id] = listener
    return handle


def can_remember(layer: PrunedLayer) -> bool:
    """Whether a selection of the layer can be recognised as its own later on."""
    return all(_has_identity(tensor) for tensor in (layer.scores, layer.weight, layer.kept))


def _has_identity(tensor: Tensor) -> bool:
    """Whether version and address of ``tensor`` mean anything: not for fake, inference and functorch tensors."""
    return (
        type(tensor) in (nn.Parameter, Tensor) and not tensor.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
