"""S2AP against independent computations, the invariants that it shares with AWP, and their errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, Selections, assert_same_state, closure_for, images, oracle_mask, small_net
from torch import nn

from s2ap_ext import AWP, S2AP, S2APLinear, sparsify
from s2ap_ext.nn import pruned_layers, train_scores
from s2ap_ext.sparsity import kept_count


def toy(restore="before", gamma=0.5):
    layer = S2APLinear(3, 2, bias=False, sparsity=0.5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2, 3], [-4, 5, -6]]))
        layer.scores.copy_(torch.tensor([[0.3, -0.7, 0.1], [0.5, -0.2, 0.7]], dtype=torch.float64))
    layer.weight.requires_grad_(False)
    optimizer = S2AP(layer, torch.optim.SGD([layer.scores], lr=0.1, weight_decay=5e-4), gamma=gamma, restore=restore)
    x = torch.tensor([1.0, 2, -1], dtype=torch.float64)

    def backward():
        loss = layer(x).square().sum()
        loss.backward()
        return loss.item()

    return layer, optimizer, backward


# Worked numbers


def test_toy_perturbation_and_second_gradient():
    layer, optimizer, backward = toy()
    scores = layer.scores.detach().clone()
    assert backward() == 20
    optimizer.ascend()
    assert torch.equal(layer.scores, scores)  # s + z is never written
    assert optimizer.flips == 2
    assert torch.equal(layer.mask, torch.tensor([[False, True, False], [False, True, True]]))
    assert layer.scores.grad is None
    assert backward() == 272
    assert torch.equal(layer.scores.grad, torch.tensor([[-8.0, -32, 24], [-128, -320, 192]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("restore", "expected"),
    [
        ("before", [[1.099985, 2.500035, -2.300005], [13.299975, 31.80001, -18.500035]]),
        ("after", [[1.0999886577187, 2.5000496308749, -2.3000159731562], [13.2999823154374, 31.8000282885936, -18.5000459731562]]),
    ],
)
def test_toy_step(restore, expected):
    layer, optimizer, backward = toy(restore)
    backward()
    optimizer.ascend()
    backward()
    optimizer.descend()
    torch.testing.assert_close(layer.scores, nn.Parameter(torch.tensor(expected, dtype=torch.float64)), rtol=0, atol=1e-10)


def test_toy_without_flips_has_the_same_gradient():
    layer, optimizer, backward = toy(gamma=0.01)
    backward()
    first = layer.scores.grad.clone()
    optimizer.ascend()
    assert optimizer.flips == 0
    assert backward() == 20
    assert torch.equal(layer.scores.grad, first)


# An independent computation, in float64 and from the formulas alone


class Oracle:
    """A two-layer net in float64, pruned and trained with S2AP and SGD from the formulas, without this package's layers and steps."""

    def __init__(self, net, sparsity, gamma, lr, momentum, weight_decay):
        self.weights = [net[0].weight.detach().double(), net[2].weight.detach().double()]
        self.biases = [net[0].bias.detach().double(), net[2].bias.detach().double()]
        self.scores = [math.sqrt(6 / w.shape[1]) * w / w.abs().max() for w in self.weights]
        self.kept = [kept_count(w.numel(), sparsity) for w in self.weights]
        self.buffers = [None, None]
        self.gamma, self.lr, self.momentum, self.weight_decay = gamma, lr, momentum, weight_decay

    def gradients(self, scores, x, y):
        masked = [(w * oracle_mask(s, k)).requires_grad_() for w, s, k in zip(self.weights, scores, self.kept, strict=True)]
        hidden = F.relu(x @ masked[0].T + self.biases[0])
        loss = F.cross_entropy(hidden @ masked[1].T + self.biases[1], y)
        return [g * w * s.sign() for g, w, s in zip(torch.autograd.grad(loss, masked), self.weights, scores, strict=True)]

    def step(self, x, y):
        g = self.gradients(self.scores, x, y)
        moved = [s + self.gamma * s.norm() * gs / (gs.norm() + 1e-12) for s, gs in zip(self.scores, g, strict=True)]
        self.flips = sum(int((oracle_mask(a, k) != oracle_mask(b, k)).sum()) for a, b, k in zip(self.scores, moved, self.kept, strict=True))
        for i, gs in enumerate(self.gradients(moved, x, y)):
            d = gs + self.weight_decay * self.scores[i]
            self.buffers[i] = d if self.buffers[i] is None else self.momentum * self.buffers[i] + d
            self.scores[i] = self.scores[i] - self.lr * self.buffers[i]


def test_s2ap_follows_an_independent_computation_over_many_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).double()
    oracle = Oracle(net, 0.8, gamma=0.05, lr=0.1, momentum=0.9, weight_decay=5e-3)
    train_scores(sparsify(net, 0.8))
    optimizer = S2AP(net, torch.optim.SGD([net[0].scores, net[2].scores], lr=0.1, momentum=0.9, weight_decay=5e-3), gamma=0.05)
    flips = 0
    for step in range(12):
        x, y = torch.randn(16, 40, dtype=torch.float64), torch.randint(5, (16,))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        oracle.step(x, y)
        assert optimizer.flips == oracle.flips
        flips += oracle.flips
        for layer, expected in zip((net[0], net[2]), oracle.scores, strict=True):
            torch.testing.assert_close(layer.scores.detach(), expected, rtol=1e-9, atol=1e-12, msg=f"step {step}")
    assert flips > 0


# Invariants


@pytest.mark.parametrize("make", [S2AP, AWP])
@pytest.mark.parametrize("how", ["gamma", "warmup"])
def test_gamma_0_and_warmup_are_the_plain_step_bit_for_bit(make, how):
    net = sparsify(small_net(), 0.9)
    plain = copy.deepcopy(net)
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    settings = {"gamma": 0.0} if how == "gamma" else {"gamma": 0.1, "warmup_epochs": 1}
    optimizer = make(net, torch.optim.SGD(net.parameters(), **sgd), **settings)
    optimizer.set_epoch(0)
    reference = torch.optim.SGD(plain.parameters(), **sgd)
    for seed in range(3):
        x = images(seed=seed)
        optimizer.step(closure_for(net, optimizer, x))
        closure_for(plain, reference, x)()
        reference.step()
    assert_same_state(net, plain)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_step_with_a_closure_is_ascend_and_descend(base):
    one = train_scores(sparsify(small_net(), 0.9))
    two = copy.deepcopy(one)
    a = S2AP(one, base(one.parameters(), lr=0.01), gamma=0.1)
    b = S2AP(two, base(two.parameters(), lr=0.01), gamma=0.1)
    for _ in range(3):
        a.step(closure_for(one, a))
        b.zero_grad()
        F.cross_entropy(two(images()), LABELS).backward()
        b.ascend()
        F.cross_entropy(two(images()), LABELS).backward()
        b.descend()
        assert a.flips == b.flips > 0
    assert_same_state(one, two)


@pytest.mark.parametrize("settings", [{"momentum": 0.9, "weight_decay": 1e-2}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 1e-2}])
def test_fused_update_gives_the_bits_of_torchs_sgd(settings):
    """A subclass of SGD is stepped by torch alone, so the two must agree after every step."""

    class PlainSGD(torch.optim.SGD):
        pass

    one = train_scores(sparsify(small_net(), 0.9))
    two = copy.deepcopy(one)
    a = S2AP(one, torch.optim.SGD(one.parameters(), lr=0.1, **settings), gamma=0.05)
    b = S2AP(two, PlainSGD(two.parameters(), lr=0.1, **settings), gamma=0.05)
    with Selections() as seen:
        for seed in range(4):
            a.step(closure_for(one, a, images(seed=seed)))
    assert seen.calls["update_select"] == (3 if "momentum" in settings else 4)
    for seed in range(4):
        b.step(closure_for(two, b, images(seed=seed)))
    assert_same_state(one, two)


def test_a_step_selects_exactly_twice_per_layer():
    net = train_scores(sparsify(small_net(), 0.9))
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), gamma=0.01)

    def train_step():
        with torch.no_grad():
            for _ in range(10):  # as many forwards as PGD-10 has
                net(images())
        optimizer.step(closure_for(net, optimizer))

    # The first step is torch's own, which makes the momentum buffers; then each step ends with the next selection.
    for expected in ({"select": 3, "perturb": 3}, {"select": 3, "perturb": 3, "update_select": 3}, {"perturb": 3, "update_select": 3}):
        with Selections() as seen:
            train_step()
        assert seen.layers == expected
        assert seen.calls == dict.fromkeys(expected, 1)
    optimizer.gamma = 0
    with Selections() as seen:
        train_step()
    assert seen.layers == {}
    with Selections() as seen:
        train_step()
    assert seen.layers == {"select": 3}


def run_steps(net, base, steps=4, **how):
    optimizer = S2AP(net, base, gamma=0.3, **how)
    flips = []
    for seed in range(steps):
        optimizer.step(closure_for(net, optimizer, images(seed=seed)))
        flips.append(optimizer.flips)
    return flips


@pytest.mark.parametrize("restore", ["before", "after"])
@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
    ids=["momentum", "no momentum", "maximize", "Adam"],
)
def test_deferred_gradients_change_no_bit(base, restore):
    one = train_scores(sparsify(small_net(), 0.9))
    two = copy.deepcopy(one)
    flips = run_steps(one, base(one.parameters()), restore=restore)
    with Selections() as seen:
        assert run_steps(two, base(two.parameters()), restore=restore, defer_grads=True) == flips
    assert sum(flips) > 0
    assert_same_state(one, two)
    assert seen.calls["perturb"] == 4
    F.cross_entropy(two(images()), LABELS).backward()  # after the step the layers are as ever
    assert two[0].scores.grad is not None


def test_deferred_gradients_in_plain_steps_and_where_weights_train():
    one = sparsify(small_net(), 0.9)
    two = copy.deepcopy(one)
    for net, defer in ((one, False), (two, True)):
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = S2AP(net, base, gamma=0.1, warmup_epochs=1, defer_grads=defer)
        for epoch in (0, 1):
            optimizer.set_epoch(epoch)
            for seed in range(3):
                optimizer.step(closure_for(net, optimizer, images(seed=seed)))
    assert_same_state(one, two)


def test_deferred_gradients_leave_none_on_the_scores():
    net = train_scores(sparsify(small_net(), 0.9))
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.1, defer_grads=True)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images()), LABELS)
        loss.backward()
        seen.append([layer.scores.grad for layer in pruned_layers(net).values()])
        return loss

    optimizer.step(closure)
    assert seen == [[None] * 3] * 2


@pytest.mark.parametrize("gamma", [0.2, 1.0])  # the larger one changes signs
@pytest.mark.parametrize("tied", [False, True])
def test_a_part_that_does_not_defer(gamma, tied):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    if tied:
        one[2].weight = one[0].weight
    train_scores(sparsify(one, 0.7))
    two = copy.deepcopy(one)
    x, y = torch.randn(8, 20), torch.randint(20, (8,))
    signs = 0
    for net, defer in ((one, False), (two, True)):
        optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), gamma=gamma, defer_grads=defer)

        def closure(net=net, optimizer=optimizer, defer=defer):
            optimizer.zero_grad()
            if defer:
                net[0].mask_state._collectors.clear()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
            signs += int(optimizer.changes()[:, 1].sum())
    assert_same_state(one, two)
    assert signs > 0 or gamma < 1


def test_step_flips_counts_what_the_step_itself_flips():
    net = train_scores(sparsify(small_net(), 0.9))
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.3), gamma=0.01)
    for seed in range(3):
        before = [layer.mask for layer in pruned_layers(net).values()]
        optimizer.step(closure_for(net, optimizer, images(seed=seed)))
        after = [layer.mask for layer in pruned_layers(net).values()]
        flips = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
        assert optimizer.step_flips == flips > 0
    optimizer.gamma = 0
    optimizer.step(closure_for(net, optimizer))
    assert optimizer.step_flips is None  # a plain step is torch's


def test_scores_are_restored_to_the_bit():
    net = train_scores(sparsify(small_net(), 0.9))
    optimizer = S2AP(net, torch.optim.SGD([layer.scores for layer in pruned_layers(net).values()], lr=0.0), gamma=0.5)
    before = {name: layer.scores.detach().clone() for name, layer in pruned_layers(net).items()}
    masks = {name: layer.mask for name, layer in pruned_layers(net).items()}
    optimizer.step(closure_for(net, optimizer))
    assert optimizer.flips > 0
    for name, layer in pruned_layers(net).items():
        assert torch.equal(layer.scores, before[name])
        assert torch.equal(layer.mask, masks[name])


@pytest.mark.parametrize("make", [S2AP, AWP])
def test_batchnorm_moves_once(make):
    net = sparsify(small_net(), 0.9)
    once = copy.deepcopy(net)
    once(images())
    optimizer = make(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.1)
    optimizer.step(closure_for(net, optimizer))
    for (name, a), (_, b) in zip(net[1].named_buffers(), once[1].named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert net[1].num_batches_tracked == 1


def test_no_random_numbers_are_drawn():
    net = train_scores(sparsify(small_net(), 0.9))
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.1)
    state = torch.get_rng_state()
    optimizer.step(closure_for(net, optimizer))
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_gradient_gives_no_perturbation():
    net = train_scores(sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), 0.5))
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.5)
    (net(torch.ones(2, 6)).sum() * 0).backward()
    optimizer.ascend()
    assert optimizer.flips == 0
    (net(torch.ones(2, 6)).sum()).backward()
    optimizer.descend()
    assert all(p.isfinite().all() for p in net.parameters())


def test_schedulers_act_on_the_base_optimizer():
    net = train_scores(sparsify(small_net(), 0.9))
    base = torch.optim.SGD(net.parameters(), lr=0.4)
    optimizer = S2AP(net, base, gamma=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=2)
    optimizer.step(closure_for(net, optimizer))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_state_dict_resumes_bit_for_bit():
    net = train_scores(sparsify(small_net(), 0.9))
    sgd = {"lr": 0.1, "momentum": 0.9}
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), **sgd), gamma=0.1, warmup_epochs=1)
    for epoch in range(2):
        optimizer.set_epoch(epoch)
        optimizer.step(closure_for(net, optimizer))
    other = train_scores(sparsify(small_net(), 0.9))
    other.load_state_dict(net.state_dict())
    resumed = S2AP(other, torch.optim.SGD(other.parameters(), **sgd), gamma=0.1, warmup_epochs=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, n in ((optimizer, net), (resumed, other)):
        o.step(closure_for(n, o))
    assert_same_state(net, other)


def test_tied_scores_are_stepped_once():
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    train_scores(sparsify(net, 0.5))
    base = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    optimizer = S2AP(net, base, gamma=0.0)
    twin = copy.deepcopy(net)
    plain = S2AP(twin, torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1), gamma=0.0)
    x = torch.randn(4, 6)
    optimizer.gamma = 1e-30  # takes the fused way, without a flip
    for o, n in ((optimizer, net), (plain, twin)):

        def closure(o=o, n=n):
            o.zero_grad()
            loss = n(x).square().sum()
            loss.backward()
            return loss

        o.step(closure)
    assert torch.equal(net[0].scores, twin[0].scores)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own, of autograd functions
def test_compiled_model_sees_the_perturbation():
    net = train_scores(sparsify(nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)), 0.7))
    twin = copy.deepcopy(net)
    a, b = (S2AP(n, torch.optim.SGD(n.parameters(), lr=0.1), gamma=0.2) for n in (net, twin))
    compiled = torch.compile(net, backend="aot_eager")
    x, y = torch.randn(8, 20), torch.randint(5, (8,))
    for n, o in ((compiled, a), (twin, b)):
        F.cross_entropy(n(x), y).backward()
        o.ascend()
        F.cross_entropy(n(x), y).backward()
        o.descend()
    assert a.flips == b.flips > 0
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    net = train_scores(sparsify(small_net(), 0.9))
    twin = copy.deepcopy(net)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        for n, o in ((parallel, net), (twin, twin)):
            optimizer = S2AP(n, torch.optim.SGD(o.parameters(), lr=0.1, momentum=0.9), gamma=0.1)
            for _ in range(3):
                optimizer.step(closure_for(n, optimizer))
            assert optimizer.flips > 0
    finally:
        torch.distributed.destroy_process_group()
    assert_same_state(net, twin)


def test_buffers_may_be_overwritten_with_what_they_hold():
    """As DistributedDataParallel does before each forward."""
    layer, optimizer, backward = toy()
    twin, other, twin_backward = toy()
    layer.masked_weight  # noqa: B018 (it selects)
    for move, twin_move in ((optimizer.ascend, other.ascend), (optimizer.descend, other.descend)):
        before = layer.mask_state.selection
        layer.kept.copy_(layer.kept.clone())
        assert backward() == twin_backward()
        assert layer.mask_state.selection is before is not None  # nothing was selected anew
        move()
        twin_move()
    assert_same_state(layer, twin)
    optimizer.zero_grad()
    backward()
    optimizer.ascend()
    layer.kept.add_(1)
    with pytest.raises(RuntimeError, match=r"changed between ascend\(\) and descend\(\)"):
        backward()


# Errors


def test_order_of_calls():
    layer, optimizer, backward = toy()
    with pytest.raises(RuntimeError, match="no layer's scores have a gradient"):
        optimizer.ascend()
    with pytest.raises(RuntimeError, match=r"descend\(\) was called without ascend\(\)"):
        optimizer.descend()
    backward()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match=r"ascend\(\) was called twice"):
        optimizer.ascend()
    with pytest.raises(RuntimeError, match="between ascend"):
        optimizer.state_dict()
    with torch.no_grad():
        layer.scores.add_(1)
    with pytest.raises(RuntimeError, match=r"changed between ascend\(\) and descend\(\)"):
        backward()


def test_warmup_needs_the_epoch():
    layer, optimizer, _ = toy()
    optimizer.warmup_epochs = 2
    with pytest.raises(RuntimeError, match=r"warmup_epochs is 2: call set_epoch"):
        optimizer.step(lambda: layer.scores.sum())


@pytest.mark.parametrize("make", [S2AP, AWP])
@pytest.mark.parametrize("argument", ["gamma", "eps", "warmup_epochs"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_bad_numbers(make, argument, value):
    net = sparsify(small_net(), 0.9)
    with pytest.raises(ValueError, match=f"{argument}: expected a finite number >= 0, got {value}"):
        make(net, torch.optim.SGD(net.parameters(), lr=0.1), **{argument: value})


def test_bad_models_and_optimizers():
    net = small_net()
    with pytest.raises(ValueError, match="model: expected pruned layers, found none"):
        S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1))
    sparsify(net, 0.9)
    with pytest.raises(TypeError, match=r"base_optimizer: expected a torch\.optim\.Optimizer, got str"):
        S2AP(net, "sgd")
    with pytest.raises(ValueError, match="restore: expected 'before' or 'after', got 'never'"):
        S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), restore="never")


def test_nan_loss_changes_nothing():
    net = train_scores(sparsify(small_net(), 0.9))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.1)
    with pytest.raises(FloatingPointError, match="loss: expected a number, got NaN"):
        optimizer.step(closure_for(net, optimizer, images() * math.nan))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_nan_gradient_names_the_layer():
    net = train_scores(sparsify(small_net(), 0.9))
    optimizer = S2AP(net, torch.optim.SGD(net.parameters(), lr=0.1), gamma=0.1)
    F.cross_entropy(net(images()), LABELS).backward()
    net[3].scores.grad[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="got NaN in 3"):
        optimizer.ascend()
