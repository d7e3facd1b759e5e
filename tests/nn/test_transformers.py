"""Families of Hugging Face's transformers, from small random configurations: heads and neurons are found, pruned, and go away."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from s2ap_ext import S2AP, densify, sparsify
from s2ap_ext.nn import pruned_layers, sparsity_table, train_scores
from s2ap_ext.nn.tracing import configured_calls

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 16, "patch_size": 8}
CONFIGS = {
    "ViT": {**SIZES, **IMAGES, "intermediate_size": 32},
    "DeiT": {**SIZES, **IMAGES, "intermediate_size": 32},
    "Swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16},
    "MobileViT": {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    "Dinov2": {**SIZES, **IMAGES, "mlp_ratio": 2},
    "Dinov2 gated": {**SIZES, **IMAGES, "mlp_ratio": 2, "use_swiglu_ffn": True},
    "Bert": {**SIZES, "intermediate_size": 32, "vocab_size": 40, "max_position_embeddings": 16},
    "Llama": {**SIZES, "intermediate_size": 32, "vocab_size": 40, "num_key_value_heads": 2, "pad_token_id": 0},
}
BLOCKS = {"Swin": 3, "ConvNext": 2, "MobileViT": 9}  # two in the others
CASES = [(family, kind) for family in CONFIGS for kind in ("head", "neuron") if (family, kind) != ("ConvNext", "head")]


def tiny(family):
    name = family.split()[0]
    what = "Sequence" if name in ("Bert", "Llama") else "Image"
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[family], num_labels=3)
    net = getattr(transformers, f"{name}For{what}Classification")(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def size(net):
    return sum(p.numel() for p in net.parameters())


def flops(net, x):
    with FlopCounterMode(display=False) as counter:
        net(**x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_search_densify_and_shrink(family, kind):
    net = tiny(family)
    x = {name: value.repeat_interleave(2, dim=0) for name, value in configured_calls(net)[0][1].items()}
    dense, given = size(net), flops(net, x)
    train_scores(sparsify(net, 0.5, granularity=kind))
    layers = pruned_layers(net)
    assert len(layers) == BLOCKS.get(family, 2)
    pruned = [row for row in sparsity_table(net).rows if row.granularity != "dense"]
    assert {row.granularity for row in pruned} == {kind}
    optimizer = S2AP(net, torch.optim.SGD([layer.scores for layer in layers.values()], lr=0.5, momentum=0.9), gamma=0.3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(**x).logits, torch.tensor([0, 1]))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert all((layer.scores.grad != 0).all() for layer in layers.values())  # of pruned units too
    with torch.no_grad():
        expected = net(**x).logits
        assert torch.equal(densify(copy.deepcopy(net))(**x).logits, expected)
        densify(net, shrink=True)
        torch.testing.assert_close(net(**x).logits, expected, rtol=0, atol=1e-5)
        gone = sum(row.weights - row.kept for row in pruned)
        assert gone <= dense - size(net) <= 1.4 * gone  # with the biases, and Swin's relative positions
        assert flops(net, x) < given
    assert all(type(m).__module__.partition(".")[0] in ("torch", "transformers") for m in net.modules())


def test_a_model_within_another():
    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny("Swin")  # whose blocks take windows, so random tokens do not suit them

        def forward(self, x):
            return self.model((x - 0.5) / 0.25).logits

    net, x = sparsify(Normalised(), 0.5, granularity="head"), torch.rand(2, 3, 16, 16)
    assert len(pruned_layers(net)) == BLOCKS["Swin"]
    with torch.no_grad():
        torch.testing.assert_close(densify(copy.deepcopy(net), shrink=True)(x), net(x), rtol=0, atol=1e-5)


def test_layers_whose_inputs_windows_do_not_divide_are_named():
    for family, named in [
        ("ViT", "vit.embeddings.patch_embeddings.projection (3)"),
        ("Swin", "projection (3)"),
        ("ConvNext", "dwconv (1)"),
    ]:
        with pytest.warns(UserWarning, match="which stay dense: ") as caught:
            net = sparsify(tiny(family), 0.5, granularity="2:4")
        assert named in str(caught[0].message)
        assert len(pruned_layers(net)) > 2
