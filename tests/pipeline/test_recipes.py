"""Recipes: what ships, what may be overridden, and what each mistake is answered with."""

import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2ap_ext import parts
from s2ap_ext.parts import find
from s2ap_ext.pipeline import Recipe, load_recipe, override
from s2ap_ext.pipeline.recipe import explained_keys, from_table, to_table, to_toml


@pytest.mark.parametrize("name", ["cifar10-resnet18", "digits"])
def test_a_recipe_survives_the_way_through_toml(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert recipe.name == name


def test_cifar10_is_in_the_setting_of_the_papers():
    recipe = load_recipe("cifar10-resnet18")
    assert (recipe.model.name, recipe.model.width) == ("resnet18", 64)
    assert (recipe.attack.eps, recipe.attack.step_size, recipe.attack.steps) == (8 / 255, 2 / 255, 10)
    assert (recipe.pretrain.epochs, recipe.prune.epochs, recipe.finetune.epochs) == (100, 20, 100)
    assert (recipe.prune.lr, recipe.finetune.lr, recipe.prune.gamma, recipe.prune.warmup_epochs) == (0.1, 0.01, 1e-3, 5)
    assert (recipe.prune.sparsity, recipe.prune.batch_size, recipe.prune.momentum, recipe.prune.weight_decay) == (0.9, 128, 0.9, 5e-4)
    assert recipe.evaluate.steps == 20


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("prune.gamma=0.002", "prune", "gamma", 0.002),
        ("prune.gamma=1", "prune", "gamma", 1.0),
        ("attack.eps=8/255", "attack", "eps", 8 / 255),
        ("prune.s2ap=false", "prune", "s2ap", False),
        ("finetune.awp=True", "finetune", "awp", True),
        ("model.width=8", "model", "width", 8),
        ("prune.exclude=conv1, linear", "prune", "exclude", ("conv1", "linear")),
        ("prune.sparsity=0", "prune", "sparsity", 0.0),
        ("prune.sparsity=1", "prune", "sparsity", 1.0),
    ],
)
def test_override_reads_the_keys_type(text, section, key, value):
    changed = getattr(getattr(load_recipe("digits", [text]), section), key)
    assert changed == value
    assert type(changed) is type(value)


def test_overrides_change_nothing_else_and_the_last_one_wins():
    plain, changed = load_recipe("digits"), load_recipe("digits", ["seed=3", "prune.lr=0.3", "seed=4"])
    assert changed.seed == 4
    different = [f.name for f in fields(Recipe) if getattr(plain, f.name) != getattr(changed, f.name)]
    assert different == ["seed", "prune"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune.gama=0.1", r"--set prune\.gama: no such key in a recipe; did you mean prune\.gamma"),
        ("prun.gamma=0.1", r"--set prun\.gamma: no such key in a recipe; did you mean prune\.gamma"),
        ("prune=1", r"--set prune: no such key"),
        ("prune.gamma", r"--set prune\.gamma: expected section\.key=value"),
        ("prune.gamma=-0.001", r"--set prune\.gamma: expected a number >= 0, got -0\.001"),
        ("prune.gamma=nan", r"--set prune\.gamma: expected a number, got 'nan'"),
        ("prune.gamma=inf", r"--set prune\.gamma: expected a number, got 'inf'"),
        ("prune.gamma=1/0", r"--set prune\.gamma: expected a number, or flips:P or track:P with P in \[0, 1\], got '1/0'"),
        ("prune.gamma=much", r"--set prune\.gamma: expected a number, or flips:P or track:P with P in \[0, 1\], got 'much'"),
        ("prune.sparsity=1.5", r"--set prune\.sparsity: expected a number in \[0, 1\], got 1\.5"),
        ("prune.sparsity=-0.1", r"--set prune\.sparsity: expected a number in \[0, 1\], got -0\.1"),
        ("prune.epochs=2.5", r"--set prune\.epochs: expected an integer, got '2\.5'"),
        ("prune.epochs=-1", r"--set prune\.epochs: expected an integer >= 0, got -1"),
        ("prune.batch_size=0", r"--set prune\.batch_size: expected an integer >= 1, got 0"),
        ("prune.s2ap=maybe", r"--set prune\.s2ap: expected true or false, got 'maybe'"),
        ("prune.method=hidra", r"--set prune\.method: expected one of harp, hydra, .*, got 'hidra'; did you mean hydra\?"),
        ("prune.loss=smart", r"--set prune\.loss: expected one of .*, got 'smart'; did you mean mart\?"),
        ("model.name=resnet", r"--set model\.name: expected one of .*digits_cnn, .*, got 'resnet'; did you mean resnet50 or resnet18\?"),
        ("attack.norm=l3", r"--set attack\.norm: expected one of linf, l2, l1, got 'l3'"),
        ("prune.method.penalty=1", r"recipe digits: unknown key prune\.method\.penalty; hydra takes name"),
        ("prune.method.name=hidra", r"--set prune\.method\.name: expected one of harp, hydra, .*, got 'hidra'; did you mean hydra\?"),
        ("plugins=no_such_module", r"--set plugins: cannot import the plugin no_such_module \(ModuleNotFoundError"),
        ("seed=4294967296", r"--set seed: expected an integer in \[0, 4294967295\], got 4294967296"),
        ("seed=-1", r"--set seed: expected an integer >= 0, got -1"),
    ],
)
def test_a_wrong_override_is_answered_with_the_key_and_what_was_expected(text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("digits", [text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prune]\ngama = 1.0\n", r"unknown key prune\.gama; did you mean prune\.gamma"),
        ("[pruning]\n", r"unknown key pruning"),
        ("prune = 3\n", r"prune: expected a section, got 3"),
        ("[prune]\nsparsity = 2\n", r"prune\.sparsity: expected a number in \[0, 1\], got 2"),
        ("[prune]\nepochs = true\n", r"prune\.epochs: expected an integer, got True"),
        ("[prune]\nlr = true\n", r"prune\.lr: expected a number, got True"),
        ("[prune]\nmethod = 3\n", r"prune\.method: expected a text, got 3"),
        ("[prune.method]\nname = 'harp'\npenalti = 1\n", r"unknown key prune\.method\.penalti; did you mean penalty\?"),
        ("[prune.method]\nname = 'harp'\npenalty = -1\n", r"prune\.method\.penalty: expected a number >= 0, got -1"),
        ("[data]\ndirr = 'x'\n", r"unknown key data\.dirr.*; digits takes train_size, test_size, shift, flip, name"),
        ("model = 'resnet'\n", r"model: expected one of .*, got 'resnet'"),
        ("plugins = 'no_such_module'\n", r"cannot import the plugin no_such_module"),
        ("a = " + "[" * 5000 + "]" * 5000 + "\n", r"not a TOML file"),
        ("[prune\n", r"not a TOML file"),
    ],
)
def test_a_wrong_file_is_answered_with_its_name_and_the_key(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"mine\.toml: {message}"):
        load_recipe(path)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"expected one of cifar10-5min, .*, digits, .* or .*, got 'digit'; did you mean digits or digits-vit\?"
    ):
        load_recipe("digit")


def test_parts_are_named_alone_or_with_their_options():
    recipe = load_recipe(
        "digits", ["prune.method.penalty=0.5", "prune.method=harp", "model.name=resnet18", "data.name=a/b", "data.dir=c=d e"]
    )
    assert (recipe.prune.method.name, recipe.prune.method.penalty) == ("harp", 0.5)
    assert (recipe.model.name, recipe.model.width) == ("resnet18", 64)  # its own default: the width was that of another model
    assert (recipe.data.source.name, recipe.data.source.dir, recipe.data.shift) == ("a/b", "c=d e", 0)
    again = override(recipe, ["prune.method=harp", "data.shift=2"])
    assert again.prune.method == recipe.prune.method
    assert again.data.source == recipe.data.source
    assert again.data.shift == 2
    assert from_table({"prune": {"method": "harp"}}) == from_table({"prune": {"method": {"name": "harp"}}})
    assert isinstance(recipe.prune.method.make(), find("method", "harp"))
    assert from_table(to_table(recipe)) == recipe


def test_a_plugin_brings_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_registered", dict(parts._registered))
    (tmp_path / "plugin_for_a_recipe.py").write_text(
        "from s2ap_ext.methods.hydra import Hydra\n"
        "from s2ap_ext.parts import register\n"
        "@register('hydra_by_another_name')\n"
        "class Mine(Hydra):\n"
        "    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    table = {"plugins": ["plugin_for_a_recipe"], "prune": {"method": "hydra_by_another_name"}}
    with pytest.raises(ValueError, match="needs the plugin plugin_for_a_recipe; to import that module, add --set plugins="):
        from_table(table, import_plugins=False)
    recipe = load_recipe("digits", ["prune.method=hydra_by_another_name", "plugins=plugin_for_a_recipe"])
    assert recipe.prune.method.name == "hydra_by_another_name"
    assert from_table(table, import_plugins=False).prune.method == recipe.prune.method
    assert from_table(to_table(recipe)) == recipe


def test_options_of_a_part_of_ones_own_can_be_set_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "nets_here.py").write_text(
        "from dataclasses import dataclass\n"
        "from s2ap_ext.models import Model\n"
        "from s2ap_ext.settings import key\n"
        "class Mine(Model):\n"
        "    @dataclass(frozen=True)\n"
        "    class Settings:\n"
        "        strata: int = key(2, 'layers', low=1)\n"
        "    def build(self, *, num_classes, in_channels): ...\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits", ["model.strata=3", "model.name=nets_here:Mine"]).model.strata == 3
    with pytest.raises(ValueError, match=r"unknown key model\.strat; did you mean strata\?; nets_here:Mine takes name, strata"):
        load_recipe("digits", ["model.name=nets_here:Mine", "model.strat=3"])
    with pytest.raises(ValueError, match=r"--set model\.strata: expected an integer >= 1, got 0"):
        load_recipe("digits", ["model.name=nets_here:Mine", "model.strata=0"])
    with pytest.raises(ValueError, match=r"--set prune\.strata: no such key"):
        load_recipe("digits", ["model.name=nets_here:Mine", "prune.strata=0"])


def test_every_key_is_explained_and_can_be_set_to_its_default():
    recipe, table = load_recipe("digits"), to_table(load_recipe("digits"))
    keys = [key for key, _ in explained_keys()]
    assert len(set(keys)) >= 60
    assert keys.count("data.size") == 2  # with the usual default, and with that of ImageNet
    assert all(text for _, text in explained_keys())
    tried = 0
    for key in dict.fromkeys(keys):
        value = table
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = value["name"]
        if value is None:  # an option of a part that this recipe does not name
            continue
        text = ",".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)
        assert override(recipe, [f"{key}={text}"]) == recipe, key
        tried += 1
    assert tried >= 50


@given(sparsity=st.floats(0, 1), gamma=st.floats(0, 1e6), seed=st.integers(0, 2**32 - 1), epochs=st.integers(0, 10**6))
def test_any_value_in_range_arrives_exactly(sparsity, gamma, seed, epochs):
    recipe = override(Recipe(), [f"prune.sparsity={sparsity!r}", f"prune.gamma={gamma!r}", f"seed={seed}", f"prune.epochs={epochs}"])
    assert (recipe.prune.sparsity, recipe.prune.gamma, recipe.seed, recipe.prune.epochs) == (sparsity, gamma, seed, epochs)
    assert from_table(to_table(recipe)) == recipe
