"""Packages that the core install does not need, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

# Import name -> name on the package index, where the two differ.
PROJECTS = {"tomli_w": "tomli-w", "PIL": "pillow"}
# Import name -> the extra that brings it; the others come with "train".
EXTRAS = {"optuna": "sweep", "pyautoattack": "eval", "timm": "timm", "torchvision": "torchvision", "transformers": "hf"}


class MissingExtra(ImportError):
    """A package of one of the extras is not installed; the message says how to get it."""

    def __init__(self, *names: str) -> None:
        projects = ", ".join(PROJECTS.get(name, name) for name in names)
        extras = ",".join(sorted({EXTRAS.get(name, "train") for name in names}))
        super().__init__(f'{projects} missing; install with: pip install "s2ap_ext[{extras}]"')


def optional(name: str, *, or_else: str = "") -> ModuleType:
    """Imports ``name``, or ``or_else`` where it is missing; raises :class:`MissingExtra` without either."""
    for candidate in filter(None, (name, or_else)):
        if importlib.util.find_spec(candidate.partition(".")[0]) is not None:
            return importlib.import_module(candidate)
    raise MissingExtra((or_else or name).partition(".")[0])
