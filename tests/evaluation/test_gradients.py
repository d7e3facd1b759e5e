"""The check for gradient masking: silent about a plain network, and its words for networks that hide their gradients."""

import pytest
import torch
from evaluation_models import EPS, images_of, small_network
from helpers import assert_as_found, snapshot
from torch import nn

from s2ap_ext.evaluation import check_gradients
from s2ap_ext.evaluation.gradients import GradientCheck, _signs

pytest.importorskip("pyautoattack")
HOW = {"eps": EPS["linf"], "queries": 60}


class Loud(nn.Module):
    """Logits so far apart that the softmax has no gradient left in float32."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return 1e5 * self.network(x)


class Rounded(Loud):
    """Images of few grey levels, through which no gradient passes."""

    def forward(self, x):
        return self.network(torch.round(x * 100) / 100)


def test_a_plain_network_gives_no_sign():
    model = small_network().train()
    x, y = images_of(model, 40)
    before = snapshot(model)
    found = check_gradients(model, x, y, **HOW)
    assert_as_found(model, before)
    assert found.warnings == ()
    assert found.images == 38
    assert found.zero_gradients == found.only_black_box == found.held_by_radius[torch.inf] == 0
    assert list(found.loss.values()) == sorted(found.loss.values())
    assert list(found.held_by_radius.values()) == sorted(found.held_by_radius.values(), reverse=True)
    assert found.held_by_radius[1] == found.held_by_starts[1] == found.held_by_steps[20] < 1


@pytest.mark.parametrize("hidden", [Loud, Rounded])
def test_networks_that_hide_their_gradients(hidden):
    model = hidden(small_network())
    x, y = images_of(model, 40)
    found = check_gradients(model, x, y, **HOW | {"eps": 3 * EPS["linf"]})
    text = "\n".join(found.warnings)
    assert found.zero_gradients > 0.5
    assert f"the gradient of {found.zero_gradients:.1%} of the images is 0 in every pixel" in text
    assert found.only_black_box > 0
    assert f"{found.only_black_box:.1%} hold under PGD and fall to Square" in text
    assert "although the attack may change every pixel" in text


def check(**changed):
    """The findings of a model without a sign, but for what is ``changed``."""
    good = {
        "images": 100,
        "zero_gradients": 0.0,
        "loss": {0: 0.1, 1: 0.5, 5: 1.0, 20: 1.1},
        "held_by_steps": {1: 0.7, 20: 0.5},
        "held_by_radius": {0.5: 0.8, 1: 0.5, 2: 0.1, 4: 0.0, torch.inf: 0.0},
        "held_by_starts": {1: 0.5, 5: 0.49},
        "only_black_box": 0.0,
        "warnings": (),
    }
    return GradientCheck(**{**good, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"zero_gradients": 0.02}, "the gradient of 2.0% of the images is 0 in every pixel"),
        ({"loss": {0: 0.1, 1: 0.5, 5: 1.2, 20: 1.1}}, "the loss falls from 1.200 after 5 steps of PGD to 1.100 after 20"),
        ({"held_by_steps": {1: 0.45, 20: 0.5}}, "one large step fools more than 20 small ones: 45.0% against 50.0% hold"),
        ({"held_by_radius": {0.5: 0.8, 1: 0.5, 2: 0.1, 4: 0.1, torch.inf: 0.1}}, "10.0% hold although the attack may change every pixel"),
        ({"held_by_radius": {0.5: 0.5, 1: 0.6, 2: 0.1, 4: 0, torch.inf: 0}}, "larger ball: 50.0% at 0.5 eps, 60.0% at 1 eps"),
        ({"held_by_starts": {1: 0.5, 5: 0.4}}, "5 random starts find much more than one: 40.0% against 50.0% hold"),
        ({"only_black_box": 0.05}, "5.0% hold under PGD and fall to Square, which sees no gradient"),
    ],
)
def test_each_sign_in_words(changed, words):
    signs = _signs(check(**changed))
    assert signs == [] if words is None else len(signs) == 1
    assert words is None or words in signs[0]


def test_images_that_are_all_wrong():
    model = small_network()
    x, y = images_of(model)
    with pytest.raises(ValueError, match="images: expected some that the model classifies rightly, got 12 that it does not"):
        check_gradients(model, x, (y + 2) % 5, **HOW)
