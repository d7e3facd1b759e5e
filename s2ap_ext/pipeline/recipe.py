"""Recipes: everything a run depends on, as a TOML file that is checked as a whole before any work starts.

:mod:`.sections` lists every key with its type, default, range and meaning. A key that names a part (:mod:`s2ap_ext.parts`) takes the
name alone, ``method = "harp"``, or a table of the name and what can be set about that part, ``method = {name = "harp", penalty = 0.02}``.
What a file leaves out is inherited from the recipe that it extends (:mod:`.recipe_files`) or takes the default, and the run folder keeps
the complete recipe as ``config.toml``, which is a recipe again.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from .. import parts
from ..settings import Text, explained, nearest, shown, types_of, value_of
from .extras import optional
from .recipe_files import read_table
from .sections import Chosen, Recipe, part_places

_own_modules: set[str] = set()  # that recipes of the user's have named, so that those of others may use them

# ------------------------------------------------------------------------------------------------------------ reading and writing


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        source: the name of a recipe of the package (:func:`known_recipes`), or the path of a TOML file.
        overrides: ``"section.key=value"``, read as the key's type; numbers may be fractions such as ``8/255``.

    Raises:
        ValueError: an unknown recipe, section or key (with the nearest known one), a value of the wrong type or outside
            its range (naming the key), a plugin that cannot be imported, a file that is not TOML, or recipes that extend each other.
    """
    table, where = read_table(str(source))
    return from_table(_with_overrides(table, overrides), where)


def from_table(table: dict[str, Any], where: str = "recipe", *, import_plugins: bool = True) -> Recipe:
    """The recipe that nested dictionaries (parsed TOML or JSON) describe; errors as in :func:`load_recipe`, starting with ``where``.

    Args:
        import_plugins: False for a table that somebody else may have written: it may then name only modules that another recipe has
            named which was read without this, and nothing is imported.
    """
    try:
        return _from_table(table, where, import_plugins)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a recipe") from None


def _from_table(table: Any, where: str, import_plugins: bool) -> Recipe:
    plugins = value_of(Recipe, "plugins", table.get("plugins", ()), f"{where}: plugins") if isinstance(table, dict) else ()
    if import_plugins:
        for module in plugins:
            _import_plugin(module, where)
        if modules := _modules_named(table):
            _search_here()
            _own_modules.update(modules)
    else:
        for module in (*plugins, *_modules_named(table)):
            if module not in _own_modules:
                raise ValueError(f"{where}: needs the plugin {module}; to import that module, add --set plugins={module}")
    recipe: Recipe = _section(Recipe, table, "", where)
    return recipe


def _modules_named(table: Any) -> list[str]:
    """The modules in the names of parts of the form ``package.module:attribute``, wherever they stand in ``table``."""
    if isinstance(table, dict):
        return [module for value in table.values() for module in _modules_named(value)]
    return [table.partition(":")[0]] if isinstance(table, str) and re.fullmatch(parts.OWN, table) else []


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """``recipe`` with each ``"section.key=value"`` applied; errors as in :func:`load_recipe`."""
    return from_table(_with_overrides(to_table(recipe), overrides))


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries, every key present; :func:`from_table` reads it back."""
    return _table(recipe)


def to_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML."""
    text: str = optional("tomli_w").dumps(to_table(recipe))
    return text


def explained_keys() -> list[tuple[str, str]]:
    """Every key, as ``--set`` takes it, with its meaning, the values it may take and its default."""
    return list(_explained(Recipe, ""))


# ----------------------------------------------------------------------------------------------------------------------- sections


def _section(cls: type, table: Any, prefix: str, where: str) -> Any:
    """The dataclass ``cls`` filled from ``table``, each value checked."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.') or 'recipe'}: expected a section, got {shown(table)}")
    table, values, types = dict(table), {}, types_of(cls)
    flat = next((f for f in fields(cls) if f.metadata.get("flat")), None)
    own = [f for f in fields(cls) if f is not flat]
    for f in own:
        if f.name not in table:
            continue
        value = table.pop(f.name)
        if "kind" in f.metadata:
            values[f.name] = _chosen(f.metadata, value, f"{prefix}{f.name}", where)
        elif is_dataclass(types[f.name]):
            values[f.name] = _section(types[f.name], value, f"{prefix}{f.name}.", where)
        else:
            values[f.name] = value_of(cls, f.name, value, f"{where}: {prefix}{f.name}")
    if flat is not None:
        values[flat.name] = _chosen(flat.metadata, table, prefix.rstrip("."), where, beside=[f.name for f in own])
    elif table:
        unknown = prefix + next(iter(table))
        raise ValueError(f"{where}: unknown key {unknown}{nearest(unknown, [key for key, _ in explained_keys()])}")
    return cls(**values)


def _chosen(about: typing.Mapping[str, Any], value: Any, path: str, where: str, beside: Iterable[str] = ()) -> Chosen:
    """The part that ``value`` names: a text, or a table with a ``name`` and options."""
    options = dict(value) if isinstance(value, dict) else {"name": value}
    name = options.pop("name", about["default"])
    label = f"{where}: {path}.name" if isinstance(value, dict) else f"{where}: {path}"
    label = name.where if isinstance(name, Text) else label
    if not isinstance(name, str):
        raise ValueError(f"{label}: expected a text, got {shown(name)}")
    try:
        cls = parts.find(about["kind"], str(name))
    except ValueError as error:
        raise ValueError(f"{label}: {str(error).partition(': ')[2]}") from None
    known = [f.name for f in fields(cls.Settings)]
    for option in options:
        if option not in known:
            takes = [*beside, "name", *known]
            raise ValueError(f"{where}: unknown key {path}.{option}{nearest(option, takes)}; {cls.name} takes {', '.join(takes)}")
    settings = {option: value_of(cls.Settings, option, v, f"{where}: {path}.{option}") for option, v in options.items()}
    return Chosen(about["kind"], cls.name, cls.Settings(**settings))


def _table(section: Any) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if isinstance(value, Chosen):
            chosen = {"name": value.name, **_listed(asdict(value.settings))}
            table |= chosen if f.metadata["flat"] else {f.name: chosen}
        else:
            table[f.name] = _table(value) if is_dataclass(value) else value
    return _listed(table)


def _listed(table: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in table.items()}


def _explained(cls: type, prefix: str) -> Iterator[tuple[str, str]]:
    types = types_of(cls)
    for f in fields(cls):
        path = f"{prefix}{f.name}"
        if "kind" in f.metadata:
            path = prefix.rstrip(".") if f.metadata["flat"] else path
            name, known = f.metadata["default"], parts.registered(f.metadata["kind"])
            sections = f.metadata["flat"] or not prefix  # [model] and [data] name their part in a key of their own
            yield f"{path}.name" if sections else path, f"{f.metadata['help']}: {', '.join(known)} [{name}]"
            shared: dict[tuple[str, str], list[str]] = {}  # the parts that have an option of the same name and meaning
            for part_name, part in known.items():
                for option in fields(part.Settings):
                    shared.setdefault((option.name, explained(part.Settings, option.name)), []).append(part_name)
            for (option_name, text), part_names in sorted(shared.items(), key=lambda entry: entry[1][0]):
                yield f"{path}.{option_name}", f"{', '.join(part_names)}: {text}"
        elif is_dataclass(types[f.name]):
            yield from _explained(types[f.name], f"{path}.")
        else:
            yield path, explained(cls, f.name)


# ---------------------------------------------------------------------------------------------------------------------- overrides


def _with_overrides(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``table`` with each ``"section.key=value"`` in its place, as :class:`Text`."""
    pairs = []
    for text in overrides:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals:
            raise ValueError(f"--set {text:.100}: expected section.key=value")
        pairs.append((path, Text(value.strip(), f"--set {path:.100}")))
    for path, value in pairs:
        if path == "plugins":  # another key may belong to a part that a plugin registers
            for module in value_of(Recipe, "plugins", value, "plugins"):
                _import_plugin(module, value.where)
    places = {f"{place}.name": about for place, about in part_places().items()}
    known = [key for key, _ in explained_keys()]
    # The names of parts come first, since they say which options there are.
    for path, value in sorted(pairs, key=lambda pair: f"{pair[0].removesuffix('.name')}.name" not in places):
        full = f"{path.removesuffix('.name')}.name"
        full = full if full in places else path
        if full not in places and path not in known and not _is_own(table, path.rpartition(".")[0]):
            raise ValueError(f"{value.where}: no such key in a recipe{nearest(path, known)}")
        table = _put(table, full.split("."), value, places.get(full))
    return table


def _is_own(table: Any, place: str) -> bool:
    """Whether ``table`` names at ``place`` a part of a user's own module, of whose options nothing is known before it is imported."""
    for step in place.split("."):
        table = table.get(step) if isinstance(table, dict) else None
    name = table.get("name") if isinstance(table, dict) else table
    return isinstance(name, str) and re.fullmatch(parts.OWN, name) is not None


def _put(node: Any, steps: list[str], value: Text, part: typing.Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of ``node`` with ``value`` at ``steps``. A ``part`` that gets another name loses the options of the old one."""
    table: dict[str, Any] = dict(node) if isinstance(node, dict) else {"name": node}
    first, *rest = steps
    if rest:
        table[first] = _put(table.get(first, {}), rest, value, part)
        return table
    if part is not None and table.get("name", part["default"]) != value:
        table = {name: kept for name, kept in table.items() if name in part["beside"]}
    return table | {first: value}


def _import_plugin(module: str, where: str) -> None:
    """Imports a module that registers parts, from where Python finds modules or from the current folder."""
    _search_here()
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the module raises
        raise ValueError(f"{where}: cannot import the plugin {module} ({type(error).__name__}: {error})") from error
    _own_modules.add(module)


def _search_here() -> None:
    """From here on Python finds modules in the current folder too, after all others."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
