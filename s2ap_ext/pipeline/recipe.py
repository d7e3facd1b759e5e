"""Recipes: everything a run depends on, as a TOML file that is checked as a whole before any work starts.

A recipe has one section for each part of a run; :class:`Recipe` and the classes above it list every key with its type, default,
range and meaning. What a file leaves out takes the default, and the run folder keeps the complete recipe as ``config.toml``,
which is a recipe again.
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..attacks import NORMS
from ..losses import LOSSES
from ..methods import METHODS
from ..parts import names
from .extras import optional

SCHEDULES = ("cosine", "constant")


def key(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, choices: Iterable[str] = ()) -> Any:
    """One key of a section: its default, what it means, and the values it may take."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": tuple(choices)})


@dataclass(frozen=True)
class Model:
    name: str = key("digits_cnn", "the architecture", choices=names("model"))
    width: int = key(32, "channels of the first layer, for the models that have it; the others are multiples of it", low=1)


@dataclass(frozen=True)
class Data:
    name: str = key("digits", "digits (comes with scikit-learn), or an image set of the hub such as uoft-cs/cifar10")
    dir: str = key("", "folder of that set's parquet files; empty: ask the hub")
    train_size: int = key(0, "train on the first so many images; 0: all", low=0)
    test_size: int = key(0, "test on the first so many images; 0: all", low=0)
    shift: int = key(0, "training images move by up to so many pixels", low=0)
    flip: bool = key(False, "training images are mirrored at random")


@dataclass(frozen=True)
class Attack:
    norm: str = key("linf", "the ball's norm", choices=NORMS)
    eps: float = key(8 / 255, "radius of the ball, in units where images lie in [0, 1]", low=0)
    step_size: float = key(2 / 255, "length of one step of the training attack", low=0)
    steps: int = key(10, "number of steps of the training attack", low=0)


@dataclass(frozen=True)
class Training:
    """What the three training stages share: SGD on a robust loss."""

    epochs: int = key(100, "passes over the training images", low=0)
    batch_size: int = key(128, "images per step", low=1)
    lr: float = key(0.1, "learning rate at the start", low=0)
    schedule: str = key("cosine", "how the learning rate falls, epoch by epoch", choices=SCHEDULES)
    momentum: float = key(0.9, "SGD's momentum", low=0, high=1)
    weight_decay: float = key(5e-4, "SGD's weight decay", low=0)
    loss: str = key("pgd_at", "what is minimised", choices=LOSSES)
    beta: float = key(6.0, "weight of the robust term of TRADES", low=0)


@dataclass(frozen=True)
class Pretrain(Training):
    pass


@dataclass(frozen=True)
class Prune(Training):
    epochs: int = key(20, "passes over the training images", low=0)
    method: str = key("hydra", "how the mask is searched", choices=METHODS)
    sparsity: float = key(0.9, "fraction of the weights removed", low=0, high=1)
    granularity: str = key("weight", "what is removed as one: weight, channel, head, or N:M such as 2:4 (N of every M inputs stay)")
    exclude: str = key("", "names of layers that stay dense, separated by commas; * and ? match")
    s2ap: bool = key(True, "take the gradient at scores perturbed towards higher loss")
    gamma: float = key(1e-3, "S2AP: size of the perturbation relative to the scores' norm, layer by layer", low=0)
    warmup_epochs: int = key(5, "S2AP: epochs of plain steps at the start", low=0)


@dataclass(frozen=True)
class Finetune(Training):
    lr: float = key(0.01, "learning rate at the start", low=0)
    awp: bool = key(True, "adversarial perturbation of the kept weights")
    gamma: float = key(5e-3, "AWP: size of the perturbation relative to the kept weights' norm, layer by layer", low=0)
    warmup_epochs: int = key(0, "AWP: epochs of plain steps at the start", low=0)


@dataclass(frozen=True)
class Evaluate:
    steps: int = key(20, "steps of the attack on the test images", low=0)
    step_size: float = key(2 / 255, "length of one step", low=0)
    batch_size: int = key(256, "images per batch", low=1)
    images_per_epoch: int = key(256, "test images for the robust accuracy after each training epoch", low=1)


@dataclass(frozen=True)
class Recipe:
    """A complete, valid recipe. ``Recipe()`` holds the defaults."""

    name: str = key("recipe", "what the run is called")
    seed: int = key(0, "everything random follows from it", low=0, high=2**32 - 1)
    device: str = key("auto", "auto (CUDA where there is a device), or a torch device such as cpu or cuda:1")
    threads: int = key(0, "CPU threads, on which the last bits of sums depend; 0: as many as torch takes", low=0)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    attack: Attack = field(default_factory=Attack)
    pretrain: Pretrain = field(default_factory=Pretrain)
    prune: Prune = field(default_factory=Prune)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)


def known_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files("s2ap_ext") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        source: the name of a recipe of the package (:func:`known_recipes`), or the path of a TOML file.
        overrides: ``"section.key=value"``, read as the key's type; numbers may be fractions such as ``8/255``.

    Raises:
        ValueError: an unknown recipe, section or key (with the nearest known one), a value of the wrong type or outside
            its range (naming the key), or a file that is not TOML.
    """
    name = str(source)
    if name in known_recipes():
        text, where = (resources.files("s2ap_ext") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"), f"recipe {name}"
    elif Path(source).is_file():
        text, where = Path(source).read_text(encoding="utf-8"), name
    else:
        known = known_recipes()
        raise ValueError(f"recipe: expected one of {', '.join(known)} or the path of a TOML file, got {name!r}{_nearest(name, known)}")
    toml = optional("tomllib", or_else="tomli")
    try:
        table = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise ValueError(f"{where}: not a TOML file ({error})") from None
    return override(from_table(table, where), overrides)


def from_table(table: dict[str, Any], where: str = "recipe") -> Recipe:
    """The recipe that nested dictionaries (parsed TOML or JSON) describe; errors as in :func:`load_recipe`, starting with ``where``."""
    return _section(Recipe, table, "", where)


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """``recipe`` with each ``"section.key=value"`` applied; errors as in :func:`load_recipe`."""
    for text in overrides:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals:
            raise ValueError(f"--set {text}: expected section.key=value")
        if path not in all_keys():
            raise ValueError(f"--set {path}: no such key in a recipe{_nearest(path, all_keys())}")
        *section, name = path.split(".")
        part = getattr(recipe, section[0]) if section else recipe
        part = replace(part, **{name: _value(type(part), name, _parse(value.strip(), _type_of(type(part), name)), f"--set {path}")})
        recipe = replace(recipe, **{section[0]: part}) if section else part
    return recipe


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries, every key present; :func:`from_table` reads it back."""
    return asdict(recipe)


def to_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML."""
    return optional("tomli_w").dumps(to_table(recipe))


def all_keys() -> list[str]:
    """Every key of a recipe, as ``--set`` takes it."""
    names = []
    for part in fields(Recipe):
        section = typing.get_type_hints(Recipe)[part.name]
        names += [f"{part.name}.{f.name}" for f in fields(section)] if is_dataclass(section) else [part.name]
    return names


def explained_keys() -> list[tuple[str, str]]:
    """Every key with its meaning, the values it may take and its default."""
    lines = []
    for path in all_keys():
        *section, name = path.split(".")
        part = getattr(Recipe(), section[0]) if section else Recipe()
        about = next(f for f in fields(part) if f.name == name).metadata
        default = getattr(part, name)
        shown = f"{default:.4g}" if isinstance(default, float) else str(default).lower() or "empty"
        text = about["help"] + (f": {', '.join(about['choices'])}" if about["choices"] else "")
        lines.append((path, f"{text} [{shown}]"))
    return lines


def _section(cls: type, table: Any, prefix: str, where: str):
    """The dataclass ``cls`` filled from ``table``, each value checked."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.')}: expected a section, got {table!r}")
    known = {f.name for f in fields(cls)}
    values = {}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {prefix}{name}{_nearest(prefix + name, all_keys())}")
        kind = _type_of(cls, name)
        if is_dataclass(kind):
            values[name] = _section(kind, value, f"{name}.", where)
        else:
            values[name] = _value(cls, name, value, f"{where}: {prefix}{name}")
    return cls(**values)


def _type_of(cls: type, name: str) -> type:
    return typing.get_type_hints(cls)[name]


def _parse(text: str, kind: type) -> Any:
    """Reads a value from the command line; what cannot be read stays text, which :func:`_value` then refuses."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is int:
        try:
            return int(text)
        except ValueError:
            return text
    return text


def _value(cls: type, name: str, value: Any, where: str) -> Any:
    """``value`` as the type of the key, or ValueError."""
    kind = _type_of(cls, name)
    allowed = next(f for f in fields(cls) if f.name == name).metadata
    what = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
    got = value
    if kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        value = _number(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where}: expected {what}, got {got!r}")
    if allowed["choices"] and value not in allowed["choices"]:
        raise ValueError(f"{where}: expected one of {', '.join(allowed['choices'])}, got {got!r}{_nearest(value, allowed['choices'])}")
    if kind in (int, float) and not allowed["low"] <= value <= allowed["high"]:
        bound = f">= {allowed['low']}" if math.isinf(allowed["high"]) else f"in [{allowed['low']}, {allowed['high']}]"
        raise ValueError(f"{where}: expected {what} {bound}, got {got}")
    return value


def _number(value: str | int) -> float | str:
    """A float from an integer, a number in text, or a fraction such as ``"8/255"``; the text itself if it is none."""
    numerator, slash, denominator = str(value).partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return str(value)


def _nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean a or b?"`` for the known names that look like ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
