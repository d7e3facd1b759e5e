"""The gradients of parameters that an attack's last backward gives on its way."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LABELS, assert_as_found, images, small_net, snapshot

from s2ap_ext.attacks import Attack, Pgd
from s2ap_ext.nn import sparsify, train_scores


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradients_of_the_last_backward(steps, loss):
    """Those of the summed loss at the images before the last step, in evaluation mode; and the examples are the attack's own."""
    model, (x, y) = train_scores(sparsify(small_net(), 0.9)), (images(), LABELS)
    model.train()
    before = snapshot(model)
    attack = Pgd(eps=0.1, step_size=0.05, steps=steps)
    wanted = {name: p for name, p in model.named_parameters() if name.endswith("scores")}
    x_adv, gradients = attack.with_gradients(model, x, y, wanted, loss=loss, generator=torch.Generator().manual_seed(1))
    assert_as_found(model, before)
    assert torch.equal(x_adv, attack(model, x, y, loss=loss, generator=torch.Generator().manual_seed(1)))
    assert list(gradients) == list(wanted) == ["0.scores", "3.scores", "5.scores"]

    earlier = Pgd(eps=0.1, step_size=0.05, steps=steps - 1)(model, x, y, loss=loss, generator=torch.Generator().manual_seed(1))
    model.eval()
    if loss == "ce":
        value = F.cross_entropy(model(earlier), y, reduction="sum")
    else:
        value = F.kl_div(model(earlier).log_softmax(1), model(x).detach().log_softmax(1), reduction="sum", log_target=True)
    expected = torch.autograd.grad(value, list(wanted.values()))
    for found, g in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(found, g)


def test_parameters_that_the_logits_do_not_depend_on_have_no_gradient():
    model = small_net()
    strange = torch.nn.Parameter(torch.ones(3))
    _, gradients = Pgd(steps=1).with_gradients(model, images(), LABELS, {"0.weight": model[0].weight, "strange": strange})
    assert list(gradients) == ["0.weight"]
    assert strange.requires_grad


def test_no_gradients_wanted_is_the_attack_itself():
    """A plain step wants none, and a training loop need not look whether the next one is."""
    model = train_scores(sparsify(small_net(), 0.9))
    x_adv, gradients = Pgd(steps=2).with_gradients(model, images(), LABELS, {}, generator=torch.Generator().manual_seed(1))
    assert gradients == {}
    assert torch.equal(x_adv, Pgd(steps=2)(model, images(), LABELS, generator=torch.Generator().manual_seed(1)))


def test_no_images_have_no_gradients():
    x_adv, gradients = Pgd().with_gradients(small_net(), images()[:0], LABELS[:0], dict(small_net().named_parameters()))
    assert (x_adv.shape, gradients) == ((0, 3, 8, 8), {})


def test_gradients_that_an_attack_cannot_give():
    class Own(Attack):
        def __call__(self, model, x, y, *, loss="ce", generator=None):
            return x

    model = small_net()
    frozen = {"0.weight": model[0].weight.requires_grad_(False)}
    with pytest.raises(ValueError, match=r"parameters: expected such as require a gradient, 0\.weight does not"):
        Pgd().with_gradients(model, images(), LABELS, frozen)
    with pytest.raises(ValueError, match="attack pgd: takes no gradients of parameters in 0 steps"):
        Pgd(steps=0).with_gradients(model, images(), LABELS, {})
    with pytest.raises(ValueError, match="attack Own: takes no gradients of parameters"):
        Own().with_gradients(model, images(), LABELS, {})
