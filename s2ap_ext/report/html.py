"""A report as one HTML page that needs nothing besides itself: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..pipeline.extras import optional
from .of_analyses import analysis
from .of_experiments import experiment
from .of_runs import attacks, configuration, cost, mask, results, training
from .page import Artist, Section
from .pictures import pictures
from .records import Experiment, Run
from .verdict import verdict_of_runs


def to_html(runs: Sequence[Run], experiments: Sequence[Experiment] = ()) -> str:
    """The page about ``runs``, side by side, and ``experiments``.

    Raises:
        ValueError: nothing to report on.
        MissingExtra: Jinja2 or matplotlib is not installed.
    """
    if not (runs or experiments):
        raise ValueError("report: expected the folder of a run or of an experiment, got none")
    artist = Artist()
    sections = [experiment(one, number, artist) for number, one in enumerate(experiments, 1)]
    if runs:
        sections += [results(runs, artist), training(runs, artist), mask(runs, artist), analysis(runs, artist), attacks(runs)]
        sections += [pictures(runs), cost(runs, artist), configuration(runs)]
    names = [*(one.name for one in experiments), *(run.name for run in runs)]
    sentence = verdict_of_runs(runs) if runs else experiments[0].summary["verdict"]
    for section in sections:
        if section.text == sentence:  # said above already
            section.text = ""
    return _fill(title=", ".join(names), verdict=sentence, sections=[section for section in sections if section])


def _fill(**values: str | list[Section]) -> str:
    jinja2 = optional("jinja2")
    loader = jinja2.PackageLoader("s2ap_ext.report", "templates")
    environment: Any = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return str(environment.get_template("page.html").render(**values))
