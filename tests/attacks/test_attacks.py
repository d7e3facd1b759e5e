"""PGD against its formula, and the promise to leave everything as found."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_found, l1_projection, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2ap_ext.attacks import Attack, Pgd, accuracy, pgd
from s2ap_ext.nn import densify, sparsify
from s2ap_ext.parts import make, names

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMS = ("linf", "l2", "l1")
SETTINGS = {"eps": 0.1, "step_size": 0.03, "steps": 4}


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).to(dtype)


def images(n=7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 6, 6, generator=generator).to(dtype)
    x[0] = 0  # on the border of [0, 1]
    x[1] = 1
    return x, torch.arange(n) % 5


def distance(x_adv, x, norm):
    """Of each image, measured in the precision that the images have."""
    shift = (x_adv - x).flatten(1)
    if norm == "linf":
        return shift.abs().amax(1)
    return shift.abs().sum(1) if norm == "l1" else torch.linalg.vector_norm(shift, dim=1)


def plain_pgd(model, x, start, objective, eps, step_size, steps, norm):
    """Textbook PGD, step by step and image by image."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(objective(model(x_adv)), x_adv)
        with torch.no_grad():
            if norm == "linf":
                x_adv = x_adv + step_size * g.sign()
                x_adv = torch.max(torch.min(x_adv, x + eps), x - eps).clamp(0, 1)
                continue
            moved = []
            for image, origin, gradient in zip(x_adv, x, g, strict=True):
                if norm == "l1":  # 1 % of 36 pixels: the one with the largest gradient that can still move
                    stuck = ((image == 0) & (gradient < 0)) | ((image == 1) & (gradient > 0))
                    best = int(gradient.abs().masked_fill(stuck, 0).argmax())
                    step = torch.zeros(36, dtype=image.dtype)
                    step[best] = step_size * gradient.flatten()[best].sign()
                    moved.append(l1_projection(origin, image + step.view(image.shape), eps).view(image.shape))
                    continue
                shift = image + step_size * gradient / gradient.norm() - origin
                moved.append((origin + shift * min(1, eps / shift.norm())).clamp(0, 1))
            x_adv = torch.stack(moved)
    return x_adv


@pytest.mark.parametrize("norm", NORMS)
def test_cross_entropy_attack_is_the_formula(norm):
    model, (x, y) = small_model(torch.float64).eval(), images(dtype=torch.float64)
    ours = pgd(model, x, y, **SETTINGS, norm=norm, random_start=False)
    expected = plain_pgd(model, x, x, lambda z: F.cross_entropy(z, y), **SETTINGS, norm=norm)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert (ours - x).abs().max() > 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_kl_attack_is_the_formula(norm):
    model, (x, _) = small_model(torch.float64).eval(), images(dtype=torch.float64)
    p = model(x).softmax(1).detach()

    def divergence(logits):
        return (p * (p.log() - logits.log_softmax(1))).sum()

    start = pgd(model, x, None, eps=0.1, step_size=0, steps=0, norm=norm, loss="kl", generator=torch.Generator().manual_seed(3))
    ours = pgd(model, x, None, **SETTINGS, norm=norm, loss="kl", generator=torch.Generator().manual_seed(3))
    expected = plain_pgd(model, x, start, divergence, **SETTINGS, norm=norm)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert divergence(model(ours)) > divergence(model(start)) > 0


def test_one_linf_step_by_hand():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    x = torch.tensor([[0.5, 0.5, 0.5], [0.05, 0.98, 0.5]])
    x_adv = pgd(model, x, torch.tensor([0, 1]), eps=0.25, step_size=0.125, steps=1, random_start=False)
    # class 0 grows with x0 - x1: label 0 wants it down, label 1 up; a zero gradient moves nothing
    torch.testing.assert_close(x_adv, torch.tensor([[0.375, 0.625, 0.5], [0.175, 0.855, 0.5]]))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(NORMS),
    st.sampled_from([0.0, 8 / 255, 0.1, 0.5, 1e-3, 3.0]),
    st.sampled_from([0.0, 2 / 255, 1.0]),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_never_leaves_the_ball_or_the_image_range(dtype, norm, eps, step_size, steps, random_start, seed):
    model, (x, y) = small_model(dtype).eval(), images(dtype=dtype, seed=seed)
    x[2] *= 1e-3
    x_adv = pgd(model, x, y, eps=eps, step_size=step_size, steps=steps, norm=norm, random_start=random_start)
    assert x_adv.dtype == dtype
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    for kind in (torch.float64, dtype):  # measured exactly, and as a user of that dtype would
        assert distance(x_adv.to(kind), x.to(kind), norm).max().item() <= eps


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_fills_the_ball(norm):
    x = torch.full((4000, 1, 1, 2), 0.5)
    start = pgd(nn.Flatten(), x, torch.zeros(4000, dtype=torch.long), eps=0.25, step_size=0, steps=0, norm=norm)
    shift, radius = (start - x).flatten(1), distance(start, x, norm)
    # Uniform in two dimensions: the share within radius r is (r / eps)**2.
    for share in (0.1, 0.5, 0.9):
        assert (radius < 0.25 * share**0.5).float().mean().item() == pytest.approx(share, abs=0.05)
    assert shift.mean(0).abs().max() < 0.02


def test_random_numbers():
    model, (x, y) = small_model(), images()
    state = torch.get_rng_state()
    attack = partial(pgd, model, x, y, **SETTINGS)
    first, second = (attack(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, attack(generator=torch.Generator().manual_seed(6)))
    attack(random_start=False)
    assert torch.equal(torch.get_rng_state(), state), "dropout or a start drew from torch's random state"
    attack()
    assert not torch.equal(torch.get_rng_state(), state)


class Failing(nn.Module):
    """Raises in the ``last``-th forward."""

    def __init__(self, model, last):
        super().__init__()
        self.model, self.left = model, last

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory, say")
        return self.model(x)


@pytest.mark.parametrize("fails_at", [0, 1, 3])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_leaves_everything_as_found(loss, fails_at):
    model, (x, y) = small_model(), images()
    model.train()
    model[1].eval()  # a mixture of modes, of flags and of gradients
    model[0].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    model = Failing(model, fails_at)
    before, grad = snapshot(model), model.model[5].weight.grad
    x_before = x.clone()
    if fails_at:
        with pytest.raises(RuntimeError, match="out of memory"):
            pgd(model, x, y, **SETTINGS, loss=loss)
    else:
        pgd(model, x, y, **SETTINGS, loss=loss)
    assert_as_found(model, before)
    assert model.model[5].weight.grad is grad
    assert torch.equal(x, x_before)
    assert not x.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_any_grad_mode(context):
    model, (x, y) = small_model(), images()
    expected = pgd(model, x, y, **SETTINGS, random_start=False)
    with context():
        x_here, y_here = x.clone(), y.clone()
        enabled = torch.is_grad_enabled()
        ours = pgd(model, x_here, y_here, **SETTINGS, random_start=False)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(ours, expected)
    assert not ours.is_inference()


class Calls(TorchDispatchMode):
    """Records the convolutions' output masks and every op's name."""

    def __init__(self):
        super().__init__()
        self.masks, self.names = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
def test_computes_no_weight_gradients(norm):
    model, (x, y) = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5)), images()
    with Calls() as calls:
        pgd(model, x, y, **SETTINGS, norm=norm)
    assert calls.masks == [[True, False, False]] * (2 * SETTINGS["steps"])
    # The linear layer's backward is one product for its input; its weight's would be a second one.
    products = [name for name in calls.names if name in ("aten::mm", "aten::addmm")]
    assert len(products) == 2 * SETTINGS["steps"]


@pytest.mark.parametrize(("loss", "expected"), [("ce", 4), ("kl", 5)])
def test_number_of_forwards(loss, expected):
    model, (x, y) = small_model(), images()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append((module.training, module[0].weight.requires_grad)))
    pgd(model, x, y, **SETTINGS, loss=loss)
    assert seen == [(False, False)] * expected


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_pruned_model_is_attacked_like_its_dense_twin(loss):
    x, y = images()
    model = sparsify(small_model(), 0.5)
    twin = densify(copy.deepcopy(model))
    attacked, expected = (pgd(m, x, y, **SETTINGS, loss=loss, generator=torch.Generator().manual_seed(0)) for m in (model, twin))
    assert torch.equal(attacked, expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_images_do_not_see_each_other(norm):
    model, (x, y) = small_model(torch.float64), images(dtype=torch.float64)
    together = pgd(model, x, y, **SETTINGS, norm=norm, random_start=False)
    alone = [pgd(model, x[i : i + 1], y[i : i + 1], **SETTINGS, norm=norm, random_start=False) for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_and_tiny_gradients(norm):
    x, y = images()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    nn.init.zeros_(flat[1].weight)
    assert torch.equal(pgd(flat, x, y, **SETTINGS, norm=norm, random_start=False), x)
    with torch.no_grad():
        flat[1].weight.normal_(std=1e-30)  # squares of these gradients underflow in float32
    moved = pgd(flat, x[2:], y[2:], **SETTINGS, norm=norm, random_start=False)
    assert distance(moved, x[2:], norm).min() > 0.05


def test_other_callables_layouts_and_sizes():
    x, y = images()
    weight = torch.randn(36, 5, requires_grad=True)
    x_adv = pgd(lambda images: images.flatten(1) @ weight, x, y, **SETTINGS)
    assert x_adv.shape == x.shape
    assert weight.grad is None
    assert weight.requires_grad
    # gradients that are views of one element, and images that are not contiguous
    constant = pgd(lambda images: images.flatten(1).sum(1, keepdim=True).expand(-1, 5) * torch.arange(5.0), x, y, **SETTINGS)
    assert constant.shape == x.shape
    strided = x.to(memory_format=torch.channels_last).transpose(2, 3)
    model = small_model()
    expected = pgd(model, strided.contiguous(), y, **SETTINGS, random_start=False)
    torch.testing.assert_close(pgd(model, strided, y, **SETTINGS, random_start=False), expected)
    assert pgd(model, x[:0], y[:0], **SETTINGS).shape == (0, 1, 6, 6)


def test_steps_zero_and_eps_zero():
    model, (x, y) = small_model(), images()
    same = pgd(model, x, y, eps=0.1, step_size=0.1, steps=0, random_start=False)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    for norm in NORMS:
        assert torch.equal(pgd(model, x, y, eps=0, step_size=0.1, steps=2, norm=norm), x)


def test_autocast():
    model, (x, y) = small_model(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = pgd(model, x, y, **SETTINGS)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps: expected a finite number >= 0, got -0.1"),
        ({"eps": float("nan")}, "eps: expected a finite number >= 0, got nan"),
        ({"step_size": -1}, "step_size: .* got -1"),
        ({"steps": -1}, "steps: expected an integer >= 0, got -1"),
        ({"steps": 2.5}, "steps: .* got 2.5"),
        ({"norm": "l7"}, "norm: expected one of linf, l2, l1, got 'l7'"),
        ({"loss": "mse"}, "loss: expected one of ce, kl, got 'mse'"),
        ({"x": images()[0] * 255}, r"x: expected images in \[0, 1\], got values in \[0, 255\]"),
        ({"x": images()[0] - 0.5}, r"got values in \[-0.5, 0.5\]"),
        ({"x": torch.full((7, 1, 6, 6), float("nan"))}, r"x: expected images in \[0, 1\], got values in \[nan, nan\]"),
        ({"y": torch.zeros(3, dtype=torch.long)}, r"y: expected int64 classes of shape \(7,\), got torch.int64 of shape \(3,\)"),
        ({"y": torch.zeros(7)}, "y: expected int64 .* got torch.float32"),
        ({"y": None}, "y: expected .* got None"),
    ],
)
def test_bad_arguments(change, message):
    x, y = images()
    with pytest.raises(ValueError, match=message):
        pgd(**{"model": small_model(), "x": x, "y": y, **SETTINGS, **change})


def test_bad_models():
    model, (x, y) = small_model(), images()
    with pytest.raises(TypeError, match="x: expected floating point"):
        pgd(model, (x * 255).to(torch.uint8), y, **SETTINGS)
    with torch.no_grad():
        model[5].bias[2] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="loss: NaN in 4 of 4 steps"):
        pgd(model, x, y, **SETTINGS)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [flag for flag, _, _ in before[1].values()]
    with pytest.raises(ValueError, match="gradient: NaN in 4 of 4 steps"):
        pgd(lambda images: images.flatten(1) + (images.flatten(1) * 0).sqrt(), x, y, **SETTINGS)
    with pytest.raises(ValueError, match=r"model: expected logits of shape \(7, classes\), got \(7, 1, 6, 6\)"):
        pgd(nn.Identity(), x, y, **SETTINGS)
    with pytest.raises(ValueError, match="do not depend on x"):
        pgd(lambda images: images.detach().flatten(1), x, y, **SETTINGS)


def test_kl_without_random_start_warns():
    model, (x, y) = small_model(), images()
    with pytest.warns(UserWarning, match="no gradient at x"):
        x_adv = pgd(model, x, y, **SETTINGS, loss="kl", random_start=False)
    assert (x_adv - x).abs().max() <= 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_the_part_is_the_function(norm):
    model, (x, y) = small_model(), images()
    attack = make("attack", "pgd", norm=norm, eps="1/10", step_size=0.03, steps=4)
    assert isinstance(attack, Attack)
    for loss in ("ce", "kl"):
        ours, expected = (
            f(model, x, y, loss=loss, generator=torch.Generator().manual_seed(2)) for f in (attack, partial(pgd, **SETTINGS, norm=norm))
        )
        assert torch.equal(ours, expected)
    assert accuracy(model, [(x, y)], attack).images == 7


def test_settings_of_the_part():
    assert "pgd" in names("attack")
    settings = Pgd().settings
    assert (settings.norm, settings.eps, settings.step_size, settings.steps) == ("linf", 8 / 255, 2 / 255, 10)
    for options, message in (
        ({"norm": "l3"}, "attack pgd: norm: expected one of linf, l2, l1, got 'l3'"),
        ({"eps": -0.1}, "attack pgd: eps: expected a number >= 0, got -0.1"),
        ({"steps": 2.5}, "attack pgd: steps: expected an integer, got 2.5"),
        ({"step": 1}, "attack pgd: unknown key step; did you mean steps"),
    ):
        with pytest.raises(ValueError, match=message):
            Pgd(**options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype, norm):
    model, (x, y) = small_model(dtype).cuda(), (t.cuda() for t in images(dtype=dtype))
    generator = torch.Generator("cuda").manual_seed(0)
    x_adv = pgd(model, x, y, **SETTINGS, norm=norm, generator=generator)
    assert 0.05 < distance(x_adv.double(), x.double(), norm).max() <= SETTINGS["eps"]
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
