"""Pruned weights of modules that keep a forward of their own: subclasses of layers, other convolutions, ``nn.MultiheadAttention``.

The weight moves into a child of its module, a :class:`PrunedWeight`, and under its old name the module reads what the child computes: the
masked weight. For this the module gets a class that is made once for each dense class, so it can be copied, pickled and compiled.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..reference import SINGLE_WEIGHTS, Pattern
from .layers import Pruned
from .layout import TORCH_CLASSES
from .mask_state import MaskGroup

if TYPE_CHECKING:
    from .tied import TiedWeight

PREFIX = "pruned_"  # of the child's name, before that of the weight


class PrunedChild(Pruned, nn.Module):
    """A pruned layer that a module has as a child and takes a weight from: called without arguments it gives the masked one."""

    _followers: tuple[str, ...] = ()  # the parameters that came after the weight in its module


class PrunedWeight(PrunedChild):
    """A pruned layer that is nothing but its weight: called without arguments it gives the masked weight.

    Attributes, arguments and errors are those of :class:`s2ap_ext.S2APConv2d`.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        sparsity: float = 0.9,
        pattern: Pattern = SINGLE_WEIGHTS,
        scores: nn.Parameter | None = None,
        kept: Tensor | None = None,
        group: MaskGroup | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self._start_pruning(sparsity, pattern, scores, kept, group)

    def forward(self) -> Tensor:
        return self._masked_weight()


class _WithPrunedWeights:
    """What the classes of modules with pruned weights share.

    Attributes:
        dense: the class that the module had.
        names: of its pruned weights.
    """

    dense: type[nn.Module]
    names: tuple[str, ...]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(operator.index(protocol), 2))
        assert isinstance(reduced, tuple)
        return _empty, (self.dense, self.names), *reduced[2:]


@functools.cache
def _class_with(dense: type, names: tuple[str, ...]) -> type[Any]:
    weights = {name: _computed_by(PREFIX + name) for name in names}
    return type(f"Pruned{dense.__name__}", (_WithPrunedWeights, dense), {"dense": dense, "names": names, **weights})


def _computed_by(child: str) -> property:
    return property(lambda self: getattr(self, child)())


def _empty(dense: type, names: tuple[str, ...]) -> nn.Module:
    cls: type[nn.Module] = _class_with(dense, names)
    return cls.__new__(cls)


def put_in(module: nn.Module, name: str, pruned: PrunedChild | TiedWeight) -> None:
    """From now on ``module`` computes with ``pruned`` in place of its parameter ``name``."""
    cls = type(module)
    dense: type = cls.dense if issubclass(cls, _WithPrunedWeights) else cls
    names = cls.names if issubclass(cls, _WithPrunedWeights) else ()
    order = list(module._parameters)
    pruned._followers = tuple(order[order.index(name) + 1 :])
    del module._parameters[name]
    module.__class__ = _class_with(dense, (*names, name))
    module.add_module(PREFIX + name, pruned)


def pruned_weights(module: nn.Module) -> Iterable[tuple[str, PrunedChild | TiedWeight]]:
    """Name and child for each weight of ``module`` that :func:`put_in` has replaced."""
    names = type(module).names if isinstance(module, _WithPrunedWeights) else ()
    return [(name, cast("PrunedChild | TiedWeight", module.get_submodule(PREFIX + name))) for name in names]


def take_out(module: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Undoes :func:`put_in`: ``module`` has its class again, and for each pruned weight the parameter in ``weights``, in its old place."""
    cls = type(module)
    assert issubclass(cls, _WithPrunedWeights)
    module.__class__ = cls.dense
    for name, weight in weights.items():
        pruned = cast("PrunedChild | TiedWeight", module._modules.pop(PREFIX + name))
        selected = pruned if isinstance(pruned, PrunedChild) else pruned.together
        selected.mask_state.group.discard(selected)
        later = {follower: module._parameters.pop(follower) for follower in pruned._followers if follower in module._parameters}
        module.register_parameter(name, weight)
        module._parameters.update(later)


def class_before(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without what :func:`s2ap_ext.sparsify` and torch's parametrizations have made of it.

    ``S2APConv2d`` and ``S2APLinear`` are classes in their own right and stay.
    """
    cls: type[nn.Module] = type(module)
    if issubclass(cls, _WithPrunedWeights):
        cls = cls.dense
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    return TORCH_CLASSES.get(cls, cls)
