"""Plans: what they say of arms and comparisons, those of the package, and how wrong ones are refused."""

from pathlib import Path

import pytest

from s2ap_ext.experiments import known_plans, load_plan
from s2ap_ext.experiments.attacked import recipe_for
from s2ap_ext.experiments.jobs import jobs_of
from s2ap_ext.experiments.plan import from_table, to_toml
from s2ap_ext.pipeline.extras import optional

ARMS = {"plain": {"prune": {"s2ap": False}}, "s2ap": {"prune.s2ap": True}}
METHODS = {"hydra": {"prune": {"method": "hydra"}}, "harp": {"prune": {"method": "harp"}}}


def plan(**table):
    return from_table({"arms": ARMS, **table})


def jobs(read):
    return jobs_of(read.runs(), Path("out"))


def test_arms_are_repeated_across_and_compared_in_their_cell():
    read = plan(across=[METHODS, {"90": {"prune.sparsity": 0.9}, "95": {"prune.sparsity": 0.95}}], baseline="plain")
    assert list(read.all_arms())[:3] == ["hydra-90-plain", "hydra-90-s2ap", "hydra-95-plain"]
    assert len(read.all_arms()) == 8
    assert read.comparisons()[0] == ("hydra-90-s2ap", "hydra-90-plain")
    assert len(read.comparisons()) == 4
    recipe = read.recipe_of("harp-95-s2ap", 3)
    assert (recipe.prune.method.name, recipe.prune.sparsity, recipe.prune.s2ap, recipe.seed) == ("harp", 0.95, True, 3)


def test_several_baselines_compare_no_pair_twice():
    read = from_table({"arms": {name: {"prune.gamma": i} for i, name in enumerate("abc")}, "baseline": ["a", "b"]})
    assert read.comparisons() == [("b", "a"), ("c", "a"), ("c", "b")]


def test_a_plan_is_read_back_from_what_it_is_written_to():
    read = plan(
        across=[METHODS], baseline="plain", settings={"prune": {"ascent": {"name": "random", "seed": 3}, "exclude": ["conv1", "linear"]}}
    )
    assert from_table(optional("tomllib", or_else="tomli").loads(to_toml(read))) == read
    recipe = read.recipe_of("harp-s2ap", 0)
    assert recipe.prune.ascent.seed == 3
    assert recipe.prune.exclude == ("conv1", "linear")


@pytest.mark.parametrize("name", known_plans())
def test_the_plans_of_the_package_hold(name):
    """Every arm has a recipe of its own, and compares with another."""
    read = load_plan(name)
    assert read.question.endswith("?")
    assert read.comparisons()
    read = read.changed(seeds=1)
    assert len([job for job in jobs(read) if job.arm]) == len(read.all_arms())


def test_stages_that_agree_are_done_once():
    """The masks of the finetuning arms are the same, so pretraining and search are one job for each seed."""
    read = load_plan("finetune").changed(seeds=2)
    first, *others = [job for job in jobs(read) if job.seed == 0]
    assert (first.arm, first.stages, first.start) == ("", ("pretrain", "prune"), None)
    assert [(job.stages, job.start) for job in others] == [(("finetune",), first.folder)] * 2
    # Where some arms share more than others, what all share is done once too.
    awp = from_table({"arms": {**ARMS, "awp": {"prune.s2ap": False, "finetune.awp": False}}, "seeds": 1})
    dense, masks = [job for job in jobs(awp) if not job.arm]
    assert (dense.stages, dense.start, masks.stages, masks.start) == (("pretrain",), None, ("prune",), dense.folder)
    starts = {job.arm: job.start for job in jobs(awp) if job.arm}
    assert starts == {"plain": masks.folder, "awp": masks.folder, "s2ap": dense.folder}


def test_methods_without_pretraining_start_from_nothing():
    read = plan(across=[{**METHODS, "rst": {"prune.method": "rst"}}], seeds=1)
    starts = {job.arm: (job.stages, job.start) for job in jobs(read)}
    assert starts["rst-plain"] == (("prune",), None)
    assert starts["harp-plain"] == starts["hydra-s2ap"] != starts["rst-plain"]


def test_more_settings_change_all_arms():
    read = plan().changed(["prune.gamma=0.5"], 2)
    assert (read.seeds, read.recipe_of("s2ap", 1).prune.gamma, read.recipe_of("plain", 1).prune.gamma) == (2, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"--set prune\.s2ap: the arm plain sets it itself"):
        plan().changed(["prune.s2ap=true"])
    with pytest.raises(ValueError, match="--seeds: expected an integer >= 1, got 0"):
        plan().changed(seeds=0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sed": 3}, "plan: unknown key sed; did you mean seeds"),
        ({"seeds": 0}, "plan: seeds: expected an integer >= 1, got 0"),
        ({"arms": {}}, "plan: arms: expected at least one"),
        ({"arms": {"a/b": {}}}, r"plan: arms: expected names that match .*, got 'a/b'"),
        ({"arms": {"a": 3}}, r"plan: arms\.a: expected a table of settings, got 3"),
        ({"baseline": "plane"}, "plan: baseline: expected names of arms, got 'plane'; did you mean plain"),
        ({"across": {"a": {}}}, r"plan: across: expected \[\[across\]\], a list of tables"),
        ({"across": [{}]}, "plan: across: expected tables with at least one entry"),
        ({"across": [{"a": {}, "a-b": {}}, {"b-c": {}, "c": {}}]}, "plan: arms: two of them have the same name"),
        ({"attacked": {"pruned": {}}}, "plan: attacked: expected names that match .*, without a dot and none of a model, got 'pruned'"),
        ({"settings": {"seed": 3}}, "plan: settings: seed: the experiment gives each run its own"),
    ],
)
def test_wrong_plans_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        plan(**table)


def test_further_attacks_change_neither_model_nor_training():
    read = plan(attacked={"l2": {"prune": {"gamma": 0.5}}})
    with pytest.raises(ValueError, match=r"attacked\.l2: prune\.gamma: the model is made already; expected keys of attack and evaluate"):
        recipe_for(read.recipe_of("plain"), "l2", read.attacked["l2"])
    wide = plan(attacked={"wide": {"attack": {"eps": 0.5}}})
    recipe = wide.recipe_of("plain")
    assert recipe_for(recipe, "wide", wide.attacked["wide"]).attack.eps == 0.5
    assert recipe.attack.eps == 0.1
    with pytest.raises(ValueError, match=r"attacked\.wide: attack\.eps: expected a number >= 0, got -1"):
        recipe_for(recipe, "wide", {"attack.eps": "-1"})


def test_wrong_settings_name_the_arm():
    with pytest.raises(ValueError, match=r"plan p: arm a: prune\.gama: no such key in a recipe; did you mean prune\.gamma"):
        from_table({"name": "p", "arms": {"a": {"prune.gama": 3}}}).recipe_of("a", 0)


def test_arms_that_are_the_same_are_refused():
    same = from_table({"arms": {"one": {"prune.gamma": 0.001}, "two": {}}})
    with pytest.raises(ValueError, match="arms one and two: expected recipes that differ, got the same"):
        jobs(same)


def test_a_recipe_lies_where_the_plan_does(tmp_path):
    (tmp_path / "mine.toml").write_text("seed = 3\n[prune]\nsparsity = 0.5\n")
    (tmp_path / "plan.toml").write_text('recipe = "mine.toml"\n[arms]\na = {}\n')
    assert load_plan(tmp_path / "plan.toml").recipe_of("a", 0).prune.sparsity == 0.5
    with pytest.raises(ValueError, match=r"plan: expected one of .* got 'compar'; did you mean compare"):
        load_plan("compar")
    (tmp_path / "bad.toml").write_text("seeds = \n")
    with pytest.raises(ValueError, match=r"bad\.toml: not a TOML file"):
        load_plan(tmp_path / "bad.toml")
