"""Which channels of a network no result depends on: the analysis behind :func:`s2ap_ext.nn.shrink.shrink_channels`.

The network is looked at as the graph of tensor operations that :func:`torch.export.export` records. Each activation gets for each of its
channels a *unit* and a *constant*. The unit stands for everything that has to be removed together: operations that combine two activations
(a residual sum, a gate) join their units, a concatenation puts units side by side, and a flattened image repeats each of them. The
constant is the number that the channel holds at every position of every image, or NaN if the channel varies. A channel whose weights
are zero starts with its bias as the constant, and BatchNorm, activation functions and pooling compute on with it.

Channels end in the layers that read them. A unit can be removed if each of these layers either finds the constant of the channel, or
multiplies the channel by zero weights. What the layers that write the channel do does not matter then. An operation that is not known
here fixes the units that it reads, so they stay: a missing rule costs size, never exactness.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .coupling import Coupling, Reader

aten = torch.ops.aten


class Activation(NamedTuple):
    """What is known of an activation.

    Attributes:
        axis: its axis of channels.
        units: int64 [C], the unit of each channel.
        constant: float64 [C], the number that the channel holds everywhere; NaN if it varies.
    """

    axis: int
    units: Tensor
    constant: Tensor


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a tensor by itself, a tuple of arguments, or a mapping of named ones."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example) if isinstance(example, tuple | list) else (example,), {}


def analyse(model: nn.Module, example: Any, *, numbers_are_written: bool = False) -> Coupling:
    """The units of ``model``, which is in evaluation mode, found for the input ``example`` (:func:`arguments`).

    Args:
        model: without pruned layers.
        example: an input of the model.
        numbers_are_written: a shape that names the number of channels, such as ``x.view(-1, 512)``, has it written in the model's code,
            so these channels stay. The graph does not tell this from ``x.view(-1, x.shape[1])``.

    Raises:
        ValueError: :func:`torch.export.export` cannot record the model.
    """
    try:
        program = torch.export.export(model, *arguments(example), strict=False)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"model: torch.export cannot record its operations: {error}") from error
    reading = _Reading(model, program, numbers_are_written)
    for node in program.graph.nodes:
        reading.see(node)
    return reading.found


class _Reading:
    """Goes through the graph. ``self.at`` has what is known of the nodes; the channels of a node that is not there all stay."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, numbers_are_written: bool) -> None:
        self.model, self.found, self.numbers_are_written = model, Coupling(), numbers_are_written
        self.at: dict[fx.Node, Activation] = {}
        self.memory: dict[fx.Node, fx.Node] = {}  # the node whose memory a node shares
        names: dict[int, str] = {}  # the first name of each tensor
        tensors = {name: tensor for get in (model.named_parameters, model.named_buffers) for name, tensor in get(remove_duplicate=False)}
        for name, tensor in tensors.items():
            names.setdefault(id(tensor), name)
        signature = program.graph_signature
        given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.tensors = {placeholder: tensors[name].detach() for placeholder, name in given.items() if name in tensors}
        self.names = {placeholder: names[id(tensors[name])] for placeholder, name in given.items() if name in tensors}
        uses: defaultdict[str, int] = defaultdict(int)
        for node in program.graph.nodes:
            for read in node.all_input_nodes if node.op == "call_function" else ():
                if read.name in self.names:
                    uses[self.names[read.name]] += 1
        self.shared = {name for name, count in uses.items() if count > 1}

    def see(self, node: fx.Node) -> None:
        if node.op == "output":
            self.fix(node.all_input_nodes)
        if node.op != "call_function":
            return
        rule = _RULES.get(node.target)
        if rule is None:
            self.fix(node.all_input_nodes)
            for read in node.all_input_nodes:  # its result may be the same memory, which the model may write to
                self.forget(read)
        elif (result := rule(self, node, *node.args, **node.kwargs)) is not None:
            self.at[node] = result
        first: Any = node.args[0] if node.args else None
        if node.target in _SAME_MEMORY:
            self.memory[node] = self.memory.get(first, first)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            self.written(node, first)

    def forget(self, node: fx.Node) -> None:
        """The channels of a node, and of all that shares its memory, vary from here on."""
        memory = self.memory.get(node, node)
        for other, known in self.at.items():
            if self.memory.get(other, other) is memory:
                self.at[other] = _varying(known)

    def written(self, node: fx.Node, first: fx.Node) -> None:
        """An operation has written its result into the memory of its first argument, whatever nodes look at that."""
        result = self.at.get(node)
        self.memory[node] = self.memory.get(first, first)
        self.forget(first)
        if result is not None:
            self.at[node] = self.at[first] = result

    def fix(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node in self.at:
                self.found.fix(self.at[node].units)
            for axis, size in enumerate(self.tensors[node.name].shape) if node.name in self.tensors else ():
                units = self.found.new(size)
                self.found.fix(units)
                self.found.put(self.names[node.name], axis, units)

    # ---- Layers

    def convolution(
        self,
        node: fx.Node,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Activation | None:
        if len(_shape(node)) != len(_shape(weight)):  # a single image without a batch
            self.fix(node.all_input_nodes)
            return None
        padded = padding != "valid" if isinstance(padding, str) else any([padding] if isinstance(padding, int) else padding)
        return self.layer(node, input, weight, bias, padded, groups, 1)

    def linear(self, node: fx.Node, input: Any, weight: Any, bias: Any = None) -> Activation | None:
        return self.layer(node, input, weight, bias, False, 1, len(_shape(node)) - 1)

    def layer(self, node: fx.Node, input: Any, weight: Any, bias: Any, padded: bool, groups: int, axis: int) -> Activation | None:
        if weight.name not in self.tensors or (bias is not None and bias.name not in self.tensors):
            self.fix(node.all_input_nodes)
            return None
        name, w = self.names[weight.name], self.tensors[weight.name].double()
        offset = 0.0 if bias is None else self.tensors[bias.name].double().cpu()
        channels = w.shape[1] * groups
        known = self.at.get(input)
        if known is None or known.axis != axis:
            self.fix([input])
            known = self.fixed(channels, axis)
        known = known._replace(constant=torch.where(known.constant.isfinite(), known.constant, torch.nan))
        units = self.found.new(len(w))
        taps = w.cpu().view(groups, len(w) // groups, w.shape[1], -1)
        sums, read = taps.sum(3), (taps != 0).any(3)
        constant = known.constant.view(groups, -1, 1)
        unclear = constant.isnan() | (padded & (constant != 0))
        varies = (read.double() @ unclear.double()).flatten() > 0
        result = torch.where(varies, torch.nan, (sums @ constant.masked_fill(unclear, 0)).flatten() + offset)
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if groups > 1 and not isinstance(owner, nn.modules.conv._ConvNd):  # whose groups could be changed
            self.found.fix(known.units)
            self.found.fix(units)
        if groups > 1 and w.shape[1] == 1:
            self.found.join(units, known.units.repeat_interleave(len(w) // groups))
            self.found.depthwise.add(name)
        else:
            self.reads(name, bias and self.names[bias.name], known, read.any(1).flatten(), padded, groups)
        self.found.put(name, 0, units)
        if bias is not None:
            self.found.put(self.names[bias.name], 0, units)
        return Activation(axis, units, result)

    def reads(self, weight: str, bias: str | None, known: Activation, read: Tensor, padded: bool, groups: int) -> None:
        if groups == 1:
            self.found.put(weight, 1, known.units)
        elif weight in self.found.grouped:
            self.found.join(self.found.grouped[weight][0], known.units)
        else:
            self.found.grouped[weight] = known.units, groups
        reader = Reader(weight, bias, known.units, known.constant, read, padded, groups)
        owner, _, own = weight.rpartition(".")
        has_bias = own == "weight" and "bias" in self.model.get_submodule(owner)._parameters
        if self.shared & {weight, reader.bias} or not has_bias:  # what one use of it needs, another one does not
            self.found.fix(known.units[reader.folded])
        self.found.readers.append(reader)

    def batch_norm(
        self,
        node: fx.Node,
        input: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        var: Any,
        training: bool,
        momentum: float,
        eps: float,
        cudnn: bool,
    ) -> Activation | None:
        known, own = self.at.get(input), [n for n in (weight, bias, mean, var) if n is not None]
        if known is None or known.axis != 1 or any(n.name not in self.tensors for n in own):
            self.fix(node.all_input_nodes)
            return None
        for n in own:
            self.found.put(self.names[n.name], 0, known.units)
        if training or mean is None:
            return _varying(known)
        at = {n: self.tensors[n.name].double().cpu() for n in own}
        constant = (known.constant - at[mean]) * (at[var] + eps).rsqrt()
        constant = constant if weight is None else constant * at[weight]
        return known._replace(constant=constant if bias is None else constant + at[bias])

    # ---- What leaves channels where they are

    def pointwise(self, node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Activation | None:
        known = self.at.get(input)
        return known and known._replace(constant=_computed(node, known.constant.clone(), *args, **kwargs))

    def same(self, node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Activation | None:
        return self.at.get(input)

    def dropout(self, node: fx.Node, input: Any, p: float, train: bool) -> Activation | None:
        known = self.at.get(input)
        return known and (_varying(known) if train else known)

    def average(
        self,
        node: fx.Node,
        input: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        include_pad: bool = True,
        divisor: int | None = None,
    ) -> Activation | None:
        known = self.at.get(input)
        exact = divisor is None and (not include_pad or not any([padding] if isinstance(padding, int) else padding))
        return known and known._replace(constant=known.constant if exact else _only_zero(known.constant))

    def mean(self, node: fx.Node, input: Any, dims: Any, keepdim: bool = False, dtype: Any = None) -> Activation | None:
        known = self.at.get(input)
        if known is None:
            return None
        dims = [dim % len(_shape(input)) for dim in dims or range(len(_shape(input)))]
        if known.axis in dims:
            self.fix([input])
            return None
        return known._replace(axis=known.axis - (0 if keepdim else sum(dim < known.axis for dim in dims)))

    def permuted(self, node: fx.Node, input: Any, *args: Any) -> Activation | None:
        known = self.at.get(input)
        if known is None:
            return None
        axes = list(range(len(_shape(input))))
        if node.target is aten.permute.default:
            axes = [axis % len(axes) for axis in args[0]]
        else:
            one, other = (axis % len(axes) for axis in args)
            axes[one], axes[other] = axes[other], axes[one]
        return known._replace(axis=axes.index(known.axis))

    def viewed(self, node: fx.Node, input: Any, *args: Any) -> Activation | None:
        """Another shape: the channels become an axis again, or one in which each of them takes up several places in a row."""
        known = self.at.get(input)
        if known is None:
            return None
        before, after = _shape(input), _shape(node)
        left, right, size = math.prod(before[: known.axis]), math.prod(before[known.axis + 1 :]), before[known.axis]
        places = [axis for axis, n in enumerate(after) if math.prod(after[:axis]) == left and n in (size, size * right)]
        named = args and isinstance(args[0], list | tuple) and after[places[0]] in args[0] if places else False
        if len(places) != 1 or (named and self.numbers_are_written):
            self.fix([input])
            return None
        repeats = after[places[0]] // size
        return Activation(places[0], known.units.repeat_interleave(repeats), known.constant.repeat_interleave(repeats))

    # ---- What brings channels together

    def combined(self, node: fx.Node, a: Any, b: Any, **kwargs: Any) -> Activation | None:
        """A sum, a difference, a product or a quotient."""
        if not isinstance(a, fx.Node) or a not in self.at:
            nodes = [n for n in (a, b) if isinstance(n, fx.Node)]
            if len(nodes) == 2 and nodes[1] in self.at and node.target in (aten.add.Tensor, aten.mul.Tensor) and not kwargs:
                return self.combined(node, b, a)
            self.fix(nodes)
            return None
        known = self.at[a]
        if not isinstance(b, fx.Node):
            return known._replace(constant=_computed(node, known.constant.clone(), b, **kwargs))
        other = self.at.get(b) or self.parameter(b, known, len(_shape(a)))
        if other is None or len(_shape(node)) != len(_shape(a)) or other.axis != known.axis or len(other.units) != len(known.units):
            self.fix([a, b])
            return None
        self.found.join(known.units, other.units)
        constant = _computed(node, known.constant.clone(), other.constant, **kwargs)
        if node.target in (aten.mul.Tensor, aten.mul_.Tensor):
            constant = torch.where((known.constant == 0) | (other.constant == 0), 0.0, constant)
        return known._replace(constant=constant)

    def parameter(self, node: fx.Node, beside: Activation, dims: int) -> Activation | None:
        """A parameter with a number for each channel, as an activation that is constant."""
        if node.name not in self.tensors:
            return None
        tensor = self.tensors[node.name]
        axis = beside.axis - (dims - tensor.dim())
        if axis < 0 or tensor.shape[axis] != len(beside.units) or tensor.numel() != tensor.shape[axis]:
            return None
        self.found.put(self.names[node.name], axis, beside.units)
        return beside._replace(constant=tensor.double().cpu().flatten())

    def concatenated(self, node: fx.Node, inputs: Any, dim: int = 0) -> Activation | None:
        known = [self.at.get(n) for n in inputs]
        axes = {k.axis for k in known if k is not None}
        dim %= len(_shape(node))
        if len(axes) != 1 or axes != {dim}:
            self.fix(inputs)
            return None
        parts = [k or self.fixed(_shape(n)[dim], dim) for n, k in zip(inputs, known, strict=True)]
        return Activation(dim, torch.cat([p.units for p in parts]), torch.cat([p.constant for p in parts]))

    def fixed(self, size: int, axis: int) -> Activation:
        """Channels of which nothing is known."""
        units = self.found.new(size)
        self.found.fix(units)
        return Activation(axis, units, torch.full((size,), torch.nan, dtype=torch.float64))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _computed(node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
    operation: Any = node.target
    return operation(*args, **kwargs)  # type: ignore[no-any-return]


def _varying(known: Activation) -> Activation:
    return known._replace(constant=torch.full_like(known.constant, torch.nan))


def _only_zero(constant: Tensor) -> Tensor:
    """Where a window may lie partly outside, only zero remains what it was."""
    return torch.where(constant == 0, 0.0, torch.nan)


def _overloads(*names: str) -> list[Any]:
    """The operations of these names, such as ``"relu.default"``, and their forms that write in place."""
    found = []
    for name in names:
        operation, _, overload = name.partition(".")
        packets = (getattr(aten, form, None) for form in (operation, operation + "_"))
        found += [getattr(packet, overload) for packet in packets if packet is not None and overload in packet.overloads()]
    return found


_VIEWS = _overloads(
    "view.default", "reshape.default", "flatten.using_ints", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default"
)
_PERMUTATIONS = _overloads("permute.default", "transpose.int")
_SAME = _overloads("contiguous.default", "clone.default", "detach.default", "alias.default")
_DROPOUT = _overloads("dropout.default", "feature_dropout.default")
_SAME_MEMORY = {*_VIEWS, *_PERMUTATIONS, *_SAME, *_DROPOUT}

_R = _Reading
_RULES: dict[Any, Callable[..., Activation | None]] = {
    **dict.fromkeys(_overloads("conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding"), _R.convolution),
    aten.linear.default: _R.linear,
    aten.batch_norm.default: _R.batch_norm,
    **dict.fromkeys(
        _overloads(
            *(f"{name}.default" for name in ("relu", "relu6", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "elu", "leaky_relu")),
            *(f"{name}.default" for name in ("hardtanh", "hardswish", "hardsigmoid", "clamp", "clamp_min", "abs", "neg", "exp")),
            "pow.Tensor_Scalar",
        ),
        _R.pointwise,
    ),
    **dict.fromkeys(_SAME, _R.same),
    **dict.fromkeys(_DROPOUT, _R.dropout),
    **dict.fromkeys(_overloads("max_pool2d.default", "adaptive_avg_pool2d.default", "upsample_nearest2d.vec"), _R.same),
    aten.avg_pool2d.default: _R.average,
    aten.mean.dim: _R.mean,
    **dict.fromkeys(_PERMUTATIONS, _R.permuted),
    **dict.fromkeys(_VIEWS, _R.viewed),
    **dict.fromkeys(_overloads("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"), _R.combined),
    aten.cat.default: _R.concatenated,
}
