"""The losses against their formulas, and what each makes a model train on."""

import copy

import pytest
import torch
from torch import nn

from s2ap_ext import S2AP, parts, sparsify
from s2ap_ext.attacks import Pgd, pgd
from s2ap_ext.losses import FreeAt, PgdAt

ATTACK = {"eps": 0.1, "step_size": 0.03, "steps": 3}
LOSSES = ("free_at", "mart", "n_fgsm", "natural", "pgd_at", "trades")
Y = torch.arange(8) % 5


def setup(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    return model, torch.rand(8, 1, 6, 6, dtype=dtype), Y


def make(name, norm="linf", **options):
    return parts.make("loss", name, adversary=Pgd(**ATTACK, norm=norm), **options)


def seeded():
    return torch.Generator().manual_seed(1)


# The formulas, image by image, with nothing of torch's own losses.


def smooth_cross_entropy(logits, y, smoothing):
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    target = torch.full_like(log_p, smoothing / log_p.shape[1])
    target[torch.arange(len(y)), y] += 1 - smoothing
    return -(target * log_p).sum(1).mean()


def trades(clean, adversarial, y, smoothing, beta=6.0):
    p, q = clean.exp() / clean.exp().sum(1, True), adversarial.exp() / adversarial.exp().sum(1, True)
    return smooth_cross_entropy(clean, y, smoothing) + beta * (p * (p / q).log()).sum() / len(y)


def mart(clean, adversarial, y, smoothing, beta=5.0):
    total = 0
    for z, z_adv, label in zip(clean, adversarial, y.tolist(), strict=True):
        p, q = z.exp() / z.exp().sum(), z_adv.exp() / z_adv.exp().sum()
        runner_up = max(q[k] for k in range(len(q)) if k != label)
        margin = -(1.0001 - runner_up + 1e-12).log()
        total = total + margin + beta * (p * (p / q).log()).sum() * (1.0000001 - p[label])
    return smooth_cross_entropy(adversarial, y, smoothing) + total / len(y)


def on_adversarial(clean, adversarial, y, smoothing):
    return smooth_cross_entropy(adversarial, y, smoothing)


FORMULAS = dict.fromkeys(LOSSES, on_adversarial) | {"trades": trades, "mart": mart}


def test_the_losses():
    assert tuple(parts.names("loss")) == LOSSES
    assert parts.make("loss", "trades").settings.beta == 6
    assert parts.make("loss", "mart").settings.beta == 5
    assert [parts.make("loss", name).replays for name in LOSSES] == [4, 1, 1, 1, 1, 1]
    assert FreeAt(replays=8).replays == 8
    assert PgdAt().adversary.settings == Pgd().settings


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pgd_at", {"beta": 6}, "loss pgd_at: unknown key beta; it takes none"),
        ("trades", {"beta": -1}, "loss trades: beta: expected a number >= 0, got -1"),
        ("mart", {"beta": float("inf")}, "loss mart: beta: expected a number, got inf"),
        ("free_at", {"replays": 0}, "loss free_at: replays: expected an integer >= 1, got 0"),
        ("free_at", {"adversary": Pgd(norm="l2")}, "loss free_at: expected an adversary of norm linf, got l2"),
        ("n_fgsm", {"adversary": Pgd(norm="l1")}, "loss n_fgsm: expected an adversary of norm linf, got l1"),
        ("natural", {"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ("natural", {"label_smoothing": float("nan")}, r"label_smoothing: expected a number in \[0, 1\], got nan"),
    ],
)
def test_bad_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        parts.make("loss", name, **options)


def test_the_adversary_must_be_an_attack():
    with pytest.raises(TypeError, match=r"adversary: expected an s2ap_ext\.attacks\.Attack, got function"):
        PgdAt(adversary=lambda model, x, y: x)


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_formula(name, smoothing):
    model, x, y = setup()
    model.eval()  # the clean and the adversarial logits do not depend on the order of the forwards
    loss = make(name, label_smoothing=smoothing)
    x_adv = (x + 0.1 * torch.rand(x.shape, dtype=x.dtype, generator=seeded())).clamp(0, 1)
    value, logits = loss(model, x, x_adv, y)
    ours = torch.autograd.grad(value, list(model.parameters()))
    expected = FORMULAS[name](model(x), model(x_adv), y, smoothing)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, model(x_adv))
    # The gradient flows through the clean logits too, where they matter.
    torch.testing.assert_close(ours, torch.autograd.grad(expected, list(model.parameters())), rtol=1e-9, atol=1e-12)


def test_beta():
    model, x, y = setup()
    model.eval()
    for name in ("trades", "mart"):
        value, _ = make(name, beta=2.5)(model, x, 1 - x, y)
        torch.testing.assert_close(value, FORMULAS[name](model(x), model(1 - x), y, 0.0, beta=2.5), rtol=1e-12, atol=1e-12)


def test_natural_trains_on_clean_images():
    model, x, y = setup()
    assert make("natural").attack(model, x, y) is x


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("name", "objective"), [("pgd_at", "ce"), ("trades", "kl"), ("mart", "ce")])
def test_the_adversary_maximises(name, objective, norm):
    model, x, y = setup()
    for smoothing in (0.0, 0.5):  # of no concern to the adversary
        x_adv = make(name, norm, label_smoothing=smoothing).attack(model, x, y, generator=seeded())
        assert torch.equal(x_adv, pgd(model, x, y, **ATTACK, norm=norm, loss=objective, generator=seeded()))


@pytest.mark.parametrize(
    ("name", "attack_forwards", "loss_forwards"),
    [("natural", 0, 1), ("pgd_at", 3, 1), ("trades", 4, 2), ("mart", 3, 2), ("free_at", 0, 1), ("n_fgsm", 1, 1)],
)
def test_forwards_and_batchnorm(name, attack_forwards, loss_forwards):
    """TRADES looks at the clean logits once per attack, and no attack moves BatchNorm."""
    model, x, y = setup()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    loss = make(name)
    x_adv = loss.attack(model, x, y)
    assert calls == [False] * attack_forwards
    assert model[1].num_batches_tracked == 0
    loss(model, x, x_adv, y)
    assert calls == [False] * attack_forwards + [True] * loss_forwards
    assert model[1].num_batches_tracked == loss_forwards


def test_n_fgsm_is_the_formula():
    model, x, y = setup()
    model.eval()
    x[0], x[1] = 0, 1
    noise = torch.empty_like(x).uniform_(-0.2, 0.2, generator=seeded())
    noisy = (x + noise).clamp(0, 1).requires_grad_()
    smooth_cross_entropy(model(noisy), y, 0.0).backward()
    expected = (noisy + 0.1 * noisy.grad.sign()).clamp(0, 1).detach()
    ours = make("n_fgsm").attack(model, x, y, generator=seeded())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert 0.2 < (ours - x).abs().max() <= 0.3


def plain_free_at(model, batches, replays, eps, lr):
    """Algorithm 1 with the gradient of the perturbation taken through the clamp.

    That gradient is written out, with 0 and 1 inside: versions of torch differ in their clamp's gradient at its very limits.
    """
    delta = torch.zeros_like(batches[0][0])
    seen = []
    for x, y in batches:
        for _ in range(replays):
            moved = x + delta[: len(x)]
            x_adv = moved.clamp(0, 1).requires_grad_()
            seen.append(x_adv.detach().clone())
            *grads, g = torch.autograd.grad(smooth_cross_entropy(model(x_adv), y, 0.0), [*model.parameters(), x_adv])
            g = torch.where((moved >= 0) & (moved <= 1), g, 0)
            delta[: len(x)] = (delta[: len(x)] + eps * g.sign()).clamp(-eps, eps)
            with torch.no_grad():
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p -= lr * grad
    return seen, delta


def test_free_at_is_algorithm_1():
    model, x, y = setup()
    x[0], x[1] = 0, 1  # the perturbation leaves [0, 1] and gets no gradient there
    batches = [(x, y), (1 - x, y), (x[:5], y[:5]), (x, y)]
    expected, delta = plain_free_at(copy.deepcopy(model), batches, replays=3, eps=0.1, lr=0.2)
    loss, optimizer, seen = make("free_at", replays=3), torch.optim.SGD(model.parameters(), lr=0.2), []
    for x, y in batches:
        for _ in range(loss.replays):
            x_adv = loss.attack(model, x, y)
            optimizer.zero_grad()
            value, _ = loss(model, x, x_adv, y)
            value.backward()
            loss.after_backward(x, x_adv)
            optimizer.step()
            seen.append(x_adv)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.state()["delta"], delta, rtol=0, atol=1e-12)


def test_free_at_learns_from_the_first_pass_only():
    model, x, y = setup()
    model = sparsify(model, 0.5)
    loss, optimizer = make("free_at"), S2AP(model, torch.optim.SGD(model.parameters(), lr=0.1), gamma=0.1)
    x_adv = loss.attack(model, x, y)
    wanted = []

    def closure():
        optimizer.zero_grad()
        value, _ = loss(model, x, x_adv, y)
        value.backward()
        wanted.append(x_adv.requires_grad)
        if len(wanted) == 1:
            expected = 0.1 * x_adv.grad.sign()
            loss.after_backward(x, x_adv)
            assert torch.equal(loss.state()["delta"], expected)
        return value

    optimizer.step(closure)
    assert wanted == [True, False]
    assert x_adv.grad is None
    assert 0 < loss.state()["delta"].abs().max() <= 0.1


def test_free_at_goes_on_where_it_was():
    model, x, y = setup()
    loss = make("free_at")
    assert loss.state() == {}
    x_adv = loss.attack(model, x[:3], y[:3])
    loss(model, x[:3], x_adv, y[:3])[0].backward()
    loss.after_backward(x[:3], x_adv)
    twin = make("free_at")
    twin.load_state({name: t.clone() for name, t in loss.state().items()})
    assert torch.equal(loss.attack(model, x, y), twin.attack(model, x, y))
    assert torch.equal(twin.attack(model, x, y)[3:], x[3:])  # places that no minibatch had filled
    assert len(twin.state()["delta"]) == 8
    twin.load_state({})
    assert torch.equal(twin.attack(model, x, y), x)
    with pytest.raises(ValueError, match=r"x: expected images of shape \(1, 6, 6\) as before, got \(1, 5, 5\)"):
        twin.attack(model, x[..., :5, :5], y)
    with pytest.raises(ValueError, match="loss free_at: expected the state delta, got noise"):
        twin.load_state({"noise": x})
    with pytest.raises(ValueError, match="loss pgd_at: expected no state, got delta"):
        make("pgd_at").load_state(loss.state())
    with pytest.raises(RuntimeError, match="call backward"):
        twin.after_backward(x, twin.attack(model, x, y))


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_finite_where_probabilities_vanish(name):
    model, x, y = setup(torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(1e4)
    loss = make(name)
    value, _ = loss(model, x, loss.attack(model, x, y), y)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mart_in_half_precision(dtype):
    """Where 1.0001 is 1 and 1e-12 is 0, a sure mistake must not have an infinite loss."""
    loss = make("mart")

    def model(x):
        return x * 80

    x = torch.eye(3, dtype=dtype).requires_grad_()
    value, _ = loss(model, x, x, torch.tensor([1, 2, 0]))
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - 0.5)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"natural"}))
def test_training_on_it_makes_a_model_robust(name):
    """One pixel tells the class of 90 % of the images and eps cannot hide it; twenty others tell it always and eps turns them over."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    sign = (2 * y - 1).double()
    strong = 0.5 + 0.25 * sign * (torch.rand(200, dtype=torch.float64, generator=generator) < 0.9)
    x = torch.cat([strong[:, None], (0.5 + 0.05 * sign)[:, None].expand(200, 20)], dim=1)
    robust = {}
    for loss in (make("natural"), make(name)):
        model = Centred(21, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        for _ in range(40):
            x_adv = loss.attack(model, x, y, generator=generator)
            value, _ = loss(model, x, x_adv, y)
            optimizer.zero_grad()
            value.backward()
            loss.after_backward(x, x_adv)
            optimizer.step()
        x_adv = pgd(model, x, y, eps=0.1, step_size=0.05, steps=5)
        robust[type(loss)] = (model(x_adv).argmax(1) == y).double().mean().item()
    natural, ours = robust.values()
    assert natural < 0.1
    assert ours > 0.8
