"""Every recipe of the package: it parses, its model is built, and a mask search takes a step on two images."""

import pytest
import torch

from s2ap_ext.data import Dataset, Split
from s2ap_ext.nn import pruned_layers
from s2ap_ext.pipeline import RunFolder, Session, check_prunable, known_recipes, load_recipe, prune
from s2ap_ext.pipeline.model_file import new_model
from s2ap_ext.pipeline.recipe import to_toml
from s2ap_ext.pipeline.recipe_files import recipe_file

GRID = [f"{data}-{model}" for data in ("cifar10", "svhn") for model in ("resnet18", "vgg16", "wrn28-4")]
SMALLER = {"resnet18": "model.width=8", "resnet50": "model.width=8", "vit": "model.depth=1"}  # where the model has such a setting
SHAPES = {"digits": (1, 8, 8), "imagenet": (3, 64, 64)}


def two_images(recipe):
    shape = SHAPES.get(recipe.data.source.name, (3, 32, 32))
    split = Split(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]))
    return Dataset("two", split, split, tuple("0123456789"))


def test_the_grid_of_the_literature_ships():
    assert set(known_recipes()) >= {*GRID, "digits", "imagenet-resnet50", "cifar10-vit", "digits-vit"}


@pytest.mark.parametrize("name", known_recipes())
def test_a_recipe_has_its_files_name_a_model_and_survives_the_way_through_toml(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    model = recipe.model.make()
    assert 5_000 < model.count_parameters(**model.sizes(two_images(recipe).shape, 10)) < 50_000_000
    assert len(recipe_file(name).description) > 20
    path = tmp_path / "config.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize("name", known_recipes())
def test_its_mask_search_takes_a_step(name, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "save_state", lambda *args: None)  # hundreds of megabytes
    recipe = load_recipe(name)
    overrides = [
        "attack.steps=1",
        "evaluate.steps=1",
        "prune.epochs=1",
        "prune.warmup_epochs=0",
        "device=cpu",
        "threads=1",
        "compile=false",
    ]
    overrides += [setting for model, setting in SMALLER.items() if model == recipe.model.name]
    recipe = load_recipe(name, overrides)
    data = two_images(recipe)
    model = new_model(recipe, data)
    with RunFolder.create(tmp_path / "run", recipe) as folder:
        prune(Session(recipe, data, folder), model)
        (record,) = folder.find("prune")
    layers = pruned_layers(model)
    assert record["passes"] >= 2
    kept = sum(int(layer.mask.sum()) for layer in layers.values())
    weights = sum(layer.mask.numel() for layer in layers.values())
    assert kept / weights == pytest.approx(1 - recipe.prune.sparsity, abs=0.01)


@pytest.mark.parametrize("name", [*GRID, "digits-vit"])
@pytest.mark.parametrize("method", ["hydra", "harp", "rst"])
def test_every_row_of_the_grid_is_a_recipe(name, method):
    for sparsity in ("0.8", "0.9", "0.95", "0.99"):
        for s2ap in ("true", "false"):
            recipe = load_recipe(name, [f"prune.method={method}", f"prune.sparsity={sparsity}", f"prune.s2ap={s2ap}"])
            assert (recipe.prune.method.name, recipe.prune.sparsity) == (method, float(sparsity))
            assert recipe.prune.s2ap == (s2ap == "true")


@pytest.mark.parametrize("method", ["harp", "rst"])
def test_methods_fit_a_vision_transformer(method):
    recipe = load_recipe("digits-vit", [f"prune.method={method}"])
    assert check_prunable(recipe, two_images(recipe)) > 0


@pytest.mark.parametrize("name", GRID)
def test_the_grid_is_in_the_setting_of_the_papers(name):
    recipe = load_recipe(name)
    assert (recipe.attack.eps, recipe.attack.step_size, recipe.attack.steps, recipe.attack.norm) == (8 / 255, 2 / 255, 10, "linf")
    assert (recipe.pretrain.epochs, recipe.prune.epochs, recipe.finetune.epochs) == (100, 20, 100)
    assert (recipe.prune.lr, recipe.finetune.lr, recipe.prune.gamma, recipe.prune.warmup_epochs) == (0.1, 0.01, 1e-3, 5)
    assert recipe.model.name == name.partition("-")[2].replace("-", "_")
    assert recipe.data.flip == name.startswith("cifar10")


def test_imagenet_is_trained_for_free():
    recipe = load_recipe("imagenet-resnet50")
    assert recipe.attack.eps == 4 / 255
    for stage in (recipe.pretrain, recipe.prune, recipe.finetune):
        assert (stage.loss.name, stage.loss.replays) == ("free_at", 4)
    assert recipe.prune.warmup_epochs < recipe.prune.epochs
