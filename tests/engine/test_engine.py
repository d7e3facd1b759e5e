"""The sparse engine: whole networks against the models they were made from, forward and gradient, on both layouts."""

import copy
import dataclasses
import re
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from engine_models import MODELS, Branches, FusedBlock, Strange, ViT, all_dense, all_sparse, assert_close, gradient, images, pruned, seeded
from torch import nn

import s2ap_ext
from s2ap_ext import S2AP, backend, densify, engine, sparsify
from s2ap_ext.engine import Layer, SparseNetwork, compile_sparse
from s2ap_ext.engine.choice import cheapest, lanes
from s2ap_ext.nn import cost, dense_kernels, execution, pruned_layers

needs_kernels = pytest.mark.skipif(backend().cpu != "C++", reason="what is chosen rests on the C++ kernels")


def check(network, model, x):
    """Outputs with and without gradient, and the gradient, are the model's.

    Rounding opens and shuts gates that are all but 0 and picks among maxima that are all but equal, in the model too: in few images.
    """
    with torch.no_grad():
        expected = model(x)
        assert_close(network(x), expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    y, dx = gradient(network, x, direction)
    assert_close(y, expected)
    expected = gradient(model, x, direction)[1]
    apart = (dx - expected).abs().flatten(1).amax(1) > 1e-5 * expected.abs().max()
    assert apart.sum() <= len(x) // 8


# ---- Numerics


@pytest.mark.parametrize("choose", [all_sparse, all_dense])
@pytest.mark.parametrize("name", MODELS)
def test_network_is_the_model(name, choose):
    model, size = pruned(name)
    network = compile_sparse(model, images(2, size), choose=choose)
    assert network.dense_parts == []
    assert set(network.layers.values()) == {choose(None)}
    for n in (1, 3, 8, 13):
        check(network, model, images(n, size, seed=n))


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet", "torchvision_basic"])
def test_a_mixture_of_sparse_and_dense_layers(name):
    model, size = pruned(name)
    for parity in (0, 1):
        count = iter(range(100))
        network = compile_sparse(model, images(2, size), choose=lambda layer, c=count, p=parity: ("sparse", "dense")[next(c) % 2 == p])
        assert set(network.layers.values()) == {"sparse", "dense"}
        for n in (3, 19):
            check(network, model, images(n, size))


@pytest.mark.parametrize("name", ["resnet18", "vgg_bn"])
def test_a_densified_model(name):
    model, size = pruned(name)
    network = compile_sparse(densify(copy.deepcopy(model)), images(2, size), choose=all_sparse)
    check(network, model, images(9, size))


def test_batchnorm_relu_and_sums_are_part_of_the_convolutions():
    model, size = pruned("resnet18")
    steps = [type(step).__name__ for step in compile_sparse(model, images(1, size), choose=all_sparse)._blocks.steps]
    assert steps == ["ToBlocks", *["SparseConv"] * 20, "Pool", "Flatten", "Linear"]


@pytest.mark.parametrize(("n", "chunk"), [(1, 4), (7, 3), (40, 16), (40, 17), (33, 1000)])
def test_images_do_not_depend_on_their_chunk(n, chunk):
    model, size = pruned("resnet18")
    check(compile_sparse(model, images(1, size), choose=all_sparse, chunk=chunk), model, images(n, size))


def test_an_empty_batch():
    model, size = pruned("resnet18")
    network = compile_sparse(model, images(1, size))
    x = torch.zeros(0, *size, requires_grad=True)
    y = network(x)
    y.sum().backward()
    assert y.shape == (0, 10)
    assert x.grad.shape == x.shape


def test_inputs_of_any_strides_and_modes():
    model, size = pruned("resnet18")
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    x = images(13, size)
    expected = network(x)
    assert torch.equal(network(x.to(memory_format=torch.channels_last)), expected)
    with torch.inference_mode():
        assert torch.equal(network(x.clone()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(x), expected)
    check(network, model, x.to(memory_format=torch.channels_last))


def test_an_output_of_images_and_a_relu_at_the_end():
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()), 0.5).eval()
    network = compile_sparse(model, images(1, (3, 9, 9)), choose=all_sparse)
    for n in (2, 18):
        check(network, model, images(n, (3, 9, 9)))


def test_layers_that_share_a_mask():
    make, size, _ = MODELS["torchvision_basic"]
    x = images(11, size)
    model = sparsify(seeded(make), 0.5, granularity="channel", tied=True, example=x[:2]).eval()
    network = compile_sparse(model, x[:1], choose=all_sparse)
    check(network, model, x)
    with torch.no_grad():
        nn.init.normal_(pruned_layers(model)["conv1.pruned_weight.together"].scores)
    assert not network.is_current()
    network.refresh()
    check(network, model, x)


def test_a_model_that_is_a_layer():
    torch.manual_seed(0)
    model = sparsify(nn.Conv2d(3, 6, 3, padding=1), 0.5)
    check(compile_sparse(model, images(1, (3, 9, 9)), choose=all_sparse), model, images(11, (3, 9, 9)))


def test_subclasses_and_parametrized_layers():
    class Renamed(nn.Conv2d):
        pass

    torch.manual_seed(0)
    model = sparsify(
        nn.Sequential(Renamed(3, 8, 3), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))), 0.5, exclude=["2"]
    )
    network = compile_sparse(model.eval(), images(1, (3, 9, 9)), choose=all_sparse)
    assert network.layers == {"0": "sparse", "2": "sparse"}
    check(network, model, images(11, (3, 9, 9)))


def test_a_pruned_weight_in_a_forward_of_its_own():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    torch.manual_seed(0)
    model, x = sparsify(nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 0.5), images(11, (3, 9, 9))
    network = compile_sparse(model.eval(), x[:1], choose=all_sparse)
    assert [part.name for part in network.dense_parts] == ["conv2d"]
    check(network, model, x)
    with torch.no_grad():
        nn.init.normal_(model[0].pruned_weight.scores)
    assert not network.is_current()
    network.refresh()
    check(network, model, x)


def test_bits_do_not_depend_on_the_number_of_threads():
    model, size = pruned("resnet18")
    network, x, threads = compile_sparse(model, images(1, size), choose=all_sparse), images(24, size), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(gradient(network, x, torch.ones(24, 10)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- Dense parts


def test_dense_parts_are_named_and_run():
    torch.manual_seed(0)
    model = sparsify(Strange(), 0.5).eval()
    network = compile_sparse(model, images(2, (3, 15, 15)), choose=all_sparse)
    reasons = dict(network.dense_parts)
    assert reasons["act"] == "no step for Softplus"
    assert reasons["b"] == "padding_mode 'reflect'"
    assert "mul" in reasons
    assert network.layers == {"a": "sparse", "gate": "sparse", "c": "dense"}
    assert all(f"dense part {name}: {reason}" in repr(network) for name, reason in reasons.items())
    for n in (1, 3, 8, 13, 40):
        check(network, model, images(n, (3, 15, 15)))
    with pytest.raises(ValueError, match=r"network: cannot be saved.*act \(no step for Softplus\)"):
        network.save("never.safetensors")


def test_layers_around_attention_of_another_form_run_on_their_kept_weights():
    torch.manual_seed(0)
    model = sparsify(ViT(FusedBlock), 0.5).eval()
    network = compile_sparse(model, images(2, (3, 8, 10)), choose=all_sparse)
    assert [(part.name, part.reason) for part in network.dense_parts][:2] == [
        ("scaled_dot_product_attention", "no step for scaled_dot_product_attention"),
        ("reshape_1", "puts axes in an order that there is no step for"),
    ]
    assert set(network.layers) == {"patches", "head", *(f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("qkv", "proj"))}
    assert set(network.layers.values()) == {"sparse"}
    for n in (1, 3, 13):  # 3: as many images as there are of queries, keys and values
        check(network, model, images(n, (3, 8, 10)))


class Masked(nn.Module):
    """Attention that has no step, and tokens as the result."""

    def __init__(self, **settings):
        super().__init__()
        self.attention, self.settings = nn.MultiheadAttention(8, 2, batch_first=True, **settings), settings
        self.register_buffer("mask", torch.ones(12, 12).triu(1).bool())

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        return self.attention(x, x, x, attn_mask=None if self.settings else self.mask)[0]


@pytest.mark.parametrize(
    ("settings", "reason"), [({}, "attention under a mask"), ({"add_bias_kv": True}, "only attention with the batch first")]
)
def test_attention_without_a_step_is_a_dense_part(settings, reason):
    torch.manual_seed(0)
    model, x = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), Masked(**settings)), 0.5).eval(), images(5, (3, 5, 6))
    network = compile_sparse(model, x[:2], choose=all_sparse)
    assert [part.name for part in network.dense_parts] == ["1.attention"]
    assert network.dense_parts[0].reason.startswith(reason)
    check(network, model, x)


def test_results_with_channels_last():
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), ChannelsLast(), nn.Linear(8, 6)), 0.5).eval()
    network = compile_sparse(model, images(2, (3, 9, 9)), choose=all_sparse)
    assert network.layers == {"0": "sparse", "3": "sparse"}
    for n in (3, 13):
        check(network, model, images(n, (3, 9, 9)))


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.transpose(1, -1)


def test_refresh_reaches_dense_parts():
    torch.manual_seed(0)
    model = sparsify(Strange(), 0.5)
    network = compile_sparse(model, images(2, (3, 15, 15)), choose=all_sparse)
    assert model.training
    with torch.no_grad():
        model.norm.weight.mul_(2)
        model.scale.add_(1)
    assert not network.is_current()
    network.refresh()
    check(network, model.eval(), images(13, (3, 15, 15)))


def test_layers_with_hooks_run_as_they_are():
    model, size = pruned("resnet18")
    model.layer1[0].conv2.register_forward_hook(lambda module, args, out: out + 1)
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    assert network.dense_parts == [("layer1.0.conv2", "has forward hooks")]
    check(network, model, images(9, size))


# ---- The model changes


def test_refresh_takes_masks_weights_and_statistics():
    model, size = pruned("resnet18")
    network, x = compile_sparse(model, images(1, size), choose=all_sparse), images(9, size)
    assert network.is_current()
    before = network(x)

    def scores():
        nn.init.normal_(model.layer2[0].conv1.scores)

    def weight():
        model.layer1[0].conv1.weight.data = torch.randn_like(model.layer1[0].conv1.weight)

    def statistics():
        model.bn1.running_mean.add_(1)

    def sparsity():
        model.layer3[0].conv1.sparsity = 0.5

    for change in (scores, weight, statistics, sparsity):
        with torch.no_grad():
            change()
        assert not network.is_current(), change
        assert torch.equal(network(x), before), change  # it notices nothing by itself
        network.refresh()
        assert network.is_current(), change
        check(network, model, x)
        before = network(x)


def test_is_current_sees_perturbed_scores():
    model, size = pruned("digits_cnn")
    optimizer = S2AP(model, torch.optim.SGD([layer.scores for layer in pruned_layers(model).values()], lr=0.1), gamma=0.5)
    network, x, y = compile_sparse(model, images(1, size)), images(9, size), torch.arange(9)
    F.cross_entropy(model(x), y).backward()
    optimizer.ascend()
    assert not network.is_current()
    network.refresh()
    check(network, model, x)
    F.cross_entropy(model(x), y).backward()
    optimizer.descend()
    assert not network.is_current()
    network.refresh()
    check(network, model, x)


def test_weights_that_are_not_finite_are_refused():
    model, size = pruned("resnet18")
    network = compile_sparse(model, images(1, size))
    before = network(images(3, size))
    with torch.no_grad():
        model.bn1.running_var[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in the tensors of conv1, bn1"):
        network.refresh()
    assert torch.equal(network(images(3, size)), before)


# ---- Memory and threads


def test_activations_lie_in_the_same_memory_again():
    model, size = pruned("resnet18")
    network, x = compile_sparse(model, images(1, size), choose=all_sparse), images(16, size)

    def held():
        return sorted(t.data_ptr() for arena in network._arenas._arenas.values() for free in arena._free.values() for t in free)

    with torch.no_grad():
        network(x)
        inference = held()
        network(x)
        assert held() == inference
    gradient(network, x, torch.ones(16, 10))
    training = held()
    assert len(training) > len(inference)
    for _ in range(3):
        gradient(network, x, torch.ones(16, 10))
        assert held() == training


def test_buffers_are_few():
    model, size = pruned("resnet18")
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    with torch.no_grad():
        network(images(16, size))
    (arena,) = (arena for key, arena in network._arenas._arenas.items() if key == ("blocks", -(-16 // lanes())))
    assert max(len(free) for free in arena._free.values()) <= 3  # what a residual block has at a time, of one size


def test_halo_stays_zero():
    model, size = pruned("wide_resnet")
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    gradient(network, images(16, size), torch.ones(16, 10))
    blocks = [t for arena in network._arenas._arenas.values() for free in arena._free.values() for t in free if t.dim() == 5]
    assert blocks
    for t in blocks:
        border = t.clone()
        border[:, :, 1:-1, 1:-1] = 0
        assert not border.any()


def test_two_threads():
    model, size = pruned("resnet18")
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    inputs = [images(13, size, seed=i) for i in range(2)]
    expected = [gradient(network, x, torch.ones(13, 10)) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            found = gradient(network, inputs[i], torch.ones(13, 10))
            wrong.extend(i for a, b in zip(found, expected[i], strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_gradients_of_two_calls_at_once_and_only_once_each():
    model, size = pruned("resnet18")
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    a, b = (images(9, size, seed=i).requires_grad_() for i in range(2))
    ya, yb = network(a), network(b)
    ya.sum().backward(retain_graph=True)
    yb.sum().backward()
    assert_close(a.grad, gradient(model, a.detach(), torch.ones(9, 10))[1])
    assert_close(b.grad, gradient(model, b.detach(), torch.ones(9, 10))[1])
    with pytest.raises(RuntimeError, match="gone after the first backward"):
        ya.sum().backward()


# ---- Errors


class Fickle(nn.Module):
    """Torch.fx sees its first call only."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 3), []

    def forward(self, x):
        self.calls.append(0)
        return self.conv(x).flatten(1) * len(self.calls)


def by_batch():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())


CANNOT = [
    (Branches, ValueError, r"torch.fx cannot trace layer inner.1 \(.*engine_models.py, line \d+\)"),
    (Fickle, RuntimeError, "what torch.fx traced is not what it computes"),
    (by_batch, ValueError, "layer 1 normalises by the batch in evaluation mode too"),
    (lambda: nn.Sequential(nn.Identity()), ValueError, "gives its input back"),
    (lambda: nn.Conv2d(3, 4, 3).double(), ValueError, "expected float32 parameters on the CPU, got float64"),
    (lambda: None, TypeError, "model: expected an nn.Module, got NoneType"),
]


@pytest.mark.parametrize(("make", "error", "message"), CANNOT)
def test_models_that_cannot_be_compiled(make, error, message):
    with pytest.raises(error, match=message):
        compile_sparse(make(), images(2, (3, 9, 9)))


WRONG_IMAGES = [
    (torch.rand(2, 3, 16, 17), r"x: expected float32 images \[N, 3, 16, 16\] on the CPU, got float32 of shape \(2, 3, 16, 17\) on cpu"),
    (torch.rand(3, 16, 16), r"got float32 of shape \(3, 16, 16\)"),
    (torch.rand(2, 3, 16, 16).double(), "got float64"),
    (torch.empty(2, 3, 16, 16, device="meta"), "on meta"),
]


@pytest.mark.parametrize(("x", "message"), WRONG_IMAGES)
def test_wrong_images_are_named(x, message):
    model, size = pruned("resnet18")
    with pytest.raises(ValueError, match=message):
        compile_sparse(model, images(1, size))(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
        ({"choose": lambda layer: "fast"}, "choose: expected 'sparse' or 'dense' for layer conv1, got 'fast'"),
        ({"example": torch.rand(3, 16, 16)}, "example: expected float32 images"),
    ],
)
def test_wrong_settings_are_named(change, message):
    model, size = pruned("resnet18")
    with pytest.raises(ValueError, match=re.escape(message)):
        compile_sparse(model, **{"example": images(1, size), **change})


def test_compiling_leaves_the_model_as_it_was():
    model, size = pruned("wide_resnet")
    model.train()
    model.fc.eval()
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    modes = [module.training for module in model.modules()]
    network = compile_sparse(model, images(2, size))
    gradient(network, images(9, size), torch.ones(9, 10))
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == attributes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_what_is_asked_of_choose():
    model, size = pruned("resnet18")
    seen = []
    compile_sparse(model, images(1, size), choose=lambda layer: seen.append(layer) or "dense", chunk=24)
    for batch in (24, 1):
        layer = next(layer for layer in seen if layer.name == "layer2.0.conv1" and layer.batch == batch)
        assert (layer.weight, layer.input, layer.output, layer.stride, layer.groups) == ((16, 8, 3, 3), (8, 16, 16), (16, 8, 8), (2, 2), 1)
        assert layer.density == pytest.approx(0.1, abs=0.01)


def convolution(density, batch=32, name="a"):
    return Layer(name, (128, 128, 3, 3), density, (128, 16, 16), (128, 16, 16), batch)


@needs_kernels
def test_what_is_chosen_by_itself(monkeypatch):
    monkeypatch.setattr(cost, "load", cost.Rates)
    for batch in (32, 1):
        assert cheapest([convolution(0.01, batch)]) == {"a": "sparse"}
        assert cheapest([convolution(0.9, batch)]) == {"a": "dense"}
    assert cheapest([convolution(0.01), Layer("b", (10, 128), 0.01, (128,), (10,), 32)]) == {"a": "sparse", "b": "dense"}
    # A dense layer among sparse ones pays for moving its activations, and one sparse layer is not worth that of nine dense ones.
    nearly = next(d / 100 for d in range(100) if cheapest([convolution(d / 100)]) == {"a": "dense"})
    assert set(cheapest([convolution(nearly), *(convolution(0.1, name=str(i)) for i in range(9))]).values()) == {"sparse"}
    assert set(cheapest([convolution(0.1), *(convolution(0.9, name=str(i)) for i in range(9))]).values()) == {"dense"}


@needs_kernels
def test_outputs_computed_for_one_that_is_wanted():
    n = engine.choice.lanes()
    layer = Layer("a", (4, 4, 3, 3), 0.1, (4, 8, 8), (4, 4, 4), 1, stride=(2, 2))  # of a plane of 5 x 5 without its last row and column
    assert engine.choice.computed(layer) == -(-19 // n) * n / 16
    assert engine.choice.computed(dataclasses.replace(layer, batch=2 * n)) == 1
    assert engine.choice.computed(dataclasses.replace(layer, batch=n + 1)) == 2 * n / (n + 1)


def test_without_the_kernels_all_is_dense(monkeypatch):
    monkeypatch.setattr(execution, "backend", lambda: types.SimpleNamespace(cpu="Python"))
    assert cheapest([convolution(0.01)]) == {"a": "dense"}


@needs_kernels
def test_one_switch_turns_sparse_execution_off():
    model, size = pruned("resnet18")
    x = images(9, size)
    assert "sparse" in compile_sparse(model, x).layers.values()
    assert engine.for_attack(model, x) is not None
    with dense_kernels():
        assert set(compile_sparse(model, x).layers.values()) == {"dense"}
        assert set(compile_sparse(model, x, choose=all_sparse).layers.values()) == {"sparse"}  # who says so gets it
        assert engine.for_attack(model, x) is None
    assert engine.for_attack(model, x) is not None


@pytest.mark.parametrize("few", ["sparse", "dense"])
def test_few_images_run_as_was_chosen_for_them(few, tmp_path):
    model, size = pruned("resnet18")
    many = "dense" if few == "sparse" else "sparse"
    network = compile_sparse(model, images(1, size), choose=lambda layer: many if layer.batch > 1 else few, chunk=16)
    network.save(tmp_path / "network.safetensors")
    for net in (network, SparseNetwork.load(tmp_path / "network.safetensors")):
        assert set(net.layers.values()) == {many}
        assert set(net.small_batch_layers.values()) == {few}
        for n in (1, 8, 17, 35):
            check(net, model, images(n, size))
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    assert not network.is_current()
    network.refresh()
    for n in (1, 16):
        check(network, model, images(n, size))


def test_images_that_fill_no_block_run_by_themselves():
    model, size = pruned("digits_cnn")
    n = lanes()
    network = compile_sparse(model, images(1, size), chunk=3 * n)
    assert [piece.stop for piece in network._pieces(2 * n + 1)] == [2 * n, 2 * n + 1]
    assert [piece.stop for piece in network._pieces(2 * n - 1)] == [2 * n - 1]
    assert [piece.stop for piece in network._pieces(3 * n + 1)] == [3 * n, 3 * n + 1]
    assert list(network._pieces(0)) == []


def test_the_package_offers_it():
    assert s2ap_ext.compile_sparse is compile_sparse
