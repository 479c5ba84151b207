"""Every picture of the project: schedules, range tests, trainings, the benchmark's results.

Each function returns a new :class:`matplotlib.figure.Figure`. No function uses pyplot, its settings
or its windows: pictures need no display, and leave the plots of the user alone.
"""

from clr_optim.plotting.canvas import check_picture, require_matplotlib, save
from clr_optim.plotting.results import (
    plot_constant_and_cycled,
    plot_paper_curves,
    plot_throughput,
)
from clr_optim.plotting.schedules import plot_policies, plot_schedule
from clr_optim.plotting.training import (
    plot_demo_accuracies,
    plot_demo_rates,
    plot_history,
    plot_range_test,
)

__all__ = [
    "check_picture",
    "plot_constant_and_cycled",
    "plot_demo_accuracies",
    "plot_demo_rates",
    "plot_history",
    "plot_paper_curves",
    "plot_policies",
    "plot_range_test",
    "plot_schedule",
    "plot_throughput",
    "require_matplotlib",
    "save",
]
