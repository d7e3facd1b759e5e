"""The options with which a command line chooses a recipe and changes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import Recipe


def add_to(parser: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """Adds ``--set`` and its short forms to ``parser``; without ``seed`` all but that of the seed."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe; may be repeated")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data's files (data.dir)")
    if seed:
        parser.add_argument("--seed", metavar="N", help="everything random follows from it (seed)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (device)")


def help_page() -> dict[str, Any]:
    """The recipes and their keys, for the end of a help page."""
    from ..pipeline import known_recipes
    from ..pipeline.recipe import explained_keys

    lines = [f"recipes: {', '.join(known_recipes())}", "", "keys of a recipe, with their defaults:"]
    lines += [f"  {key:<32} {text}" for key, text in explained_keys()]
    return {"epilog": "\n".join(lines), "formatter_class": argparse.RawDescriptionHelpFormatter}


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of the command line."""
    from ..pipeline import load_recipe

    if not arguments.recipe:
        raise ValueError("expected a recipe, or --resume RUN_DIR")
    return load_recipe(arguments.recipe, overrides_of(arguments))


def plugins_of(arguments: argparse.Namespace) -> list[str]:
    """The modules that ``--set plugins=...`` names: a checkpoint that needs them does not choose what is imported."""
    pairs = [text.partition("=") for text in arguments.set]
    return [value for name, _, value in pairs if name.strip() == "plugins"]


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """``--set`` and its short forms, the latter last."""
    overrides = list(arguments.set)
    if arguments.data_dir is not None:
        overrides.append(f"data.dir={_absolute(arguments.data_dir)}")
    if getattr(arguments, "seed", None) is not None:
        overrides.append(f"seed={arguments.seed}")
    if arguments.device is not None:
        overrides.append(f"device={arguments.device}")
    return overrides


def _absolute(folder: str) -> Path:
    """``--data-dir`` as the recipe keeps it: right from wherever the run goes on."""
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:  # no such user, or none that has a home
        raise ValueError(f"--data-dir {folder}: {error}") from error
