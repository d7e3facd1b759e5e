"""The parser of the command line: how commands are added, how input is refused, and the values that several commands take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .. import __version__

STOPPED = 130  # the exit code after Ctrl-C
LONGEST = 1000  # characters of an error


def refuse(message: str) -> int:
    """Prints why the input cannot be used, in one line that no name of a file or text in it can break, and returns the exit code."""
    line = "".join(c if c.isprintable() else " " for c in message)
    print(f"s2ap: error: {line if len(line) <= LONGEST else line[: LONGEST - 3] + '...'}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(refuse(f"{message[: LONGEST // 2]} (see {self.prog} --help)"))


class Commands:
    """The commands of ``s2ap``: each module of this package adds its own in ``add(commands)``."""

    def __init__(self) -> None:
        self.parser = Parser(prog="s2ap", description="Adversarially robust pruning with S2AP: pretrain, prune, finetune, evaluate.")
        self.parser.add_argument("--version", action="version", version=f"s2ap {__version__}")
        self._commands = self.parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def add(self, name: str, function: Callable[[argparse.Namespace], int], summary: str, **options: Any) -> Parser:
        """Adds the command ``name``, which ``function`` carries out, and returns its parser.

        Args:
            function: takes the arguments and returns the exit code.
            summary: the line of the help that describes the command, without a full stop.
            options: those of :class:`argparse.ArgumentParser`.
        """
        parser = self._commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", **options)
        parser.set_defaults(command=function)
        return parser


def count(text: str) -> int:
    """The type of an argument that is a number of things."""
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 999999, got {text}")
    return int(text)
