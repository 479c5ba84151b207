"""All rows by name, of every table and of Figure 6."""

from __future__ import annotations

from clr_optim.bench.paper.figure_6 import FIGURE_6
from clr_optim.bench.paper.resnet import RESNET
from clr_optim.bench.paper.rows import ROWS, Row

__all__ = ["KNOWN"]

KNOWN: dict[str, Row] = {**ROWS, **FIGURE_6, **RESNET}
