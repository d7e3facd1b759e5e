"""``s2ap evaluate --attack`` and the key evaluate.attacks: what is shown, written, kept and refused."""

import functools
import json

import pytest
import torch
from command_line import refused, settings
from evaluation_models import cut_down

from s2ap_ext import densify
from s2ap_ext.cli import main
from s2ap_ext.evaluation import check_gradients
from s2ap_ext.evaluation import run as evaluation_run
from s2ap_ext.pipeline import RunFolder, Session, Stopped, evaluation, load_model, load_recipe, open_data, run

EPS = "0.06"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(["run", "digits", *settings("model.width=4", "data.train_size=256", "pretrain.epochs=4"), "--out", str(folder)]) == 0
    return folder


def test_autoattack_through_the_command_is_the_packages_own_image_by_image(finished, tmp_path, monkeypatch, capsys):
    pyautoattack = pytest.importorskip("pyautoattack")
    cut_down(monkeypatch)
    found = {}
    for engine in ("torch", "sparse"):
        file = tmp_path / f"{engine}.json"
        words = ["--attack", "autoattack", "--eps", EPS, "--seed", "5", "--engine", engine, "--json", str(file), "--out", str(tmp_path)]
        assert main(["evaluate", str(finished / "pruned.safetensors"), *words]) == 0
        found[engine] = json.loads(file.read_text())
    model, recipe, _ = load_model(finished / "pruned.safetensors")
    data = open_data(recipe)
    x, y, dense = data.test.floats(), data.test.labels, densify(model).eval()
    attack = pyautoattack.AutoAttack(dense, norm="Linf", eps=float(EPS), seed=5)
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=recipe.evaluate.batch_size)
    with torch.no_grad():
        broken = (dense(x_adv).argmax(1) != y).nonzero().squeeze(1).tolist()
    assert found["torch"]["attacks"]["autoattack"]["broken"] == broken
    assert found["torch"]["attacks"]["clean"]["broken"] != broken
    assert len(broken) < len(y)
    assert found["torch"]["worst"]["accuracy"] == 1 - len(broken) / len(y)
    assert found["sparse"]["attacks"]["autoattack"]["broken"] == broken
    out = capsys.readouterr().out
    assert f"pyautoattack {pyautoattack.__version__}" in out
    assert "after fab_t" in out


def test_what_is_shown_and_written(finished, tmp_path, capsys):
    words = ["--attack", "pgd", "--norm", "l2", "--eps", "0.3", "--json", str(tmp_path / "found.json"), "--out", str(tmp_path)]
    assert main(["evaluate", str(finished / "dense.safetensors"), *words]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert "16 images, l2, eps 0.3, seed 0" in out
    for name in ("clean", "pgd"):
        about = found["attacks"][name]
        row = next(line for line in out.splitlines() if line.startswith(f"│ {name} "))
        assert f" {100 * about['accuracy']:.2f} │" in row
        assert f" {100 * about['low']:.1f} to {100 * about['high']:.1f} │" in row
    assert (found["model"], found["data"], found["norm"]) == ("dense", "digits", "l2")
    assert sum(row["images"] for row in found["classes"]) == 16
    assert "class by class" in out


def test_without_attacks_it_is_as_ever(finished, capsys):
    assert main(["evaluate", str(finished / "dense.safetensors"), "--eps", "0.05"]) == 0
    assert "PGD-1, linf, eps 0.05" in capsys.readouterr().out
    assert not (finished / "evaluations").exists()


def test_the_check_for_gradient_masking(finished, monkeypatch, capsys):
    pytest.importorskip("pyautoattack")
    monkeypatch.setattr(evaluation, "check_gradients", functools.partial(check_gradients, queries=10))
    words = ["--check-gradients", "--eps", EPS, "--set", "evaluate.images_per_epoch=4"]
    assert main(["evaluate", str(finished / "dense.safetensors"), *words]) == 0
    out = capsys.readouterr().out
    assert "images that are classified rightly" in out
    assert "warning: " in out or "No sign of gradient masking" in out


def test_the_same_command_goes_on(finished, tmp_path, monkeypatch, capsys):
    words = ["evaluate", str(finished / "dense.safetensors"), "--attack", "pgd", "--set", "evaluate.batch_size=4", "--eps", EPS]
    assert main([*words, "--json", str(tmp_path / "whole.json"), "--out", str(tmp_path / "whole")]) == 0
    attacked, batches = evaluation_run._Runner._attacked, []

    def interrupted(self, *arguments):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(arguments)
        return attacked(self, *arguments)

    monkeypatch.setattr(evaluation_run._Runner, "_attacked", interrupted)
    assert main([*words, "--out", str(tmp_path)]) == 130
    monkeypatch.undo()
    assert main([*words, "--json", str(tmp_path / "again.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "whole.json").read_text()
    monkeypatch.setattr(evaluation_run._Runner, "_attacked", lambda *arguments: pytest.fail("it is all there"))
    assert main([*words, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attack", "pdg"], "attack: expected one of"),
        (["--attack", "pgd", "--norm", "l3"], "attack.norm: expected one of linf, l2, l1, got 'l3'"),
        (["--attack", "pgd", "--eps", "x"], "attack.eps: expected a number, got 'x'"),
        (["--json", "x"], "--json: expected --attack NAME too"),
        (["--attack", "pgd", "--json", "no/such/folder/x"], "--json: expected a file in a folder that exists, got no/such/folder/x"),
        (["--out", "x"], "--out: expected --attack NAME too"),
    ],
)
def test_what_is_refused(finished, words, message, capsys):
    assert message in refused(capsys, "evaluate", finished / "dense.safetensors", *words)


def test_a_run_with_further_attacks(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", "digits", *settings("evaluate.attacks=pgd", "attack.eps=0.02"), "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert list(results["attacks"]) == ["pgd"]
    for row in results["rows"]:
        assert row["worst"] == row["pgd"] <= row["clean"]
        assert "robust" in row
        assert row["engine"] in (("torch",) if row["model"] == "dense" else ("torch", "sparse"))
    assert "further attacks" in out


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("evaluate.attacks=pgd,pgdd", "evaluate.attacks: attack: expected one of"),
        ("evaluate.attacks=pgd,pgd", "evaluate.attacks: attacks: expected each once"),
    ],
)
def test_a_run_refuses_attacks_that_it_could_not_make_before_it_starts(key, message, tmp_path, capsys):
    assert message in refused(capsys, "run", "digits", *settings(key), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_within_an_attack_goes_on(tmp_path):
    overrides = [word for word in settings("evaluate.attacks=pgd", "evaluate.batch_size=8", "attack.eps=0.02") if word != "--set"]
    recipe = load_recipe("digits", overrides)
    data, rows = open_data(recipe), []
    for name, asked in (("whole", 10**9), ("stopped", 12)):

        def stop():
            nonlocal asked
            asked -= 1
            return asked < 0

        with RunFolder.create(tmp_path / name, recipe) as folder:
            try:
                rows.append(run(Session(recipe, data, folder, stop=stop)))
            except Stopped:
                assert (tmp_path / name / "evaluations").is_dir()
                asked = 10**9
                rows.append(run(Session(recipe, data, folder, stop=stop)))
    whole, stopped = ([{**row, "seconds": 0} for row in found] for found in rows)
    assert whole == stopped
