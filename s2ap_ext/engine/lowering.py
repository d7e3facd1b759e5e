"""A model's graph as steps, one for each operation; what there is no step for becomes a dense part, with the reason."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import S2APConv2d, S2APLinear
from .choice import Layer
from .steps import Add, Affine, DenseConv, Flatten, Linear, Part, Pool, Relu, SparseConv, Step
from .trace import BATCH, Graph, changed_by, computes_as
from .weights import PartSource, Source, tensor_of, weight_of


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


def lower(graph: Graph, choose: Callable[[Layer], str], batch: int) -> Lowered:
    """Steps for a model's graph, for ``batch`` images.

    Raises:
        ValueError: it does not give one float32 tensor with the batch first; it normalises by the batch; ``choose`` gave no answer.
    """
    lowering = _Lowering(graph, choose, batch)
    for node in graph.nodes:
        lowering.lower(node)
    return lowering.lowered


class _Lowering:
    """Makes the steps, node by node. ``self.at`` tells which value a node stands for.

    Nodes that are no float32 tensor with the batch first (sizes, constants, tuples) have no value; dense parts that need them compute them.
    """

    def __init__(self, graph: Graph, choose: Callable[[Layer], str], batch: int) -> None:
        self.model, self.found, self.choose, self.batch = graph.root, graph.found, choose, batch
        self.at: dict[fx.Node, int] = {}
        self.varies: set[fx.Node] = set()  # nodes that depend on the input
        self.lowered = Lowered()

    def lower(self, node: fx.Node) -> None:
        if node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node) or result not in self.at:
                raise ValueError("model: expected one float32 tensor [N, ...] as its output, that depends on its input")
            self.lowered.output = self.at[result]
            if self.lowered.output == 0:
                raise ValueError("model: gives its input back")
            return
        if node.op == "placeholder":
            if not self.varies:
                self.varies.add(node)
                self.at[node] = self.value(node)
            return
        if not any(n in self.varies for n in node.all_input_nodes):
            return
        self.varies.add(node)
        if not self.is_value(node):
            return
        try:
            self.at[node] = self.step_for(node)
        except Unsupported as why:
            self.at[node] = self.part(node, str(why))
        if (changed := changed_by(self.model, node)) is not None and changed in self.at:
            # Written in place: whoever reads the changed tensor from here on, under whatever name, reads the result.
            before = self.at[changed]
            self.at.update({other: self.at[node] for other, value in self.at.items() if value == before})

    def is_value(self, node: fx.Node) -> bool:
        found = self.found[node]
        return found is not None and found[1] == torch.float32 and found[0][:1] == (BATCH,)

    def value(self, node: fx.Node) -> int:
        """A new value, of the node's shape."""
        self.lowered.shapes.append(self.given(node)[1:])
        return len(self.lowered.shapes) - 1

    def given(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of what a node gives that is a value, with the batch."""
        found = self.found[node]
        assert found is not None
        return found[0]

    def emit(self, node: fx.Node, make: Callable[..., Step], *read: fx.Node, **settings: Any) -> int:
        sources = tuple(self.read(n) for n in read)
        out = self.value(node)
        self.lowered.steps.append(make(sources, out, **settings))
        return out

    def weights(self, source: Source | PartSource) -> int:
        self.lowered.sources.append(source)
        return len(self.lowered.sources) - 1

    def read(self, node: Any) -> int:
        if not isinstance(node, fx.Node) or node not in self.at:
            raise Unsupported("reads what is no float32 tensor with the batch first")
        return self.at[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.lowered.shapes[self.read(node)]

    def image(self, node: fx.Node) -> tuple[int, int, int]:
        shape = self.shape(node)
        if len(shape) != 3:
            raise Unsupported(f"expected images (N, C, H, W), got {len(shape) + 1} dimensions")
        return shape

    def step_for(self, node: fx.Node) -> int:
        module = None
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if module._forward_hooks or module._forward_pre_hooks:
                raise Unsupported("has forward hooks")
            handler = next((handler for cls, handler in _MODULES.items() if computes_as(module, cls)), None)
        else:
            handler = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
        if handler is None:
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            raise Unsupported(f"no step for {what}")
        first = (self, node) if module is None else (self, node, module)
        try:
            bound = inspect.signature(handler).bind(*first, *node.args, **node.kwargs)
        except TypeError:
            raise Unsupported("called with arguments that there is no step for") from None
        return handler(*bound.args, **bound.kwargs)

    # ---- Dense parts

    def part(self, node: fx.Node, reason: str) -> int:
        graph, read = fx.Graph(), list[int]()
        copies: dict[fx.Node | int, fx.Node] = {}  # of nodes, and placeholders by the value that they stand for

        def copied(n: fx.Node) -> fx.Node:
            if n not in copies:
                if n in self.at:
                    if self.at[n] not in read:
                        read.append(self.at[n])
                        copies[self.at[n]] = graph.placeholder(f"x{len(read)}")
                    return copies[self.at[n]]
                copies[n] = graph.node_copy(n, copied)
            return copies[n]

        # Placeholders come first in a graph, so they are made before anything that needs them is copied.
        for n in _needed(node, self.at):
            copied(n)
        graph.output(graph.node_copy(node, copied))
        self.lowered.dense_parts.append(DensePart(str(node.target) if node.op == "call_module" else node.name, reason))
        out = self.value(node)
        in_place = changed_by(self.model, node) is not None
        self.lowered.steps.append(Part(tuple(read), out, weights=self.weights(PartSource(graph)), in_place=in_place))
        return out

    # ---- Layers

    def conv(self, node: fx.Node, module: nn.Conv2d, input: fx.Node) -> int:
        shape, weight = self.image(input), weight_of(module)
        if module.padding_mode != "zeros":
            raise Unsupported(f"padding_mode {module.padding_mode!r}")
        ends = module._reversed_padding_repeated_twice  # left, right, top, bottom
        if ends[0] != ends[1] or ends[2] != ends[3]:
            raise Unsupported("pads one side more than the other")
        self.check_weight(weight)
        if max(module.stride) > 2:  # blocks have no kernels for it
            kind = self.lowered.layers[str(node.target)] = "dense"
        else:
            kind = self.chosen(node, weight, shape, stride=module.stride, groups=module.groups)
        convolution = (module.kernel_size, module.stride, (ends[2], ends[0]), module.dilation, module.groups)
        geometry = dict(zip(("kernel", "stride", "padding", "dilation", "groups"), convolution, strict=True))
        source = Source(kind, len(weight), str(node.target), convolution=convolution)
        step = SparseConv if kind == "sparse" else DenseConv
        return self.emit(node, step, input, weights=self.weights(source), **geometry)

    def linear(self, node: fx.Node, module: nn.Linear, input: fx.Node) -> int:
        shape, weight = self.shape(input), weight_of(module)
        if len(shape) != 1:
            raise Unsupported(f"expected vectors (N, C), got {len(shape) + 1} dimensions")
        self.check_weight(weight)
        kind = self.chosen(node, weight, shape)
        return self.emit(node, Linear, input, weights=self.weights(Source(kind, len(weight), str(node.target))), sparse=kind == "sparse")

    def check_weight(self, weight: Tensor) -> None:
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise Unsupported(f"expected a float32 weight on the CPU, got {weight.dtype} on {weight.device}")

    def chosen(self, node: fx.Node, weight: Tensor, shape: tuple[int, ...], **geometry: Any) -> str:
        density = weight.count_nonzero().item() / max(1, weight.numel())
        layer = Layer(str(node.target), tuple(weight.shape), density, shape, self.given(node)[1:], self.batch, **geometry)
        kind = self.choose(layer)
        if kind not in ("sparse", "dense"):
            raise ValueError(f"choose: expected 'sparse' or 'dense' for layer {layer.name}, got {kind!r}")
        self.lowered.layers[layer.name] = kind
        return kind

    def norm(self, node: fx.Node, module: nn.BatchNorm2d, input: fx.Node) -> int:
        if module.running_mean is None:
            raise ValueError(
                f"model: layer {node.target} normalises by the batch in evaluation mode too; images would depend on each other"
            )
        return self.scaled(node, input, "norm", str(node.target))

    def norm_function(
        self,
        node: fx.Node,
        input: fx.Node,
        mean: Any,
        var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> int:
        """``F.batch_norm`` with the tensors of one BatchNorm, as subclasses of it call it."""
        layer = str(mean.target).rpartition(".")[0] if isinstance(mean, fx.Node) and mean.op == "get_attr" else None
        module = self.model.get_submodule(layer) if layer is not None else None
        names = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        own = all((n.target if isinstance(n, fx.Node) else n) == (layer and f"{layer}.{name}") for name, n in names.items())
        if training or not own or layer is None or not isinstance(module, nn.modules.batchnorm._BatchNorm) or eps != module.eps:
            raise Unsupported("normalises with tensors that are not those of one BatchNorm")
        return self.scaled(node, input, "norm", layer)

    def scaled(self, node: fx.Node, input: fx.Node, change: str, operand: str | float) -> int:
        shape = self.shape(input)
        if len(shape) not in (1, 3):
            raise Unsupported(f"expected images or vectors, got {len(shape) + 1} dimensions")
        source = Source("scale", shape[0], changes=((change, operand),))
        return self.emit(node, Affine, input, weights=self.weights(source))

    # ---- Arithmetic

    def arithmetic(self, node: fx.Node, change: str, a: Any, b: Any) -> int:
        """``a + b`` of two activations, or an activation and a constant that is one number for each channel."""
        both = [isinstance(v, fx.Node) and v in self.varies for v in (a, b)]
        if all(both):
            if change != "add" or self.shape(a) != self.shape(b):
                raise Unsupported("only sums of activations of one shape have a step")
            return self.emit(node, Add, a, b)
        if both[1]:
            if change not in ("add", "mul"):
                raise Unsupported("an activation subtracted, or that something is divided by")
            a, b = b, a
        if isinstance(b, fx.Node):
            channels = self.shape(a)[0] if self.shape(a) else 0
            per_channel = {(1, channels, *[1] * (len(self.shape(a)) - 1)), (channels, *[1] * (len(self.shape(a)) - 1)), (), (1,)}
            if b.op != "get_attr" or tuple(tensor_of(self.model, str(b.target)).shape) not in per_channel:
                raise Unsupported("combined with what is not one number for each channel")
            return self.scaled(node, a, change, str(b.target))
        if isinstance(b, bool) or not isinstance(b, (int, float)):
            raise Unsupported(f"combined with {type(b).__name__}")
        return self.scaled(node, a, change, float(b))

    def relu(self, node: fx.Node, input: fx.Node, inplace: bool = False) -> int:
        return self.emit(node, Relu, input)

    def same(self, node: fx.Node, input: fx.Node, *args: Any, **kwargs: Any) -> int:
        return self.read(input)

    # ---- Pooling and shapes

    def pool(
        self,
        node: fx.Node,
        kind: str,
        input: fx.Node,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> int:
        shape = self.image(input)
        stride = kernel_size if stride is None or stride == [] else stride
        kernel, stride, padding, dilation = (_pair(v) for v in (kernel_size, stride, padding, dilation))
        out = self.given(node)[2:]
        floor = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(shape[1:], padding, dilation, kernel, stride, strict=True)]
        if kind == "avg" and list(out) != floor:
            raise Unsupported("averages windows that are cut off")
        return self.emit(node, Pool, input, kind=kind, kernel=kernel, stride=stride, padding=padding, dilation=dilation)

    def max_pool(
        self,
        node: fx.Node,
        input: fx.Node,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> int:
        return self.pool(node, "max", input, kernel_size, stride, padding, dilation, ceil_mode)

    def avg_pool(
        self,
        node: fx.Node,
        input: fx.Node,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> int:
        if divisor_override is not None or (not count_include_pad and any(_pair(padding))):
            raise Unsupported("divides by something other than the window's size")
        return self.pool(node, "avg", input, kernel_size, stride, padding, 1, ceil_mode)

    def adaptive_pool(self, node: fx.Node, kind: str, input: fx.Node) -> int:
        sizes = self.image(input)[1:], self.given(node)[2:]
        if any(n % m for n, m in zip(*sizes, strict=True)):
            raise Unsupported("windows of unequal size")
        return self.pool(node, kind, input, [n // m for n, m in zip(*sizes, strict=True)])

    def mean(self, node: fx.Node, input: fx.Node, dim: Any, keepdim: bool = False) -> int:
        shape = self.image(input)
        if isinstance(dim, int) or sorted(d % 4 for d in dim) != [2, 3]:
            raise Unsupported("a mean over other axes than 2 and 3")
        pooled = self.value(node)
        self.lowered.shapes[pooled] = (shape[0], 1, 1)
        self.lowered.steps.append(Pool((self.read(input),), pooled, "avg", shape[1:], shape[1:]))
        if keepdim:
            return pooled
        out = self.value(node)
        self.lowered.steps.append(Flatten((pooled,), out))
        return out

    def flatten(self, node: fx.Node, input: fx.Node, *args: Any, **kwargs: Any) -> int:
        """``flatten``, ``view`` and ``reshape``, where they give (N, all the rest)."""
        shape, out = self.shape(input), self.given(node)[1:]
        if out == shape:
            return self.read(input)
        if len(out) != 1 or not shape:
            raise Unsupported("only shapes (N, -1) have a step")
        if len(shape) != 3:
            raise Unsupported(f"expected images (N, C, H, W), got {len(shape) + 1} dimensions")
        return self.emit(node, Flatten, input)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def _needed(node: fx.Node, known: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes among ``known`` that ``node`` depends on, without going beyond them."""
    found, left = [], list(node.all_input_nodes)
    while left:
        n = left.pop(0)
        if n in known:
            found.append(n)
        else:
            left += n.all_input_nodes
    return found


# The signatures here are those of what is traced; the arguments that follow lowering and node (and module) are the traced call's.
_L = _Lowering
_MODULES: dict[type[nn.Module], Callable[..., int]] = {
    S2APConv2d: _L.conv,
    S2APLinear: _L.linear,
    nn.Conv2d: _L.conv,
    nn.Linear: _L.linear,
    nn.BatchNorm2d: _L.norm,
    nn.BatchNorm1d: _L.norm,
    nn.ReLU: lambda low, node, module, input: low.relu(node, input),
    nn.MaxPool2d: lambda low, node, m, input: low.pool(node, "max", input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode),
    nn.AvgPool2d: lambda low, node, m, input: low.avg_pool(
        node, input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda low, node, module, input: low.adaptive_pool(node, "avg", input),
    nn.AdaptiveMaxPool2d: lambda low, node, module, input: low.adaptive_pool(node, "max", input),
    nn.Flatten: lambda low, node, module, input: low.flatten(node, input),
    nn.Identity: lambda low, node, module, input: low.same(node, input),
    nn.Dropout: lambda low, node, module, input: low.same(node, input),
    nn.Dropout2d: lambda low, node, module, input: low.same(node, input),
}


def _combined(change: str) -> Callable[..., int]:
    return lambda low, node, input, other: low.arithmetic(node, change, input, other)


def _dropped(low: _Lowering, node: fx.Node, input: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> int:
    if training:
        raise Unsupported("drops out in evaluation mode too")
    return low.same(node, input)


_FUNCTIONS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_), _L.relu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _combined("add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _combined("sub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _combined("mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _combined("div")),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _L.max_pool),
    F.avg_pool2d: _L.avg_pool,
    F.adaptive_avg_pool2d: lambda low, node, input, output_size: low.adaptive_pool(node, "avg", input),
    F.adaptive_max_pool2d: lambda low, node, input, output_size, return_indices=False: low.adaptive_pool(node, "max", input),
    F.batch_norm: _L.norm_function,
    torch.mean: _L.mean,
    **dict.fromkeys((torch.flatten, torch.reshape), _L.flatten),
    **dict.fromkeys((F.dropout, F.dropout2d), _dropped),
}
_METHODS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(("relu", "relu_"), lambda low, node, input: low.relu(node, input)),
    **{name + end: _combined(name) for name in ("add", "sub", "mul", "div") for end in ("", "_")},
    "mean": _L.mean,
    **dict.fromkeys(("flatten", "view", "reshape"), _L.flatten),
    "contiguous": lambda low, node, input, memory_format=None: low.same(node, input),
}
