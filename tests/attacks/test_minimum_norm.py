"""CW and FMN: on a linear model, where the nearest misclassified image is known, and their promises."""

import pytest
import torch
from evaluation_models import images_of, small_network
from helpers import assert_as_found, snapshot
from torch import nn

from s2ap_ext.attacks.balls import distances
from s2ap_ext.attacks.fmn import _projected
from s2ap_ext.evaluation import evaluate
from s2ap_ext.parts import make

ATTACKS = [("cw", "l2"), ("fmn", "linf"), ("fmn", "l2"), ("fmn", "l1")]
FEW = {"cw": {"steps": 50, "searches": 4, "start": 0.3}, "fmn": {"steps": 40}}
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


class Plane(nn.Module):
    """Two classes with a plane between them, [N, 1, 3, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(12))

    def forward(self, x):
        value = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([value, -value], dim=1)

    def distance(self, x, norm):
        """How far each image is from the plane, where the range of images is no obstacle."""
        return ((x.flatten(1) - 0.5) @ self.weight).abs() / torch.linalg.vector_norm(self.weight, DUAL[norm])


@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_the_distance_to_a_plane(name, norm):
    """What lies a little nearer than eps is found, and what lies beyond is not; wherever the planes are."""
    model = Plane()
    x = 0.5 + 0.05 * torch.randn(20, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, true = model(x).argmax(1), model.distance(x, norm)
        for eps in true[:2].tolist():
            x_adv = make("attack", name, norm=norm, eps=1.1 * eps, **FEW[name])(model, x, y)
            fooled = model(x_adv).argmax(1) != y
            assert torch.equal(fooled, (x_adv != x).flatten(1).any(1))
            assert distances(x_adv, x, norm).max() <= 1.1 * eps
            assert fooled[true <= eps].all()
            assert not fooled[true > 1.1 * eps].any()


@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_they_are_as_strong_as_pgd_and_leave_the_model_as_found(name, norm):
    model = small_network().train()
    x, y = images_of(model)
    eps = {"linf": 0.012, "l2": 0.12, "l1": 1.0}[norm]
    before = snapshot(model)
    with torch.inference_mode():
        found = evaluate(model, x, y, ["pgd", make("attack", name, norm=norm, eps=eps, **FEW[name])], norm=norm, eps=eps)
    assert_as_found(model, before)
    assert 0 < found.accuracy[name] < found.accuracy["clean"]
    assert int(found.held[name].sum()) <= int(found.held["pgd"].sum()) + 1


@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_images_on_the_border_and_a_model_without_a_gradient(name, norm):
    x = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 1, 3, 4).contiguous()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        flat[1].weight.zero_()
        y = flat(x).argmax(1)
    attack = make("attack", name, norm=norm, eps=0.1, **FEW[name])
    assert torch.equal(attack(flat, x, y), x)
    x_adv = attack(Plane(), x, Plane()(x).argmax(1))
    assert x_adv.isfinite().all()
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert attack(Plane(), x[:0], y[:0]).shape == (0, 1, 3, 4)


@pytest.mark.parametrize("norm", list(DUAL))
def test_projections_are_the_nearest_points(norm):
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    radius = torch.tensor([0.1, 0.5, 1, 2, 100, torch.inf], dtype=torch.float64)
    ours = _projected(shift, radius, norm)
    zeros = torch.zeros_like(shift)
    assert (distances(ours, zeros, norm) <= radius * (1 + 1e-12)).all()
    assert torch.equal(ours[4:], shift[4:])
    for _ in range(200):  # no point of the ball is nearer
        other = _projected(ours + 0.1 * torch.randn(6, 5, generator=generator, dtype=torch.float64), radius, norm)
        other *= (radius / distances(other, zeros, norm)).clamp(max=1)[:, None]
        assert (distances(other, shift, "l2") >= distances(ours, shift, "l2") - 1e-12).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cw", {"norm": "linf"}, "attack cw: norm: expected one of l2, got 'linf'"),
        ("fmn", {"norm": "l0"}, "attack fmn: norm: expected one of linf, l2, l1, got 'l0'"),
        ("fmn", {"gamma": 2}, "attack fmn: gamma: expected a number in"),
    ],
)
def test_settings_that_make_no_sense(name, options, message):
    with pytest.raises(ValueError, match=message):
        make("attack", name, **options)


@pytest.mark.parametrize("name", list(FEW))
def test_what_they_cannot_use(name):
    attack, (x, y) = make("attack", name), images_of(small_network())
    with pytest.raises(ValueError, match=f"attack {name}: expected classes and the loss ce"):
        attack(small_network(), x, None)
    with pytest.raises(ValueError, match=f"attack {name}: expected float32 or float64 images"):
        attack(small_network().half(), x.half(), y)
    with pytest.raises(ValueError, match="attack cw: norm: expected one of l2, got 'linf'"):
        evaluate(small_network(), x, y, ["cw"], eps=0.1)
