"""The files of recipes: where they lie, and what they inherit from others.

A recipe with ``extends = "NAME"`` starts from the recipe NAME: one of the package, or a file whose path is relative to its own. What it
says itself takes the place of what it inherits, key by key. A part that gets another name loses the options of the one that it replaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..settings import nearest, shown
from .extras import optional
from .sections import part_places


@dataclass(frozen=True)
class RecipeFile:
    """One file.

    Attributes:
        where: what errors about it start with.
        text: what it holds.
        folder: where the paths in it start from; None for a recipe of the package, which names only others of the package.
    """

    where: str
    text: str
    folder: Path | None

    @property
    def description(self) -> str:
        """Its first line, if that is a comment."""
        line = self.text.partition("\n")[0]
        return line.removeprefix("#").strip() if line.startswith("#") else ""


def known_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files("s2ap_ext") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_file(source: str, folder: Path | None = Path(), label: str = "recipe") -> RecipeFile:
    """The recipe ``source``: a known name, or a path from ``folder``.

    Raises:
        ValueError: there is no such recipe, or the file is not text; the message starts with ``label`` or the file's path.
    """
    known = known_recipes()
    if source in known:
        text = (resources.files("s2ap_ext") / "recipes" / f"{source}.toml").read_text(encoding="utf-8")
        return RecipeFile(f"recipe {source}", text, None)
    if folder is None or not (path := folder / source).is_file():
        raise ValueError(
            f"{label}: expected one of {', '.join(known)} or the path of a TOML file, got {shown(source)}{nearest(source, known)}"
        )
    try:
        return RecipeFile(str(path), path.read_text(encoding="utf-8"), path.parent)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a TOML file ({error})") from None


def read_table(source: str) -> tuple[dict[str, Any], str]:
    """The recipe ``source``, known by name or a path, with all that it inherits: its table, and what errors about it start with.

    Raises:
        ValueError: there is no such recipe, or none that it extends; a file that is not TOML; recipes that extend each other.
    """
    file = recipe_file(source)
    where, seen, tables = file.where, [_place(file)], []
    while True:
        table = _parsed(file)
        tables.append(table)
        if "extends" not in table:
            break
        base = table.pop("extends")
        if not isinstance(base, str):
            raise ValueError(f"{file.where}: extends: expected a text, got {shown(base)}")
        file = recipe_file(base, file.folder, f"{file.where}: extends")
        if _place(file) in seen:
            raise ValueError(f"{where}: extends: these recipes extend each other: {' -> '.join([*seen, _place(file)])}")
        seen.append(_place(file))
        where = f"{where}, which extends {file.where}" if len(tables) == 1 else where
    try:
        merged = tables.pop()
        for table in reversed(tables):
            merged = _merged(merged, table)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a recipe") from None
    return merged, where


def _place(file: RecipeFile) -> str:
    """What tells ``file`` from any other."""
    return file.where if file.folder is None else str(Path(file.where).resolve())


def _parsed(file: RecipeFile) -> dict[str, Any]:
    toml = optional("tomllib", or_else="tomli")
    try:
        table: dict[str, Any] = toml.loads(file.text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError, as is what a number of 5,000 digits brings
        raise ValueError(f"{file.where}: not a TOML file ({error})") from None
    return table


def _merged(base: Any, own: Any, path: str = "") -> Any:
    """``own`` in the place of ``base``, key by key where both are tables."""
    if (part := part_places().get(path)) is not None:
        base, own = ({"name": value} if isinstance(value, str) else value for value in (base, own))
        renamed = isinstance(base, dict) and isinstance(own, dict) and "name" in own
        if renamed and own["name"] != base.get("name", part["default"]):
            base = {name: value for name, value in base.items() if name in part["beside"]}
    if not isinstance(base, dict) or not isinstance(own, dict):
        return own
    inside = f"{path}." if path else ""
    return base | {name: _merged(base[name], value, f"{inside}{name}") if name in base else value for name, value in own.items()}
