"""Cyclical learning rates inside the optimizer's step.

``CyclicalOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), policy="exp_range")`` is the one
line to change; :mod:`clr_optim.schedule` has every policy, and
:func:`~clr_optim.range_test.lr_range_test` finds the bounds.
"""

from clr_optim._version import __version__
from clr_optim.averages import CycleEnd, Ema
from clr_optim.gate import Spike
from clr_optim.optimizer import CyclicalOptimizer, CyclicalScheduler
from clr_optim.range_test import Bounds, RangeTest, lr_range_test
from clr_optim.rules import register_rule
from clr_optim.schedule import Phase, Schedule
from clr_optim.snapshots import Snapshots

from clr_optim import plotting as plotting  # isort: skip  (enters the functions of plot methods)

__all__ = [
    "Bounds",
    "CycleEnd",
    "CyclicalOptimizer",
    "CyclicalScheduler",
    "Ema",
    "Phase",
    "RangeTest",
    "Schedule",
    "Snapshots",
    "Spike",
    "__version__",
    "lr_range_test",
    "register_rule",
]
