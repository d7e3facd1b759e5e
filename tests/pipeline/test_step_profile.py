"""Where a step of a mask search goes, in this package's form and in the one that it is compared with."""

import pytest
import torch

from s2ap_ext.nn import pruned_layers
from s2ap_ext.pipeline import load_recipe, open_data
from s2ap_ext.pipeline.step_profile import PHASES, _Ours, _Sorting, profile_step
from s2ap_ext.pipeline.trainer import seed

SMALL = ["model.width=4", "data.train_size=64", "data.test_size=8", "attack.steps=2", "prune.gamma=0.05", "threads=1", "device=cpu"]


@pytest.mark.parametrize("s2ap", ["true", "false"])
def test_both_forms_take_the_same_step(s2ap):
    """So what is compared is the same work. The forms sum in different orders, and so agree up to rounding."""
    recipe = load_recipe("digits", [*SMALL, f"prune.s2ap={s2ap}"])
    data = open_data(recipe)
    ours, sorting = (form(recipe, data, 32) for form in (_Ours, _Sorting))
    before = [layer.scores.detach().clone() for layer in pruned_layers(ours.model).values()]
    for form in (ours, sorting):
        seed(0)
        form.whole()
    after = [layer.scores.detach() for layer in pruned_layers(ours.model).values()]
    for start, one, other in zip(before, after, sorting.scores, strict=True):
        assert not torch.equal(start, one)
        torch.testing.assert_close(one - start, other.detach() - start, rtol=1e-3, atol=1e-6)


def test_every_phase_takes_its_time():
    recipe = load_recipe("digits", SMALL)
    ours, sorting = profile_step(recipe, open_data(recipe), batch=32, steps=1)
    for found in (ours, sorting):
        assert list(found.phases) == list(PHASES)
        assert all(ms > 0 for ms in found.phases.values()), found
        assert found.step > 0
        assert found.peak is None or found.peak >= 0
        assert max(found.phases, key=found.phases.get) in ("attack", "forward", "backward", "select")
    assert sorting.phases["select"] > ours.phases["select"]  # a selection in every forward, and not in every step


def test_a_plain_step_perturbs_nothing():
    recipe = load_recipe("digits", [*SMALL, "prune.s2ap=false"])
    for found in profile_step(recipe, open_data(recipe), batch=32, steps=1):
        assert found.phases["perturb"] == 0
        assert found.phases["update"] > 0
