"""Docstrings as the site shows them: the roles of Sphinx (``:func:`name```) become code, and the marks of its literal blocks go."""

import re

import griffe


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            text = re.sub(r":(?:func|class|meth|mod|attr|data):`~?\.?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
