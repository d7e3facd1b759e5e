"""PGD-AT and TRADES against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2ap_ext.attacks import pgd
from s2ap_ext.losses import LOSSES, PGDAT, TRADES, CrossEntropy, get_loss

ATTACK = {"eps": 0.1, "step_size": 0.03, "steps": 3}


def setup(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    return model, torch.rand(8, 1, 6, 6, dtype=dtype), torch.arange(8) % 5


def seeded():
    return torch.Generator().manual_seed(1)


def test_get_loss():
    assert get_loss("ce") == CrossEntropy()
    assert get_loss("pgd_at", **ATTACK, norm="l2") == PGDAT(eps=0.1, step_size=0.03, steps=3, norm="l2")
    assert get_loss("trades", **ATTACK) == TRADES(eps=0.1, step_size=0.03, steps=3, norm="linf", beta=6.0)
    assert sorted(LOSSES) == ["ce", "pgd_at", "trades"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mart", ATTACK, "loss: expected one of ce, pgd_at, trades, got 'mart'"),
        ("ce", {"eps": 0.1}, "loss ce: unknown setting eps; it takes none"),
        ("pgd_at", {**ATTACK, "beta": 6, "alpha": 1}, "loss pgd_at: unknown setting alpha, beta; it takes eps, step_size, steps, norm"),
        ("trades", {"eps": 0.1}, "loss trades: missing setting step_size, steps"),
        ("pgd_at", {**ATTACK, "eps": -1}, "eps: expected a finite number >= 0, got -1"),
        ("trades", {**ATTACK, "norm": "l7"}, "norm: expected one of linf, l2, got 'l7'"),
        ("trades", {**ATTACK, "beta": -1}, "beta: expected a finite number >= 0, got -1"),
        ("trades", {**ATTACK, "beta": float("inf")}, "beta: .* got inf"),
    ],
)
def test_get_loss_errors(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **settings)


def test_cross_entropy_trains_on_clean_images():
    model, x, y = setup()
    loss = get_loss("ce")
    assert loss.attack(model, x, y) is x
    value, logits = loss(model, x, x, y)
    assert torch.equal(value, F.cross_entropy(model(x), y))
    assert torch.equal(logits, model(x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_at(norm):
    model, x, y = setup()
    loss = get_loss("pgd_at", **ATTACK, norm=norm)
    x_adv = loss.attack(model, x, y, generator=seeded())
    assert torch.equal(x_adv, pgd(model, x, y, **ATTACK, norm=norm, loss="ce", generator=seeded()))
    value, logits = loss(model, x, x_adv, y)
    torch.testing.assert_close(value, -model(x_adv).log_softmax(1)[torch.arange(8), y].mean())
    assert torch.equal(logits, model(x_adv))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trades(norm):
    model, x, y = setup()
    loss = get_loss("trades", **ATTACK, norm=norm, beta=3.0)
    x_adv = loss.attack(model, x, y, generator=seeded())
    assert torch.equal(x_adv, pgd(model, x, y, **ATTACK, norm=norm, loss="kl", generator=seeded()))

    value, logits = loss(model, x, x_adv, y)
    ours = torch.autograd.grad(value, list(model.parameters()))
    clean, adversarial = model(x), model(x_adv)
    p, q = clean.softmax(1), adversarial.softmax(1)
    expected = -p.log()[torch.arange(8), y].mean() + 3.0 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(logits, adversarial)
    # the gradient flows through the clean logits of the divergence too
    torch.testing.assert_close(ours, torch.autograd.grad(expected, list(model.parameters())))


@pytest.mark.parametrize(("name", "attack_forwards", "loss_forwards"), [("ce", 0, 1), ("pgd_at", 3, 1), ("trades", 4, 2)])
def test_forwards_and_batchnorm(name, attack_forwards, loss_forwards):
    """TRADES looks at the clean logits once per attack, and no attack moves BatchNorm."""
    model, x, y = setup()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    loss = get_loss(name, **({} if name == "ce" else ATTACK))
    x_adv = loss.attack(model, x, y)
    assert calls == [False] * attack_forwards
    assert model[1].num_batches_tracked == 0
    loss(model, x, x_adv, y)
    assert calls == [False] * attack_forwards + [True] * loss_forwards
    assert model[1].num_batches_tracked == loss_forwards


def test_trades_is_finite_where_probabilities_vanish():
    model, x, y = setup(torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(1e4)
    loss = get_loss("trades", **ATTACK)
    value, _ = loss(model, x, loss.attack(model, x, y), y)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - 0.5)


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_training_on_it_makes_a_model_robust(name):
    """One pixel tells the class of 90 % of the images and eps cannot hide it; twenty others tell it always and eps turns them over."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    sign = (2 * y - 1).double()
    strong = 0.5 + 0.25 * sign * (torch.rand(200, dtype=torch.float64, generator=generator) < 0.9)
    x = torch.cat([strong[:, None], (0.5 + 0.05 * sign)[:, None].expand(200, 20)], dim=1)
    robust = {}
    for loss in (get_loss("ce"), get_loss(name, **ATTACK)):
        model = Centred(21, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        for _ in range(40):
            value, _ = loss(model, x, loss.attack(model, x, y, generator=generator), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=5)
        robust[type(loss)] = (model(x_adv).argmax(1) == y).double().mean().item()
    natural, ours = robust.values()
    assert natural < 0.1
    assert ours > 0.8
