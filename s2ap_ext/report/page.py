"""What a page consists of: sections of figures, tables and pictures, as the templates take them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..pipeline.extras import optional
from . import svg


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows. Cells are text, numbers as they are to be read."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure with what it shows in words, and the numbers in it."""

    title: str
    text: str
    svg: Any
    numbers: Table | None


@dataclass(frozen=True)
class Picture:
    """An image as a ``data:`` address."""

    source: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """A row of images that belong together."""

    title: str
    rows: Sequence[Sequence[Picture]]


@dataclass
class Section:
    """A part of the page with a heading of its own.

    Attributes:
        id: of the heading, for links to it.
        text: what to know before looking at the rest.
        folded: long tables, of which at first only the captions are seen.
        code: texts to be shown as they are, by their title.
    """

    id: str
    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    pictures: list[Pictures] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.figures or self.tables or self.pictures or self.code)


class Artist:
    """Draws the figures of a page, each with ids of its own."""

    def __init__(self) -> None:
        self._keys = (f"f{number}" for number in itertools.count(1))

    def figure(self, draw: Callable[..., Any], *arguments: Any, title: str, text: str, alt: str, numbers: Table | None = None) -> Figure:
        """What ``draw``, a function of :mod:`.plots`, makes of ``arguments``."""
        drawn = svg.inline(draw, *arguments, key=next(self._keys), alt=alt)
        return Figure(title, text, optional("markupsafe").Markup(drawn), numbers)


def percents(fraction: float) -> str:
    """``0.9012`` as ``"90.1"``."""
    return f"{100 * fraction:.1f}"


def span(interval: tuple[float, float]) -> str:
    """``(0.876, 0.937)`` as ``"87.6 to 93.7"``."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def points(gap: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * gap:+.1f}"
