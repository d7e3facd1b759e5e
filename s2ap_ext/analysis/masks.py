"""How masks differ: between two moments of a search, over all of it, and between searches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..nn import pruned_layers

Masks = Mapping[str, Tensor]
"""Masks by layer: bool, of the weights' shapes."""


def layer_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the pruned layers of ``model`` by name: bool, of the weights' shapes. They do not follow the model."""
    return {name: layer.mask for name, layer in pruned_layers(model).items()}


def mask_distance(a: nn.Module | Masks, b: nn.Module | Masks) -> float:
    """Normalised Hamming distance of two masks: the fraction of all entries in which they differ, in [0, 1].

    Args:
        a, b: models with pruned layers of the same names, or their masks (:func:`layer_masks`).

    Raises:
        ValueError: different layers, or different shapes of a layer.

    Equivalent to::

        sum((a[l] != b[l]).sum() for l in a) / sum(a[l].numel() for l in a)
    """
    a, b = _pair(a, b)
    total = sum(mask.numel() for mask in a.values())
    return _differing(a, b) / total if total else 0.0


def flip_rate(a: nn.Module | Masks, b: nn.Module | Masks) -> float:
    """Entries in which two masks differ, relative to the number that ``a`` keeps.

    A swap of one kept entry for another counts twice, so two disjoint masks of the same size have flip rate 2.

    Args and errors as for :func:`mask_distance`.

    Equivalent to::

        sum((a[l] != b[l]).sum() for l in a) / sum(a[l].sum() for l in a)
    """
    a, b = _pair(a, b)
    kept = _kept(a)
    return _differing(a, b) / kept if kept else 0.0


def jaccard(a: nn.Module | Masks, b: nn.Module | Masks) -> float:
    """Jaccard index of the kept sets: the entries that both keep, relative to those that at least one keeps, in [0, 1].

    Two masks that keep nothing are equal, so their index is 1. Args and errors as for :func:`mask_distance`.

    Equivalent to::

        sum((a[l] & b[l]).sum() for l in a) / sum((a[l] | b[l]).sum() for l in a)
    """
    a, b = _pair(a, b)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return sum(int((a[name] & b[name]).sum()) for name in a) / either if either else 1.0


def churn(masks: Sequence[Masks]) -> float:
    """Entries that come back, relative to the entries that the last mask keeps: how much of the search goes in circles.

    An entry comes back when a mask keeps it, the mask before does not, and an earlier one did. It counts each time.

    Args:
        masks: the masks of one search in the order of time, such as one for each epoch, of the same layers and shapes.

    Raises:
        ValueError: no masks, different layers, or different shapes of a layer.

    Equivalent to::

        returned = sum((m[t] & ~m[t - 1] & any_of(m[: t - 1])).sum() for t in range(2, T))
        returned / m[-1].sum()
    """
    if not masks:
        raise ValueError("masks: expected at least one, got none")
    seen, returned = dict(masks[0]), 0
    for before, now in itertools.pairwise(masks):
        _pair(before, now)
        returned += sum(int((now[name] & ~before[name] & seen[name]).sum()) for name in now)
        seen = {name: seen[name] | now[name] for name in now}
    kept = _kept(masks[-1])
    return returned / kept if kept else 0.0


def overlap(masks: Sequence[nn.Module | Masks]) -> float:
    """The mean :func:`jaccard` over all pairs of ``masks``, such as those of searches that differ in their seed.

    Compare it with :func:`chance_overlap`, which masks that know nothing of each other reach too.

    Raises:
        ValueError: fewer than two masks; what :func:`mask_distance` raises.
    """
    return _mean_of_pairs(jaccard, masks)


def chance_overlap(masks: Sequence[nn.Module | Masks]) -> float:
    """What :func:`overlap` would be for independent random masks that keep as many entries of each layer.

    It is the ratio of the expected numbers of entries in the intersection and in the union. Args and errors as for :func:`overlap`.

    Equivalent to (for a pair, with the densities ``p`` and ``q`` of a layer of ``n`` entries)::

        sum(n * p * q) / sum(n * (p + q - p * q))
    """
    return _mean_of_pairs(_chance, masks)


def by_layer(measure: Callable[[Masks, Masks], float], a: nn.Module | Masks, b: nn.Module | Masks) -> dict[str, float]:
    """What ``measure``, such as :func:`mask_distance`, gives for each layer by itself. Args and errors as for :func:`mask_distance`."""
    a, b = _pair(a, b)
    return {name: measure({name: a[name]}, {name: b[name]}) for name in a}


def _chance(a: nn.Module | Masks, b: nn.Module | Masks) -> float:
    a, b = _pair(a, b)
    both = either = 0.0
    for name in a:
        size, first, second = a[name].numel(), int(a[name].sum()), int(b[name].sum())
        shared = first * second / max(size, 1)
        both, either = both + shared, either + first + second - shared
    return both / either if either else 1.0


def _mean_of_pairs(measure: Callable[[nn.Module | Masks, nn.Module | Masks], float], masks: Sequence[nn.Module | Masks]) -> float:
    if len(masks) < 2:
        raise ValueError(f"masks: expected at least two to compare, got {len(masks)}")
    values = [measure(a, b) for a, b in itertools.combinations(masks, 2)]
    return sum(values) / len(values)


def _pair(a: nn.Module | Masks, b: nn.Module | Masks) -> tuple[Masks, Masks]:
    first, second = (layer_masks(m) if isinstance(m, nn.Module) else m for m in (a, b))
    if first.keys() != second.keys():
        raise ValueError(f"masks: expected the same layers in both, but only one has {sorted(first.keys() ^ second.keys())}")
    for name, mask in first.items():
        if mask.shape != second[name].shape:
            raise ValueError(f"masks: layer {name} has shape {tuple(mask.shape)} in one and {tuple(second[name].shape)} in the other")
    return first, second


def _differing(a: Masks, b: Masks) -> int:
    return sum(int((a[name] != b[name]).sum()) for name in a)


def _kept(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
