"""``s2ap recipes``: the recipes of the package, and what one of them says in full."""

from __future__ import annotations

import argparse

from .parser import Commands


def add(commands: Commands) -> None:
    parser = commands.add("recipes", _recipes, "the recipes that come with the package; with a name, all that this one says")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's name or the path of a TOML file: printed with every key")


def _recipes(arguments: argparse.Namespace) -> int:
    from ..pipeline import known_recipes, load_recipe
    from ..pipeline.recipe import to_toml
    from ..pipeline.recipe_files import recipe_file

    if arguments.recipe is not None:
        text = to_toml(load_recipe(arguments.recipe))
        if description := recipe_file(arguments.recipe).description:
            text = f"# {description}\n{text}"
        print(text, end="")
        return 0
    names = known_recipes()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {recipe_file(name).description}")
    return 0
