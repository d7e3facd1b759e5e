"""Networks that compute with their kept weights only."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from .. import nn as pruned_nn
from ..nn.mask_state import Snapshot
from . import storage
from .arena import Arenas
from .builder import DensePart, Lowered
from .choice import Layer, cheapest, in_blocks, lanes
from .lowering import lower
from .program import Program, describe, fuse, joined, lay_out
from .run import Run
from .steps import Step
from .trace import Graph, root_of, trace
from .weights import PartSource, Source, evaluating

CHUNK = 32  # images that run through the network together: their activations stay in the last-level cache


def compile_sparse(model: nn.Module, example: Tensor, *, choose: Callable[[Layer], str] | None = None, chunk: int = CHUNK) -> SparseNetwork:
    """A network for the CPU that computes what ``model`` computes in evaluation mode, with its kept weights only.

    BatchNorm is folded into the convolutions; ReLUs and residual sums are part of them. Operations that the engine has no step for run as
    they are in the model; ``dense_parts`` of the result names them. The model itself is not changed, and later changes of its
    weights are taken with :meth:`SparseNetwork.refresh`. Its modules and its code have to stay as they are.

    Args:
        model: with pruned layers or with zeros in its weights; float32, on the CPU. Images must not depend on each other.
        example: images [N, C, H, W], float32, N >= 1. The network is for images of this size; and it is compared with the model on them.
        choose: for each convolution and linear layer, ``"sparse"`` or ``"dense"``. It is asked twice, for batches that fill blocks and
            for fewer images (``layer.batch`` is 1), and may give different answers. By default the cost model of
            :mod:`s2ap_ext.nn.cost` chooses.
        chunk: so many images run through the network together.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``example`` is no such images; ``chunk`` below 1; parameters that are not float32 on the CPU; a model that torch.fx
            cannot trace (the message names the layer and the line), that has no single tensor as its output, or whose BatchNorm uses the
            batch's own statistics in evaluation mode; an answer of ``choose`` that is neither.
        RuntimeError: the network does not agree with the model on ``example``.

    Equivalent to::

        copy.deepcopy(model).eval()
    """
    return compile_model(model, example, choose, chunk)


def compile_model(
    model: nn.Module, example: Tensor, choose: Callable[[Layer], str] | None = None, chunk: int = CHUNK, *, weak: bool = False
) -> SparseNetwork:
    """:func:`compile_sparse`; a ``weak`` network does not keep its model alive."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected an integer >= 1, got {chunk!r}")
    if example.dim() != 4 or example.dtype != torch.float32 or example.device.type != "cpu" or not len(example):
        raise ValueError(f"example: expected float32 images [N, C, H, W] on the CPU, got {_described(example)}")
    for name, p in model.named_parameters():
        if p.device.type != "cpu" or p.dtype != torch.float32:
            raise ValueError(f"model: expected float32 parameters on the CPU, got {_described(p)} in {name}")
    pruned_nn.refresh(model)
    with evaluating(model):
        graph = trace(model, example.detach())
        large, small = (_lowered(graph, choose, batch) for batch in (chunk, 1))
    steps, sources = fuse(large)
    small_batch_steps = steps
    if small.layers != large.layers:
        small_batch_steps, sources = joined(sources, *fuse(small))
    network = SparseNetwork(
        steps,
        small_batch_steps,
        large.shapes,
        large.output,
        sources,
        chunk=chunk,
        layers=large.layers,
        small_batch_layers=small.layers,
        dense_parts=large.dense_parts,
    )
    network._owner, network._constants = weakref.ref(model) if weak else lambda: model, graph.constants
    network.refresh()
    with evaluating(model):
        expected, got = model(example), network(example)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    if not torch.allclose(got, expected, rtol=0, atol=1e-3 * scale, equal_nan=True):
        error = (got - expected).abs().max().item()
        raise RuntimeError(
            f"model: what torch.fx traced is not what it computes (off by {error:g}, outputs go up to {scale:g}); "
            "does its code look at the values of tensors, or at their memory?"
        )
    return network


def _lowered(graph: Graph, choose: Callable[[Layer], str] | None, batch: int) -> Lowered:
    if choose is None:
        layers: list[Layer] = []

        def noted(layer: Layer) -> str:
            layers.append(layer)
            return "dense"

        lower(graph, noted, batch)
        kinds = cheapest(layers)
        return lower(graph, lambda layer: kinds[layer.name], batch)
    return lower(graph, choose, batch)


class SparseNetwork(nn.Module):
    """What :func:`compile_sparse` and :meth:`load` give: float32 images [N, C, H, W] on the CPU -> what the model gives for them.

    Differentiable with respect to the images, once. Several threads may call it at the same time; each has activation buffers of its own,
    that stay from call to call. It has no parameters.

    Attributes:
        dense_parts: what runs as it is in the model, by name, with the reason.
        layers: ``"sparse"`` or ``"dense"``, for each convolution and linear layer that the engine runs.
        small_batch_layers: the same, for images that are too few to fill a block.
        chunk: so many images run through the network together.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        small_batch_steps: Sequence[Step],
        shapes: Sequence[tuple[int, ...]],
        output: int,
        sources: Sequence[Source | PartSource],
        *,
        chunk: int,
        layers: dict[str, str],
        small_batch_layers: dict[str, str],
        dense_parts: Sequence[DensePart] = (),
    ) -> None:
        super().__init__()
        self._steps, self._small_batch_steps, self._shapes, self._output, self._sources = steps, small_batch_steps, shapes, output, sources
        self._blocks, self._images = lay_out(steps, shapes, output, blocks=True), lay_out(small_batch_steps, shapes, output, blocks=False)
        self._lanes = lanes()
        self.chunk, self.layers, self.small_batch_layers, self.dense_parts = chunk, layers, small_batch_layers, list(dense_parts)
        self._weights: tuple[Any, ...] = ()
        self._arenas = Arenas()
        self._owner: Callable[[], nn.Module | None] = lambda: None
        self._constants: dict[str, Tensor] = {}
        self._seen: list[Snapshot | tuple[Any, ...] | None] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for images ``x``.

        Raises:
            ValueError: ``x`` is not float32 images of the example's size on the CPU.
        """
        shape = self._blocks.slots[0].shape
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[1:] != shape or x.dim() != 4:
            size = ", ".join(str(n) for n in shape)
            raise ValueError(f"x: expected float32 images [N, {size}] on the CPU, got {_described(x)}")
        if torch.is_grad_enabled() and x.requires_grad:
            logits: Tensor = _WithGradient.apply(x, self)
            return logits
        return self._run(x, None)

    def refresh(self) -> None:
        """Takes the model's present masks, weights and BatchNorm statistics. Calls that run in other threads end with the old ones.

        Raises:
            RuntimeError: the model is gone, or the network was loaded from a file.
            ValueError: weights that are not finite, naming the layer. The network stays as it was.
        """
        model = self._model()
        pruned_nn.refresh(model)
        root = root_of(model, self._constants)
        with evaluating(root):
            weights = tuple(source.take(root) for source in self._sources)
        self._weights, self._seen = weights, _versions(model)

    def is_current(self) -> bool:
        """Whether the model still is as the last :meth:`refresh` found it (as far as autograd's version counters show)."""
        now = _versions(self._model())
        return len(now) == len(self._seen) and all(_same(a, b) for a, b in zip(self._seen, now, strict=True))

    def save(self, path: str | Path) -> None:
        """Writes the network to one safetensors file, without pickle, whole or not at all.

        Raises:
            ValueError: it has dense parts, which only the model's own code can compute.
        """
        if self.dense_parts:
            names = "; ".join(f"{part.name} ({part.reason})" for part in self.dense_parts)
            raise ValueError(f"network: cannot be saved, for only the model's own code can compute its dense parts: {names}")
        sources = [source for source in self._sources if isinstance(source, Source)]  # all of them
        programs = (self._steps, self._small_batch_steps, self._shapes, self._output, sources)
        storage.save(storage.Stored(*programs, self.chunk, self.layers, self.small_batch_layers, self._weights), path)

    @classmethod
    def load(cls, path: str | Path) -> SparseNetwork:
        """Reads what :meth:`save` wrote, on any machine.

        Raises:
            ValueError: no such file, or not a file of this kind.
        """
        stored = storage.load(path)
        programs = (stored.steps, stored.small_batch_steps, stored.shapes, stored.output, stored.sources)
        network = cls(*programs, chunk=stored.chunk, layers=stored.layers, small_batch_layers=stored.small_batch_layers)
        network._weights = tuple(stored.weights)
        return network

    def extra_repr(self) -> str:
        kinds = [Counter(layers.values()) for layers in (self.layers, self.small_batch_layers)]
        large, small = (f"{kind['sparse']} sparse, {kind['dense']} dense" for kind in kinds)
        lines = [f"layers: {large}; for small batches: {small}; lanes={self._lanes}, halo={self._blocks.halo}, chunk={self.chunk}"]
        lines += [f"dense part {part.name}: {part.reason}" for part in self.dense_parts]
        return "\n".join([*lines, *describe(self._blocks, self._sources)])

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a SparseNetwork is not pickled or copied; use save(path) and SparseNetwork.load(path)")

    def _model(self) -> nn.Module:
        model = self._owner()
        if model is None:
            raise RuntimeError("network: there is no model to look at; it was loaded from a file, or the model is gone")
        return model

    def _pieces(self, n: int) -> Iterator[slice]:
        """Pieces of at most ``chunk`` images; those at the end that fill too little of a block are one of their own."""
        rest = 0 if in_blocks(n % self._lanes) else n % self._lanes
        for first in range(0, n - rest, self.chunk):
            yield slice(first, min(n - rest, first + self.chunk))
        if rest:
            yield slice(n - rest, n)

    def _start(self, n: int) -> tuple[Program, Run]:
        program = self._blocks if in_blocks(n) else self._images
        size = ("blocks", -(-n // self._lanes)) if in_blocks(n) else ("images", n)
        return program, program.start(self._weights, self._arenas.of(size), n, self._lanes)

    def _run(self, x: Tensor, runs: list[tuple[slice, Program, Run]] | None) -> Tensor:
        """The outputs; with ``runs`` what the gradient needs is put there."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = x.detach()
            out = torch.empty(len(x), *self._blocks.slots[self._blocks.output].shape)
            for chunk in self._pieces(len(x)):
                program, run = self._start(chunk.stop - chunk.start)
                if runs is not None:
                    run.graphs = {}
                    runs.append((chunk, program, run))
                out[chunk].copy_(program.run(run, x[chunk].contiguous()))
                if runs is None or program.output not in program.kept:
                    run.drop(program.output)
        return out


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: SparseNetwork) -> Tensor:
        ctx.runs, ctx.shape = [], x.shape
        return network._run(x, ctx.runs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.runs is None:
            raise RuntimeError("the network's activations are gone after the first backward; call the network again")
        dx = torch.empty(ctx.shape)
        with torch.autocast("cpu", enabled=False):
            for chunk, program, run in ctx.runs:
                result = program.backward(run, grad[chunk])
                dx[chunk].copy_(result)
                run.arena.drop(result)
        ctx.runs = None
        return dx, None


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)} on {t.device}"


def _versions(model: nn.Module) -> list[Snapshot | tuple[Any, ...] | None]:
    """What tells whether a model has changed: its tensors' versions, and what the masks of its pruned layers were made from."""
    tensors = [t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    states = [layer.mask_state for layer in pruned_nn.pruned_layers(model).values()]
    return [*(None if t.is_inference() else Snapshot(t) for t in tensors), *((state.selection, state.perturbation) for state in states)]


def _same(before: Snapshot | tuple[Any, ...] | None, now: Snapshot | tuple[Any, ...] | None) -> bool:
    if isinstance(before, Snapshot) and isinstance(now, Snapshot):
        return before.version == now.version and before.alias.data_ptr() == now.alias.data_ptr()
    return isinstance(before, tuple) and isinstance(now, tuple) and all(a is b for a, b in zip(before, now, strict=True))
