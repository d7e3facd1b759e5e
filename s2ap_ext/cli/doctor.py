"""``s2ap doctor``: which kernels run here, and why."""

from __future__ import annotations

import argparse

from .parser import Commands


def add(commands: Commands) -> None:
    commands.add("doctor", _doctor, "which kernels run here, and why")


def _doctor(arguments: argparse.Namespace) -> int:
    from ..doctor import doctor

    return doctor()
