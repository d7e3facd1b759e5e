"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import s2ap_ext

PACKAGE = Path(s2ap_ext.__file__).parent
FILES = [path.relative_to(PACKAGE.parent).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("name", [".".join(file.parts).removesuffix(".__init__") for file in FILES])
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_there_are_examples() -> None:
    assert FILES
