"""The l1 ball: its projection against slow ones, and its steps."""

import numpy as np
import pytest
import torch
from helpers import l1_projection
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ap_ext.attacks import pgd
from s2ap_ext.attacks.balls import L1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.sampled_from([0.0, 0.05, 0.3, 1.0, 4.0]), st.sampled_from([0.01, 0.3, 3.0]), st.integers(0, 10_000))
def test_l1_projection_is_the_nearest_point(pixels, eps, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, pixels, dtype=torch.float64, generator=generator)
    x[1] = x[1].round()  # in the corners of the range
    x[2] = 0.5
    moved = x + spread * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    moved[2] = 0.5 + spread * torch.randint(-1, 2, (pixels,), generator=generator)  # ties
    ours = L1(x, eps, 0)._project(moved)
    expected = torch.stack([l1_projection(a, b, eps) for a, b in zip(x, moved, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.2, 0.5, 1.5])
def test_l1_projection_solves_the_minimisation(eps):
    """Against a general solver: the least |z - moved|^2 where z = x + a - b is in range, a, b >= 0, and their sum is at most eps."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    x, moved = rng.random(6), rng.normal(0.5, 1, 6)

    def point(ab):
        return x + ab[:6] - ab[6:]

    found = optimize.minimize(
        lambda ab: np.square(point(ab) - moved).sum(),
        np.zeros(12),
        bounds=[(0, room) for room in (*(1 - x), *x)],
        constraints={"type": "ineq", "fun": lambda ab: eps - ab.sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    ours = L1(torch.from_numpy(x)[None], eps, 0)._project(torch.from_numpy(moved)[None])
    np.testing.assert_allclose(ours[0].numpy(), point(found.x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_l1_ball_of_large_images(dtype):
    """Where the sum over many pixels, in the images' own precision, is far from exact."""
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    ball = L1(x, 12.0, 1.0)
    moved = (x.double() + torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for x_adv in (ball._project(moved), ball.random_start(torch.Generator().manual_seed(2))):
        for kind in (torch.float64, dtype):
            assert (x_adv.to(kind) - x.to(kind)).flatten(1).abs().sum(1).max().item() <= 12
    if dtype.itemsize >= 4:
        assert (ball._project(moved) - x).flatten(1).abs().sum(1).min().item() > 12 * (1 - 1e-4)


def test_l1_steps_move_few_pixels_that_can_move():
    x = torch.full((1, 300), 0.5)
    x[0, 299] = 1  # has the largest gradient of all, and no room
    model = nn.Linear(300, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(300), torch.arange(300.0)]))
    shift = pgd(model, x, torch.tensor([0]), eps=3.0, step_size=0.6, steps=2, norm="l1", random_start=False) - x
    expected = torch.zeros(300)
    expected[296:299] = 0.4  # 1 % of 300 pixels share each step
    torch.testing.assert_close(shift[0], expected)
