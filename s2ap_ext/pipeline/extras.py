"""The packages that only training needs."""

from __future__ import annotations

import importlib.util

from .._extras import MissingExtra, optional

__all__ = ["TRAINING", "MissingExtra", "optional", "require"]

TRAINING = ("jinja2", "matplotlib", "rich", "safetensors", "scipy", "tensorboard", "tomli_w")


def require(names: tuple[str, ...] = TRAINING) -> None:
    """Raises one :class:`MissingExtra` that names all of ``names`` that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(*missing)
