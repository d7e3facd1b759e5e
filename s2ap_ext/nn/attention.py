"""Attention of any width: what is left of ``nn.MultiheadAttention`` when heads have gone away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of which heads times head width need not be the model's width, made of four linear layers.

    It takes the place of an ``nn.MultiheadAttention``, whose arguments, layouts and results it has. Attention weights, where they are
    asked for, are those of the heads that it has, or their mean.

    Args:
        q, k, v: the projections of queries, keys and values, to as many outputs as the heads have together.
        out: the projection of what the heads give.
        num_heads: the number of heads.
        dropout: of the attention weights, in training.
        batch_first: whether tensors are [batch, tokens, features], and not [tokens, batch, features].

    Equivalent to::

        split = lambda t: t.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(split(q(query)), split(k(key)), split(v(value)))
        out(heads.transpose(1, 2).flatten(2))
    """

    in_proj_bias = None  # with this and the next torch's encoder layers know that their fused path does not fit
    _qkv_same_embed_dim = False

    def __init__(
        self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, *, num_heads: int, dropout: float, batch_first: bool
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = q, k, v, out
        self.num_heads, self.dropout, self.batch_first = num_heads, dropout, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; of an ``attn_mask`` in three dimensions the first is that of batch times the heads left."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._heads(self.q(query)), self._heads(self.k(key)), self._heads(self.v(value))
        bias = self._bias(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = F.dropout((logits if bias is None else logits + bias).softmax(dim=-1), dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        output = self.out(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _bias(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What the masks add to the logits, to be broadcast to [batch, heads, queries, keys]."""
        bias = None
        if attn_mask is not None:
            bias = _added(attn_mask, q.dtype)
            bias = bias.view(len(q), self.num_heads, *bias.shape[1:]) if bias.dim() == 3 else bias
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q.dtype)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a number to add: minus infinity where a boolean one is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(dtype)
