"""Recipes whose steps run in lower precision, in channels_last or compiled: they train, go on after a stop, and say what cannot be."""

import functools

import pytest
import torch

from s2ap_ext import optim
from s2ap_ext.cli import main
from s2ap_ext.data import Dataset, Split
from s2ap_ext.nn import Accelerated
from s2ap_ext.pipeline import RunFolder, Session, Stopped, forwards, load_recipe, model_file, open_data, run, trainer
from s2ap_ext.pipeline.run_folder import read_metrics

TINY = [
    "model.width=4",
    "data.train_size=40",
    "data.test_size=16",
    "attack.steps=1",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=16",
    "evaluate.latency_at_scale=false",
    "prune.control=false",
]
TINY += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=1", "batch_size=16")]
TINY += ["prune.warmup_epochs=0", "prune.gamma=0.05", "pretrain.loss=pgd_at", "finetune.loss=pgd_at"]


def start(folder, *overrides, stop=lambda: False):
    recipe = load_recipe("digits", [*TINY, *overrides])
    with RunFolder.create(folder, recipe) as opened:
        return run(Session(recipe, open_data(recipe), opened, stop=stop))


def losses(folder):
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    start(folder)
    return losses(folder)


@pytest.mark.parametrize("settings", [["precision=bf16"], ["precision=bf16", "channels_last=true"]], ids=str)
def test_all_stages_train_in_bf16_with_close_losses(settings, plain, tmp_path):
    start(tmp_path / "run", *settings)
    found = losses(tmp_path / "run")
    assert found != plain
    assert found[:2] == pytest.approx(plain[:2], rel=0.02)
    assert found[2] < found[1]  # of another mask, since a few entries of the search have flipped


def test_all_stages_train_in_channels_last_with_the_same_losses(plain, tmp_path):
    start(tmp_path / "run", "channels_last=true")
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize(("method", "ascent"), [("hydra", "reuse"), ("harp", "exact")])
def test_compiled_stages_are_the_eager_ones(method, ascent, tmp_path, monkeypatch):
    monkeypatch.setattr(forwards, "Accelerated", functools.partial(Accelerated, backend="eager"))
    overrides = [f"prune.method={method}", f"prune.ascent={ascent}", "prune.epochs=2", "pretrain.epochs=0", "finetune.epochs=0"]
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        start(tmp_path / name, *overrides, f"compile={compiled}")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


def test_fp16_passes_over_steps_that_overflow_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    """On the CPU, where torch can, though slowly: a recipe asks for CUDA."""
    made = []

    def scale(recipe):
        made.append(optim.LossScale(2.0**18))  # so large that the first steps overflow
        return made[-1]

    monkeypatch.setattr(trainer, "loss_scale", scale)
    monkeypatch.setattr(model_file, "check_precision", lambda precision, device: None)
    settings = ["precision=fp16", "pretrain.averaging=0.9", "prune.epochs=2", "finetune.epochs=2"]
    start(tmp_path / "run", *settings)
    assert all(2**10 < scale.scale < 2**18 for scale in made)
    assert len(made) == 3
    with pytest.raises(Stopped):
        start(tmp_path / "stopped", *settings, stop=iter([False] * 6 + [True]).__next__)
    with RunFolder.resume(tmp_path / "stopped") as folder:
        recipe = load_recipe(tmp_path / "stopped" / "config.toml")
        run(Session(recipe, open_data(recipe), folder))
    for name in ("dense", "pruned", "finetuned"):
        assert (tmp_path / "run" / f"{name}.safetensors").read_bytes() == (tmp_path / "stopped" / f"{name}.safetensors").read_bytes(), name


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_what_the_cpu_does_not_compute_is_one_line(precision, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "digits", "--device", "cpu", "--set", f"precision={precision}"]) == 2
    assert capsys.readouterr().err.startswith(f"s2ap: error: precision: {precision} needs a CUDA device, got cpu")
    assert not (tmp_path / "runs").exists()


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match="precision: expected one of fp32, tf32, bf16, fp16, got 'half'"):
        load_recipe("digits", ["precision=half"])


def test_by_default_steps_call_the_model_itself_and_no_loss_is_scaled():
    recipe, model = load_recipe("digits"), torch.nn.Linear(2, 2)
    assert forwards.forwards(recipe, model, 16) == (model, model)
    assert forwards.loss_scale(recipe) is None


@pytest.mark.slow
def test_five_minutes_for_cifar10_takes_steps_at_tiny_size(tmp_path):
    """But for the compilation, which takes longer than all else at this size, and is tested above. Not below width 8: torch's own 1x1
    convolution with stride 2 writes where it must not on a CPU, in channels_last with 4 channels."""
    assert load_recipe("cifar10-5min").compile
    small = [
        "device=cpu",
        "compile=false",
        "model.width=8",
        "attack.steps=1",
        "evaluate.steps=1",
        "evaluate.images_per_epoch=4",
        "prune.warmup_epochs=0",
    ]
    small += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=1", "batch_size=8")]
    recipe = load_recipe("cifar10-5min", small)
    pixels = torch.randint(256, (28, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(28) % 10
    data = Dataset("cifar10", Split(pixels[:20], labels[:20]), Split(pixels[20:], labels[20:]), tuple("0123456789"))
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        rows = run(Session(recipe, data, folder))
    assert [row["model"] for row in rows] == ["dense", "pruned", "finetuned"]
    assert rows[2]["sparsity"] == pytest.approx(0.9, abs=0.01)
