"""Rerun the paper's tables.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
Tables 1 to 3.
"""

from clr_optim.bench.paper.command import DESCRIPTION, run
from clr_optim.bench.paper.comparison import summarize
from clr_optim.bench.paper.one_run import Run
from clr_optim.bench.paper.optimizers import CaffeSGD
from clr_optim.bench.paper.options import add_arguments
from clr_optim.bench.paper.readme import readme_table
from clr_optim.bench.paper.rows import ROWS, Row, Scale

__all__ = [
    "DESCRIPTION",
    "ROWS",
    "CaffeSGD",
    "Row",
    "Run",
    "Scale",
    "add_arguments",
    "readme_table",
    "run",
    "summarize",
]
