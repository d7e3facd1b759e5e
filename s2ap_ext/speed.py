"""What convolutions cost on this machine, dense and on their kept weights alone: the measurements behind ``s2ap profile``.

The choice between the two while training is :mod:`s2ap_ext.nn.cost`'s; here it is shown beside the truth, and its numbers are fitted.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._library import backend
from .engine.choice import Layer, computed, lanes
from .engine.network import CHUNK, compile_sparse
from .modes import evaluation_mode
from .nn import cost, densify
from .nn.kept_weights import KeptWeights, convolution_of
from .nn.layout import empty_batch_innermost

ROUNDS = 5
CALIBRATION = ((16, 32), (64, 32), (128, 16), (256, 8), (512, 4))  # channels and size of 3x3 convolutions: those of ResNets
DENSITIES = (0.2, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Measured:
    """One convolution, forward and gradient with respect to the input together, in milliseconds."""

    layer: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    density: float
    dense_ms: float
    sparse_ms: float
    predicted_dense_ms: float
    predicted_sparse_ms: float
    choice: str  # what training takes: "sparse" or "dense"


def profile(model: nn.Module, x: Tensor) -> list[Measured]:
    """Measures every convolution of ``model``, at the sizes it has for ``x``.

    Args:
        model: with pruned or with plain convolutions; what is not 0 counts as kept.
        x: float32 images [N, C, H, W] on the CPU.

    Raises:
        ValueError: the C++ kernels are not there, or there is no convolution.
    """
    _require_kernels()
    inputs: dict[str, tuple[nn.Conv2d, tuple[int, ...]]] = {}

    def watch(name: str, layer: nn.Conv2d) -> RemovableHandle:
        return layer.register_forward_pre_hook(lambda layer, args: inputs.setdefault(name, (layer, tuple(args[0].shape))) and None)

    hooks = [watch(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    try:
        with torch.no_grad(), evaluation_mode(model, freeze=False):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs:
        raise ValueError("model: expected a convolution, found none")
    return [_measure(name, layer, shape) for name, (layer, shape) in inputs.items() if layer.padding_mode == "zeros"]


@dataclass(frozen=True)
class Latency:
    """Median milliseconds for one batch, without gradients."""

    batch: int
    dense_ms: float
    sparse_ms: float


def latency(model: nn.Module, shape: tuple[int, int, int], batches: Sequence[int] = (1, 8, 64)) -> list[Latency]:
    """How long ``model`` and what :func:`s2ap_ext.engine.compile_sparse` makes of it take for batches of images of ``shape`` (C, H, W).

    ``model`` is measured dense, in both of torch's memory formats, and the faster one counts.
    """
    rows, network = [], compile_sparse(model, torch.rand(1, *shape))
    model = densify(copy.deepcopy(model)).eval()  # without what a pruned layer does besides
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has not declared this one
    with torch.no_grad():
        for batch in batches:
            x = torch.rand(batch, *shape)
            x_last = x.contiguous(memory_format=torch.channels_last)
            calls: list[Callable[[], object]] = [partial(model, x), partial(last, x_last), partial(network, x)]
            dense, dense_last, sparse = (1e3 * seconds for seconds in in_turn(calls))
            rows.append(Latency(batch, min(dense, dense_last), sparse))
    return rows


def calibrate() -> cost.Rates:
    """Fits the cost model's numbers to this machine, in some seconds. :func:`s2ap_ext.nn.cost.save` keeps them.

    Measured are 3x3 convolutions as they train (64 images) and as networks run them (blocks, and single images). The numbers are those with
    the smallest sum of squared relative errors.

    Raises:
        ValueError: the C++ kernels are not there; or no numbers above 0 fit the arithmetic.
    """
    _require_kernels()
    dense: list[tuple[cost.Terms, float]] = []
    sparse: list[tuple[cost.Terms, float]] = []
    for channels, size in CALIBRATION:
        for density in DENSITIES:
            layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            with torch.no_grad():
                layer.weight.mul_(torch.rand_like(layer.weight) < density)
            density = _density(layer.weight)
            shape = _shape(layer, 64, size)
            m = _measure("", layer, (64, channels, size, size))
            dense.append((cost.dense_terms(shape), m.dense_ms / 2e3))
            sparse.append((cost.sparse_terms(shape, density), m.sparse_ms / 2e3))
            for batch in (CHUNK, 1):
                shape, blocks = _shape(layer, batch, size), batch > 1
                times = _measure_inference(layer, batch, size)
                dense.append((cost.dense_terms(shape), times[0]))
                sparse.append((cost.sparse_terms(shape, density, blocks=blocks, computed=_computed(layer, batch, size)), times[1]))
    return cost.Rates(**_fit(dense, "dense"), **_fit(sparse, "sparse"))


def _fit(rows: Sequence[tuple[cost.Terms, float]], arithmetic: str) -> dict[str, float]:
    """Rates with which the terms take the measured seconds. What does not seem to take any time is as good as free."""
    free = 1e3
    names = sorted({name for terms, _ in rows for name in terms})
    a = torch.tensor([[1e-9 * terms.get(name, 0.0) / seconds for name in names] for terms, seconds in rows], dtype=torch.float64)
    kept = list(range(len(names)))
    while kept:
        costs = torch.linalg.lstsq(a[:, kept], torch.ones(len(a), 1, dtype=torch.float64)).solution.flatten().tolist()
        if min(costs) > 1 / free:
            break
        kept.pop(costs.index(min(costs)))
    rates = dict.fromkeys(names, free) | {names[i]: 1 / cost for i, cost in zip(kept, costs if kept else (), strict=True)}
    if rates[arithmetic] == free:
        raise ValueError("calibrate: the measurements contradict each other; is anything else running on this machine?")
    return rates


def _require_kernels() -> None:
    if backend().cpu != "C++":
        raise ValueError(f"profile: expected the C++ kernels, found none: {backend()}")


def _measure(name: str, layer: nn.Conv2d, input_shape: tuple[int, ...]) -> Measured:
    weight = getattr(layer, "masked_weight", layer.weight).detach().contiguous()
    density = _density(weight)
    convolution = (layer.kernel_size, _pair(layer.stride), _padding(layer), _pair(layer.dilation), layer.groups)
    x = torch.randn(input_shape)
    with torch.no_grad():
        y = layer._conv_forward(x, weight, None)
    kept = KeptWeights.of(weight, None, convolution)

    def dense(memory_format: torch.memory_format) -> Callable[[], object]:
        a, w, g = (t.contiguous(memory_format=memory_format) for t in (x, weight, y))
        _, stride, padding, dilation, groups = convolution

        def run() -> None:
            layer._conv_forward(a, w, None)
            torch.ops.aten.convolution_backward(g, a, w, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])

        return run

    def innermost(t: Tensor) -> Tensor:
        return empty_batch_innermost(tuple(t.shape), t).copy_(t)

    a, g = innermost(x), innermost(y)
    to_y, to_x = torch.empty_like(g), torch.empty_like(a)

    def sparse() -> None:
        torch.ops.s2ap.sparse_conv(a, kept.starts, kept.columns, kept.values, None, None, *convolution, 0, False, to_y)
        torch.ops.s2ap.sparse_conv_input_grad(
            g, kept.input_starts, kept.input_columns, kept.input_values, None, None, *convolution, 0, to_x
        )

    with torch.no_grad():
        first, last, mine = in_turn([dense(torch.contiguous_format), dense(torch.channels_last), sparse])
    shape = cost.Shape.from_sizes(tuple(weight.shape), input_shape, convolution[1])
    return Measured(
        layer=name,
        weight=tuple(weight.shape),
        input=input_shape,
        density=density,
        dense_ms=1e3 * min(first, last),
        sparse_ms=1e3 * mine,
        predicted_dense_ms=2e3 * cost.seconds(cost.dense_terms(shape)),
        predicted_sparse_ms=2e3 * cost.seconds(cost.sparse_terms(shape, density)),
        choice="sparse" if cost.is_faster_sparse(shape, density) else "dense",
    )


def _measure_inference(layer: nn.Conv2d, batch: int, size: int) -> tuple[float, float]:
    """Seconds of a 3x3 convolution, dense and on its kept weights, as a network runs it: in blocks, or for a single image."""
    channels = layer.weight.shape[1]
    x = torch.rand(batch, channels, size, size)
    if batch == 1:
        halo, a = 0, x
    else:
        halo, a = 1, torch.rand(-(-batch // lanes()), channels, size + 2, size + 2, lanes())
    convolution = convolution_of(layer)
    out, kept = torch.empty_like(a), KeptWeights.of(layer.weight.detach(), None, convolution)

    def sparse() -> None:
        torch.ops.s2ap.sparse_conv(a, kept.starts, kept.columns, kept.values, None, None, *convolution, halo, False, out)

    x, weight = (t.detach().contiguous(memory_format=torch.channels_last) for t in (x, layer.weight))
    with torch.no_grad():
        dense, mine = in_turn([lambda: layer._conv_forward(x, weight, None), sparse])
    return dense, mine


def _shape(layer: nn.Conv2d, batch: int, size: int) -> cost.Shape:
    return cost.Shape.from_sizes(tuple(layer.weight.shape), (batch, layer.in_channels, size, size), layer.stride)


def _computed(layer: nn.Conv2d, batch: int, size: int) -> float:
    image = (layer.in_channels, size, size)
    return computed(Layer("", tuple(layer.weight.shape), 1.0, image, image, batch))


def _density(weight: Tensor) -> float:
    return float((weight != 0).float().mean())


def in_turn(functions: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each, one after the other round by round, so that drifts meet all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(ROUNDS + 1):
        for f, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            f()
            if round_:
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def peak_extra_bytes(f: Callable[[], object], device: torch.device) -> int | None:
    """How much more memory is in use at the peak of ``f()`` than before.

    On CUDA that of torch's allocator; elsewhere that of the process, on Linux only (None otherwise).
    """
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide what the next call takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    f()
    return max(0, _status("VmHWM") - before)


def _status(entry: str) -> int:
    found = re.search(rf"{entry}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0, 0)
    if isinstance(layer.padding, str):  # "same"
        spans = [d * (k - 1) for d, k in zip(_pair(layer.dilation), layer.kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            raise ValueError(f"profile: expected padding that is the same on both sides, got {layer}")
        return tuple(span // 2 for span in spans)
    return _pair(layer.padding)
