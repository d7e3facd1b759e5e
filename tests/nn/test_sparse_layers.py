"""Layers that train on their kept weights alone: the same gradients as dense ones, in their own memory layout."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_ext import AWP, S2AP, S2APConv2d, backend, densify, sparsify
from s2ap_ext.engine import compile_sparse, for_attack
from s2ap_ext.nn import cost, dense_kernels, pruned_layers, train_scores, train_weights
from s2ap_ext.nn.layout import KEEPING, empty_batch_innermost, is_batch_innermost

needs_kernels = pytest.mark.skipif(backend().cpu != "C++", reason="without the kernels layers are dense")


@pytest.fixture
def always_sparse(monkeypatch):
    monkeypatch.setattr(cost, "is_faster_sparse", lambda shape, density: True)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


X, Y = torch.rand(17, 3, 12, 12, generator=torch.Generator().manual_seed(1)), torch.arange(17) % 4


def gradients(model):
    x = X.clone().requires_grad_()
    loss = F.cross_entropy(model(x), Y)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad), *(b for b in model.buffers())]


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("what", [train_scores, train_weights, lambda m: m.requires_grad_(True)], ids=["scores", "weights", "both"])
def test_gradients_are_those_of_the_dense_layers(what):
    sparse = what(sparsify(net(), 0.7))
    dense = copy.deepcopy(sparse)
    got = gradients(sparse)
    with dense_kernels():
        expected = gradients(dense)
    assert sparse[0].mask_state.selection.kept_weights is not None
    assert dense[0].mask_state.selection.kept_weights is None
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Fire(nn.Module):
    """As in SqueezeNet: two convolutions side by side, all activations in place."""

    def __init__(self, inputs, squeezed, expanded):
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeezed, expanded, 1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1)


class InPlaceSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = F.relu_(self.a(x))
        y = self.b(x)
        y += x
        return y.mul_(0.5).clamp_(max=1).mean((2, 3))


IN_PLACE = {
    "vgg": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(108, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)),
    ),
    "vgg_bn": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Hardtanh(inplace=True)),
        *(nn.Conv2d(8, 12, 3), nn.LeakyReLU(inplace=True), nn.AvgPool2d(2), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(48, 4)),
    ),
    "squeezenet": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 6), Fire(12, 4, 8)),
        *(nn.Conv2d(16, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ),
    "sum": lambda: nn.Sequential(InPlaceSum(), nn.Linear(8, 4)),
}


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("what", [train_scores, train_weights, lambda m: m.requires_grad_(True)], ids=["scores", "weights", "both"])
def test_networks_that_work_in_place(name, what):
    torch.manual_seed(0)
    sparse = what(sparsify(IN_PLACE[name](), 0.5))
    dense = copy.deepcopy(sparse)
    got = gradients(sparse)
    with dense_kernels():
        expected = gradients(dense)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_an_output_may_be_changed_in_place():
    model = sparsify(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True)), 0.95)
    y = model(torch.rand(64, 64, 16, 16))
    assert is_batch_innermost(y)
    y.sum().backward()
    assert model[0].scores.grad.isfinite().all()


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize(
    "make", [lambda m: S2AP(train_scores(m), torch.optim.SGD(m.parameters(), 0.05), gamma=0.1), "awp"], ids=["S2AP", "AWP"]
)
def test_steps_follow_those_of_the_dense_layers(make):
    if make == "awp":
        make = lambda m: AWP(train_weights(m), torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05), gamma=0.01)  # noqa: E731
    models = [sparsify(net(), 0.7), sparsify(net(), 0.7)]
    steps = []
    for model in models:
        optimizer = make(model)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            return loss

        steps.append(lambda optimizer=optimizer, closure=closure: optimizer.step(closure))
    for _ in range(3):
        steps[0]()
        with dense_kernels():
            steps[1]()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for layer in pruned_layers(models[0]).values():
        if isinstance(layer, S2APConv2d):
            assert not layer.masked_weight[~layer.mask].any()


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_a_kept_weight_of_zero_trains():
    layer = S2APConv2d(4, 4, 3, padding=1, sparsity=0.5)
    train_weights(layer)
    with torch.no_grad():
        kept = layer.mask.nonzero()[0]
        layer.weight[tuple(kept)] = 0
    layer(torch.rand(16, 4, 6, 6)).square().sum().backward()
    assert layer.weight.grad[tuple(kept)] != 0
    assert not layer.weight.grad[~layer.mask].any()


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("train", [train_scores, train_weights])
def test_listeners_get_the_gradient_at_every_weight(train):
    layer, seen, x = train(S2APConv2d(4, 4, 3, padding=1, sparsity=0.5)), [], torch.rand(16, 4, 6, 6)
    layer.mask_state.listen(lambda scores, grad: seen.append(grad))
    layer(x).square().sum().backward()
    assert layer.mask_state.selection.kept_weights is not None
    masked = layer.masked_weight.detach().requires_grad_()
    F.conv2d(x, masked, layer.bias, padding=1).square().sum().backward()
    torch.testing.assert_close(seen, [masked.grad], rtol=1e-4, atol=1e-4)
    if train is train_weights:
        torch.testing.assert_close(layer.weight.grad, masked.grad * layer.mask, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_places_are_listed_once_for_a_mask_and_values_follow_the_weights(monkeypatch):
    calls = []
    pattern = torch.ops.s2ap.sparse_pattern
    monkeypatch.setattr(torch.ops.s2ap, "sparse_pattern", lambda *a: calls.append(1) or pattern(*a))
    layer = train_weights(S2APConv2d(4, 4, 3, sparsity=0.5))
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    for _ in range(3):
        y = layer(torch.rand(16, 4, 6, 6))
        y.square().sum().backward()
        optimizer.step()
    assert len(calls) == 1
    x = torch.rand(16, 4, 6, 6)
    torch.testing.assert_close(layer(x).detach(), layer(x).detach())
    with torch.no_grad():
        torch.testing.assert_close(layer(x.requires_grad_()), F.conv2d(x, layer.masked_weight, layer.bias))


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_threads_that_train_on_the_same_layer():
    layer, x, barrier, found = train_weights(S2APConv2d(4, 4, 3, sparsity=0.5)), torch.rand(16, 4, 6, 6), threading.Barrier(4), []
    weights = [torch.randn_like(layer.weight) for _ in range(50)]

    def work():
        for weight in weights:
            if barrier.wait() == 0:
                with torch.no_grad():
                    layer.weight.copy_(weight)
            barrier.wait()
            found.append((weight, layer(x).detach()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    for weight, y in found:
        torch.testing.assert_close(y, F.conv2d(x, weight * layer.mask, layer.bias), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_without_gradients_the_bits_are_those_of_the_dense_layer():
    model = sparsify(net(), 0.7).eval()
    with torch.no_grad():
        before = model(X)
        assert torch.equal(densify(model)(X), before)


def test_modules_between_keep_the_layout():
    x = empty_batch_innermost((6, 4, 8, 8), X).copy_(torch.rand(6, 4, 8, 8))
    for plain in (nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2)):
        model = sparsify(nn.Sequential(copy.deepcopy(plain), nn.Linear(2, 2)), 0.5)[0]
        assert type(model) is KEEPING[type(plain)]
        a, b = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
        got, expected = model(a), plain(b)
        assert is_batch_innermost(got)
        torch.testing.assert_close(got, expected)
        weight = torch.rand_like(expected)
        got.mul(weight).sum().backward()
        expected.mul(weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        assert model.state_dict().keys() == plain.state_dict().keys()
        for k, v in model.state_dict().items():
            torch.testing.assert_close(v, plain.state_dict()[k])


def test_densify_takes_the_classes_back():
    given = [type(m) for m in net().modules()]
    assert [type(m) for m in densify(sparsify(net(), 0.5)).modules()] == given


@pytest.mark.parametrize(
    ("weight", "x", "density", "expected"),
    [
        ((64, 64, 3, 3), (64, 64, 32, 32), 0.1, True),
        ((64, 64, 3, 3), (64, 64, 32, 32), 0.9, False),
        ((64, 64, 3, 3), (1, 64, 32, 32), 0.1, False),  # small batches train dense
        ((8, 3, 3, 3), (64, 3, 8, 8), 0.01, False),  # too little to do
        ((512, 512, 3, 3), (64, 512, 4, 4), 0.05, True),
    ],
)
def test_cost_model(weight, x, density, expected, monkeypatch):
    monkeypatch.setattr(cost, "load", cost.Rates)
    assert cost.is_faster_sparse(cost.Shape.from_sizes(weight, x, (1, 1)), density) is expected


def test_a_calibration_is_kept_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost.load.cache_clear()
    assert cost.load() == cost.Rates()
    cost.save(cost.Rates(dense=90.0, sparse=20.0, activations=2.0))
    assert cost.load().dense == 90
    cost.path().write_text('{"dense": -1}', encoding="utf-8")
    cost.load.cache_clear()
    with pytest.raises(ValueError, match=r"rates\.json: not a calibration .*delete it, or run: s2ap profile --calibrate"):
        cost.load()
    monkeypatch.undo()
    cost.load.cache_clear()


@needs_kernels
def test_the_engine_knows_the_modules_that_keep_the_layout():
    network = compile_sparse(sparsify(net(), 0.7).eval(), X[:1])
    assert network.dense_parts == []
    assert for_attack(sparsify(net(), 0.9), X) is not None
