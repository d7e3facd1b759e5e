"""A model's graph (torch.fx) as steps, one for each operation; what there is no step for becomes a dense part, with the reason."""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..nn import Pruned, S2APConv2d, S2APLinear
from .steps import Add, Affine, DenseConv, Flatten, Linear, Part, Pool, Relu, SparseConv, Step
from .weights import PartSource, Source, tensor_of, weight_of


class DensePart(NamedTuple):
    """A node of the model's graph that runs as it is."""

    name: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """What is known of a convolution or linear layer when it is chosen how to run it.

    Attributes:
        name: in the model.
        weight: its weight's shape.
        density: the fraction of its weights that are not 0.
        input, output: shapes of an image's activations, without the batch.
        stride, groups: of the convolution.
    """

    name: str
    weight: tuple[int, ...]
    density: float
    input: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass
class Traced:
    """Steps over values, the first value being the network's input, and where their weights come from."""

    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of each value, without the batch
    sources: list[Source | PartSource] = field(default_factory=list)
    output: int = 0
    constants: dict[str, Tensor] = field(default_factory=dict)  # tensors that the model's code made while it was traced
    dense_parts: list[DensePart] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)  # how each layer runs


class _Unsupported(Exception):
    """Why there is no step for a node."""


def trace(model: nn.Module, example: Tensor, choose: Callable[[Layer], str]) -> Traced:
    """Steps for ``model``, which is in evaluation mode.

    Raises:
        ValueError: torch.fx cannot trace the model; it does not give one float32 tensor of the batch's length for one input.
    """
    tracer, root = _Tracer(), root_of(model)
    signature = inspect.signature(root.forward).parameters.values()
    _input, *others = (p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    before = set(vars(root))
    try:
        graph = tracer.trace(root, {p.name: p.default for p in others if p.default is not p.empty})
    except Exception as error:  # whatever the model's own code raises when it is shown proxies
        raise ValueError(f"model: torch.fx cannot trace {tracer.failed or 'its forward'}{_line(error)}: {error}") from error
    values = _Values(fx.GraphModule(root, graph))
    values.run(example[:1].expand(_BATCH, *example.shape[1:]).contiguous())
    lowering = _Lowering(root, values.found, choose)
    lowering.traced.constants = {name: value for name, value in vars(root).items() if name not in before}
    for node in graph.nodes:
        lowering.lower(node)
    return lowering.traced


def root_of(model: nn.Module, constants: Mapping[str, Tensor] | None = None) -> nn.Module:
    """What is traced in place of ``model``: a shallow copy, for torch.fx sets attributes there; or something around a single layer."""
    root = nn.Sequential(model) if _Tracer().is_leaf_module(model, "") else copy.copy(model)
    root.__dict__.update(constants or {})
    return root


def _line(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename.replace("\\", "/")]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


_BATCH = 3  # images of the run that finds the shapes


def computes_as(module: nn.Module, cls: type) -> bool:
    """Whether ``module`` is a ``cls``, perhaps parametrized or of a subclass, with the very forward of ``cls``."""
    own = parametrize.type_before_parametrizations(module)
    inherits = issubclass(own, cls) and own.forward is cls.forward
    return inherits and getattr(own, "_conv_forward", None) is getattr(cls, "_conv_forward", None)


class _Tracer(fx.Tracer):
    """Goes into all modules but those of torch.nn and pruned layers."""

    failed = ""  # the innermost module whose forward raised

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = parametrize.type_before_parametrizations(module)
        if own.__module__.startswith("torch.nn"):
            return not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        return isinstance(module, Pruned) or any(computes_as(module, cls) for cls in _MODULES)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or f"layer {self.path_of_module(module)}"
            raise


class _Values(fx.Interpreter):
    """Runs the graph and remembers what each node gave: shape and dtype of a tensor, None of anything else."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[tuple[int, ...], torch.dtype] | None] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.found[node] = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None
        return value


class _Lowering:
    """Makes the steps, node by node. ``self.at`` tells which value a node stands for.

    Nodes that are no float32 tensor with the batch first (sizes, constants, tuples) have no value; dense parts that need them compute them.
    """

    def __init__(self, model: nn.Module, found: dict, choose: Callable[[Layer], str]) -> None:
        self.model, self.found, self.choose = model, found, choose
        self.at: dict[fx.Node, int] = {}
        self.varies: set[fx.Node] = set()  # nodes that depend on the input
        self.traced = Traced()

    def lower(self, node: fx.Node) -> None:
        if node.op == "output":
            result = node.args[0]
            if result not in self.at:
                raise ValueError("model: expected one float32 tensor [N, ...] as its output, that depends on its input")
            self.traced.output = self.at[result]
            if self.traced.output == 0:
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
        except _Unsupported as why:
            self.at[node] = self.part(node, str(why))
        if (changed := _changed_by(self.model, node)) is not None and changed in self.at:
            # Written in place: whoever reads the changed tensor from here on, under whatever name, reads the result.
            before = self.at[changed]
            self.at.update({other: self.at[node] for other, value in self.at.items() if value == before})

    def is_value(self, node: fx.Node) -> bool:
        found = self.found[node]
        return found is not None and found[1] == torch.float32 and found[0][:1] == (_BATCH,)

    def value(self, node: fx.Node) -> int:
        """A new value, of the node's shape."""
        self.traced.shapes.append(self.found[node][0][1:])
        return len(self.traced.shapes) - 1

    def emit(self, node: fx.Node, make: Callable[..., Step], *read: fx.Node, **settings) -> int:
        sources = tuple(self.read(n) for n in read)
        out = self.value(node)
        self.traced.steps.append(make(sources, out, **settings))
        return out

    def weights(self, source: Source | PartSource) -> int:
        self.traced.sources.append(source)
        return len(self.traced.sources) - 1

    def read(self, node: Any) -> int:
        if not isinstance(node, fx.Node) or node not in self.at:
            raise _Unsupported("reads what is no float32 tensor with the batch first")
        return self.at[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.traced.shapes[self.read(node)]

    def image(self, node: fx.Node) -> tuple[int, int, int]:
        shape = self.shape(node)
        if len(shape) != 3:
            raise _Unsupported(f"expected images (N, C, H, W), got {len(shape) + 1} dimensions")
        return shape

    def step_for(self, node: fx.Node) -> int:
        module = None
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            if module._forward_hooks or module._forward_pre_hooks:
                raise _Unsupported("has forward hooks")
            handler = next((handler for cls, handler in _MODULES.items() if computes_as(module, cls)), None)
        else:
            handler = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)
        if handler is None:
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            raise _Unsupported(f"no step for {what}")
        first = (self, node) if module is None else (self, node, module)
        try:
            bound = inspect.signature(handler).bind(*first, *node.args, **node.kwargs)
        except TypeError:
            raise _Unsupported("called with arguments that there is no step for") from None
        return handler(*bound.args, **bound.kwargs)

    # ---- Dense parts

    def part(self, node: fx.Node, reason: str) -> int:
        graph, copies, read = fx.Graph(), {}, []

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
        self.traced.dense_parts.append(DensePart(node.target if node.op == "call_module" else node.name, reason))
        out = self.value(node)
        in_place = _changed_by(self.model, node) is not None
        self.traced.steps.append(Part(tuple(read), out, weights=self.weights(PartSource(graph)), in_place=in_place))
        return out

    # ---- Layers

    def conv(self, node: fx.Node, module: nn.Conv2d, input: fx.Node) -> int:
        shape, weight = self.image(input), weight_of(module)
        if module.padding_mode != "zeros":
            raise _Unsupported(f"padding_mode {module.padding_mode!r}")
        ends = module._reversed_padding_repeated_twice  # left, right, top, bottom
        if ends[0] != ends[1] or ends[2] != ends[3]:
            raise _Unsupported("pads one side more than the other")
        self.check_weight(weight)
        kind = self.chosen(node, weight, shape, stride=module.stride, groups=module.groups)
        if max(module.stride) > 2:
            kind = self.traced.layers[node.target] = "dense"
        source = Source(kind, len(weight), node.target, groups=module.groups)
        geometry = {"kernel": module.kernel_size, "stride": module.stride, "padding": (ends[2], ends[0]), "dilation": module.dilation}
        step = SparseConv if kind == "sparse" else DenseConv
        return self.emit(node, step, input, weights=self.weights(source), groups=module.groups, **geometry)

    def linear(self, node: fx.Node, module: nn.Linear, input: fx.Node) -> int:
        shape, weight = self.shape(input), weight_of(module)
        if len(shape) != 1:
            raise _Unsupported(f"expected vectors (N, C), got {len(shape) + 1} dimensions")
        self.check_weight(weight)
        kind = self.chosen(node, weight, shape)
        return self.emit(node, Linear, input, weights=self.weights(Source(kind, len(weight), node.target)), sparse=kind == "sparse")

    def check_weight(self, weight: Tensor) -> None:
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise _Unsupported(f"expected a float32 weight on the CPU, got {weight.dtype} on {weight.device}")

    def chosen(self, node: fx.Node, weight: Tensor, shape: tuple[int, ...], **geometry) -> str:
        density = weight.count_nonzero().item() / max(1, weight.numel())
        layer = Layer(node.target, tuple(weight.shape), density, shape, self.found[node][0][1:], **geometry)
        kind = self.choose(layer)
        if kind not in ("sparse", "dense"):
            raise ValueError(f"choose: expected 'sparse' or 'dense' for layer {layer.name}, got {kind!r}")
        self.traced.layers[layer.name] = kind
        return kind

    def norm(self, node: fx.Node, module: nn.BatchNorm2d, input: fx.Node) -> int:
        if module.running_mean is None:
            raise ValueError(
                f"model: layer {node.target} normalises by the batch in evaluation mode too; images would depend on each other"
            )
        return self.scaled(node, input, "norm", node.target)

    def scaled(self, node: fx.Node, input: fx.Node, change: str, operand: str | float) -> int:
        shape = self.shape(input)
        if len(shape) not in (1, 3):
            raise _Unsupported(f"expected images or vectors, got {len(shape) + 1} dimensions")
        source = Source("scale", shape[0], changes=((change, operand),))
        return self.emit(node, Affine, input, weights=self.weights(source))

    # ---- Arithmetic

    def arithmetic(self, node: fx.Node, change: str, a: Any, b: Any) -> int:
        """``a + b`` of two activations, or an activation and a constant that is one number for each channel."""
        both = [isinstance(v, fx.Node) and v in self.varies for v in (a, b)]
        if all(both):
            if change != "add" or self.shape(a) != self.shape(b):
                raise _Unsupported("only sums of activations of one shape have a step")
            return self.emit(node, Add, a, b)
        if both[1]:
            if change not in ("add", "mul"):
                raise _Unsupported("an activation subtracted, or that something is divided by")
            a, b = b, a
        if isinstance(b, fx.Node):
            channels = self.shape(a)[0] if self.shape(a) else 0
            per_channel = {(1, channels, *[1] * (len(self.shape(a)) - 1)), (channels, *[1] * (len(self.shape(a)) - 1)), (), (1,)}
            if b.op != "get_attr" or tuple(tensor_of(self.model, b.target).shape) not in per_channel:
                raise _Unsupported("combined with what is not one number for each channel")
            return self.scaled(node, a, change, b.target)
        if isinstance(b, bool) or not isinstance(b, (int, float)):
            raise _Unsupported(f"combined with {type(b).__name__}")
        return self.scaled(node, a, change, float(b))

    def relu(self, node: fx.Node, input: fx.Node, inplace: bool = False) -> int:
        return self.emit(node, Relu, input)

    def same(self, node: fx.Node, input: fx.Node, *args, **kwargs) -> int:
        return self.read(input)

    # ---- Pooling and shapes

    def pool(self, node: fx.Node, kind: str, input: fx.Node, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> int:
        shape = self.image(input)
        stride = kernel_size if stride is None or stride == [] else stride
        kernel, stride, padding, dilation = (_pair(v) for v in (kernel_size, stride, padding, dilation))
        out = self.found[node][0][2:]
        floor = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(shape[1:], padding, dilation, kernel, stride, strict=True)]
        if kind == "avg" and list(out) != floor:
            raise _Unsupported("averages windows that are cut off")
        return self.emit(node, Pool, input, kind=kind, kernel=kernel, stride=stride, padding=padding, dilation=dilation)

    def max_pool(self, node, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False) -> int:
        return self.pool(node, "max", input, kernel_size, stride, padding, dilation, ceil_mode)

    def avg_pool(
        self, node, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    ) -> int:
        if divisor_override is not None or (not count_include_pad and any(_pair(padding))):
            raise _Unsupported("divides by something other than the window's size")
        return self.pool(node, "avg", input, kernel_size, stride, padding, 1, ceil_mode)

    def adaptive_pool(self, node: fx.Node, kind: str, input: fx.Node) -> int:
        sizes = self.image(input)[1:], self.found[node][0][2:]
        if any(n % m for n, m in zip(*sizes, strict=True)):
            raise _Unsupported("windows of unequal size")
        return self.pool(node, kind, input, [n // m for n, m in zip(*sizes, strict=True)])

    def mean(self, node: fx.Node, input: fx.Node, dim, keepdim: bool = False) -> int:
        shape = self.image(input)
        if isinstance(dim, int) or sorted(d % 4 for d in dim) != [2, 3]:
            raise _Unsupported("a mean over other axes than 2 and 3")
        pooled = self.value(node)
        self.traced.shapes[pooled] = (shape[0], 1, 1)
        self.traced.steps.append(Pool((self.read(input),), pooled, "avg", shape[1:], shape[1:]))
        if keepdim:
            return pooled
        out = self.value(node)
        self.traced.steps.append(Flatten((pooled,), out))
        return out

    def flatten(self, node: fx.Node, input: fx.Node, *args, **kwargs) -> int:
        """``flatten``, ``view`` and ``reshape``, where they give (N, all the rest)."""
        shape, out = self.shape(input), self.found[node][0][1:]
        if out == shape:
            return self.read(input)
        if len(out) != 1 or not shape:
            raise _Unsupported("only shapes (N, -1) have a step")
        if len(shape) != 3:
            raise _Unsupported(f"expected images (N, C, H, W), got {len(shape) + 1} dimensions")
        return self.emit(node, Flatten, input)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


def _needed(node: fx.Node, known: dict) -> list[fx.Node]:
    """The nodes among ``known`` that ``node`` depends on, without going beyond them."""
    found, left = [], list(node.all_input_nodes)
    while left:
        n = left.pop(0)
        if n in known:
            found.append(n)
        else:
            left += n.all_input_nodes
    return found


def _changed_by(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose value the operation writes in place, if it does."""
    if node.op == "call_module":
        changes = getattr(model.get_submodule(node.target), "inplace", False)
    elif node.op == "call_method":
        changes = node.target.endswith("_") and not node.target.endswith("__")
    else:
        changes = node.target in _IN_PLACE or node.kwargs.get("inplace", False)
        if node.target in _FUNCTIONS and not changes and inspect.isfunction(node.target):  # by position
            changes = inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments.get("inplace", False)
    return node.args[0] if changes and node.args and isinstance(node.args[0], fx.Node) else None


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_, F.relu_, torch.dropout_}

# The signatures here are those of what is traced; the arguments that follow lowering and node (and module) are the traced call's.
_L = _Lowering
_MODULES: dict[type, Callable] = {
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


def _combined(change: str) -> Callable:
    return lambda low, node, input, other: low.arithmetic(node, change, input, other)


def _dropped(low: _Lowering, node: fx.Node, input: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> int:
    if training:
        raise _Unsupported("drops out in evaluation mode too")
    return low.same(node, input)


_FUNCTIONS: dict[Any, Callable] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_), _L.relu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _combined("add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _combined("sub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _combined("mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _combined("div")),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _L.max_pool),
    F.avg_pool2d: _L.avg_pool,
    F.adaptive_avg_pool2d: lambda low, node, input, output_size: low.adaptive_pool(node, "avg", input),
    F.adaptive_max_pool2d: lambda low, node, input, output_size, return_indices=False: low.adaptive_pool(node, "max", input),
    torch.mean: _L.mean,
    **dict.fromkeys((torch.flatten, torch.reshape), _L.flatten),
    **dict.fromkeys((F.dropout, F.dropout2d), _dropped),
}
_METHODS: dict[str, Callable] = {
    **dict.fromkeys(("relu", "relu_"), lambda low, node, input: low.relu(node, input)),
    **{name + end: _combined(name) for name in ("add", "sub", "mul", "div") for end in ("", "_")},
    "mean": _L.mean,
    **dict.fromkeys(("flatten", "view", "reshape"), _L.flatten),
    "contiguous": lambda low, node, input, memory_format=None: low.same(node, input),
}
