"""The ``s2ap`` command: one file for each of its commands.

Exit codes: 0 done; 1 a defect of this program (with a traceback); 2 input that cannot be used, told in one line; 130 stopped by Ctrl-C,
with the command that goes on. ``doctor`` and the list of ``recipes`` work from the core install; all else asks for the ``train`` extra.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import analyze, doctor, evaluate, experiment, import_, profile, recipes, report, run, sweep
from .parser import STOPPED, Commands, refuse

__all__ = ["main"]

COMMANDS = (run, recipes, import_, experiment, sweep, evaluate, analyze, report, profile, doctor)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (the process's own if None) and returns the exit code."""
    try:
        commands = Commands()
        for module in COMMANDS:
            module.add(commands)
        arguments = commands.parser.parse_args(argv)
        status: int = arguments.command(arguments)
        return status
    except BrokenPipeError:  # nobody reads the report; what was done is in its files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        # These types are how the library reports input that it cannot use: recipes, files, devices, missing packages, losses that diverge.
        return refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return refuse(f"not enough memory; choose a smaller model or smaller batches ({error})")
    except KeyboardInterrupt:
        print("s2ap: interrupted", file=sys.stderr)
        return STOPPED
