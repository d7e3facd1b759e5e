"""Sweeps: what a parameter may be, trials that are stopped, killed, pruned or diverge, and what is left of them."""

import csv
import json
from pathlib import Path

import pytest
from command_line import TINY, refused

from s2ap_ext.cli import main
from s2ap_ext.experiments.sweep import ENDED, FOLDER, Param, Sweep, read_sweep, run_sweep
from s2ap_ext.pipeline import load_recipe, progress
from s2ap_ext.pipeline.run_folder import read_metrics

optuna = pytest.importorskip("optuna")
TWO = ("prune.gamma=log:1e-4:1e-1", "prune.method=choice:hydra,harp")
SMALL = [*TINY, "name=small", "prune.warmup_epochs=0"]


def sweep_of(*params, settings=()):
    return Sweep(load_recipe("digits", [*SMALL, *settings]), params or TWO)


def study_in(folder):
    return optuna.load_study(study_name="small", storage=f"sqlite:///{folder / 'study.db'}")


def states(folder):
    return [trial.state.name for trial in study_in(folder).trials]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "small"
    words = [word for text in SMALL for word in ("--set", text)] + [word for text in TWO for word in ("--param", text)]
    assert main(["sweep", "digits", *words, "--device", "cpu", "--trials", "2", "--out", str(out)]) == 0
    return out


def test_trials_are_runs_that_share_their_pretraining(finished):
    assert states(finished) == ["COMPLETE"] * 2
    with open(finished / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["robust"]) for row in rows] == sorted((float(row["robust"]) for row in rows), reverse=True)
    assert len(list((finished / "shared").iterdir())) == 1
    for row in rows:
        folder = Path(row["folder"])
        recipe = load_recipe(folder / "config.toml")
        assert recipe.prune.gamma == float(row["prune.gamma"])
        assert recipe.prune.method.name == row["prune.method"]
        result = json.loads((folder / "results.json").read_text())["rows"][-1]
        assert (result["model"], result["robust"]) == ("finetuned", float(row["robust"]))
    reported = study_in(finished).trials[0]
    records = [record for record in read_metrics(reported.user_attrs[FOLDER]) if record["stage"] in ("prune", "finetune")]
    assert [value for _, value in sorted(reported.intermediate_values.items())] == [
        record["robust"] for record in records if "epoch" in record
    ]


def test_a_sweep_goes_on_with_the_same_study(finished, capsys):
    assert main(["sweep", "--resume", str(finished), "--trials", "2"]) == 0
    assert states(finished) == ["COMPLETE"] * 2
    assert "the best of 2 trials" in capsys.readouterr().out
    gammas = {trial.params["prune.gamma"] for trial in study_in(finished).trials}
    assert len(gammas) == 2


def test_a_stopped_trial_goes_on_where_it_was(tmp_path):
    sweep, out = sweep_of(settings=["prune.epochs=3"]), tmp_path / "out"
    asked = iter(range(10**6))
    run_sweep(sweep, out, trials=2, stop=lambda: next(asked) >= 6)
    (stopped,) = [trial for trial in study_in(out).trials if trial.state.name == "FAIL"]
    assert ENDED not in stopped.user_attrs
    folder = Path(stopped.user_attrs[FOLDER])
    begun = [record for record in read_metrics(folder) if record["stage"] == "prune"]
    assert begun
    rows = run_sweep(read_sweep(out), out, trials=2)
    assert len(rows) == 2
    assert states(out) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study_in(out).trials[1].params == stopped.params
    assert study_in(out).trials[1].user_attrs[FOLDER] == str(folder)
    assert [record for record in read_metrics(folder) if record["stage"] == "prune"][: len(begun)] == begun


def test_a_trial_whose_process_was_killed_is_taken_up_again(tmp_path):
    sweep, out = sweep_of(), tmp_path / "out"
    assert run_sweep(sweep, out, trials=1, stop=lambda: True) == []
    killed = study_in(out).ask()
    killed.suggest_float("prune.gamma", 1e-4, 1e-1, log=True)
    killed.suggest_categorical("prune.method", ("hydra", "harp"))
    killed.set_user_attr(FOLDER, str(out / "trials" / "x"))
    elsewhere = study_in(out).ask()
    elsewhere.set_user_attr(FOLDER, "/another/machine")
    assert len(run_sweep(sweep, out, trials=1)) == 1
    assert states(out) == ["FAIL", "RUNNING", "COMPLETE"]
    assert study_in(out).trials[2].params == study_in(out).trials[0].params


def test_trials_are_pruned_and_diverging_ones_counted(tmp_path, monkeypatch):
    lines = []

    class Told(progress.Silent):
        def say(self, line):
            lines.append(line)

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: True)
    (row,) = run_sweep(sweep_of(), tmp_path / "pruned", trials=1, show=Told())
    assert (row["ended"], row["robust"]) == ("pruned", None)
    assert states(tmp_path / "pruned") == ["PRUNED"]
    monkeypatch.undo()
    (row,) = run_sweep(
        sweep_of("finetune.lr=uniform:9e5:1e6", settings=["finetune.epochs=4"]), tmp_path / "diverges", trials=1, show=Told()
    )
    assert row["ended"].startswith("finetune, epoch ")
    assert states(tmp_path / "diverges") == ["FAIL"]
    assert ["pruned" in line or "finetune, epoch" in line for line in lines] == [True, True]


def test_what_the_parameters_change_is_trained_anew(tmp_path):
    run_sweep(sweep_of("pretrain.lr=choice:0.1,0.2"), tmp_path / "out", trials=1)
    assert not (tmp_path / "out" / "shared").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=log:1e-4:0.1", Param("a.b", "log", 1e-4, 0.1)),
        ("a.b=uniform:-1:2", Param("a.b", "uniform", -1.0, 2.0)),
        ("a.b=int:1:9", Param("a.b", "int", 1, 9)),
        ("a.b=choice:x, y", Param("a.b", "choice", choices=("x", "y"))),
    ],
)
def test_what_parameters_say(text, expected):
    assert Param.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune.gamma", "expected KEY=log:LOW:HIGH"),
        ("prune.gamma=lin:0:1", "expected KEY=log:LOW:HIGH"),
        ("prune.gamma=log:1", "expected KEY=log:LOW:HIGH"),
        ("prune.gamma=log:0:1", "expected LOW < HIGH, both > 0"),
        ("prune.gamma=uniform:2:1", "expected LOW < HIGH"),
        ("prune.epochs=int:1:2.5", "expected KEY=log:LOW:HIGH"),
        ("prune.gama=log:1e-3:1", "--param prune.gama: no such key in a recipe; did you mean prune.gamma"),
        ("prune.sparsity=uniform:0.5:1.5", "--param prune.sparsity: expected a number in [0, 1], got 1.5"),
        ("prune.method=choice:hydra,harpp", "--param prune.method: expected one of"),
    ],
)
def test_wrong_parameters_are_refused(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "sweep", "digits", "--param", text)
    assert list(tmp_path.iterdir()) == []


def test_wrong_sweeps_are_refused(finished, tmp_path, capsys):
    assert "--param: expected at least one" in refused(capsys, "sweep", "digits")
    twice = ["--param", "prune.gamma=uniform:0:1"] * 2
    assert "--param: expected each key once" in refused(capsys, "sweep", "digits", *twice)
    assert "holds another sweep" in refused(capsys, "sweep", "digits", *twice[:2], "--out", finished)
    assert "leave out recipe, param" in refused(capsys, "sweep", "digits", *twice, "--resume", finished)
    assert "not the folder of a sweep" in refused(capsys, "sweep", "--resume", tmp_path)
    away = refused(capsys, "sweep", "--resume", finished, "--storage", "nosuchdb://x")
    assert "--storage nosuchdb://x: cannot be used" in away
