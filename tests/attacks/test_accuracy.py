"""The accuracy loop."""

from functools import partial

import pytest
import torch
from helpers import assert_as_found, images, small_net, snapshot

from s2ap_ext.attacks import Accuracy, accuracy, pgd


def test_accuracy_by_hand():
    """One pixel and a threshold at 0.5: an image is robust iff it is further than eps from the threshold."""

    def model(x):
        return torch.cat([0.5 - x, x - 0.5], dim=1)

    x = torch.tensor([[0.1], [0.45], [0.55], [0.9], [0.3], [0.45], [0.7]])
    y = torch.tensor([0, 0, 1, 1, 1, 1, 1])  # two are wrong: the fifth, and the sixth, which an attack could "mend"
    batches = list(zip(x.split(3), y.split(3), strict=True))
    attack = partial(pgd, eps=0.1, step_size=0.05, steps=4)
    assert accuracy(model, batches, attack) == Accuracy(clean=5 / 7, robust=3 / 7, images=7)
    assert accuracy(model, batches) == Accuracy(clean=5 / 7, robust=None, images=7)
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(model, [])


def test_accuracy_attacks_only_what_is_right_and_leaves_the_model_as_found():
    model, x = small_net(), images(7)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    y[4:] = (y[4:] + 1) % 10  # these three are wrong as they are
    model.train()
    model[1].eval()
    before, attacked = snapshot(model), []

    def attack(model, x, y):
        assert not any(module.training for module in model.modules())
        attacked.append(len(x))
        return pgd(model, x, y, eps=0.1, step_size=0.03, steps=4)

    result = accuracy(model, [(x, y)], attack)
    assert_as_found(model, before)
    assert attacked == [4]
    assert result.robust <= result.clean == 4 / 7
