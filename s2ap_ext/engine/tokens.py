"""Steps of what transformers are made of: linear layers and normalisation of tokens, attention, tokens that a model adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .builder import Builder, Seen, Unsupported
from .steps import Conv, DenseConv, Flatten, SparseConv
from .token_steps import Activation, Attention, LayerNorm, Prepend, Select
from .trace import computes_as
from .views import LAST, TOKENS, permuted, shape_in
from .weights import Source, tensor_of, weight_of


class TokenSteps(Builder):
    """What it adds sees values with channels last as well."""

    def on_positions(self, name: str, module: nn.Module, value: int, tensor: str = "weight") -> int:
        """A linear layer on the channels of each position of a value: a 1x1 convolution."""
        weight, image = weight_of(module, tensor), self.lowered.shapes[value]
        self.check_weight(weight)
        label = name if tensor == "weight" else f"{name}.{tensor}"
        out = (len(weight), *image[1:])
        kind = self.chosen(label, weight[..., None, None], image, out)
        step: type[Conv] = SparseConv if kind == "sparse" else DenseConv
        return self.emit(out, step, value, weights=self.weights(Source(kind, len(weight), name, tensor=tensor)))

    def channels_last(self, node: fx.Node) -> Seen:
        seen = self.seen(node)
        if seen.view not in (LAST, TOKENS):
            raise Unsupported(f"expected vectors (N, C), got {len(shape_in(seen.view, self.lowered.shapes[seen.value])) + 1} dimensions")
        return seen

    def layer_norm(self, node: fx.Node, module: nn.LayerNorm, input: fx.Node) -> Seen:
        seen = self.seen(input)
        shape = self.lowered.shapes[seen.value]
        if len(shape) != 1 and seen.view not in (LAST, TOKENS):
            raise Unsupported("normalises over something other than channels")
        if tuple(module.normalized_shape) != shape[:1]:
            raise Unsupported("normalises over something other than channels")
        source = Source("scale", shape[0], changes=(("affine", str(node.target)),))
        return self.elementwise(input, LayerNorm, weights=self.weights(source), eps=module.eps)

    def activation(self, node: fx.Node, kind: str, input: fx.Node) -> Seen:
        return self.elementwise(input, Activation, kind=kind)

    def gelu(self, node: fx.Node, input: fx.Node, approximate: str = "none") -> Seen:
        return self.activation(node, {"none": "gelu", "tanh": "gelu_tanh"}[approximate], input)

    def item(self, node: fx.Node, input: fx.Node, index: Any) -> int | Seen:
        """The results of attention, or one token of all."""
        if input.op == "call_module":
            module = self.model.get_submodule(str(input.target))
            if index == 0 and isinstance(module, nn.MultiheadAttention) and computes_as(module, nn.MultiheadAttention):
                return self.attention(input, module)
            if input not in self.at:
                raise Unsupported(f"no step for {type(module).__name__}")
        token = index[1] if isinstance(index, tuple) and len(index) in (2, 3) else None
        if type(token) is not int or any(part != slice(None) for part in (index[0], *index[2:])):
            raise Unsupported("only one token of all images has a step")
        seen = self.seen(input)
        shape = self.lowered.shapes[seen.value]
        if seen.view != TOKENS:
            raise Unsupported("takes something other than a token")
        position = token % (shape[1] * shape[2])
        return self.emit(shape[:1], Flatten, self.emit((shape[0], 1, 1), Select, seen.value, position=position))

    def attention(self, node: fx.Node, module: nn.MultiheadAttention) -> Seen:
        settings = dict(zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), node.args, strict=False))
        settings |= node.kwargs
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported("has forward hooks")
        if not (settings["query"] is settings["key"] is settings["value"]):
            raise Unsupported("attends to something other than its own tokens")
        if settings.get("key_padding_mask") is not None or settings.get("attn_mask") is not None or settings.get("is_causal"):
            raise Unsupported("attention under a mask")
        if not module.batch_first or module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise Unsupported("only attention with the batch first, of keys and values as wide as tokens and nothing added, has a step")
        seen = self.seen(settings["query"])
        if seen.view != TOKENS:
            raise Unsupported("expected tokens (N, T, C)")
        name = str(node.target)
        qkv = self.on_positions(name, module, seen.value, "in_proj_weight")
        attended = self.emit(self.lowered.shapes[seen.value], Attention, qkv, heads=module.num_heads)
        return Seen(self.on_positions(f"{name}.out_proj", module.out_proj, attended), TOKENS)

    def concatenated(self, node: fx.Node, inputs: Any, dim: int = 0) -> Seen:
        """Tokens that are the same for every image, in front of the others."""
        name = self.constant_of(inputs[0]) if len(inputs) == 2 else None
        if name is None or dim not in (1, -2):
            raise Unsupported("only tokens put in front of others have a step")
        seen, first = self.seen(inputs[1]), tensor_of(self.model, name)
        channels, height, width = self.lowered.shapes[seen.value]
        if seen.view != TOKENS or first.numel() % channels or first.shape[-1] != channels:
            raise Unsupported("only tokens put in front of others have a step")
        out = (channels, 1, first.numel() // channels + height * width)
        source = Source("constant", channels, name)
        return Seen(self.emit(out, Prepend, seen.value, weights=self.weights(source)), TOKENS)

    def permuted(self, node: fx.Node, input: fx.Node, *order: Any) -> Seen:
        seen = self.seen(input)
        axes = list(range(len(shape_in(seen.view, self.lowered.shapes[seen.value])) + 1))
        if node.target in ("transpose", torch.transpose):
            a, b = (axis % len(axes) for axis in order)
            axes[a], axes[b] = axes[b], axes[a]
        else:
            axes = [axis % len(axes) for axis in (order[0] if len(order) == 1 else order)]
        view = permuted(seen.view, tuple(axes))
        if view is None:
            raise Unsupported("puts axes in an order that there is no step for")
        return seen._replace(view=view)
