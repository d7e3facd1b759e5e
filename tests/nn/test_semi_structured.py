"""Semi-structured weights: where they cannot be, the reason is told. What they compute is measured and compared on a GPU."""

import pytest
import torch
from helpers import snapshot
from torch import nn

from s2ap_ext import densify, sparsify
from s2ap_ext.nn import S2APLinear, pruned_layers, semi_structured


def net(granularity="2:4", dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)
    return sparsify(model, 0.5, granularity=granularity)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU whose kernels take weights of at least 32 rows; what they pack stays dense."""

    def to_form(weight):
        if len(weight) < 32:
            raise RuntimeError("Error original_tensor.shape: both dimensions must be larger than 32\nand more")
        return weight.clone()

    monkeypatch.setattr(semi_structured, "_pack", lambda layer: semi_structured._form_of(layer.masked_weight.detach()))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", to_form)


def test_on_the_cpu_there_are_none_and_the_model_stays_as_it_is():
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"format 'semi-structured': 0: expected a weight on a CUDA device, .* got cpu"):
        densify(model, format="semi-structured")
    assert [type(module) for module in model] == [S2APLinear, nn.ReLU, S2APLinear]
    assert all(torch.equal(a, b) for a, b in zip(before[2].values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"dtype": torch.float32}, r"0: expected a weight of torch.float16 or torch.bfloat16, got torch.float32; convert the model first"),
        ({"granularity": "weight"}, "0: expected at most 2 non-zero weights of every 4 neighbouring inputs"),
    ],
    ids=["dtype", "pattern"],
)
def test_the_reason_is_told(made, reason, on_a_gpu):
    with pytest.raises(ValueError, match=reason):
        densify(net(**made), format="semi-structured")


def test_layers_that_do_not_fit_stay_dense_with_a_warning(on_a_gpu):
    model, plain = net(), densify(net())
    with pytest.warns(
        UserWarning, match="these layers stay dense: 2: Error original_tensor.shape: both dimensions must be larger than 32$"
    ):
        densify(model, format="semi-structured")
    assert not pruned_layers(model)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    x = torch.rand(3, 64, dtype=torch.bfloat16)
    assert torch.equal(model(x), plain(x))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="format 'semi-structured': the model has no pruned linear layer"):
        densify(sparsify(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.5), format="semi-structured")
    with pytest.raises(ValueError, match="format: expected one of dense, semi-structured, got '2:4'"):
        densify(net(), format="2:4")
