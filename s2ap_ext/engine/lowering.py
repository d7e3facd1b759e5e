"""A model's graph as steps, one for each operation; what there is no step for becomes a dense part, with the reason."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn import S2APConv2d, S2APLinear
from .builder import Lowered, Seen, Unsupported
from .choice import Layer
from .steps import Add, Affine, Conv, DenseConv, Flatten, Linear, Pool, Relu, SparseConv
from .token_steps import Shift
from .tokens import TokenSteps
from .trace import Graph, computes_as
from .views import FLAT, LAST, PLAIN, TOKENS, reshaped, shape_in
from .weights import Source, tensor_of, weight_of


def lower(graph: Graph, choose: Callable[[Layer], str], batch: int) -> Lowered:
    """Steps for a model's graph, for ``batch`` images.

    Raises:
        ValueError: it does not give one float32 tensor with the batch first; it normalises by the batch; ``choose`` gave no answer.
    """
    lowering = _Lowering(graph, choose, batch)
    for node in graph.nodes:
        lowering.lower(node)
    return lowering.lowered


class _Lowering(TokenSteps):
    """Makes the steps of each operation."""

    def step_for(self, node: fx.Node) -> int | Seen:
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

    # ---- Layers

    def conv(self, node: fx.Node, module: nn.Conv2d, input: fx.Node) -> int:
        shape, weight = self.image(input), weight_of(module)
        if module.padding_mode != "zeros":
            raise Unsupported(f"padding_mode {module.padding_mode!r}")
        ends = module._reversed_padding_repeated_twice  # left, right, top, bottom
        if ends[0] != ends[1] or ends[2] != ends[3]:
            raise Unsupported("pads one side more than the other")
        self.check_weight(weight)
        out = self.found_shape(node)
        if max(module.stride) > 2:  # blocks have no kernels for it
            kind = self.lowered.layers[str(node.target)] = "dense"
        else:
            kind = self.chosen(str(node.target), weight, shape, out, stride=module.stride, groups=module.groups)
        geometry: dict[str, Any] = {
            "kernel": module.kernel_size,
            "stride": module.stride,
            "padding": (ends[2], ends[0]),
            "dilation": module.dilation,
            "groups": module.groups,
        }
        source = Source(kind, len(weight), str(node.target), convolution=tuple(geometry.values()))
        step: type[Conv] = SparseConv if kind == "sparse" else DenseConv
        return self.emit(out, step, self.read(input), weights=self.weights(source), **geometry)

    def linear(self, node: fx.Node, module: nn.Linear, input: fx.Node) -> int | Seen:
        seen = self.seen(input)
        shape = self.lowered.shapes[seen.value]
        if seen.view in (LAST, TOKENS):
            return seen._replace(value=self.on_positions(str(node.target), module, seen.value))
        if len(shape) != 1:
            raise Unsupported(f"expected vectors (N, C), got {len(shape) + 1} dimensions")
        weight = weight_of(module)
        self.check_weight(weight)
        out = (len(weight),)
        kind = self.chosen(str(node.target), weight, shape, out)
        return self.emit(
            out, Linear, seen.value, weights=self.weights(Source(kind, len(weight), str(node.target))), sparse=kind == "sparse"
        )

    def norm(self, node: fx.Node, module: nn.BatchNorm2d, input: fx.Node) -> Seen:
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
    ) -> Seen:
        """``F.batch_norm`` with the tensors of one BatchNorm, as subclasses of it call it."""
        layer = str(mean.target).rpartition(".")[0] if isinstance(mean, fx.Node) and mean.op == "get_attr" else None
        module = self.model.get_submodule(layer) if layer is not None else None
        names = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        own = all((n.target if isinstance(n, fx.Node) else n) == (layer and f"{layer}.{name}") for name, n in names.items())
        if training or not own or layer is None or not isinstance(module, nn.modules.batchnorm._BatchNorm) or eps != module.eps:
            raise Unsupported("normalises with tensors that are not those of one BatchNorm")
        return self.scaled(node, input, "norm", layer)

    def scaled(self, node: fx.Node, input: fx.Node, change: str, operand: str | float) -> Seen:
        shape = self.lowered.shapes[self.seen(input).value]
        if len(shape) not in (1, 3):
            raise Unsupported(f"expected images or vectors, got {len(shape) + 1} dimensions")
        source = Source("scale", shape[0], changes=((change, operand),))
        return self.elementwise(input, Affine, weights=self.weights(source))

    # ---- Arithmetic

    def arithmetic(self, node: fx.Node, change: str, a: Any, b: Any) -> Seen:
        """``a + b`` of two activations, or an activation and a constant that is one number for each channel, or for each token's."""
        both = [isinstance(v, fx.Node) and v in self.varies for v in (a, b)]
        if all(both):
            one, other = self.seen(a), self.seen(b)
            shape = self.lowered.shapes[one.value]
            if change != "add" or shape != self.lowered.shapes[other.value] or one.view != other.view:
                raise Unsupported("only sums of activations of one shape have a step")
            return one._replace(value=self.emit(shape, Add, one.value, other.value))
        if both[1]:
            if change not in ("add", "mul"):
                raise Unsupported("an activation subtracted, or that something is divided by")
            a, b = b, a
        if isinstance(b, fx.Node):
            if b.op != "get_attr":
                raise Unsupported("combined with what is not one number for each channel")
            return self.with_tensor(node, a, change, str(b.target))
        if isinstance(b, bool) or not isinstance(b, (int, float)):
            raise Unsupported(f"combined with {type(b).__name__}")
        return self.scaled(node, a, change, float(b))

    def with_tensor(self, node: fx.Node, input: fx.Node, change: str, name: str) -> Seen:
        seen = self.seen(input)
        given, shape = tuple(tensor_of(self.model, name).shape), self.lowered.shapes[seen.value]
        there = shape_in(seen.view, shape)  # without the batch
        channels = tuple(n if i == (len(there) - 1 if seen.view in (LAST, TOKENS) else 0) else 1 for i, n in enumerate(there))
        if given in ((), (1,)) or given in _broadcast(channels):
            return self.scaled(node, input, change, name)
        if change != "add" or seen.view != TOKENS or given not in _broadcast(there):
            raise Unsupported("combined with what is not one number for each channel")
        return self.elementwise(input, Shift, weights=self.weights(Source("constant", shape[0], name)))

    def relu(self, node: fx.Node, input: fx.Node, inplace: bool = False) -> Seen:
        return self.elementwise(input, Relu)

    def same(self, node: fx.Node, input: fx.Node, *args: Any, **kwargs: Any) -> Seen:
        return self.seen(input)

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
        out = self.found_shape(node)
        floor = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(shape[1:], padding, dilation, kernel, stride, strict=True)]
        if kind == "avg" and list(out[1:]) != floor:
            raise Unsupported("averages windows that are cut off")
        return self.emit(out, Pool, self.read(input), kind=kind, kernel=kernel, stride=stride, padding=padding, dilation=dilation)

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
        sizes = self.image(input)[1:], self.found_shape(node)[1:]
        if any(n % m for n, m in zip(*sizes, strict=True)):
            raise Unsupported("windows of unequal size")
        return self.pool(node, kind, input, [n // m for n, m in zip(*sizes, strict=True)])

    def mean(self, node: fx.Node, input: fx.Node, dim: Any, keepdim: bool = False) -> int:
        seen = self.seen(input)
        shape = self.lowered.shapes[seen.value]
        axes = [axis % (len(self.found_shape(input)) + 1) for axis in ([dim] if isinstance(dim, int) else dim)]
        if len(shape) != 3 or sorted(axes) != {PLAIN: [2, 3], LAST: [1, 2], FLAT: [2], TOKENS: [1]}[seen.view]:
            raise Unsupported("a mean over other axes than those of positions")
        if keepdim and seen.view != PLAIN:
            raise Unsupported("a mean that keeps the axes of positions")
        pooled = self.emit((shape[0], 1, 1), Pool, seen.value, kind="avg", kernel=shape[1:], stride=shape[1:])
        return pooled if keepdim else self.emit(shape[:1], Flatten, pooled)

    def flatten(self, node: fx.Node, input: fx.Node, *args: Any, **kwargs: Any) -> int | Seen:
        """``flatten``, ``view`` and ``reshape``, where they give (N, all the rest), or put the positions of images into one axis or two."""
        seen, out = self.seen(input), self.found_shape(node)
        shape = self.lowered.shapes[seen.value]
        if out == shape_in(seen.view, shape):
            return seen
        if (view := reshaped(seen.view, shape, out)) is not None:
            return seen._replace(view=view)
        if len(out) != 1 or not shape:
            raise Unsupported("only shapes (N, -1) have a step")
        if len(shape) != 3 or seen.view not in (PLAIN, FLAT):
            raise Unsupported(f"expected images (N, C, H, W), got {len(shape_in(seen.view, shape)) + 1} dimensions")
        return self.emit(out, Flatten, seen.value)


def _broadcast(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Shapes of tensors that are combined with (N, *shape) as one of ``shape`` is: with a batch of one, without it, without leading 1s."""
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return {(1, *shape), *(shape[i:] for i in range(first + 1))}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)


# The signatures here are those of what is traced; the arguments that follow lowering and node (and module) are the traced call's.
_L = _Lowering
_MODULES: dict[type[nn.Module], Callable[..., int | Seen]] = {
    S2APConv2d: _L.conv,
    S2APLinear: _L.linear,
    nn.Conv2d: _L.conv,
    nn.Linear: _L.linear,
    nn.BatchNorm2d: _L.norm,
    nn.BatchNorm1d: _L.norm,
    nn.LayerNorm: _L.layer_norm,
    nn.GELU: lambda low, node, module, input: low.gelu(node, input, module.approximate),
    nn.SiLU: lambda low, node, module, input: low.activation(node, "silu", input),
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


def _combined(change: str) -> Callable[..., int | Seen]:
    return lambda low, node, input, other: low.arithmetic(node, change, input, other)


def _dropped(low: _Lowering, node: fx.Node, input: fx.Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> Seen:
    if training:
        raise Unsupported("drops out in evaluation mode too")
    return low.same(node, input)


_FUNCTIONS: dict[Any, Callable[..., int | Seen]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, F.relu_), _L.relu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _combined("add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _combined("sub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _combined("mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _combined("div")),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _L.max_pool),
    F.gelu: _L.gelu,
    F.silu: lambda low, node, input, inplace=False: low.activation(node, "silu", input),
    operator.getitem: _L.item,
    **dict.fromkeys((torch.cat, torch.concat), _L.concatenated),
    **dict.fromkeys((torch.permute, torch.transpose), _L.permuted),
    F.avg_pool2d: _L.avg_pool,
    F.adaptive_avg_pool2d: lambda low, node, input, output_size: low.adaptive_pool(node, "avg", input),
    F.adaptive_max_pool2d: lambda low, node, input, output_size, return_indices=False: low.adaptive_pool(node, "max", input),
    F.batch_norm: _L.norm_function,
    torch.mean: _L.mean,
    **dict.fromkeys((torch.flatten, torch.reshape), _L.flatten),
    **dict.fromkeys((F.dropout, F.dropout2d), _dropped),
}
_METHODS: dict[Any, Callable[..., int | Seen]] = {
    **dict.fromkeys(("relu", "relu_"), lambda low, node, input: low.relu(node, input)),
    **{name + end: _combined(name) for name in ("add", "sub", "mul", "div") for end in ("", "_")},
    "mean": _L.mean,
    **dict.fromkeys(("permute", "transpose"), _L.permuted),
    **dict.fromkeys(("flatten", "view", "reshape"), _L.flatten),
    "contiguous": lambda low, node, input, memory_format=None: low.same(node, input),
}
