"""Heads and neurons that are pruned go away: the same logits from smaller layers, and blocks that cannot be shrunk are named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import ATTENTIONS, MLPS, PackedAttention, TorchAttention, Unknown, UnknownAttention, digits, tiny_vit
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext.nn import Units, pruned_layers
from s2ap_ext.nn.attention import Attention


def size(net):
    return sum(p.numel() for p in net.parameters())


def assert_shrinks(net, x, to, **how):
    """``net``, pruned, gives the same logits with as many parameters as ``to`` says."""
    net.eval()
    with torch.no_grad():
        expected = net(x)
        densify(net, shrink=True, **how)
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)
    assert size(net) == to
    assert not any(type(m).__module__.startswith("s2ap_ext") for m in net.modules() if not isinstance(m, Attention))


@pytest.mark.parametrize("form", ATTENTIONS)
def test_heads(form):
    net = tiny_vit(attention=ATTENTIONS[form])
    of_heads = sum(
        p.numel() for name, p in net.named_parameters() if ".attn." in name and not name.endswith(("proj.bias", "o_proj.bias"))
    ) + sum(p.numel() for name, p in net.named_parameters() if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")))
    sparsify(net, 0.5, granularity="head")
    full = size(tiny_vit(attention=ATTENTIONS[form]))
    assert_shrinks(net, digits(), full - of_heads // 2)
    net(digits()).sum().backward()  # it trains on
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("form", [*MLPS, "torch"])
def test_neurons(form):
    options = {} if form == "torch" else {"mlp": MLPS[form]}
    net = tiny_vit(**options)
    of_neurons = sum(p.numel() for name, p in net.named_parameters() if ".mlp." in name) - 2 * 16
    full = size(net)
    assert_shrinks(sparsify(net, 0.75, granularity="neuron"), digits(), full - of_neurons * 3 // 4)
    assert net.blocks[0].mlp.get_submodule("fc2" if form == "torch" else "down").in_features == 8


def test_one_after_the_other():
    net = tiny_vit()
    full = size(net)
    densify(sparsify(net, 0.5, granularity="head"), shrink=True)
    densify(sparsify(net, 0.5, granularity="head"), shrink=True)
    sparsify(net, 0.5, granularity="neuron", exclude="blocks.1")
    assert_shrinks(net, digits(), full - 2 * (3 * 4 * 4 * 16 + 3 * 12) - 16 * (2 * 16 + 1))
    assert [block.attn.attention.num_heads for block in net.blocks] == [1, 1]


def test_a_block_of_which_nothing_stays_keeps_a_unit():
    for kind in ("head", "neuron"):
        net = sparsify(tiny_vit(), 1.0, granularity=kind)
        expected = net(digits())
        torch.testing.assert_close(densify(net, shrink=True)(digits()), expected)
        attention = net.blocks[0].attn.attention
        assert (attention.num_heads if kind == "head" else net.blocks[0].mlp.fc1.out_features) == 1


def test_other_granularities_have_no_units_to_shrink():
    net = sparsify(tiny_vit(), 0.5)
    expected, full = net(digits()), size(tiny_vit())
    with pytest.raises(ValueError, match="example: expected an input of the model, with which shrink finds the channels"):
        densify(net, shrink=True)
    torch.testing.assert_close(densify(net, shrink=True, example=digits())(digits()), expected, atol=1e-5, rtol=0)
    assert size(net) == full


def test_encoders_of_torch():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    x, padding = torch.rand(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for kind in ("head", "neuron"):
        net = sparsify(copy.deepcopy(encoder), 0.5, granularity=kind)
        expected = net(x, src_key_padding_mask=padding)
        densify(net, shrink=True)
        torch.testing.assert_close(net(x, src_key_padding_mask=padding), expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(net(x), densify(sparsify(copy.deepcopy(encoder), 0.5, granularity=kind))(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_all_that_torchs_attention_takes(batch_first, need_weights):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=batch_first)

        def forward(self, *args, **how):
            return self.attention(*args, **how)

    torch.manual_seed(0)
    net = sparsify(Holder(), 0.5, granularity="head").eval()
    small = densify(copy.deepcopy(net), shrink=True)
    stays = next(iter(pruned_layers(net).values())).mask
    q, k, v = torch.rand(3, 5, 16), torch.rand(3, 7, 6), torch.rand(3, 7, 10)
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    padding = torch.arange(7) >= torch.tensor([7, 5, 6])[:, None]
    later = torch.ones(5, 7).triu(1).bool()
    by_head = torch.randn(3, 4, 5, 7)
    for masks, masks_left in [
        ({}, {}),
        ({"key_padding_mask": padding}, {}),
        ({"attn_mask": later}, {}),
        ({"attn_mask": torch.randn(5, 7), "key_padding_mask": padding.float()}, {}),
        ({"attn_mask": by_head.flatten(0, 1)}, {"attn_mask": by_head[:, stays].flatten(0, 1)}),
    ]:
        how = {"need_weights": need_weights, "average_attn_weights": False}
        expected, of_heads = net(q, k, v, **masks, **how)
        output, weights = small(q, k, v, **{**masks, **masks_left}, **how)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
        assert (weights is None) == (not need_weights)
        if need_weights:
            torch.testing.assert_close(weights, of_heads[:, stays], rtol=0, atol=1e-5)
            torch.testing.assert_close(small(q, k, v)[1], small(q, k, v, average_attn_weights=False)[1].mean(dim=1))
    one = [t[0] if batch_first else t[:, 0] for t in (q, k, v)]
    torch.testing.assert_close(small(*one)[0], net(*one)[0], rtol=0, atol=1e-5)


class Stubborn(PackedAttention):
    """Writes its heads into a tensor of the model's width."""

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Counting(Unknown):
    """Tells its number of heads by a name that is known."""

    def forward(self, x, *, scale):
        self.h = self.heads
        return super().forward(x, scale=scale)


class Temperatures(PackedAttention):
    """One for each head."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1))

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


def test_parameters_of_heads_go_with_them():
    net = sparsify(tiny_vit(attention=Temperatures), 0.5, granularity="head")
    full = size(tiny_vit(attention=Temperatures))
    assert_shrinks(net, digits(), full - 2 * (2 * 4 * 4 * 16 + 3 * 8 + 2))
    assert net.blocks[0].attn.temperature.shape == (2, 1, 1)


def test_blocks_that_cannot_be_shrunk_are_named_and_nothing_changes():
    net = sparsify(tiny_vit(attention=Stubborn), 0.5, granularity="head")
    net.blocks[0].attn.__class__ = PackedAttention
    expected, full = net(digits()), size(tiny_vit())
    with pytest.raises(ValueError, match=r"shrink: blocks.1.attn cannot have fewer heads: RuntimeError: shape .* is invalid"):
        densify(net, shrink=True)
    assert torch.equal(net(digits()), expected)  # the first block too is as it was
    assert not pruned_layers(net)
    assert size(net) == full
    assert (net.blocks[0].attn.num_heads, net.blocks[0].attn.qkv.out_features) == (4, 48)


def test_a_block_that_computes_otherwise_is_noticed():
    class Scaled(PackedAttention):
        def forward(self, x):
            return super().forward(x) * self.num_heads

    net = sparsify(tiny_vit(attention=Scaled), 0.5, granularity="head")
    with pytest.raises(ValueError, match=r"shrink: blocks.0.attn does not compute the same with fewer heads"):
        densify(net, shrink=True)


def test_attention_that_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"the model itself is an nn.MultiheadAttention"):
        densify(sparsify(nn.MultiheadAttention(16, 4), 0.5, granularity="head"), shrink=True)
    net = sparsify(tiny_vit(attention=lambda w, h: TorchAttention(w, h, add_bias_kv=True)), 0.5, granularity="head")
    with pytest.raises(ValueError, match=r"shrink: blocks.0.attn.attention: expected .* without add_bias_kv and add_zero_attn"):
        densify(net, shrink=True)


def test_blocks_that_take_more_than_tokens_need_an_example():
    told = Units("blocks.*.inner", rows=("a", "b", "c"), columns="d", count=4)
    net = sparsify(tiny_vit(attention=UnknownAttention), 0.5, granularity="head", structure=told)
    full = size(tiny_vit())
    with pytest.raises(ValueError, match=r"shrink: blocks.0.attn.inner cannot be run .*missing 1 required keyword-only argument: 'scale'"):
        densify(copy.deepcopy(net), shrink=True)
    with pytest.raises(ValueError, match=r"shrink: blocks.0.attn.inner does not compute the same"):  # its heads become wider, not fewer
        densify(copy.deepcopy(net), shrink=True, example=digits(2))
    for block in net.blocks:
        block.attn.inner.heads = block.attn.inner.h
        block.attn.inner.__class__ = Counting
    assert_shrinks(net, digits(), full - 2 * (2 * 4 * 4 * 16 + 3 * 8), example=digits(2))
