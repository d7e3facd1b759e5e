"""The s2ap command: exit codes, messages, what is left on disk, and Ctrl-C."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import s2ap_ext
from s2ap_ext import speed
from s2ap_ext.cli import main
from s2ap_ext.nn import cost
from s2ap_ext.pipeline import analyze, checkpoint, load_recipe
from s2ap_ext.pipeline.run_folder import read_analysis, read_recipe

SMALL = [
    "model.width=4",
    "data.train_size=64",
    "data.test_size=32",
    "attack.steps=1",
    "pretrain.epochs=1",
    "prune.epochs=2",
    "prune.warmup_epochs=1",
    "finetune.epochs=1",
    "evaluate.steps=2",
    "evaluate.images_per_epoch=16",
    "evaluate.latency_at_scale=false",
    "prune.control=false",
]


def settings(*overrides):
    return [word for text in (*SMALL, *overrides) for word in ("--set", text)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", "digits", *settings(), "--seed", "3", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def refused(capsys, *arguments):
    """Runs the command, which must refuse; returns what it said, which must be one line."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as ended:  # argparse
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("s2ap: error: ")
    assert err.count("\n") == 1
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ([], ["pretrain 1/1", "test dense", "prune 2/2", "test pruned", "finetune 1/1", "test finetuned"]),
        (["--verbose"], ["pretrain 1/1", "pretrain 1/1", "test dense", "prune 1/2", "prune 2/2", "prune 2/2", "test pruned"]),
    ],
    ids=["a line per stage", "a line per epoch"],
)
def test_run_prints_lines_a_table_and_the_outcome(words, labels, tmp_path, capsys):
    assert main(["run", "digits", *settings(), *words, "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    shown = lines[1 : 1 + len(labels)]
    assert [line.split("  ")[0] for line in shown] == labels
    assert all("robust" in line and ("loss" in line) != line.startswith("test") for line in shown)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for row in results["rows"]:
        (shown,) = [line for line in lines if line.startswith(f"│ {row['model']} ")]
        assert f" {100 * row['clean']:.1f} " in shown
        assert f" {100 * row['robust']:.1f} " in shown
        assert f" {100 * row['sparsity']:.1f} " in shown
    assert any(line.startswith("At 90.") and "the finetuned model has" in line for line in lines)
    for plot in ("curves.png", "mask_distance.png", "density.png", "perturbation.png"):
        assert (tmp_path / "run" / plot).read_bytes().startswith(b"\x89PNG")
        assert plot in out
    assert [line.split()[1] for line in out.replace("Next:", "").splitlines()[-3:]] == ["analyze", "report", "evaluate"]


def test_the_short_options_reach_the_recipe(finished):
    config = (finished / "config.toml").read_text()
    assert "seed = 3" in config
    assert 'device = "cpu"' in config


def test_the_default_folder_is_numbered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["pretrain", "digits", *settings("pretrain.epochs=0")]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "digits-2"]


def test_the_stages_alone_give_what_the_run_gives(finished, tmp_path, capsys):
    options = [*settings(), "--seed", "3", "--device", "cpu"]
    assert main(["pretrain", "digits", *options, "--out", str(tmp_path / "1")]) == 0
    assert main(["prune", "digits", *options, "--from", str(tmp_path / "1/dense.safetensors"), "--out", str(tmp_path / "2")]) == 0
    assert main(["finetune", "digits", *options, "--from", str(tmp_path / "2/pruned.safetensors"), "--out", str(tmp_path / "3")]) == 0
    assert (tmp_path / "3/finetuned.safetensors").read_bytes() == (finished / "finetuned.safetensors").read_bytes()
    rows = json.loads((finished / "results.json").read_text())["rows"]
    alone = json.loads((tmp_path / "3/results.json").read_text())["rows"]
    assert [{**row, "seconds": 0} for row in alone] == [{**row, "seconds": 0} for row in rows[1:]]


def test_a_pretrained_folder_goes_on_stage_by_stage(finished, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["pretrain", "digits", *settings(), "--seed", "3", "--device", "cpu", "--out", folder]) == 0
    assert main(["prune", "--resume", folder]) == 0
    assert main(["run", "--resume", folder]) == 0
    assert (tmp_path / "run/finetuned.safetensors").read_bytes() == (finished / "finetuned.safetensors").read_bytes()


def test_evaluate_prints_the_numbers_of_the_run(finished, capsys):
    assert main(["evaluate", str(finished / "finetuned.safetensors")]) == 0
    out = capsys.readouterr().out
    row = json.loads((finished / "results.json").read_text())["rows"][-1]
    assert f" {100 * row['clean']:.1f} " in out
    assert f" {100 * row['robust']:.1f} " in out
    assert main(["evaluate", str(finished / "finetuned.safetensors"), "--set", "attack.eps=0"]) == 0
    assert "eps 0/255" in capsys.readouterr().out


def test_evaluate_with_the_sparse_engine_prints_the_same_numbers_and_its_latency(finished, capsys):
    assert main(["evaluate", str(finished / "finetuned.safetensors"), "--engine", "sparse"]) == 0
    out = capsys.readouterr().out
    row = json.loads((finished / "results.json").read_text())["rows"][-1]
    assert f" {100 * row['clean']:.1f} " in out
    assert f" {100 * row['robust']:.1f} " in out
    assert "sparse images/s" in out


def test_report_draws_and_prints_again(finished, capsys):
    for plot in finished.glob("*.png"):
        plot.unlink()
    assert main(["report", str(finished)]) == 0
    assert "finetuned" in capsys.readouterr().out
    assert sorted(path.name for path in finished.glob("*.png")) == ["curves.png", "density.png", "mask_distance.png", "perturbation.png"]


@pytest.mark.slow
def test_an_analysis_is_kept_in_the_folder_and_shown_in_the_report(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "POINTS", {"line": 3, "plane": 3})
    folder = shutil.copytree(finished, tmp_path / "run")
    assert main(["analyze", str(folder), "--images", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = read_analysis(folder)
    assert found["images"] == 8
    assert [entry["model"] for entry in found["models"]] == ["dense", "pruned", "finetuned"]
    spaces = [[one["space"] for one in entry["spectra"]] for entry in found["models"]]
    assert spaces == [["weights"], ["scores", "weights"], ["scores", "weights"]]
    assert f"{found['models'][1]['spectra'][0]['eigenvalues'][0]:.4g}" in out
    files = [tmp_path / name for name in ("page.html", "table.csv", "table.md")]
    options = [word for option, file in zip(("--html", "--csv", "--markdown"), files, strict=True) for word in (option, str(file))]
    assert main(["report", str(folder), *options]) == 0
    page, table, markdown = (file.read_text() for file in files)
    assert f"<td>{found['models'][1]['ascent']['gradient_cosine']:.3f}</td>" in page
    assert page.count('src="data:image/png;base64,') == 6 * 3
    assert "A test image of the class" in page
    assert table.count("\n") == 4
    assert "| finetuned |" in markdown


def test_profile_of_a_step(capsys):
    assert main(["profile", "--step", "digits", *settings("prune.ascent=reuse"), "--batch", "16", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "a step of digits's mask search: hydra, S2AP, reuse ascent, 16 images" in " ".join(out.split())
    assert all(f"│ {phase} " in out for phase in ("data", "attack", "forward", "backward", "select", "perturb", "update"))


def test_masks_of_several_runs(finished):
    same = analyze.compare_masks([finished, finished])
    assert same["overlap"] == 1
    assert 0 < same["chance"] < 0.1


@pytest.mark.skipif(s2ap_ext.backend().cpu != "C++", reason="without the kernels there is nothing to compare")
def test_profile_measures_every_convolution_and_calibrates(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost.load.cache_clear()
    try:
        monkeypatch.setattr(speed, "calibrate", lambda: cost.Rates(dense=50.0))
        assert main(["profile", "--calibrate", str(finished / "finetuned.safetensors"), "--batch", "9"]) == 0
        assert cost.load().dense == 50
        out = capsys.readouterr().out
        assert str(tmp_path / "s2ap_ext" / "rates.json") in out
        assert all(layer in out for layer in ("conv1", "conv2", "conv3", "batch 9"))
    finally:
        monkeypatch.undo()
        cost.load.cache_clear()
    assert main(["profile"]) == 2
    assert "profile: expected CHECKPOINT, --step RECIPE or --calibrate" in capsys.readouterr().err


def test_version_and_doctor(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"s2ap {s2ap_ext.__version__}\n"
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], "expected one of cifar10-5min, cifar10-resnet18, "),
        (["run"], "expected a recipe, or --resume RUN_DIR"),
        (["run", "digits", "--set", "prune.gama=1"], "did you mean prune.gamma"),
        (["run", "digits", "--set", "prune.gamma=-1"], "prune.gamma: expected a number >= 0, got -1"),
        (["run", "digits", "--set", "prune.sparsity=1.1"], "prune.sparsity: expected a number in [0, 1]"),
        (["run", "digits", "--set", "prune.granularity=rows"], "granularity: expected 'weight', 'channel', 'head', 'neuron' or 'N:M'"),
        (
            ["run", "digits", "--set", "prune.granularity=2:4", "--set", "prune.exclude=:first"],
            "layer conv2: sparsity: expected a multiple of 1/4",
        ),
        (["run", "digits", "--set", "prune.exclude=conv9"], "exclude: no module is named 'conv9'"),
        (["run", "digits", "--seed", "x"], "seed: expected an integer, got 'x'"),
        (["run", "digits", "--device", "abacus"], "device: cannot use 'abacus'"),
        (["run", "digits", "--data-dir", "."], "unknown key data.dir; digits takes"),
        (["run", "cifar10-resnet18", "--data-dir", "no/such/folder"], "no/such/folder"),
        (["run", "cifar10-resnet18", "--data-dir", "."], "train.parquet"),
        (["run", "cifar10-resnet18", "--data-dir", "~nobody-has-this-name/x"], "--data-dir ~nobody-has-this-name/x: "),
        (["run", "--resume", "nowhere"], "nowhere: not the folder of a run"),
        (["prune", "digits"], "prune: expected --from CHECKPOINT"),
        (["prune", "digits", "--from", "none.safetensors"], "checkpoint none.safetensors: no such file"),
        (["evaluate", "none.safetensors"], "checkpoint none.safetensors: no such file"),
        (["report", "nowhere"], "nowhere: not the folder of a run"),
        (["swim"], "invalid choice: 'swim'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_do_not_fit_are_refused(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes((finished / "dense.safetensors").read_bytes()[:-1])
    assert "cut.safetensors: truncated" in refused(capsys, "prune", "digits", *settings(), "--from", "cut.safetensors")
    assert "prune starts from a dense model, this one is pruned" in refused(
        capsys, "prune", "digits", *settings(), "--from", finished / "pruned.safetensors"
    )
    message = refused(capsys, "prune", "digits", *settings("model.width=8"), "--from", finished / "dense.safetensors")
    assert "--set model.name=digits_cnn --set model.width=4" in message
    assert "the model is made already" in refused(capsys, "evaluate", finished / "dense.safetensors", "--set", "model.width=8")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_resume_takes_no_other_recipe(finished, capsys):
    assert "leave out the recipe, --set" in refused(capsys, "run", "digits", "--resume", finished, "--set", "seed=1")


def test_a_folder_in_use_is_left_alone(finished, capsys):
    before = sorted(finished.iterdir())
    assert "exists already" in refused(capsys, "run", "digits", "--out", finished)
    assert sorted(finished.iterdir()) == before


def test_a_truncated_state_is_refused_on_resume(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["pretrain", "digits", *settings(), "--out", str(folder)]) == 0
    capsys.readouterr()
    (folder / "state.safetensors").write_bytes(b"\x10\x00")
    code = main(["run", "--resume", str(folder)])
    assert code == 2
    assert "state.safetensors: truncated or not a safetensors file" in capsys.readouterr().err


def test_a_loss_that_diverges_ends_with_2(tmp_path, capsys):
    code = main(["run", "digits", *settings("pretrain.lr=1e6", "pretrain.batch_size=16"), "--out", str(tmp_path / "run")])
    assert code == 2
    assert "s2ap: error: pretrain, epoch 1, step" in capsys.readouterr().err


def test_missing_extras_are_named_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("tomli_w", "rich") else real(name, *rest))
    message = refused(capsys, "run", "digits")
    assert 'rich, tomli-w missing; install with: pip install "s2ap_ext[train]"' in message
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_not_hidden(finished, monkeypatch):
    def broken(path):
        raise KeyError("a defect")

    monkeypatch.setattr("s2ap_ext.report.records.read_results", broken)
    with pytest.raises(KeyError):
        main(["report", str(finished)])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_bits(tmp_path, capsys):
    longer = settings("prune.epochs=20", "finetune.epochs=0", "prune.batch_size=16")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "s2ap_ext.cli", "run", "digits", *longer, "--verbose", "--out", str(stopped)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("prune 2/20"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"to go on: s2ap run --resume {stopped}" in err
    assert checkpoint.load(stopped / "state.safetensors")[1]["stage"] == "prune"
    assert "has not finished" in refused(capsys, "report", stopped)
    assert main(["run", "--resume", str(stopped)]) == 0
    assert main(["run", "digits", *longer, "--out", str(whole)]) == 0
    for name in ("pruned", "finetuned"):
        assert (stopped / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()


@pytest.mark.slow
def test_digits_keeps_its_accuracy_at_90_percent_sparsity(tmp_path, capsys):
    """The recipe as it ships: within 5 points of the dense robust model. S2AP_DIGITS_RUN is the folder of such a run, if there is one."""
    folder = Path(os.environ.get("S2AP_DIGITS_RUN", tmp_path / "run"))
    if "S2AP_DIGITS_RUN" in os.environ:
        assert load_recipe("digits") == read_recipe(folder)
    else:
        assert main(["run", "digits", "--device", "cpu", "--out", str(folder)]) == 0
    dense, _, finetuned = json.loads((folder / "results.json").read_text())["rows"]
    assert dense["robust"] > 0.8
    assert finetuned["sparsity"] > 0.895
    assert finetuned["clean"] > dense["clean"] - 0.05
    assert finetuned["robust"] > dense["robust"] - 0.05
