"""Figures as inline SVG whose colours are those of the page that they stand in.

matplotlib writes colours as numbers. A figure is therefore drawn in colours that stand for the page's own, and these are put in afterwards.
So one picture serves a light page, a dark one and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from .plots import Palette, drawn_in

NAMES = ("ink", "muted", "line", "surface", *(f"series-{number}" for number in range(6)))
STAND_INS = {f"#00{number:02x}01": f"var(--{name})" for number, name in enumerate(NAMES, 0x10)}
_KEYS = list(STAND_INS)
THEME = Palette(_KEYS[0], _KEYS[1], _KEYS[2], _KEYS[3], tuple(_KEYS[4:]))


def inline(draw: Callable[..., Any], *arguments: Any, key: str, alt: str) -> str:
    """The figure that ``draw`` makes of ``arguments``, as an ``svg`` element for an HTML page. It names no address.

    Args:
        draw: one of the functions of :mod:`.plots`.
        key: letters and digits, another one for each figure of a page: its ids start with it.
        alt: what the figure shows, for those who do not see it.
    """
    written = io.BytesIO()
    with drawn_in(THEME):
        figure = draw(*arguments)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style") or (_local(child.tag) == "defs" and all(_local(c.tag) == "style" for c in child)):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _value(_local(name), value, key) for name, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{key}-alt"}
    title = ElementTree.Element("title", {"id": f"{key}-alt"})
    title.text = alt
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace: an HTML page has those of SVG by itself."""
    return name.rpartition("}")[2]


def _value(name: str, value: str, key: str) -> str:
    """The value of an attribute, with the page's colours and fonts, and ids of the figure's own."""
    if name == "id":
        return f"{key}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    value = re.sub(r"url\(#([^)]*)\)", rf"url(#{key}-\1)", value)
    if name == "style":
        value = re.sub(r"font: (?:(bold|italic|\d+) )?([\d.]+px)[^;]*", r"font-size: \2", value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
    return re.sub(r"#[0-9a-f]{6}", lambda found: STAND_INS.get(found[0], found[0]), value)
