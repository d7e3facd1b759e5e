"""The arguments of the fused ops, checked: what is wrong with one is said by its name and its place in its list."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .reference import CUT_COLUMNS, GROUP, LARGEST_WINDOW, WEIGHT, WINDOW, Pattern

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


# ---- Lists with a tensor for each layer


def check_lists(arguments: Mapping[str, Sequence[Tensor]]) -> None:
    """All lists equally long; within a layer equal shapes; within the call one device and one dtype."""
    (first_name, first), *others = arguments.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{name}: expected {len(first)} tensors, one for each of {first_name}, got {len(tensors)}")
    dtype = getattr(first[0], "dtype", None) if len(first) else None
    device = getattr(first[0], "device", None) if len(first) else None
    for name, tensors in arguments.items():
        for i, (t, like) in enumerate(zip(tensors, first, strict=True)):
            # One condition for each of perhaps thousands of tensors; what is wrong with one is found out afterwards.
            fits = isinstance(t, Tensor) and t.dtype is dtype and t.device == device and t.shape == like.shape
            if not fits or dtype not in DTYPES:
                _refuse(name, i, t, first_name, first)


def _refuse(name: str, i: int, t: object, first_name: str, first: Sequence[Tensor]) -> NoReturn:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}[{i}]: expected a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}[{i}]: expected a floating point tensor, got {t.dtype}")
    if t.dtype != first[0].dtype:
        raise TypeError(f"{name}[{i}]: expected {first[0].dtype} like {first_name}[0], got {t.dtype}")
    if t.device != first[0].device:
        raise ValueError(f"{name}[{i}]: expected a tensor on {first[0].device} like {first_name}[0], got {t.device}")
    raise ValueError(f"{name}[{i}]: expected shape {tuple(first[i].shape)} like {first_name}[{i}], got {tuple(t.shape)}")


def check_memory(written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]) -> None:
    """What is written shares memory with no other argument. Memory is compared from the first element of a tensor to its last one."""
    if not any(written.values()):
        return
    tensors = [t for lists in (written, read) for tensors in lists.values() for t in tensors]
    count = sum(map(len, written.values()))  # of those written, which come first
    begins = [t.data_ptr() for t in tensors]
    sizes = [t.nbytes if t.is_contiguous() else _extent(t) for t in tensors]
    # In the order of their beginnings, each meets those before it that reach furthest; so this takes no longer than sorting.
    furthest = furthest_written = -1
    end = end_written = 0
    for i in sorted(range(len(tensors)), key=begins.__getitem__):
        if not sizes[i]:
            continue
        begin = begins[i]
        if begin < end_written:
            _refuse_shared(furthest_written, i, written, read)
        if i < count and begin < end:
            _refuse_shared(i, furthest, written, read)
        if begin + sizes[i] > end:
            furthest, end = i, begin + sizes[i]
        if i < count and begin + sizes[i] > end_written:
            furthest_written, end_written = i, begin + sizes[i]


def _refuse_shared(own: int, other: int, written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]) -> NoReturn:
    places = [(name, i) for lists in (written, read) for name, tensors in lists.items() for i in range(len(tensors))]
    (own, other), twice = sorted((own, other)), ""  # what is written comes first
    if places[own][0] == places[other][0]:
        own, other, twice = other, own, "; a layer was given twice"
    (name, i), (other_name, j) = places[own], places[other]
    raise ValueError(f"{name}[{i}]: expected memory of its own, got that of {other_name}[{j}]{twice}")


def _extent(t: Tensor) -> int:
    """Bytes from the first element in memory to the end of the last one."""
    if not t.numel():
        return 0
    return t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)))


def outputs(out: Sequence[Tensor] | None, like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in like] if out is None else list(out)


def momentum_argument(momentum: float, momentum_buffers: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    if momentum == 0 and len(momentum_buffers):
        raise ValueError(f"momentum_buffers: expected none with momentum 0, got {len(momentum_buffers)}")
    return {"momentum_buffers": momentum_buffers} if momentum != 0 else {}


# ---- Patterns and counts


def patterns_and_kept(
    patterns: Sequence[Pattern] | None, kept: Tensor | Sequence[int], scores: Sequence[Tensor]
) -> tuple[list[int], Tensor]:
    """The patterns as the ops take them, and ``kept`` as int64 [L] on the scores' device; counts known on the host are range-checked."""
    if patterns is None:
        largest = [s.numel() for s in scores]
    elif len(patterns) != len(scores):
        raise ValueError(f"patterns: expected {len(scores)}, one for each of scores, got {len(patterns)}")
    else:
        largest = [_most_kept(i, p, s.numel()) for i, (p, s) in enumerate(zip(patterns, scores, strict=True))]
    flat = [] if patterns is None else [number for pattern in patterns for number in pattern]
    device = _device(scores)
    if isinstance(kept, Tensor):
        if kept.shape != (len(scores),) or kept.dtype != torch.int64 or kept.device != device:
            raise ValueError(f"kept: expected int64 of shape ({len(scores)},) on {device}, got {_described(kept)}")
        if kept.device.type == "cuda":
            return flat, kept.contiguous()  # reading it would synchronise; the kernels clamp
        counts = kept.tolist()
    else:
        counts = list(kept)
        if len(counts) != len(scores):
            raise ValueError(f"kept: expected {len(scores)} counts, one for each of scores, got {len(counts)}")
        for i, count in enumerate(counts):
            if not _is_whole(count):
                raise TypeError(f"kept[{i}]: expected an integer, got {count!r}")
    for i, (count, most) in enumerate(zip(counts, largest, strict=True)):
        if not 0 <= count <= most:
            raise ValueError(f"kept[{i}]: expected a count in [0, {most}], got {count}")
    return flat, torch.tensor(counts, dtype=torch.int64, device=device)


def _most_kept(i: int, pattern: Pattern, numel: int) -> int:
    """The largest count of ``kept`` that ``pattern`` allows for a layer of ``numel`` elements."""
    if not isinstance(pattern, tuple) or len(pattern) != 3 or not all(map(_is_whole, pattern)):
        raise TypeError(f"patterns[{i}]: expected a Pattern of three integers, got {pattern!r}")
    kind, size, block = pattern
    if kind == WEIGHT:
        return numel
    if kind not in (GROUP, WINDOW) or size < 1 or block < 1 or not numel or numel % (size * block):
        raise ValueError(
            f"patterns[{i}]: expected WEIGHT, or GROUP or WINDOW with size * block dividing {numel} elements, got {tuple(pattern)}"
        )
    if kind == WINDOW and not 2 <= size <= LARGEST_WINDOW:
        raise ValueError(f"patterns[{i}]: expected a window of 2 to {LARGEST_WINDOW} elements, got {size}")
    return size


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


# ---- One number, or one row, for each layer


def check_cuts(cuts: Tensor, name: str, scores: Sequence[Tensor]) -> Tensor:
    shape, device = (len(scores), CUT_COLUMNS), _device(scores)
    fits = isinstance(cuts, Tensor) and cuts.shape == shape and cuts.dtype == torch.int64 and cuts.is_contiguous()
    if not fits or (scores and cuts.device != device):
        raise ValueError(f"{name}: expected contiguous int64 of shape {shape} on {device}, got {_described(cuts)}")
    return cuts


def cuts_or_zeros(cuts: Tensor | None, name: str, scores: Sequence[Tensor]) -> Tensor:
    if cuts is None:
        return torch.zeros((len(scores), CUT_COLUMNS), dtype=torch.int64, device=_device(scores))
    return check_cuts(cuts, name, scores)


def per_layer(values: Tensor | None, name: str, scores: Sequence[Tensor]) -> Tensor:
    """One float64 for each layer, zeros if there are none yet."""
    device = _device(scores)
    if values is None:
        return torch.zeros(len(scores), dtype=torch.float64, device=device)
    fits = isinstance(values, Tensor) and values.shape == (len(scores),) and values.dtype == torch.float64
    if not fits or (scores and values.device != device):
        raise ValueError(f"{name}: expected float64 of shape ({len(scores)},) on {device}, got {_described(values)}")
    return values.contiguous()


def gammas(gamma: float | Tensor, scores: Sequence[Tensor]) -> Tensor:
    """One for each layer; values known on the host are range-checked."""
    if not isinstance(gamma, Tensor):
        return torch.full((len(scores),), check_size("gamma", gamma), dtype=torch.float64, device=_device(scores))
    gamma = per_layer(gamma, "gamma", scores)
    if gamma.device.type != "cuda":  # reading it would synchronise
        for i, value in enumerate(gamma.tolist()):
            check_size(f"gamma[{i}]", value)
    return gamma


def check_size(name: str, value: float) -> float:
    """``value`` as a float; raises ValueError if it is negative or not finite."""
    if not 0 <= value <= sys.float_info.max:  # an int may be larger
        raise ValueError(f"{name}: expected a finite number >= 0, got {str(value)[:80]}")
    return float(value)


def _device(scores: Sequence[Tensor]) -> torch.device | None:
    return scores[0].device if scores else None


def _described(t: object) -> str:
    return f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
