"""Whole experiments, tiny: sharing changes nothing, what was stopped goes on to the same table, and all figures come from the table."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
from command_line import TINY, refused
from scipy import stats

from s2ap_ext.cli import main
from s2ap_ext.experiments import jobs, read_plan, read_table, summarise, to_markdown, workers
from s2ap_ext.experiments.jobs import Job, do
from s2ap_ext.experiments.plan import from_table, to_toml
from s2ap_ext.experiments.runner import run
from s2ap_ext.pipeline import RunFolder, Session, checkpoint, load_recipe, open_data, progress
from s2ap_ext.pipeline import run as run_alone
from s2ap_ext.pipeline.recipe import to_table
from s2ap_ext.pipeline.run_folder import Locked, locked, read_analysis, read_metrics, read_recipe

SETTINGS = dict(text.split("=") for text in [*TINY, "model.width=4", "prune.epochs=2", "prune.warmup_epochs=1", "prune.lr=1"])
PLAN = from_table(
    {
        "name": "tiny",
        "question": "Does it run?",
        "seeds": 2,
        "baseline": "plain",
        "metric": ["robust", "pruned.mask_distance"],
        "settings": SETTINGS,
        "arms": {"plain": {"prune.s2ap": False}, "s2ap": {"prune.gamma": 0.5}, "awp": {"prune.gamma": 0.5, "finetune.awp": False}},
    }
)


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment") / "tiny"
    (out.parent / "plan.toml").write_text(to_toml(PLAN))
    assert main(["experiment", str(out.parent / "plan.toml"), "--out", str(out), "--workers", "1", "--device", "cpu"]) == 0
    return out


class Told(progress.Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_a_run_is_what_it_is_alone(finished, tmp_path):
    """Shared stages: the same bits, the same records."""
    folder = finished / "runs" / "awp" / "seed-1"
    assert len(list((finished / "shared").iterdir())) == 4  # for each seed the dense model, and the mask of s2ap and awp
    recipe = load_recipe(folder / "config.toml")
    with RunFolder.create(tmp_path / "alone", recipe) as opened:
        run_alone(Session(recipe, open_data(recipe), opened))
    for model in ("dense", "pruned", "finetuned"):
        ours, theirs = (checkpoint.load(path / f"{model}.safetensors")[0] for path in (folder, tmp_path / "alone"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert timeless(read_metrics(folder)) == timeless(read_metrics(tmp_path / "alone"))


def test_the_table_says_what_the_runs_measured(finished):
    rows = read_table(finished / "table.csv")
    assert [(row["arm"], row["seed"], row["model"]) for row in rows] == list(
        itertools.product(("plain", "s2ap", "awp"), (0, 1), ("dense", "pruned", "finetuned"))
    )
    folder = finished / "runs" / "s2ap" / "seed-1"
    (row,) = [row for row in rows if (row["arm"], row["seed"], row["model"]) == ("s2ap", 1, "pruned")]
    result = json.loads((folder / "results.json").read_text())["rows"][1]
    assert {name: row[name] for name in ("clean", "robust", "sparsity", "images", "seconds")} == {
        name: result[name] for name in ("clean", "robust", "sparsity", "images", "seconds")
    }
    first, last = [record for record in read_metrics(folder) if record["stage"] == "prune"]
    assert first["steps"] == last["steps"] == 2
    assert row["seconds_per_step"] == pytest.approx((first["seconds"] + last["seconds"]) / 4)
    assert row["flips"] == last["flips"] > 0  # the first epoch is the warm-up
    assert (row["passes"], row["gamma"], row["mask_distance"]) == (2, 0.5, last["mask_distance"])
    assert row["unflipped"] == last["unflipped"] < 1
    with open(finished / "table.csv", newline="") as file:
        assert next(csv.reader(file))[:8] == ["arm", "seed", "model", "clean", "robust", "sparsity", "images", "seconds"]


def test_the_table_has_the_sharpness_of_runs_that_were_analysed(finished, tmp_path, capsys):
    folder = tmp_path / "experiment"
    shutil.copytree(finished, folder)
    for path in (folder / "runs").glob("*/seed-0"):
        if path.parent.name != "awp":
            assert main(["analyze", str(path), "--images", "16"]) == 0
    assert main(["experiment", "--resume", str(folder)]) == 0
    rows = {(row["arm"], row["seed"], row["model"]): row for row in read_table(folder / "table.csv")}
    spectra = read_analysis(folder / "runs/s2ap/seed-0")["models"][1]["spectra"]
    found = rows["s2ap", 0, "pruned"]
    assert [found["lambda_max.scores"], found["lambda_max.weights"]] == [one["eigenvalues"][0] for one in spectra]
    assert "lambda_max.scores" not in rows["plain", 0, "dense"]  # a dense model has none
    assert "lambda_max.weights" not in rows["awp", 0, "pruned"].keys() | rows["plain", 1, "pruned"].keys()
    assert "lambda_max, scores" in (folder / "summary.md").read_text()


def test_the_summary_comes_from_the_table_alone(finished, tmp_path):
    shutil.copy(finished / "table.csv", tmp_path)
    rows = read_table(tmp_path / "table.csv")
    summary = summarise(read_plan(finished), rows)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert to_markdown(summary) == (finished / "summary.md").read_text()
    assert (summary["name"], summary["baseline"], summary["metric"]) == ("tiny", "plain", "robust")
    values = [row["robust"] for row in rows if (row["arm"], row["model"]) == ("awp", "finetuned")]
    (arm,) = [arm for arm in summary["arms"] if arm["arm"] == "awp"]
    assert (arm["n"], arm["model"], arm["robust"]["mean"]) == (2, "finetuned", sum(values) / 2)
    moved = {name: [row["mask_distance"] for row in rows if (row["arm"], row["model"]) == (name, "pruned")] for name in ("s2ap", "plain")}
    (one,) = [c for c in summary["comparisons"] if (c["arm"], c["metric"]) == ("s2ap", "pruned.mask_distance")]
    theirs = stats.ttest_rel(moved["s2ap"], moved["plain"])
    assert (one["against"], one["difference"]) == ("plain", pytest.approx(sum(moved["s2ap"]) / 2 - sum(moved["plain"]) / 2))
    assert one["p"] == pytest.approx(theirs.pvalue)
    assert one["p_corrected"] == pytest.approx(min(1, 2 * theirs.pvalue))


def test_the_page_reads_a_table_as_it_says(finished, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "compare").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert capsys.readouterr().out.strip() == json.loads((finished / "summary.json").read_text())["verdict"]


def begun(finished, out, *runs):
    """A copy of an experiment in which some runs have not begun yet."""
    shutil.copytree(finished, out)
    (out / "table.csv").unlink()
    for name in runs:
        shutil.rmtree(out / "runs" / name)
    return out


@pytest.mark.slow  # two processes start, and import torch: that takes as long as all else here
def test_processes_do_what_is_left_and_are_stopped(finished, tmp_path):
    told, out = Told(), begun(finished, tmp_path / "tiny", "plain/seed-0", "s2ap/seed-0", "awp/seed-1")
    kept = {path: path.read_bytes() for path in out.glob("runs/*/*/results.json")}
    assert len(kept) == 3
    found = run(read_plan(out), out, workers=2, show=told, stop=lambda: bool(told.lines))
    assert not found.failed
    assert not found.finished
    assert run(read_plan(out), out, workers=1, show=told).finished
    assert {path: path.read_bytes() for path in kept} == kept
    assert timeless(read_table(out / "table.csv")) == timeless(read_table(finished / "table.csv"))
    assert len(told.lines) == 3
    assert all("finetuned  clean" in line and "robust" in line for line in told.lines)


def test_ctrl_c_is_answered_with_the_command_that_goes_on(finished, tmp_path, monkeypatch, capsys):
    out = begun(finished, tmp_path / "tiny", "s2ap/seed-1")
    shutil.rmtree(out / "shared")  # the other runs have what they need

    def interrupted(job, stop):
        os.kill(os.getpid(), signal.SIGINT)
        return do(job, stop)

    monkeypatch.setattr(workers, "do", interrupted)
    assert main(["experiment", "--resume", str(out), "--workers", "1"]) == 130
    assert f"s2ap: stopped; to go on: s2ap experiment --resume {out}" in capsys.readouterr().err
    (stopped,) = out.glob("shared/*/state.safetensors")
    assert {row["arm"] for row in read_table(out / "table.csv")} == {"plain", "s2ap", "awp"}
    monkeypatch.undo()
    assert main(["experiment", "--resume", str(out), "--workers", "1"]) == 0
    assert not stopped.exists()
    assert len(list((out / "shared").iterdir())) == 2  # of one seed
    assert timeless(read_table(out / "table.csv")) == timeless(read_table(finished / "table.csv"))


def test_a_second_process_is_refused(finished):
    with locked(finished), pytest.raises(ValueError, match=r"tiny: another process works in this folder \(process \d+\)"):
        run(read_plan(finished), finished)


def test_a_process_that_is_about_to_end_is_waited_for(finished, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(finished / "runs" / "plain" / "seed-0", tmp_path / "seed-0"))
    job = Job(folder, to_table(read_recipe(folder)), ("finetune",), None, "plain", 0)
    with contextlib.ExitStack() as other:
        other.enter_context(locked(folder))
        threading.Timer(0.5, other.close).start()
        assert do(job, lambda: False)["model"] == "finetuned"
    monkeypatch.setattr(jobs, "PATIENCE", 0.2)
    with locked(folder), pytest.raises(Locked, match="another process works in this folder"):
        do(job, lambda: False)


def test_a_finished_experiment_has_nothing_to_do_and_takes_more_seeds(finished, tmp_path, capsys):
    out = tmp_path / "tiny"
    shutil.copytree(finished, out)
    (out / "table.csv").unlink()
    assert main(["experiment", "--resume", str(out)]) == 0
    assert (out / "table.csv").read_bytes() == (finished / "table.csv").read_bytes()
    assert main(["experiment", "--resume", str(out), "--seeds", "3", "--workers", "1"]) == 0
    assert {row["seed"] for row in read_table(out / "table.csv")} == {0, 1, 2}
    assert "has 3 seeds already, expected at least as many, got 2" in refused(capsys, "experiment", "--resume", out, "--seeds", "2")


def test_another_plan_is_refused(finished, tmp_path, capsys):
    plan = finished.parent / "plan.toml"
    assert "holds another plan" in refused(capsys, "experiment", plan, "--out", finished, "--set", "prune.sparsity=0.5")
    assert "leave out the plan, --set" in refused(capsys, "experiment", plan, "--resume", finished, "--set", "prune.sparsity=0.5")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "exists already and is not the folder of an experiment" in refused(capsys, "experiment", plan, "--out", tmp_path / "full")
    assert "nowhere: not the folder of an experiment" in refused(capsys, "experiment", "--resume", "nowhere")
    assert "expected a plan, or --resume DIR" in refused(capsys, "experiment")


def test_a_run_of_another_recipe_is_not_taken_for_one_of_the_plan(finished, tmp_path):
    out = tmp_path / "tiny"
    shutil.copytree(finished, out)
    (out / "plan.toml").write_text(to_toml(read_plan(out).changed(["evaluate.batch_size=3"])))
    with pytest.raises(ValueError, match=r"seed-0: made by another recipe|pretrain-\w+: made by another recipe"):
        run(read_plan(out), out)


def test_a_run_that_fails_stops_no_other(tmp_path, capsys):
    table = {"name": "fails", "seeds": 1, "baseline": "fine", "settings": {**SETTINGS, "prune.epochs": 1}}
    arms = {"diverges": {"finetune.lr": 1e6, "finetune.epochs": 4}, "fine": {}}
    (tmp_path / "plan.toml").write_text(to_toml(from_table({**table, "arms": arms})))
    assert main(["experiment", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("s2ap: error: 1 of the runs failed: diverges, seed 0: finetune, epoch")
    assert "nothing was compared, so nothing follows" in out
    assert {row["arm"] for row in read_table(tmp_path / "out" / "table.csv")} == {"fine"}


def test_the_last_models_are_attacked_in_other_balls(tmp_path):
    balls = {
        "wide": {"attack.eps": 0.3, "evaluate.attacks": ["pgd"]},
        "l2": {"attack": {"norm": "l2", "eps": 0.1}, "evaluate.attacks": ["pgd", "fmn"]},
    }
    table = {"name": "attacked", "seeds": 1, "baseline": "plain", "metric": "l2.worst", "settings": SETTINGS, "attacked": balls}
    plan, out = from_table({**table, "arms": {"plain": {"prune.s2ap": False}, "s2ap": {}}}), tmp_path / "out"
    asked = itertools.count()
    assert not run(plan, out, workers=1, stop=lambda: next(asked) > 12).finished
    assert run(plan, out, workers=1).finished
    rows = read_table(out / "table.csv")
    assert all(("l2.worst" in row) == (row["model"] == "finetuned") for row in rows)
    for row in rows:
        if row["model"] == "finetuned":
            assert row["l2.worst"] <= min(row["l2.pgd"], row["l2.fmn"]) <= row["clean"]
            assert row["wide.worst"] == row["wide.pgd"] <= row["clean"]
    (one,) = summarise(plan, rows)["comparisons"]
    assert (one["metric"], one["unit"]) == ("l2.worst", "points")
    assert "| l2.fmn % | l2.pgd % | l2.worst % | wide.pgd % | wide.worst % |" in to_markdown(summarise(plan, rows))
    bad = from_table({**table, "arms": {"plain": {}}, "attacked": {"l2": {"attack.norm": "l2", "evaluate.attacks": ["pgdd"]}}})
    with pytest.raises(ValueError, match=r"attacked\.l2: evaluate\.attacks: .* got 'pgdd'"):
        run(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# ---------------------------------------------------------------------------------------------------------------------- in words


def rows_of(**arms):
    return [
        {"arm": arm, "seed": seed, "model": "finetuned", "clean": 1.0, "robust": robust, "sparsity": 0.9}
        for arm, values in arms.items()
        for seed, robust in enumerate(values)
    ]


def words(**arms):
    plan = from_table({"arms": {arm: {} for arm in arms}, "baseline": next(iter(arms)), "seeds": len(next(iter(arms.values())))})
    return summarise(plan, rows_of(**arms))


def test_a_clear_difference_and_one_that_is_none_are_told_apart():
    plain = [0.80, 0.82, 0.78, 0.81, 0.79]
    better = [value + shift for value, shift in zip(plain, [0.03, 0.031, 0.029, 0.03, 0.03], strict=True)]
    equal = [value + shift for value, shift in zip(plain, [0.02, -0.03, 0.01, -0.01, 0.02], strict=True)]
    found = words(plain=plain, better=better, equal=equal)
    assert found["verdict"].startswith(
        "Robust accuracy over 5 seeds (95 % intervals, p corrected for 2 comparisons): better is above plain by 3.0"
    )
    assert "No difference is shown for equal against plain, +0.2 points (-2.5 to +2.9" in found["verdict"]
    assert "no evidence of equality, since the intervals leave room for differences of up to 2.9 points" in found["verdict"]
    below = words(better=better, plain=plain)["verdict"]
    assert "plain is below better by 3.0 points" in below
    assert "No difference" not in below


def test_what_is_the_same_is_told_as_such():
    assert words(exact=[0.8, 0.9], skip=[0.8, 0.9])["verdict"] == (
        "Robust accuracy over 2 seeds (95 % intervals): The same in every run: skip and exact."
    )


def test_many_comparisons_are_counted():
    plain = [0.80, 0.82, 0.78, 0.81, 0.79]
    near = {f"near{i}": [value + (-1) ** (i + j) * 0.01 * (i + 1) for j, value in enumerate(plain)] for i in range(8)}
    assert "No difference is shown for 8 comparisons: that is no evidence" in words(plain=plain, **near)["verdict"]


def test_one_seed_tells_nothing():
    found = words(plain=[0.8], s2ap=[0.9])
    assert found["verdict"] == "Robust accuracy: one seed each, so no difference can be told from chance and nothing follows."
    assert found["comparisons"][0]["p"] is None
    assert "| s2ap | plain | robust | 1 | +10.0 points |" in to_markdown(found)


def test_arms_are_compared_on_the_seeds_that_both_have():
    rows = [row for row in rows_of(a=[0.5, 0.6, 0.7], b=[0.6, 0.7, 0.9]) if (row["arm"], row["seed"]) != ("a", 2)]
    plan = from_table({"arms": {"a": {}, "b": {}}, "baseline": "a", "seeds": 3})
    (one,) = summarise(plan, rows)["comparisons"]
    assert one["n"] == 2
    assert math.isclose(one["difference"], 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected a table whose first columns are arm, seed, model"),
        ("arm,seed,model,clean,robust,sparsity,images,seconds\na,0,dense,x,1,1,1,1\n", "line 2: clean: expected a number, got 'x'"),
        ("arm,seed,model,clean,robust,sparsity,images,seconds\na,0,dense,nan,1,1,1,1\n", "line 2: clean: expected a finite number"),
        ("arm,seed,model,clean,robust,sparsity,images,seconds\na,0\n", "line 2: expected a value for each column"),
    ],
)
def test_a_table_that_is_none_is_refused(text, message, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "table.csv")
