"""What runs and experiments found: tables on a terminal, plots, an HTML page, Markdown and CSV.

Everything is computed from the records in the folders (:mod:`.records`); only the adversarial images of a page ask for the model.
"""

from .evaluations import print_evaluation, print_gradient_check
from .files import to_csv, to_markdown
from .html import to_html
from .of_runs import scale_of
from .plots import write_plots
from .records import Experiment, Run, read, read_all
from .tables import print_analysis, print_latency, print_profile, print_steps, print_table
from .verdict import verdict

__all__ = [
    "Experiment",
    "Run",
    "print_analysis",
    "print_evaluation",
    "print_gradient_check",
    "print_latency",
    "print_profile",
    "print_steps",
    "print_table",
    "read",
    "read_all",
    "scale_of",
    "to_csv",
    "to_html",
    "to_markdown",
    "verdict",
    "write_plots",
]
