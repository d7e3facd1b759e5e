"""Whether what a file describes is a network that the engine can run.

Steps and kernels take it for granted that shapes, settings and kept weights belong together. :func:`~s2ap_ext.engine.compile_sparse` makes
them so; of what comes from a file this module makes sure. Every function raises ValueError, or returns what it has read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..nn.kept_weights import KeptWeights
from ..sparse_reference import pass_of_tap
from .steps import Add, Affine, Conv, DenseConv, Flatten, Linear, Pool, Relu, SparseConv, Step, weights_of
from .token_steps import ACTIVATIONS, TOKEN_STEPS, Activation, Attention, LayerNorm, Prepend, Select, Shift
from .weights import Constant, Dense, Scale, Source

MOST = 2**31 - 1  # elements of an image's activation, and any size or setting; csrc/cpu/sparse_binding.h has the same numbers
MOST_TAPS = 2**16 - 1
MOST_TAPS_OF_PASSES = 2**26
KINDS: dict[str, type[Step]] = {
    step.__name__: step for step in (SparseConv, DenseConv, Linear, Affine, Relu, Add, Pool, Flatten, *TOKEN_STEPS)
}
Weights = KeptWeights | Dense | Scale | Constant

Shape = tuple[int, ...]
T = TypeVar("T")


# ---- What JSON holds


def of_type(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{what}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def step_of(described: Any, what: str) -> Step:
    fields = dict(of_type(described, dict, what))
    name = of_type(fields.pop("step", None), str, f"{what}: step")
    if name not in KINDS:
        raise ValueError(f"{what}: expected one of {', '.join(KINDS)}, got {name}")
    return _of_class(KINDS[name], fields, what)


def source_of(described: Any, what: str) -> Source:
    return _of_class(Source, of_type(described, dict, what), what)


def _of_class(cls: type[T], described: dict[str, Any], what: str) -> T:
    """An instance of a dataclass whose fields are of the types that it names."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    if described.keys() != fields.keys():
        raise ValueError(f"{what}: expected {', '.join(fields)}, got {', '.join(described)}")
    values = tuples(described)
    for name, value in values.items():
        if not _is(value, str(fields[name].type)):
            raise ValueError(f"{what}: {name}: expected {fields[name].type}, got {value!r:.100}")
    return cls(**values)


def _is(value: Any, kind: str) -> bool:
    integer = type(value) is int and 0 <= value <= MOST
    if kind.startswith("tuple[int"):
        return type(value) is tuple and (kind.endswith("...]") or len(value) == 2) and all(_is(item, "int") for item in value)
    simple = {
        "int": integer,
        "float": type(value) is float and 0 < value < math.inf,
        "bool": type(value) is bool,
        "str": type(value) is str,
        "str | None": value is None or type(value) is str,
    }
    return simple.get(kind, type(value) is tuple)  # what remains is only looked at when a model is at hand


def shape_of(described: Any, what: str) -> Shape:
    shape: Shape = tuples(described)
    if not _is(shape, "tuple[int, ...]") or len(shape) not in (1, 3) or 0 in shape or math.prod(shape) > MOST:
        raise ValueError(f"{what}: expected 1 or 3 sizes of fewer than 2**31 elements, got {shape!r:.100}")
    return shape


def layers_of(described: Any, what: str) -> dict[str, str]:
    layers: dict[str, str] = of_type(described, dict, what)
    for name, kind in layers.items():
        if kind not in ("sparse", "dense"):
            raise ValueError(f"{what}: {name}: expected sparse or dense, got {kind!r:.100}")
    return layers


# ---- Whether it belongs together


def check_program(steps: Sequence[Step], shapes: Sequence[Shape], output: int, weights: Sequence[Weights], what: str) -> None:
    """Every step reads what an earlier one wrote, and what it writes has the shape that the next ones expect and is read, or the output."""
    if not shapes:
        raise ValueError("shapes: expected that of the input at least")
    made = {0}
    for i, step in enumerate(steps):
        name = f"{what}[{i}] ({type(step).__name__})"
        if not step.sources or not made.issuperset(step.sources) or step.out in made or step.out >= len(shapes):
            raise ValueError(f"{name}: expected to read what there is and to write what there is not, got {step.sources} -> {step.out}")
        try:
            result = _result(step, [shapes[source] for source in step.sources], shapes[step.out], weights)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if result != shapes[step.out]:
            raise ValueError(f"{name}: expected a result of shape {result}, got {shapes[step.out]}")
        made.add(step.out)
    unread = made - {source for step in steps for source in step.sources} - {output}
    if output not in made or output == 0 or unread:
        raise ValueError(f"{what}: expected the output {output} to be written, and all else to be read, got {sorted(unread)}")


def _result(step: Step, sources: Sequence[Shape], out: Shape, weights: Sequence[Weights]) -> Shape:
    """The shape of what a step writes, its weights being looked at."""
    most = 2 if isinstance(step, (Conv, Add)) else 1
    if len(sources) > most or (isinstance(step, Add) and len(sources) < most):
        raise ValueError(f"expected {most} sources, got {len(sources)}")
    first, image = sources[0], len(sources[0]) == 3
    images = (Conv, Pool, Flatten, Attention, Prepend, Select, Shift)
    if (not image and isinstance(step, images)) or (image and isinstance(step, Linear)):
        raise ValueError(f"expected {'vectors' if image else 'images'}, got shape {first}")
    own = _weights_of(step, weights)
    if isinstance(step, Conv):
        check_convolution(step, first)
        if first[0] % step.groups or out[0] % step.groups:
            raise ValueError(f"groups: expected a divisor of {first[0]} and of {out[0]}, got {step.groups}")
        assert isinstance(own, (KeptWeights, Dense))
        of_positions = isinstance(own, Dense) and own.weight is not None and own.weight.dim() == 2 and step.of_positions
        _check_weights(own, (out[0], first[0]) if of_positions else (out[0], first[0] // step.groups, *step.kernel), step)
        result = (out[0], *_positions(step, first))
    elif isinstance(step, Linear):
        assert isinstance(own, (KeptWeights, Dense))
        _check_weights(own, (out[0], first[0]) if isinstance(own, Dense) else (out[0], first[0], 1, 1), SparseConv((0,), 1))
        result = (out[0],)
    elif isinstance(step, (Affine, LayerNorm)):
        assert isinstance(own, Scale)
        _check_floats(own.scale, (first[0],), "scale")
        _check_floats(own.shift, (first[0],), "shift")
        result = first
    elif isinstance(step, Activation):
        if step.kind not in ACTIVATIONS:
            raise ValueError(f"kind: expected one of {', '.join(ACTIVATIONS)}, got {step.kind!r:.100}")
        result = first
    elif isinstance(step, Attention):
        if step.heads < 1 or first[0] % (3 * step.heads):
            raise ValueError(f"heads: expected a divisor of a third of {first[0]}, got {step.heads}")
        result = (first[0] // 3, *first[1:])
    elif isinstance(step, (Prepend, Shift)):
        assert isinstance(own, Constant)
        positions = math.prod(first[1:]) if isinstance(step, Shift) else math.prod(out[1:]) - math.prod(first[1:])
        _check_floats(own.values, (first[0], 1, positions), "values")
        result = first if isinstance(step, Shift) else (first[0], 1, math.prod(out[1:]))
    elif isinstance(step, Select):
        if step.position >= math.prod(first[1:]):
            raise ValueError(f"position: expected one of {math.prod(first[1:])}, got {step.position}")
        result = (first[0], 1, 1)
    elif isinstance(step, Pool):
        check_convolution(step, first)
        if step.kind not in ("max", "avg") or any(
            2 * p > d * (k - 1) + 1 for p, d, k in zip(step.padding, step.dilation, step.kernel, strict=True)
        ):
            raise ValueError(f"expected max or avg with at most half of the kernel as padding, got {step.kind}, {step.padding}")
        result = (first[0], *_positions(step, first))
    else:
        result = (math.prod(first),) if isinstance(step, Flatten) else first
    if len(sources) > 1 and sources[1] != result:
        raise ValueError(f"expected to add something of shape {result}, got {sources[1]}")
    return result


def _weights_of(step: Step, weights: Sequence[Weights]) -> Weights | None:
    sparse = isinstance(step, SparseConv) or (isinstance(step, Linear) and step.sparse)
    dense = isinstance(step, (DenseConv, Linear))
    scale, constant = isinstance(step, (Affine, LayerNorm)), isinstance(step, (Prepend, Shift))
    kind = KeptWeights if sparse else Dense if dense else Scale if scale else Constant if constant else None
    number = weights_of(step)
    if kind is None or number is None:
        return None
    if number >= len(weights) or not isinstance(weights[number], kind):
        raise ValueError(f"weights: expected {kind.__name__} weights, got number {number} of {len(weights)}")
    return weights[number]


def check_convolution(step: Conv | Pool, image: Shape) -> None:
    if 0 in (*step.kernel, *step.stride, *step.dilation, getattr(step, "groups", 1)):
        raise ValueError(f"expected kernel, stride, dilation and groups of at least 1, got {step}")
    taps = math.prod(step.kernel)
    if taps > MOST_TAPS or taps * math.prod(step.stride) > MOST_TAPS_OF_PASSES:
        raise ValueError(
            f"expected fewer than 2**16 kernel positions, and at most 2**26 times the strides, got {step.kernel}, {step.stride}"
        )
    if math.prod(size + 2 * padding for size, padding in zip(image[1:], step.padding, strict=True)) > MOST:
        raise ValueError(f"padding: expected fewer than 2**31 positions in a padded image, got {image[1:]} and {step.padding}")


def _positions(step: Conv | Pool, image: Shape) -> Shape:
    settings = zip(image[1:], step.kernel, step.stride, step.padding, step.dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in settings)


# ---- Weights


def _check_floats(t: Tensor, shape: Shape, what: str) -> None:
    if t is None or t.dtype != torch.float32 or t.shape != shape or not t.isfinite().all():
        raise ValueError(f"{what}: expected finite float32 numbers of shape {shape}, got {_described(t)}")


def _check_weights(weights: KeptWeights | Dense, shape: Shape, convolution: Conv) -> None:
    """``shape``: of the weight, [outputs, inputs of a group, *kernel]."""
    if weights.bias is not None:
        _check_floats(weights.bias, shape[:1], "bias")
    if isinstance(weights, Dense):
        _check_floats(weights.weight, shape, "weight")
    else:
        _check_entries(weights, shape, convolution)


def _check_entries(own: KeptWeights, shape: Shape, convolution: Conv) -> None:
    """The rows of outputs and those of inputs are of the same entries, each of which is in the part that it belongs to."""
    outputs, inputs, taps = shape[0], shape[1], math.prod(shape[2:])
    groups, passes = convolution.groups, math.prod(convolution.stride)
    if max(inputs, outputs // groups) * taps * taps >= 2**32:
        raise ValueError(f"columns: expected rows of fewer than 2**32 / taps, got a weight of shape {shape}")
    if own.values is None or own.values.dim() != 1:
        raise ValueError(f"values: expected one dimension, got {_described(own.values)}")
    _check_floats(own.values, own.values.shape, "values")
    count = len(own.values)
    row, columns = _rows(own.starts, own.columns, count, outputs, inputs * taps, "")
    place = row % outputs * (inputs * taps) + columns
    if count and (place.sort().values.diff() == 0).any():
        raise ValueError("columns: expected no entry twice")

    order = _int64(own.order, "order")
    if not torch.equal(order.sort().values, torch.arange(count)):
        raise ValueError("order: expected every entry once")
    rows = passes * groups * inputs
    row, columns = _rows(own.input_starts, own.input_columns, count, rows, outputs // groups * taps, "input_")
    runs = (len(own.input_starts) - 1) // rows
    input, tap = row % (groups * inputs), columns % taps
    output = input // inputs * (outputs // groups) + columns // taps
    if not torch.equal((output * inputs + input % inputs) * taps + tap, place[order]):
        raise ValueError("input_columns: expected the places of the entries that order tells, got others")
    if not torch.equal(pass_of_tap(*_settings(convolution, shape))[tap], row // (runs * groups * inputs)):
        raise ValueError("input_columns: expected each kernel position in the part of its residue, got others")


def _settings(convolution: Conv, shape: Shape) -> tuple[Shape, Shape, Shape, Shape]:
    return shape[2:], convolution.stride, convolution.padding, convolution.dilation


def _rows(starts: Tensor, columns: Tensor, count: int, rows: int, length: int, prefix: str) -> tuple[Tensor, Tensor]:
    """The row of each entry, counted through all parts, and its column."""
    starts, columns = _int64(starts, f"{prefix}starts"), _int64(columns, f"{prefix}columns")
    if len(starts) < 2 or (len(starts) - 1) % rows or len(columns) != count:
        raise ValueError(f"{prefix}starts: expected 1 and a multiple of {rows}, and {count} columns, got {len(starts)} and {len(columns)}")
    if starts[0] != 0 or starts[-1] != count or (starts[1:] < starts[:-1]).any():
        raise ValueError(f"{prefix}starts: expected to ascend from 0 to {count}")
    row = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    if count and (columns.min() < 0 or columns.max() >= length or ((columns[1:] <= columns[:-1]) & (row[1:] == row[:-1])).any()):
        raise ValueError(f"{prefix}columns: expected to ascend below {length} in each row")
    return row, columns


def _int64(t: Tensor | None, what: str) -> Tensor:
    if t is None or t.dtype != torch.int32 or t.dim() != 1:
        raise ValueError(f"{what}: expected int32 numbers in one dimension, got {_described(t)}")
    return t.long()


def _described(t: Tensor | None) -> str:
    return "none" if t is None else f"{t.dtype} of shape {tuple(t.shape)}" + ("" if t.isfinite().all() else " with NaN or infinity")
