"""``s2ap recipes``."""

from command_line import refused

from s2ap_ext.cli import main
from s2ap_ext.pipeline import known_recipes, load_recipe


def test_it_lists_every_recipe_with_one_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == known_recipes()
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1, "the descriptions are in one column"
    assert "Real handwritten digits" in lines[known_recipes().index("digits")]


def test_it_prints_a_recipe_that_run_accepts(capsys, tmp_path):
    assert main(["recipes", "cifar10-vgg16"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# CIFAR-10, VGG16-BN")
    path = tmp_path / "printed.toml"
    path.write_text(text)
    assert load_recipe(path) == load_recipe("cifar10-vgg16")
    assert main(["recipes", str(path)]) == 0
    assert capsys.readouterr().out == text


def test_it_prints_a_file_of_ones_own(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("extends = 'digits'\nname = 'mine'\n")
    assert main(["recipes", str(path)]) == 0
    assert capsys.readouterr().out.startswith('name = "mine"\nplugins = []\n')


def test_an_unknown_recipe(capsys):
    assert "got 'digit'; did you mean digits or" in refused(capsys, "recipes", "digit")
