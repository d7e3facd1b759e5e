"""Experiments: arms, which differ in some settings of a recipe, run with several seeds and compared with each other.

:mod:`.plan` reads what an experiment compares, :mod:`.jobs` finds the stages that its runs share, :mod:`.workers` does the work,
:mod:`.table` collects what was measured, and :mod:`.statistics`, :mod:`.summary` and :mod:`.words` say what follows from it.
"""

from .plan import Plan, known_plans, load_plan
from .runner import Result, read_plan, run
from .summary import summarise
from .table import read_table
from .words import to_markdown

__all__ = ["Plan", "Result", "known_plans", "load_plan", "read_plan", "read_table", "run", "summarise", "to_markdown"]
