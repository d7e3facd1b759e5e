"""The control that perturbs the kept weights during the mask search, as AWP does it in finetuning."""

import pytest
import torch
from command_line import TINY

from s2ap_ext.pipeline import RunFolder, Session, check_prunable, checkpoint, load_recipe, open_data, run
from s2ap_ext.pipeline.run_folder import read_metrics

WEIGHTS = ["prune.perturbs=weights", "prune.gamma=0.5", "prune.warmup_epochs=1", "prune.epochs=2", "prune.lr=1"]


def searched(folder, *overrides):
    """What a search left, the dense model it started from, and its records."""
    recipe = load_recipe("digits", [*TINY, *overrides])
    with RunFolder.create(folder, recipe) as opened:
        run(Session(recipe, open_data(recipe), opened), ("pretrain", "prune"))
    tensors = [checkpoint.load(folder / f"{name}.safetensors")[0] for name in ("pruned", "dense")]
    return *tensors, [record for record in read_metrics(folder) if record["stage"] == "prune"]


def test_the_search_takes_its_gradients_at_perturbed_weights_and_leaves_them(tmp_path):
    pruned, dense, records = searched(tmp_path / "weights", *WEIGHTS)
    assert [record["passes"] for record in records] == [1, 2]  # the first epoch is the warm-up
    assert [record["flips"] for record in records] == [0, 0]
    assert "gamma" not in records[1]
    for name in ("conv1.weight", "linear.weight"):
        assert torch.equal(pruned[name], dense[name])
    plain = searched(tmp_path / "plain", *WEIGHTS, "prune.s2ap=false")[0]
    assert not torch.equal(pruned["conv1.scores"], plain["conv1.scores"])


def test_no_share_of_flips_is_asked_of_perturbed_weights():
    recipe = load_recipe("digits", ["prune.perturbs=weights", "prune.gamma=flips:0.003"])
    with pytest.raises(ValueError, match=r"prune\.gamma: expected a number where prune\.perturbs is weights, got 'flips:0.003'"):
        check_prunable(recipe, open_data(recipe))
