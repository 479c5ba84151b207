"""Methods that draw: they call the functions that :mod:`clr_optim.plotting` enters here.

``clr_optim.plotting`` imports the objects that it draws. This table lets their methods reach the
functions that draw them, without an import in the other direction. ``import clr_optim`` fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FUNCTIONS", "draw", "enter", "plot_optimizer"]

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])

#: the functions of :mod:`clr_optim.plotting`, by name
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def enter(function: _FunctionT) -> _FunctionT:
    """Enter a function into the table under its name, as a decorator."""
    FUNCTIONS[function.__name__] = function
    return function


def draw(function: str, *args: Any, path: str | Path | None, **options: Any) -> Figure:
    """Call a function that draws, and write its picture to ``path`` unless that is None."""
    if path is not None:
        FUNCTIONS["check_picture"](path)
    figure: Figure = FUNCTIONS[function](*args, **options)
    if path is not None:
        FUNCTIONS["save"](figure, path)
    return figure


def plot_optimizer(
    self: Any, steps: int, path: str | Path | None = None, *, log: bool = False
) -> Figure:
    """Draw the rate of the next steps, and below it the momentum if it cycles.

    Args:
        steps: how many steps to show, an integer from 1 to 1,000,000.
        path: a file to write the picture to, such as ``"schedule.png"``; ``None`` writes no file.
        log: draw the rate on a logarithmic axis.

    Returns:
        The figure. A notebook shows the figure; ``figure.axes[0]`` has the curves of the rate.

    Raises:
        ImportError: without matplotlib.
        OSError: if the file cannot be written.
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), step_size_up=50)
        >>> opt.plot(300).axes[0].get_title()
        'SGD, triangular'
    """
    return draw("plot_schedule", self, steps, log=log, path=path)
