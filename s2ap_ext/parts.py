"""Parts that are chosen by name: methods, losses, models, data, attacks, allocations, ascents.

A part is a class that derives from the base class of its kind and is registered under a name. What can be set about it is a frozen
dataclass called ``Settings`` inside it, so a part owns its options, their defaults, ranges and meanings::

    @register("trades")
    class Trades(Loss):
        @dataclass(frozen=True)
        class Settings:
            beta: float = key(6.0, "weight of the robust term", low=0)

    make("loss", "trades", beta=3.0).settings.beta

The parts of this package are found by their files: each kind has a package, and importing it imports all its modules. A part from
elsewhere is registered when its module is imported: by the user's own program, by ``plugins = ["my_module"]`` in a recipe, or by an entry
point of the group ``s2ap_ext.parts`` in an installed package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .settings import check, nearest, read

P = TypeVar("P", bound="type[Part]")

# Where the parts of this package are, by kind.
PACKAGES = {
    "allocation": "s2ap_ext.allocations",
    "ascent": "s2ap_ext.optim.ascents",
    "attack": "s2ap_ext.attacks",
    "data": "s2ap_ext.data",
    "loss": "s2ap_ext.losses",
    "method": "s2ap_ext.methods",
    "model": "s2ap_ext.models",
}
ENTRY_POINTS = "s2ap_ext.parts"
LIBRARIES = ("hf", "timm", "torchvision")  # what stands before the colon in the names of parts that these packages define
OWN = rf"(?!(?:{'|'.join(LIBRARIES)}):)[^\W\d][\w.]*:[^\W\d]\w*"  # package.module:attribute, those that a user's own module defines

_registered: dict[tuple[str, str], type[Part]] = {}


class Part:
    """What all parts share. The base class of a kind sets ``kind``; :func:`register` sets ``name``.

    Args:
        settings: an object of the part's ``Settings``; None makes one from ``options``.
        options: the settings by name.

    Raises:
        ValueError: an unknown option, or a value outside its range.
    """

    kind: ClassVar[str]
    name: ClassVar[str] = ""
    pattern: ClassVar[str] = ""

    @dataclass(frozen=True)
    class Settings:
        """Nothing can be set."""

    def __init__(self, settings: Any = None, **options: Any) -> None:
        where = f"{self.kind} {self.name or type(self).__name__}"
        self.settings: Any = check(read(type(self).Settings, options, where) if settings is None else settings, where)

    @classmethod
    def member(cls, name: str) -> type[Part]:
        """The class that ``name`` stands for in the family of ``cls``, from which :func:`find` derives one called ``name``.

        As a rule that is ``cls``. A family whose names lead to classes elsewhere overrides this; it raises ValueError where a name leads
        to none.
        """
        return cls

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


def register(name: str, *, pattern: str = "") -> Callable[[P], P]:
    """A class decorator that makes a part known as ``name`` among the parts of its kind.

    Args:
        name: what recipes and :func:`find` call the part.
        pattern: a regular expression for a whole family of names, such as those of the sets on a hub. A name that matches it and is not
            registered itself finds a subclass of this class (or of its :meth:`Part.member`) whose ``name`` is that name; ``name`` then
            only describes the family.

    Raises:
        TypeError: the class does not derive from the base class of a kind.
        ValueError: another class of this kind is registered under that name.
    """

    def decorate(cls: P) -> P:
        kind = getattr(cls, "kind", None)
        if not issubclass(cls, Part) or kind is None:
            raise TypeError(f"{cls.__name__}: expected a class that derives from the base class of a kind, such as s2ap_ext.methods.Method")
        known = _registered.get((kind, name))
        # The same class again, from a module that was imported anew, takes the place of the old one.
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{kind} {name}: {cls.__qualname__} cannot take a name that {known.__module__}.{known.__qualname__} has")
        cls.name, cls.pattern = name, pattern
        _registered[kind, name] = cls
        return cls

    return decorate


def find(kind: str, name: str) -> type[Part]:
    """The class of the part called ``name``; raises ValueError with the known names, and the nearest one, if there is none."""
    known = registered(kind)
    if name in known and not known[name].pattern:
        return known[name]
    for part in known.values():
        if part.pattern and re.fullmatch(part.pattern, name):
            return _of_family(part, name)
    raise ValueError(f"{kind}: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}")


def make(kind: str, name: str, **options: Any) -> Part:
    """The part called ``name`` with its options; errors as in :func:`find` and :class:`Part`."""
    return find(kind, name)(**options)


def names(kind: str) -> list[str]:
    """The names of all parts of ``kind``, sorted; a family of names has one that describes it."""
    return list(registered(kind))


def registered(kind: str) -> dict[str, type[Part]]:
    """The classes of all parts of ``kind`` by name, sorted."""
    _load(kind)
    return {name: part for (k, name), part in sorted(_registered.items()) if k == kind}


def attribute(kind: str, name: str) -> Any:
    """What ``name``, of the form ``package.module:attribute``, leads to: the family of names for parts that a user's own module defines.

    Raises:
        ValueError: there is no such module, or nothing of that name in it; the message starts with ``kind`` and ``name``.
        ImportError: the module exists, but something that it imports does not.
    """
    module, _, target = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and needs another that is not
        raise ValueError(f"{kind} {name}: no module {error.name} on Python's path (see PYTHONPATH)") from error
    if not hasattr(found, target):
        raise ValueError(f"{kind} {name}: {module} has no {target}{nearest(target, dir(found))}")
    return getattr(found, target)


def call_own(kind: str, name: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """Calls a user's ``function`` with ``arguments``; raises ValueError if its signature does not take them."""
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        wanted = ", ".join(f"{key}=" for key in arguments)
        raise ValueError(f"{kind} {name}: expected a function that takes ({wanted}) ({error})") from error
    return function(**arguments)


def import_all(package: str, path: list[str]) -> None:
    """Imports every module of a package, so that each part in it registers itself: what the ``__init__`` of a kind's package calls."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


@functools.cache
def _of_family(part: type[Part], name: str) -> type[Part]:
    part = part.member(name)
    return type(part.__name__, (part,), {"name": name, "__module__": part.__module__, "__doc__": part.__doc__})


@functools.cache
def _load(kind: str) -> None:
    """Imports what may hold parts of ``kind``: the package's own, and those of installed packages."""
    importlib.import_module(PACKAGES[kind])
    _load_entry_points()


@functools.cache
def _load_entry_points() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise ImportError(f"{ENTRY_POINTS}: {entry.name} = {entry.value} cannot be loaded ({error})") from error
