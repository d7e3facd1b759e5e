"""The plain search beside that with S2AP: a run of its own within the run."""

import itertools
from dataclasses import replace

import pytest
from command_line import TINY

from s2ap_ext.experiments import load_plan
from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, open_data, run
from s2ap_ext.pipeline.run_folder import read_metrics, read_recipe, read_results
from s2ap_ext.report import read, verdict

PERTURBED = ["prune.warmup_epochs=0", "prune.gamma=0.5"]  # so that a plain search finds another mask


def train(folder, *overrides, stages=None, stop=lambda: False):
    recipe = load_recipe("digits", [*TINY, *PERTURBED, *overrides])
    with RunFolder.open(folder, recipe) as opened:
        return run(Session(recipe, open_data(recipe), opened, stop=stop), stages)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlled") / "run"
    rows = train(folder, "prune.control=true")
    return folder, rows


def test_the_control_is_the_same_search_without_s2ap(controlled, tmp_path):
    folder, rows = controlled
    plain = train(tmp_path / "plain", "prune.s2ap=false", stages=("pretrain", "prune"))
    with_s2ap = train(tmp_path / "s2ap")
    timeless = [{key: value for key, value in row.items() if key != "seconds"} for row in (read_results(folder)["plain"], plain[-1])]
    assert timeless[0] == timeless[1]
    ours, alone = (read_metrics(path) for path in (folder / "plain", tmp_path / "plain"))
    assert [{**record, "seconds": 0} for record in ours] == [{**record, "seconds": 0} for record in alone]
    # And the run itself is what it would be without a control.
    assert [row["model"] for row in rows] == ["dense", "pruned", "finetuned"]
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in with_s2ap]


def test_the_control_is_a_run_like_others(controlled):
    folder, _ = controlled
    own, its = read_recipe(folder), read_recipe(folder / "plain")
    assert (its.name, its.prune.s2ap, its.prune.control) == ("digits-plain", False, False)
    assert (its.seed, its.prune.sparsity, its.pretrain) == (own.seed, own.prune.sparsity, own.pretrain)
    assert [row["model"] for row in read(folder / "plain").rows] == ["dense", "pruned"]
    moved = [[r for r in read_metrics(path) if r["stage"] == "prune"] for path in (folder, folder / "plain")]
    assert moved[0][0]["flips"] > 0 == moved[1][0]["flips"]


def test_reports_set_the_control_beside_the_search(controlled):
    run = read(controlled[0])
    assert [row["model"] for row in run.rows] == ["dense", "no S2AP", "pruned", "finetuned"]
    plain, pruned = run.rows[1]["robust"], run.rows[2]["robust"]
    sentence = verdict(run.results)
    assert f"The mask found with S2AP has {100 * pruned:.1f} % robust accuracy, " in sentence
    gap = round(100 * (pruned - plain), 1)
    told = "as much as" if gap == 0 else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
    assert f"{told} the one found without it, which 16 test images do not tell from no difference." in sentence


@pytest.mark.parametrize("asked", [7, 8, 9])  # after the first batch of the control and after the last one, and while it is tested
def test_a_control_that_is_stopped_goes_on(controlled, tmp_path, asked):
    count = itertools.count(1)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "prune.control=true", stop=lambda: next(count) == asked)
    assert (tmp_path / "run/plain/pruned.safetensors").exists() == (asked == 9)
    assert not (tmp_path / "run/finetuned.safetensors").exists()
    train(tmp_path / "run", "prune.control=true")
    for name in ("dense", "pruned", "finetuned", "plain/pruned"):
        assert (tmp_path / f"run/{name}.safetensors").read_bytes() == (controlled[0] / f"{name}.safetensors").read_bytes(), name


@pytest.mark.parametrize("how", [["prune.s2ap=false"], ["prune.control=false"]])
def test_there_is_none_where_none_is_wanted(tmp_path, how):
    train(tmp_path / "run", "prune.control=true", *how)
    assert "plain" not in read_results(tmp_path / "run")
    assert not (tmp_path / "run/plain").exists()


def test_a_method_without_pretraining_has_one_too(tmp_path):
    train(tmp_path / "run", "prune.method=rst", "prune.control=true")
    assert [row["model"] for row in read(tmp_path / "run").rows][:2] == ["no S2AP", "pruned"]


def test_a_stage_that_does_not_search_starts_none(controlled, tmp_path):
    recipe = read_recipe(controlled[0])
    data = open_data(recipe)
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        for name in ("dense", "pruned"):
            (tmp_path / f"run/{name}.safetensors").write_bytes((controlled[0] / f"{name}.safetensors").read_bytes())
        rows = run(Session(recipe, data, folder), ("finetune",))
    assert [row["model"] for row in rows] == ["dense", "pruned", "finetuned"]
    assert not (tmp_path / "run/plain").exists()


def test_one_stage_at_a_time_gives_the_same_results(controlled, tmp_path):
    for stages in (("pretrain",), ("prune",), ("finetune",)):
        train(tmp_path / "run", "prune.control=true", stages=stages)
    found, whole = (
        [{**row, "seconds": 0} for row in (*results["rows"], results["plain"])]
        for results in (read_results(tmp_path / "run"), read_results(controlled[0]))
    )
    assert found == whole


def test_arms_of_an_experiment_have_none_unless_they_say_so():
    plan = replace(load_plan("compare"), recipe="digits")
    assert load_recipe("digits").prune.control
    assert not any(recipe.prune.control for _, _, recipe in plan.runs())
    assert all(recipe.prune.control for _, _, recipe in plan.changed(["prune.control=true"]).runs())
