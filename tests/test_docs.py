"""What the pages under docs/ say is run as it stands there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import TINY as SMALLEST
from evaluation_models import cut_down, images_of, small_network
from gpu.parts import Setting, parts

from s2ap_ext import cli, sparsify
from s2ap_ext.cli import COMMANDS as COMMANDS_OF_THE_PROGRAM
from s2ap_ext.cli import main
from s2ap_ext.cli.options import overrides_of
from s2ap_ext.cli.parser import Commands
from s2ap_ext.evaluation import chosen
from s2ap_ext.parts import find, names
from s2ap_ext.pipeline import check_prunable, load_recipe, open_data
from s2ap_ext.pipeline.recipe_files import read_table

DOCS = Path(__file__).parent.parent / "docs"
TINY = [*SMALLEST, "data.train_size=64", *(f"{stage}.batch_size=32" for stage in ("pretrain", "prune", "finetune"))]


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(folder, *words):
    """Runs ``s2ap`` in ``folder``, cut down; the folder of the run."""
    words = [*words, *(word for setting in TINY for word in ("--set", setting)), "--out", "run"]
    done = subprocess.run([sys.executable, "-m", "s2ap_ext.cli", *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def parsed(words):
    """What the command line makes of ``words``, without doing it."""
    commands = Commands()
    for module in cli.COMMANDS:
        module.add(commands)
    return commands.parser.parse_args(words)


@pytest.mark.slow
@pytest.mark.parametrize("line", [0, 1])
def test_a_method_of_ones_own_is_one_file(line, tmp_path):
    (tmp_path / "taylor.py").write_text(blocks("your-own-method.md", "python")[0])
    words = blocks("your-own-method.md", "bash")[0].splitlines()[line].split()
    assert words.pop(0) == "s2ap"
    folder = run(tmp_path, *words)
    assert 'name = "taylor"' in (folder / "config.toml").read_text()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "pruned", "finetuned"]
    assert rows[1]["sparsity"] == pytest.approx(0.9, abs=0.03)


def test_your_own_loop_runs_from_top_to_bottom(capsys):
    space = {}
    for block in blocks("your-own-loop.md", "python"):
        exec(block, space)
    assert "90.00%" in capsys.readouterr().out  # the table of the sparsities
    assert type(space["net"][4]) is torch.nn.Linear
    assert space["optimizer"].flips > 0


def test_a_fast_step_runs_on_a_cpu_too():
    space = {}
    (code,) = blocks("on-a-gpu.md", "python")
    exec(code, space)
    assert space["optimizer"].passes == 2
    assert space["fast"](space["x"]).dtype == torch.float32


def test_the_page_names_parts_of_the_work_list():
    named = re.findall(r"--only ([\w-]+)", (DOCS / "on-a-gpu.md").read_text(encoding="utf-8"))
    known = {part.name.partition("/")[0] for part in parts(Setting(Path("results"), "cuda", tiny=False))}
    assert len(named) >= 8
    assert set(named) - {"PART"} <= known


def test_the_sparse_network_of_the_page_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = sparsify(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), 0.9).eval()
    space = {"torch": torch, "model": model, "images": torch.rand(2, 3, 32, 32)}
    exec(blocks("sparse.md", "python")[0], space)
    torch.testing.assert_close(space["logits"], model(space["images"]))


@pytest.mark.parametrize("page", ["getting-started.md"])
def test_the_commands_of_a_walk_can_be_parsed(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("s2ap ")]
    assert len(commands) >= 8
    parser = Commands()
    for module in COMMANDS_OF_THE_PROGRAM:
        module.add(parser)
    for words in commands:
        arguments = parser.parser.parse_args(words)
        if words[0] == "run":
            load_recipe(arguments.recipe, arguments.set)


COMMANDS = [line for page in ("methods.md", "evaluation.md") for block in blocks(page, "bash") for line in block.splitlines()]
OF_RUNS = [line for line in COMMANDS if line.startswith("s2ap run digits")]


@pytest.mark.parametrize("command", OF_RUNS)
def test_the_commands_name_what_there_is(command):
    """Each recipe is read and its network pruned; the tests of the pipeline train."""
    program, verb, name, *words = shlex.split(command)
    assert (program, verb) == ("s2ap", "run")
    options = dict.fromkeys(words[0::2])
    assert set(options) <= {"--set", "--seed"}
    recipe = load_recipe(name, [word for option, word in zip(words[0::2], words[1::2], strict=True) if option == "--set"])
    check_prunable(recipe, open_data(recipe))


NETWORKS = [line for block in blocks("networks-and-recipes.md", "bash") for line in block.splitlines() if line.startswith("s2ap run")]
OWN = [line for line in NETWORKS if "nets:" in line]


@pytest.mark.parametrize("command", [line for line in NETWORKS if line not in OWN])
def test_the_commands_about_networks_are_recipes(command):
    program, verb, name, *words = shlex.split(command, comments=True)
    assert (program, verb) == ("s2ap", "run")
    assert set(words[0::2]) <= {"--set", "--seed"}
    data = read_table(name)[0]["data"]["name"]
    recipe = load_recipe(name, [word for option, word in zip(words[0::2], words[1::2], strict=True) if option == "--set"])
    if data == "digits" and "hf:" in command:
        pytest.importorskip("transformers")
    if data == "digits":
        check_prunable(recipe, open_data(recipe))


@pytest.mark.parametrize("command", OWN)
def test_a_network_of_ones_own_is_a_function_or_a_class(command, tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(blocks("networks-and-recipes.md", "python")[1])
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # the current folder is found without it
    monkeypatch.chdir(tmp_path)
    tiny = [setting for setting in TINY if not setting.startswith("model.")]
    words = [*shlex.split(command)[1:], *(word for setting in tiny for word in ("--set", setting)), "--out", "run"]
    try:
        assert main(words) == 0
        rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
        assert [row["model"] for row in rows] == ["dense", "pruned", "finetuned"]
        assert rows[1]["sparsity"] == pytest.approx(0.9, abs=0.03)
    finally:
        sys.modules.pop("nets", None)


def test_a_recipe_that_extends_another(tmp_path):
    (text,) = blocks("networks-and-recipes.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.name, recipe.model.name, recipe.attack.steps) == ("mine", "vgg16", 10)
    assert (recipe.prune.method.name, recipe.prune.method.penalty, recipe.prune.sparsity) == ("harp", 0.02, 0.95)


def test_a_network_by_name():
    space = {}
    exec(blocks("networks-and-recipes.md", "python")[0], space)
    assert space["model"](torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_page_on_transformers_runs(capsys):
    pytest.importorskip("transformers")
    space = {}
    for block in blocks("transformers.md", "python"):
        exec(block, space)
    printed = capsys.readouterr().out
    assert "vit.layers.1.attention" in printed
    assert printed.endswith("Linear(in_features=32, out_features=16, bias=True)\n")
    assert [layer.block.name for layer in space["pruned_layers"](space["net"]).values()] == ["0", "1"]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in OF_RUNS and line.startswith("s2ap ")])
def test_the_other_commands_have_these_options(command):
    """Files and folders stand for the reader's own, so these are read and not carried out."""
    commands = Commands()
    for module in cli.COMMANDS:
        module.add(commands)
    arguments = commands.parser.parse_args(shlex.split(command)[1:])
    if getattr(arguments, "recipe", None):
        load_recipe(arguments.recipe, overrides_of(arguments))
    chosen(getattr(arguments, "attack", []), getattr(arguments, "norm", None) or "linf", 0.1)


SHORTER = {
    "steps=200": "steps=5",
    "restarts=10": "restarts=2",
    '"square"': '"fmn"',
    "labels, eps=8 / 255)": "labels, eps=8 / 255, queries=20)",
}


def test_the_calls_of_the_evaluation(monkeypatch, tmp_path, capsys):
    pytest.importorskip("pyautoattack")
    monkeypatch.chdir(tmp_path)
    cut_down(monkeypatch)
    model = small_network(10)
    images, labels = images_of(model, 6)
    example = (torch.rand(2, 3, 8, 8),)
    torch.export.save(torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)), "model.pt2")
    space = {"torch": torch, "model": model, "images": images, "labels": labels}
    for block in blocks("evaluation.md", "python"):
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(block, space)
        assert space["found"].accuracy["clean"] == 4 / 6
    assert set(space["found"].held) == {"clean", "pgd", "fmn"}
    assert "images that hold under all of them: [" in capsys.readouterr().out
    assert len(list((tmp_path / "evaluations").iterdir())) == 1


def test_the_page_names_the_attacks_that_there_are():
    table = re.findall(r"^\| `(\w+)` \| .* \| (.*) \| (.*) \|$", (DOCS / "evaluation.md").read_text(), re.MULTILINE)
    assert {name for name, _, _ in table} == {"clean", *names("attack")}
    for name, norms, code in table:
        if name != "clean":
            part = find("attack", name)
            for norm in norms.split(", "):
                assert part.within(norm=norm, eps=0.1).settings.norm == norm
            assert code.strip("`") == ("pyautoattack" if "autoattack" in part.__module__ else "this package")


def test_its_settings_are_a_class_like_this_one(tmp_path):
    space = {}
    exec(blocks("your-own-method.md", "python")[1], space)
    assert space["Settings"]().memory == 0.99


@pytest.mark.slow
def test_every_kind_of_part_may_come_from_a_file_outside(tmp_path):
    (tmp_path / "mine.py").write_text(
        """
from dataclasses import dataclass

import torch
from torch import nn

from s2ap_ext.allocations import Allocation
from s2ap_ext.attacks import Attack
from s2ap_ext.data import Data, load_digits
from s2ap_ext.losses import Loss
from s2ap_ext.models import Model
from s2ap_ext.optim import Ascent
from s2ap_ext.parts import register
from s2ap_ext.settings import key


@register("noise")
class Noise(Attack):
    @dataclass(frozen=True)
    class Settings:
        eps: float = key(0.1, "standard deviation of the noise", low=0)
        norm: str = key("linf", "what the test images are attacked in")

    def __call__(self, model, x, y, *, loss="ce", generator=None):
        return (x + self.settings.eps * torch.randn_like(x)).clamp(0, 1)


@register("squared")
class Squared(Loss):
    def __call__(self, model, x, x_adv, y):
        logits = model(x_adv)
        return (logits - nn.functional.one_hot(y, logits.shape[1])).square().mean(), logits


@register("two_layers")
class TwoLayers(Model):
    def build(self, *, num_classes, in_channels):
        return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))


@register("some_digits")
class SomeDigits(Data):
    def load(self, *, limit=None, test_limit=None):
        return load_digits().limited(limit, test_limit)


@register("last_half")
class LastHalf(Allocation):
    def kept(self, layers, sparsity):
        return [layer.units // 2 for layer in layers]


@register("twice")
class Twice(Ascent):
    def step(self, at, backward):
        backward()
        at.move(gamma=2 * at.gamma)
        backward()
"""
    )
    chosen = ["plugins=mine", "model.name=two_layers", "data.name=some_digits", "prune.allocation=last_half", "prune.ascent=twice"]
    chosen += ["attack.name=noise", "attack.eps=0.2"]
    chosen += [f"{stage}.loss=squared" for stage in ("pretrain", "prune", "finetune")]
    settings = [setting for setting in TINY if not setting.startswith(("model.", "attack."))]
    words = ["run", "digits", *(word for setting in [*settings, *chosen] for word in ("--set", setting)), "--out", "run"]
    done = subprocess.run([sys.executable, "-m", "s2ap_ext.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    density = json.loads((tmp_path / "run/results.json").read_text())["density"]
    assert density == {"0": 0.5, "4": 0.5}


def test_the_six_weights_of_the_theory(capsys):
    exec(blocks("theory.md", "python")[0], {})
    assert capsys.readouterr().out == blocks("theory.md", "text")[0]


def test_sharpness_as_the_page_shows_it(capsys):
    exec(blocks("analysis-and-report.md", "python")[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["scores: 690 dimensions", "weights: 138 dimensions"]
    assert lines[2].startswith("flips along the ascent: [")


def test_the_commands_of_the_analysis_page_are_read():
    """Each up to its folders, which are not there."""
    for line in blocks("analysis-and-report.md", "bash")[0].splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "s2ap"
        arguments = parsed(words)
        assert arguments.command.__module__ == f"s2ap_ext.cli.{words[0]}"
