"""Every ascent in whole mask searches, as a recipe chooses it; and going on after a stop."""

import itertools

import pytest
from helpers import assert_same_state

from s2ap_ext.parts import names
from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, new_model, open_data, prune, reproducible
from s2ap_ext.pipeline.run_folder import read_metrics

ASCENTS = [name for name in names("ascent") if not name.startswith("test-")]
SMALL = [
    "model.width=4",
    "data.train_size=96",
    "data.test_size=16",
    "attack.steps=2",
    "prune.epochs=2",
    "prune.batch_size=32",
    "prune.warmup_epochs=0",
    "prune.gamma=0.05",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=16",
]


def search(folder, *overrides, stop=lambda: False):
    """The model that a mask search leaves, from an untrained one; goes on where ``folder`` stands."""
    recipe = load_recipe("digits", [*SMALL, *overrides])
    data = open_data(recipe)
    with RunFolder.resume(folder) if folder.exists() else RunFolder.create(folder, recipe) as opened, reproducible(recipe):
        return prune(Session(recipe, data, opened, stop=stop), new_model(recipe, data))


def records(folder):
    return read_metrics(folder)


@pytest.mark.parametrize("method", ["harp", "magnitude"])  # one that listens to gradients, and one whose optimizer holds no scores
@pytest.mark.parametrize("ascent", ASCENTS)
def test_every_ascent_searches_and_goes_on_after_a_stop(ascent, method, tmp_path):
    how = [f"prune.method={method}", f"prune.ascent={ascent}", *(["prune.ascent.share=0.5"] if ascent == "late" else [])]
    model = search(tmp_path / "run", *how)
    count = itertools.count(1)
    with pytest.raises(Stopped):
        search(tmp_path / "stopped", *how, stop=lambda: next(count) == 4)  # in the middle of the second epoch
    assert_same_state(search(tmp_path / "stopped", *how), model)
    found = records(tmp_path / "run")
    assert [r["epoch"] for r in found] == [1, 2]
    assert sum(r["flips"] for r in found) > 0
    expected = {"exact": 2, "asam": 2, "every": 1 + 2 / 6, "late": 1.5, "reuse": 1, "previous": 1, "momentum": 1, "random": 1}
    if ascent in expected:
        assert sum(r["passes"] for r in found) / 2 == pytest.approx(expected[ascent])


@pytest.mark.parametrize("method", ["harp", "hydra"])
def test_skip_finds_the_mask_of_exact(method, tmp_path):
    how = [f"prune.method={method}", "prune.gamma=0.0005"]
    assert_same_state(search(tmp_path / "skip", *how, "prune.ascent=skip"), search(tmp_path / "exact", *how))
    found = records(tmp_path / "skip")
    assert all(1 <= r["passes"] < 2 for r in found)
    assert all(2 - r["passes"] <= r["unflipped"] < 1 for r in found)  # in a step that is skipped, no layer has flipped


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("natural", "loss natural: makes its examples itself"),
        ("free_at", "loss free_at: makes its examples itself"),
        ("n_fgsm", "loss n_fgsm: makes its examples itself"),
    ],
)
def test_reuse_needs_an_adversary(loss, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "run", "prune.ascent=reuse", f"prune.loss={loss}")


@pytest.mark.parametrize("loss", ["trades", "mart"])
def test_reuse_with_other_losses(loss, tmp_path):
    search(tmp_path / "run", "prune.ascent=reuse", f"prune.loss={loss}")
    assert all(r["flips"] > 0 and r["passes"] == 1 for r in records(tmp_path / "run"))
