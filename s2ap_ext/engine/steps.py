"""The steps that a program consists of: each knows how to run, and its gradient with respect to what it read.

Steps are descriptions: numbers only, so that a program can be written as JSON. They work on the slots of a :class:`Run`, and find
their weights there.

The gradient of a slot adds up from those steps that read it. A step's backward gets the whole gradient of the slot it wrote, and for
each slot it read a :class:`Target` that says whether there is something to add to, and whether its contribution is the last one: where
a slot is the output of a ReLU, the last contribution is the one that applies the ReLU's gate to the sum.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arena import inside, per_channel, read_blocks, write_blocks
from .run import Run, Target
from .views import PLAIN, seen, shape_in, unseen


@dataclass(frozen=True)
class Step(ABC):
    """Reads ``sources`` and writes ``out``."""

    sources: tuple[int, ...]
    out: int

    @property
    def gates(self) -> bool:
        """Whether backward reads what was written, because of a ReLU in it."""
        return False

    @property
    def saves(self) -> tuple[int, ...]:
        """Other slots that backward reads."""
        return ()

    @abstractmethod
    def run(self, run: Run) -> None: ...

    @abstractmethod
    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        """``targets`` are those of ``sources``; contributions are made from the last to the first."""


def weights_of(step: Step) -> int | None:
    """The number of a step's weights among those of its network, if it has any."""
    return getattr(step, "weights", None)


@dataclass(frozen=True)
class WithRelu(Step):
    relu: bool = False

    @property
    def gates(self) -> bool:
        return self.relu


@dataclass(frozen=True)
class Weighted(WithRelu):
    weights: int = 0


@dataclass(frozen=True)
class Conv(Weighted):
    """A convolution of the first source with ``weights``, plus the second source, if there are two."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def of_positions(self) -> bool:
        """Whether each position is computed from itself alone, by the same weights."""
        return (self.kernel, *self.geometry) == ((1, 1), (1, 1), (0, 0), (1, 1), 1)

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


@dataclass(frozen=True)
class SparseConv(Conv):
    @property
    def halo(self) -> int:
        """How far the kernel reaches beyond the image, forward and backward, whatever the image's size."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        back = [(r - p + s - 1) // s for r, p, s in zip(reach, self.padding, self.stride, strict=True)]
        return max(*self.padding, *back)

    def run(self, run: Run) -> None:
        x, residual = run.values[self.sources[0]], run.values[self.sources[1]] if len(self.sources) > 1 else None
        w = run.weights[self.weights]
        torch.ops.s2ap.sparse_conv(
            x, w.starts, w.columns, w.values, w.bias, residual, self.kernel, *self.geometry, run.halo, self.relu, run.new(self.out)
        )

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        target, *residual = targets
        if residual:
            run.pass_on(residual[0], grad)
        w, out = run.weights[self.weights], run.take(target.slot)
        torch.ops.s2ap.sparse_conv_input_grad(
            grad, w.input_starts, w.input_columns, w.input_values, run.before(target), run.gate(target),
            self.kernel, *self.geometry, run.halo, out,
        )  # fmt: skip
        run.settle(target, out)


@dataclass(frozen=True)
class DenseConv(Conv):
    """By torch, in the memory format of its weight: channels last, and so from one to the next. A weight [outputs, inputs] is that of a
    linear layer on each position."""

    def run(self, run: Run) -> None:
        w, x = run.weights[self.weights], run.values[self.sources[0]]
        if w.weight.dim() == 2:
            out = run.put(self.out, F.linear(x.permute(0, 2, 3, 1), w.weight, w.bias).permute(0, 3, 1, 2))
        else:
            out = run.put(self.out, F.conv2d(x, w.weight, w.bias, *self.geometry))
        if len(self.sources) > 1:
            out.add_(run.values[self.sources[1]])
        if self.relu:
            out.relu_()

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        target, *residual = targets
        if residual:
            run.pass_on(residual[0], grad)
        weight = run.weights[self.weights].weight
        if weight.dim() == 2:
            run.contribute(target, run.arena.adopt((grad.permute(0, 2, 3, 1) @ weight).permute(0, 3, 1, 2)))
            return
        x = run.take(target.slot)  # only its shape matters
        out, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *self.geometry[:3], False, [0, 0], self.groups, [True, False, False]
        )
        run.arena.drop(x)
        run.contribute(target, run.arena.adopt(out))


@dataclass(frozen=True)
class Linear(Weighted):
    """A linear layer on vectors; ``sparse`` ones compute with the kept weights."""

    sparse: bool = False

    ONE = ((1, 1), (1, 1), (0, 0), (1, 1), 1, 0)  # a convolution of one position, without halo

    def run(self, run: Run) -> None:
        w, x, out = run.weights[self.weights], run.values[self.sources[0]], run.new(self.out)
        if self.sparse:
            torch.ops.s2ap.sparse_conv(_points(x), w.starts, w.columns, w.values, w.bias, None, *self.ONE, self.relu, _points(out))
            return
        torch.mm(x, w.weight.t(), out=out)
        if w.bias is not None:
            out.add_(w.bias)
        if self.relu:
            out.relu_()

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        (target,) = targets
        w, out = run.weights[self.weights], run.take(target.slot)
        if self.sparse:
            none = (None, None)
            torch.ops.s2ap.sparse_conv_input_grad(
                _points(grad), w.input_starts, w.input_columns, w.input_values, *none, *self.ONE, _points(out)
            )
        else:
            torch.mm(grad, w.weight, out=out)
        run.contribute(target, out)


def _points(vectors: Tensor) -> Tensor:
    return vectors[:, :, None, None]


@dataclass(frozen=True)
class Affine(Weighted):
    """A scale and a shift for each channel: a BatchNorm that no layer before it takes in."""

    def run(self, run: Run) -> None:
        w, x, out = run.weights[self.weights], inside(run.values[self.sources[0]], run.halo), inside(run.new(self.out), run.halo)
        torch.addcmul(per_channel(w.shift, x), x, per_channel(w.scale, x), out=out)
        if self.relu:
            out.relu_()

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        (target,) = targets
        out = run.take(target.slot)
        torch.mul(grad, per_channel(run.weights[self.weights].scale, grad), out=out)
        run.contribute(target, out)


@dataclass(frozen=True)
class Relu(Step):
    @property
    def gates(self) -> bool:
        return True

    def run(self, run: Run) -> None:
        torch.clamp_min(run.values[self.sources[0]], 0, out=run.new(self.out))

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        run.pass_on(targets[0], grad)


@dataclass(frozen=True)
class Add(WithRelu):
    def run(self, run: Run) -> None:
        a, b = self.sources
        torch.add(run.values[a], run.values[b], out=run.new(self.out))
        if self.relu:
            run.values[self.out].relu_()

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        for target in reversed(targets):
            run.pass_on(target, grad)


@dataclass(frozen=True)
class Pool(Step):
    """The maximum, or the average over all of the kernel's positions (padding counts), of windows."""

    kind: str = "max"
    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def saves(self) -> tuple[int, ...]:
        return (*self.sources, self.out) if self.kind == "max" else ()

    def run(self, run: Run) -> None:
        x, out = inside(run.values[self.sources[0]], run.halo), inside(run.new(self.out), run.halo)
        if self.kind == "max":
            taps = list(self._taps(x, out))
            if any(self.padding) or len(taps) == 1:
                out.fill_(-math.inf)
            else:  # the first two reach all outputs, so nothing has to be there before
                (_, first), (_, second), *taps = taps
                torch.maximum(x[first], x[second], out=out)
            for there, here in taps:
                torch.maximum(out[there], x[here], out=out[there])
        elif self._one_window(x):
            torch.mean(x, dim=(2, 3), keepdim=True, out=out)
        else:
            out.zero_()
            for there, here in self._taps(x, out):
                out[there].add_(x[here])
            out.div_(math.prod(self.kernel))

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        (target,) = targets
        result = run.take(target.slot)
        grad, dx = inside(grad, run.halo), inside(result, run.halo)
        if self.kind == "max":
            x, out = inside(run.values[self.sources[0]], run.halo), inside(run.values[self.out], run.halo)
            dx.zero_()
            left = grad.clone()  # the first of equal maxima gets all of it
            for there, here in self._taps(x, out):
                hit = x[here] == out[there]
                dx[here].add_(torch.where(hit, left[there], 0))
                left[there].masked_fill_(hit, 0)
        elif self._one_window(dx):
            dx.copy_((grad / math.prod(self.kernel)).expand_as(dx))
        else:
            dx.zero_()
            share = grad / math.prod(self.kernel)
            for there, here in self._taps(dx, grad):
                dx[here].add_(share[there])
        run.contribute(target, result)

    def _one_window(self, x: Tensor) -> bool:
        return self.kernel == tuple(x.shape[2:4]) and self.padding == (0, 0)

    def _taps(self, x: Tensor, out: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """For each of the kernel's positions the outputs whose window has an input there, and these inputs."""
        rows, columns = (
            [_tap(k * self.dilation[i], x.shape[2 + i], out.shape[2 + i], self.stride[i], self.padding[i]) for k in range(self.kernel[i])]
            for i in range(2)
        )
        whole = slice(None)
        for out_y, in_y in rows:
            for out_x, in_x in columns:
                yield (whole, whole, out_y, out_x), (whole, whole, in_y, in_x)


def _tap(offset: int, size: int, outputs: int, stride: int, padding: int) -> tuple[slice, slice]:
    shift = offset - padding
    first = max(0, -(shift // stride))
    last = max(first, min(outputs, (size - 1 - shift) // stride + 1))  # exclusive
    start = first * stride + shift
    return slice(first, last), slice(start, start + (last - first) * stride, stride)


@dataclass(frozen=True)
class Flatten(Step):
    """Images as vectors."""

    def run(self, run: Run) -> None:
        x, out = run.values[self.sources[0]], run.new(self.out)
        images = out.view(run.n, *run.slots[self.sources[0]].shape)
        read_blocks(x, run.halo, images) if x.dim() == 5 else images.copy_(x)

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        (target,) = targets
        out = run.take(target.slot)
        images = grad.view(run.n, *run.slots[target.slot].shape)
        write_blocks(images, out, run.halo) if out.dim() == 5 else out.copy_(images)
        run.contribute(target, out)


@dataclass(frozen=True)
class ToBlocks(Step):
    def run(self, run: Run) -> None:
        write_blocks(run.values[self.sources[0]], run.new(self.out), run.halo)

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        out = run.take(targets[0].slot)
        read_blocks(grad, run.halo, out)
        run.contribute(targets[0], out)


@dataclass(frozen=True)
class FromBlocks(Step):
    def run(self, run: Run) -> None:
        read_blocks(run.values[self.sources[0]], run.halo, run.new(self.out))

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        out = run.take(targets[0].slot)
        write_blocks(grad, out, run.halo)
        run.contribute(targets[0], out)


@dataclass(frozen=True)
class Recorded(Step):
    """What torch computes on images, its gradient by autograd."""

    @property
    def saves(self) -> tuple[int, ...]:
        return self.sources

    @abstractmethod
    def compute(self, run: Run, *values: Tensor) -> Tensor: ...

    def run(self, run: Run) -> None:
        graphs = run.graphs
        wanted = graphs is not None
        with torch.set_grad_enabled(wanted):
            inputs = [run.values[s].detach().requires_grad_(wanted) for s in self.sources]
            y = self.compute(run, *inputs)
        if graphs is not None:
            graphs[self.out] = inputs, y
        run.new(self.out).copy_(y.detach())

    def backward(self, run: Run, grad: Tensor, targets: Sequence[Target]) -> None:
        assert run.graphs is not None
        inputs, y = run.graphs.pop(self.out)
        grads = torch.autograd.grad(y, inputs, grad, allow_unused=True) if y.requires_grad else [None] * len(inputs)
        for target, g in zip(reversed(targets), reversed(grads), strict=True):
            out = run.take(target.slot)
            run.contribute(target, out.zero_() if g is None else out.copy_(g))


@dataclass(frozen=True)
class Part(Recorded):
    """A piece of the model as it is, which sees its sources and its result by these views."""

    weights: int = 0
    in_place: bool = False  # it writes into what it reads
    views: tuple[str, ...] = ()
    view: str = PLAIN

    def compute(self, run: Run, *values: Tensor) -> Tensor:
        inputs = [seen(x, view) for x, view in zip(values, self.views, strict=True)]
        y = run.weights[self.weights](*(x.clone() for x in inputs)) if self.in_place else run.weights[self.weights](*inputs)
        expected = (run.n, *shape_in(self.view, run.slots[self.out].shape))
        if y.shape != expected:
            raise RuntimeError(f"a dense part gave {tuple(y.shape)}, expected {expected}")
        return unseen(y, self.view, run.slots[self.out].shape)
