"""Things that are chosen by name and configured by keyword: losses, models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def build(kind: str, known: Mapping[str, Callable[..., T]], name: str, settings: Mapping[str, object]) -> T:
    """``known[name](**settings)``.

    Raises:
        ValueError: ``name`` is not in ``known``; a setting that it does not take, or one that it needs and did not get.
    """
    if name not in known:
        raise ValueError(f"{kind}: expected one of {', '.join(sorted(known))}, got {name!r}")
    parameters = inspect.signature(known[name]).parameters
    if unknown := sorted(set(settings) - set(parameters)):
        raise ValueError(f"{kind} {name}: unknown setting {', '.join(unknown)}; it takes {', '.join(parameters) or 'none'}")
    needed = [key for key, p in parameters.items() if p.default is p.empty]
    if missing := [key for key in needed if key not in settings]:
        raise ValueError(f"{kind} {name}: missing setting {', '.join(missing)}")
    return known[name](**settings)
