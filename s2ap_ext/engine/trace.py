"""A model's graph, by torch.fx, and what its nodes give."""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import Pruned
from ..nn.attention import Attention
from ..nn.pruned_weight import class_before

BATCHES = (2, 3)  # images of the runs that find the shapes


Found = tuple[tuple[int, ...], torch.dtype]


class Graph(NamedTuple):
    """What torch.fx made of a model.

    Attributes:
        root: the module that names in the graph refer to; it shares the model's modules and tensors.
        nodes: in the order that they run in.
        found: for each node shape and dtype of the tensor that it gives for an image, the batch left out; None if it gives anything else.
        constants: tensors that the model's code made while it was traced, by their names in ``root``.
    """

    root: nn.Module
    nodes: list[fx.Node]
    found: dict[fx.Node, Found | None]
    constants: dict[str, Tensor]


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The graph of ``model``, which is in evaluation mode.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """
    tracer, root = _Tracer(), root_of(model)
    _input, *others = inspect.signature(root.forward).parameters.values()
    before = set(vars(root))
    try:
        graph = tracer.trace(root, {p.name: p.default for p in others if p.default is not p.empty})
    except Exception as error:  # whatever the model's own code raises when it is shown proxies
        raise ValueError(f"model: torch.fx cannot trace {tracer.failed or 'its forward'}{_line(error)}: {error}") from error
    few, more = (_values(root, graph, example[:1].expand(n, *example.shape[1:]).contiguous()) for n in BATCHES)
    constants = {name: value for name, value in vars(root).items() if name not in before}
    return Graph(root, list(graph.nodes), {node: _batched(few[node], more[node]) for node in few}, constants)


def _values(root: nn.Module, graph: fx.Graph, example: Tensor) -> dict[fx.Node, Found | None]:
    values = _Values(fx.GraphModule(root, graph))
    values.run(example)
    return values.found


def _batched(few: Found | None, more: Found | None) -> Found | None:
    """What a node gives for an image, if its first axis, and no other, is the batch."""
    if few is None or more is None or (few[0][:1], more[0][:1]) != tuple((n,) for n in BATCHES) or few[0][1:] != more[0][1:]:
        return None
    return few[0][1:], few[1]


def root_of(model: nn.Module, constants: Mapping[str, Tensor] | None = None) -> nn.Module:
    """What is traced in place of ``model``: a shallow copy, for torch.fx sets attributes there; or something around a single layer."""
    root = nn.Sequential(model) if _Tracer().is_leaf_module(model, "") else copy.copy(model)
    root.__dict__.update(constants or {})
    return root


def _line(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename.replace("\\", "/")]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""


class _Tracer(fx.Tracer):
    """Goes into all modules but pruned layers, attention and those whose forward is one of torch.nn's."""

    failed = ""  # the innermost module whose forward raised

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        of_torch = class_before(module).forward.__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
        return of_torch or isinstance(module, (Pruned, Attention))

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or f"layer {self.path_of_module(module)}"
            raise


class _Values(fx.Interpreter):
    """Runs the graph and remembers what each node gave: shape and dtype of a tensor, None of anything else."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Found | None] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.found[node] = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None
        return value


def computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``cls``, perhaps with pruned or parametrized weights or of a subclass, with the very forward of ``cls``."""
    own = class_before(module)
    inherits = issubclass(own, cls) and own.forward is cls.forward
    return inherits and getattr(own, "_conv_forward", None) is getattr(cls, "_conv_forward", None)


def changed_by(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose value the operation writes in place, if it does."""
    if node.op == "call_module":
        changes = getattr(model.get_submodule(str(node.target)), "inplace", False)
    elif node.op == "call_method":
        name = str(node.target)
        changes = name.endswith("_") and not name.endswith("__")
    else:
        changes = node.target in _IN_PLACE or node.kwargs.get("inplace", False)
    return node.args[0] if changes and node.args and isinstance(node.args[0], fx.Node) else None


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_, F.relu_, torch.dropout_}
