"""Settings: frozen dataclasses whose fields say what they mean and which values they take.

A field is declared with :func:`key`. :func:`check` validates the values of a finished object, and :func:`read` fills a class from a table
(parsed TOML or JSON, or :class:`Text` from a command line). Every error names the key, what was expected and what came.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from typing import Any, TypeVar

T = TypeVar("T")

Texts = tuple[str, ...]
SANE = 1000
NUMBER_OR_TEXT = float | str
LARGEST = 1e9  # of a key that says nothing else: what is larger is a slip, and overflows somewhere
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Texts: "a list of texts"}


class Text(str):
    """A value as it was typed on a command line: :func:`value_of` reads it as the type of its key.

    Attributes:
        where: what errors about this value start with, such as ``"--set prune.gamma"``.
    """

    where: str

    def __new__(cls, text: str, where: str) -> Text:
        made = super().__new__(cls, text)
        made.where = where
        return made


def key(
    default: Any,
    help: str,
    *,
    low: float = -LARGEST,
    high: float = LARGEST,
    choices: Iterable[str] = (),
    pattern: str = "",
    parse: Callable[[str], object] | None = None,
) -> Any:
    """One field of a settings class: its default, what it means, and the values it may take.

    Args:
        default: of the type that the field is annotated with: bool, int, float, str, float | str or tuple[str, ...].
        help: the meaning, in words that a help page shows.
        low, high: the smallest and the largest number allowed.
        choices: the texts allowed; none means any.
        pattern: a regular expression that a text must match as a whole; none means any text.
        parse: for a key of float | str, what reads the texts that are no numbers. It raises ValueError, saying what was expected and got.
    """
    about = {"help": help, "low": low, "high": high, "choices": tuple(choices), "pattern": pattern, "parse": parse}
    return field(default=default, metadata=about)


@functools.cache
def types_of(cls: type) -> dict[str, type]:
    """The types of the fields of ``cls`` by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def check(settings: T, where: str) -> T:
    """Returns ``settings``, each value as its key's type; raises ValueError naming ``where`` and the first key whose value does not fit."""
    for name in types_of(type(settings)):  # type: ignore[arg-type]  # mypy takes the hash of a class for that of its objects
        object.__setattr__(settings, name, value_of(type(settings), name, getattr(settings, name), f"{where}: {name}"))
    return settings


def read(cls: type[T], table: dict[str, Any], where: str) -> T:
    """The settings class ``cls`` filled from ``table``.

    Raises:
        ValueError: an unknown key (with the nearest known one), or a value that does not fit; the message starts with ``where``.
    """
    known = types_of(cls)  # type: ignore[arg-type]  # mypy takes the hash of a class for that of its objects
    for name in table:
        if name not in known:
            raise ValueError(f"{where}: unknown key {name}{nearest(name, known)}; it takes {', '.join(known) or 'none'}")
    return cls(**{name: value_of(cls, name, value, f"{where}: {name}") for name, value in table.items()})


def value_of(cls: type, name: str, value: Any, where: str) -> Any:
    """``value`` as the type of key ``name`` of ``cls``. Numbers may be fractions such as ``"8/255"``, lists one text with commas.

    Raises:
        ValueError: a value of another type or outside its range; the message starts with ``where``.
    """
    kind = types_of(cls)[name]
    allowed = next(f for f in fields(cls) if f.name == name).metadata
    got = value
    if isinstance(value, Text):
        where, value = value.where, _typed(value, kind)
    if kind == Texts and isinstance(value, (str, list, tuple)):
        items = value.split(",") if isinstance(value, str) else value
        if all(isinstance(item, str) for item in items):
            return tuple(item.strip() for item in items if item.strip())
    if kind in (float, NUMBER_OR_TEXT) and isinstance(value, (str, int)) and not isinstance(value, bool):
        value = _number(value)
    if kind == NUMBER_OR_TEXT and isinstance(value, str):
        try:
            allowed["parse"](value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return value
    kind = float if kind == NUMBER_OR_TEXT else kind
    fits = kind != Texts and type(value) is kind
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where}: expected {WORDS[kind]}, got {shown(got)}")
    if allowed["choices"] and value not in allowed["choices"]:
        raise ValueError(f"{where}: expected one of {', '.join(allowed['choices'])}, got {shown(got)}{nearest(value, allowed['choices'])}")
    if allowed["pattern"] and not re.fullmatch(allowed["pattern"], value):
        raise ValueError(f"{where}: expected a text that matches {allowed['pattern']}, got {shown(got)}")
    if kind in (int, float) and not allowed["low"] <= value <= allowed["high"]:
        # Upper bounds from here on only keep absurd values out: they explain nothing about one that is too small.
        no_bound = allowed["high"] >= SANE and value < allowed["low"]
        bound = f">= {allowed['low']:.15g}" if no_bound else f"in [{allowed['low']:.15g}, {allowed['high']:.15g}]"
        raise ValueError(f"{where}: expected {WORDS[kind]} {bound}, got {shown(value)}")
    return value


def explained(cls: type, name: str) -> str:
    """The meaning of key ``name`` of ``cls`` with the values that it may take and its default, in one line."""
    about = next(f for f in fields(cls) if f.name == name)
    default = ",".join(about.default) if isinstance(about.default, tuple) else about.default
    shown = f"{default:.4g}" if isinstance(default, float) else str(default).lower() or "empty"
    choices = f": {', '.join(about.metadata['choices'])}" if about.metadata["choices"] else ""
    return f"{about.metadata['help']}{choices} [{shown}]"


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean a or b?"`` for the known names that look like ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _typed(text: str, kind: type) -> Any:
    """``text`` read as ``kind``; the text itself where that cannot be."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), str(text))
    if kind is int:
        try:
            return int(text)
        except ValueError:
            pass
    return str(text)


def _number(value: str | int) -> float | str:
    """A float from an integer, a number in text, or a fraction such as ``"8/255"``; the text itself if it is none."""
    if isinstance(value, int):
        return float(value) if abs(value) < 2**1000 else math.inf
    numerator, slash, denominator = value.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        return str(value)


def shown(value: Any) -> str:
    """``value`` for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 14_000:  # Python refuses to write more than 4,300 digits
        return f"one of {value.bit_length()} bits"
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
