"""Recipes that extend others: what they inherit, what they replace, and what cannot be."""

import pytest

from s2ap_ext.pipeline import load_recipe
from s2ap_ext.pipeline.recipe import to_table, to_toml


@pytest.fixture
def write(tmp_path):
    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_what_a_recipe_says_itself_takes_the_place_of_what_it_inherits(write):
    mine = write("mine.toml", "extends = 'digits'\nname = 'mine'\n[prune]\nlr = 0.3\n[attack]\nsteps = 3\n")
    table, base = to_table(load_recipe(mine)), to_table(load_recipe("digits"))
    base["name"], base["prune"]["lr"], base["attack"]["steps"] = "mine", 0.3, 3
    assert table == base


def test_a_chain_of_files_and_paths_from_each_files_folder(write, monkeypatch, tmp_path):
    write("group/base.toml", "extends = '../common.toml'\nseed = 2\n[prune]\ngamma = 0.5\n")
    write("common.toml", "extends = 'digits'\nseed = 1\nthreads = 2\n[prune]\ngamma = 0.25\nsparsity = 0.5\n")
    mine = write("group/mine.toml", "extends = 'base.toml'\n[prune]\nsparsity = 0.75\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(mine)
    assert (recipe.seed, recipe.threads, recipe.prune.gamma, recipe.prune.sparsity) == (2, 2, 0.5, 0.75)
    assert recipe.pretrain == load_recipe("digits").pretrain
    assert load_recipe("../group/mine.toml") == recipe


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ("model = {name = 'resnet18', width = 8}", "model = 'resnet18'", {"name": "resnet18", "width": 8}),
        ("model = {name = 'resnet18', width = 8}", "model = 'digits_cnn'", {"name": "digits_cnn", "width": 32}),
        ("model = {name = 'resnet18', width = 8}", "model = {width = 4}", {"name": "resnet18", "width": 4}),
        ("model = {width = 8}", "model = {name = 'digits_cnn'}", {"name": "digits_cnn", "width": 8}),
        ("model = {width = 8}", "model = {name = 'resnet18'}", {"name": "resnet18", "width": 64}),
        ("model = 'resnet18'", "model = {name = 'resnet18', width = 4}", {"name": "resnet18", "width": 4}),
    ],
)
def test_a_part_keeps_its_options_under_the_same_name_only(base, own, expected, write):
    write("base.toml", base)
    assert to_table(load_recipe(write("mine.toml", f"extends = 'base.toml'\n{own}")))["model"] == expected


def test_a_part_beside_other_keys(write):
    """The name of the data stands beside keys that are not of the data set; a stage's parts are tables in its section."""
    write("base.toml", "[data]\nname = 'a/b'\ndir = 'x'\nshift = 3\n[prune]\nepochs = 7\nmethod = {name = 'harp', penalty = 0.5}\n")
    recipe = load_recipe(write("mine.toml", "extends = 'base.toml'\n[data]\nname = 'digits'\n[prune]\nmethod = 'hydra'\n"))
    assert (recipe.data.source.name, recipe.data.shift) == ("digits", 3)
    assert (recipe.prune.method.name, recipe.prune.epochs) == ("hydra", 7)
    other = load_recipe(write("mine.toml", "extends = 'base.toml'\n[prune.method]\nlr_scale = 2\n"))
    assert (other.prune.method.penalty, other.prune.method.lr_scale, other.data.source.dir) == (0.5, 2, "x")


def test_overrides_come_last_and_the_complete_recipe_extends_nothing(write):
    mine = write("mine.toml", "extends = 'digits'\n[prune]\nmethod = {name = 'harp', penalty = 0.5}\n")
    recipe = load_recipe(mine, ["prune.lr=0.7", "prune.method.penalty=0.25", "model.width=4"])
    assert (recipe.prune.lr, recipe.prune.method.penalty, recipe.model.width) == (0.7, 0.25, 4)
    text = to_toml(recipe)
    assert "extends" not in text
    assert load_recipe(write("config.toml", text)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "extends = 'digit'",
            r"mine\.toml: extends: expected one of .*digits.* or the path of a TOML file, got 'digit'; did you mean digits",
        ),
        ("extends = 3", r"mine\.toml: extends: expected a text, got 3"),
        ("extends = ['digits']", r"mine\.toml: extends: expected a text"),
        ("extends = 'mine.toml'", r"mine\.toml.*: extends: these recipes extend each other: .*mine\.toml -> .*mine\.toml$"),
        ("extends = 'other.toml'", r"extends: these recipes extend each other: .*mine\.toml -> .*other\.toml -> .*mine\.toml$"),
        ("extends = 'broken.toml'", r"broken\.toml: not a TOML file"),
        ("extends = 'wrong.toml'", r"mine\.toml, which extends .*wrong\.toml: unknown key prune\.gama; did you mean prune\.gamma"),
        ("extends = 'bytes.toml'", r"bytes\.toml: not a TOML file"),
        ("extends = '.'", r"mine\.toml: extends: expected one of"),
        ("extends = 'deep.toml'\na" + ".a" * 900 + " = 1", "nested too deeply"),
        ("[prune]\nextends = 'digits'", r"unknown key prune\.extends"),
    ],
)
def test_what_cannot_be_extended(text, message, write, tmp_path):
    write("other.toml", "extends = '../" + tmp_path.name + "/mine.toml'")
    write("broken.toml", "[prune")
    write("wrong.toml", "prune.gama = 1")
    write("deep.toml", "a" + ".a" * 900 + " = 1")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(write("mine.toml", text))
    assert "\n" not in str(raised.value)
