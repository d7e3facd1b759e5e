"""What makes steps of a model's graph: values, what each node of the graph sees of them, and dense parts."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .choice import Layer
from .steps import Part, Step
from .trace import Graph, changed_by
from .views import PLAIN, TOKENS
from .weights import PartSource, Source


class DensePart(NamedTuple):
    """A node of the model's graph that runs as it is."""

    name: str
    reason: str


@dataclass
class Lowered:
    """Steps over values, the first value being the network's input, and where their weights come from."""

    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of each value, without the batch
    sources: list[Source | PartSource] = field(default_factory=list)
    output: int = 0
    dense_parts: list[DensePart] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)  # how each layer runs


class Unsupported(Exception):
    """Why there is no step for a node."""


class Seen(NamedTuple):
    """A node of the graph: the value that it stands for, and how it sees it (:mod:`s2ap_ext.engine.views`)."""

    value: int
    view: str = PLAIN


class Builder(ABC):
    """Makes the steps, node by node. ``self.at`` tells which value a node stands for.

    Nodes that are no float32 tensor with the batch first (sizes, constants, tuples) have no value; dense parts that need them compute them.
    """

    def __init__(self, graph: Graph, choose: Callable[[Layer], str], batch: int) -> None:
        self.model, self.found, self.choose, self.batch = graph.root, graph.found, choose, batch
        self.at: dict[fx.Node, Seen] = {}
        self.varies: set[fx.Node] = set()  # nodes that depend on the input
        self.put_off: dict[fx.Node, str] = {}  # views without a step, with the reason: parts of the dense parts that read them
        self.lowered = Lowered()

    def lower(self, node: fx.Node) -> None:
        if node.op == "output":
            result: Any = node.args[0]
            if result in self.put_off:
                self.at[result] = self.part(result, self.put_off[result], result=True)
            if result not in self.at:
                raise ValueError("model: expected one float32 tensor [N, ...] as its output, that depends on its input")
            if self.at[result].view != PLAIN:
                self.at[result] = self.part(result, "results have their channels last", result=True)
            self.lowered.output = self.at[result].value
            if self.lowered.output == 0:
                raise ValueError("model: gives its input back")
            return
        if node.op == "placeholder":
            if not self.varies:
                self.varies.add(node)
                self.at[node] = Seen(self.value(self.found_shape(node)))
            return
        if not any(n in self.varies for n in node.all_input_nodes):
            return
        self.varies.add(node)
        if not self.is_value(node):
            return
        if self.is_constant(node):
            return
        if _is_view(node) and (first := _first(node)) in self.put_off:
            self.put_off[node] = self.put_off[first]
            return
        try:
            made = self.step_for(node)
            self.at[node] = made if isinstance(made, Seen) else Seen(made)
        except Unsupported as why:
            if _is_view(node):
                self.put_off[node] = str(why)
                return
            self.at[node] = self.part(node, str(why))
        if (changed := changed_by(self.model, node)) is not None and changed in self.at:
            # Written in place: whoever reads the changed tensor from here on, under whatever name, reads the result.
            before, now = self.at[changed].value, self.at[node].value
            self.at.update({other: seen._replace(value=now) for other, seen in self.at.items() if seen.value == before})

    def found_shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value's node, without the batch."""
        found = self.found[node]
        assert found is not None
        return found[0]

    def is_value(self, node: fx.Node) -> bool:
        found = self.found[node]
        return found is not None and found[1] == torch.float32

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node repeats a tensor of the model for each image. Whoever reads it finds the tensor (:meth:`constant_of`)."""
        return node.op == "call_method" and node.target == "expand" and _first(node).op == "get_attr"

    def constant_of(self, node: Any) -> str | None:
        """The name of the tensor that a node gives or repeats for each image."""
        if isinstance(node, fx.Node) and node in self.varies and self.is_constant(node):
            node = _first(node)
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def value(self, shape: tuple[int, ...]) -> int:
        """A new value of this shape."""
        self.lowered.shapes.append(shape)
        return len(self.lowered.shapes) - 1

    def emit(self, shape: tuple[int, ...], make: Callable[..., Step], *sources: int, **settings: Any) -> int:
        """A step that computes a new value of this shape."""
        out = self.value(shape)
        self.lowered.steps.append(make(sources, out, **settings))
        return out

    def weights(self, source: Source | PartSource) -> int:
        self.lowered.sources.append(source)
        return len(self.lowered.sources) - 1

    def seen(self, node: Any) -> Seen:
        if isinstance(node, fx.Node) and node in self.put_off:
            self.at[node] = self.part(node, self.put_off.pop(node))
        if not isinstance(node, fx.Node) or node not in self.at:
            raise Unsupported("reads what is no float32 tensor with the batch first")
        return self.at[node]

    def read(self, node: Any) -> int:
        """The value of a node that sees it with channels first."""
        seen = self.seen(node)
        if seen.view != PLAIN:
            raise Unsupported("expected channels as the second axis")
        return seen.value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.lowered.shapes[self.read(node)]

    def elementwise(self, node: fx.Node, make: Callable[..., Step], **settings: Any) -> Seen:
        """A step on every number of what the node gives."""
        seen = self.seen(node)
        return seen._replace(value=self.emit(self.lowered.shapes[seen.value], make, seen.value, **settings))

    def image(self, node: fx.Node) -> tuple[int, int, int]:
        shape = self.shape(node)
        if len(shape) != 3:
            raise Unsupported(f"expected images (N, C, H, W), got {len(shape) + 1} dimensions")
        return shape

    @abstractmethod
    def step_for(self, node: fx.Node) -> int | Seen:
        """The value that a node stands for, which the steps that are made for it compute.

        Raises:
            Unsupported: there is none.
        """

    def check_weight(self, weight: Tensor) -> None:
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise Unsupported(f"expected a float32 weight on the CPU, got {weight.dtype} on {weight.device}")

    def chosen(self, name: str, weight: Tensor, input: tuple[int, ...], output: tuple[int, ...], **geometry: Any) -> str:
        """How the layer of this name is to run."""
        density = weight.count_nonzero().item() / max(1, weight.numel())
        layer = Layer(name, tuple(weight.shape), density, input, output, self.batch, **geometry)
        kind = self.choose(layer)
        if kind not in ("sparse", "dense"):
            raise ValueError(f"choose: expected 'sparse' or 'dense' for layer {layer.name}, got {kind!r}")
        self.lowered.layers[layer.name] = kind
        return kind

    # ---- Dense parts

    def part(self, node: fx.Node, reason: str, *, result: bool = False) -> Seen:
        """``result``: it is the network's result, to be seen with channels first; what it gives may be there already."""
        graph, read = fx.Graph(), list[Seen]()
        copies: dict[fx.Node | Seen, fx.Node] = {}

        def copied(n: fx.Node) -> fx.Node:
            if n not in copies:
                if n in self.at:
                    if self.at[n] not in copies:
                        read.append(self.at[n])
                        copies[self.at[n]] = graph.placeholder(f"x{len(read)}")
                    return copies[self.at[n]]
                copies[n] = graph.node_copy(n, copied)
            return copies[n]

        # Placeholders come first in a graph, so they are made before anything that needs them is copied.
        for n in [node] if node in self.at else _needed(node, self.at):
            copied(n)
        in_place = node not in self.at and changed_by(self.model, node) is not None
        graph.output(copied(node))
        named = _first(node) if node.target is operator.getitem else node
        self.lowered.dense_parts.append(DensePart(str(named.target) if named.op == "call_module" else node.name, reason))
        shape, view = self.found_shape(node), PLAIN
        if len(shape) == 2 and not result:
            shape, view = (shape[1], 1, shape[0]), TOKENS
        settings: dict[str, Any] = {"in_place": in_place, "views": tuple(seen.view for seen in read), "view": view}
        sources = (seen.value for seen in read)
        return Seen(self.emit(shape, Part, *sources, weights=self.weights(PartSource(graph)), **settings), view)


def _needed(node: fx.Node, known: Container[fx.Node]) -> list[fx.Node]:
    """The nodes among ``known`` that ``node`` depends on, without going beyond them."""
    found, left = [], list(node.all_input_nodes)
    while left:
        n = left.pop(0)
        if n in known:
            found.append(n)
        else:
            left += n.all_input_nodes
    return found


VIEWS = {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "unbind", "chunk", "split", "squeeze", "unsqueeze", "getitem"}


def _first(node: fx.Node) -> fx.Node:
    """The node that an operation reads first."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _is_view(node: fx.Node) -> bool:
    """Whether the operation computes nothing."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in VIEWS and node.args != () and isinstance(node.args[0], fx.Node)
