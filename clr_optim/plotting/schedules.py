"""Pictures of schedules: rate and momentum against iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clr_optim.checks import check_bool, check_bounds, check_int, check_number, check_path
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.pictures import enter
from clr_optim.plotting.canvas import (
    COLORS,
    GREEN,
    check_title,
    draw_guides,
    label_axes,
    label_stack,
    make_figure,
    require_matplotlib,
    save,
)
from clr_optim.schedule import (
    POLICIES,
    WINDOWS,
    Schedule,
    arguments_for,
    cosine,
    fixed,
    sequence,
    triangular,
    triangular2,
    wsd,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The bounds and the step size of the paper's CIFAR-10 runs.
_BASE_LR, _MAX_LR, _STEP_SIZE = 0.001, 0.006, 2000

# Every step is drawn, since a choice of steps could miss all cycles. So many steps take seconds.
_MOST_STEPS = 1_000_000


@enter
def plot_schedule(
    schedule: Schedule | Mapping[str, Schedule] | CyclicalOptimizer[Any],
    steps: int,
    base_lr: float | None = None,
    max_lr: float | None = None,
    *,
    title: str | None = None,
    log: bool = False,
) -> Figure:
    """Draw the learning rate against iteration, of schedules or of an optimizer's next steps.

    Args:
        schedule: one schedule; a dictionary of schedules by their name in the legend; or an
            optimizer. For an optimizer, groups with different bounds have a curve each, and a
            second panel shows the momentum (``betas[0]``) if it cycles.
        steps: iterations to show, an integer from 1 to 1,000,000. The picture includes the rate
            after the last one, so that a whole number of cycles ends where it began.
        base_lr, max_lr: the bounds, for schedules only, since an optimizer has bounds. The defaults
            are 0.001 and 0.006; phases with their own bounds ignore these.
        title: the title; ``None`` is the name of the schedule, or no title for several.
        log: draw the rate on a logarithmic axis.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> import torch
        >>> adam = torch.optim.Adam([torch.zeros(3, requires_grad=True)], lr=1e-3)
        >>> opt = CyclicalOptimizer(adam, step_size_up=100, cycle_momentum=True)
        >>> [axes.get_ylabel() for axes in plot_schedule(opt, 800).axes]
        ['learning rate', 'betas[0]']
    """
    check_title(title)
    check_bool("log", log)
    steps = check_int("steps", steps, minimum=1)
    if steps > _MOST_STEPS:
        raise ValueError(f"steps must be at most {_MOST_STEPS:,}, got {steps:,}")
    if isinstance(schedule, CyclicalOptimizer):
        for name, bound in (("base_lr", base_lr), ("max_lr", max_lr)):
            if bound is not None:
                raise ValueError(
                    f"{name}={bound!r}: an optimizer is drawn with its own bounds; leave it out, "
                    f"or change them by opt.set_bounds({name}=...)"
                )
        return _plot_future(schedule, steps, title, log)
    # Check max_lr first: callers often compute base_lr from max_lr.
    max_lr = check_number("max_lr", _MAX_LR if max_lr is None else max_lr)
    base_lr = check_number("base_lr", _BASE_LR if base_lr is None else base_lr)
    check_bounds(base_lr, max_lr)
    if isinstance(schedule, Schedule):
        title = schedule.name if title is None else title
        schedule = {"": schedule}
    if (
        not isinstance(schedule, Mapping)
        or not schedule
        or not all(isinstance(curve, Schedule) for curve in schedule.values())
    ):
        raise TypeError(
            "schedule must be a Schedule, several of them by label, or a CyclicalOptimizer, got "
            f"{schedule!r}"
        )
    x = np.arange(steps + 1)
    rates = {label: curve(x, base_lr, max_lr) for label, curve in schedule.items()}
    figure, (axes,) = make_figure(width=640, height=280)
    guides = not all(curve.has_bounds for curve in schedule.values())
    _draw_rates(axes, x, rates, (base_lr, max_lr) if guides else None, log)
    label_axes(axes, title or "")
    if len(rates) > 1:
        figure.legend(loc="outside upper center", ncols=len(rates), frameon=False)
    return figure


def _plot_future(
    optimizer: CyclicalOptimizer[Any], steps: int, title: str | None, log: bool
) -> Figure:
    """Draw the next steps of an optimizer; groups with the same bounds share a curve."""
    schedule, groups, begin = optimizer.schedule, optimizer.param_groups, optimizer.iteration
    bounds = optimizer._shared.mirror.bounds()
    members: dict[tuple[float, float], list[str]] = {}
    for i, pair in enumerate(bounds):
        members.setdefault(pair, []).append(str(i))
    x = np.arange(begin, begin + steps + 1)
    if schedule.has_bounds:
        members = {bounds[0]: []}
    rates = {
        f"group{'s' * (len(indices) > 1)} {', '.join(indices)}": schedule(x, *pair)
        for pair, indices in members.items()
    }
    if len(rates) == 1:
        rates = {"": next(iter(rates.values()))}
    momenta: dict[str, npt.NDArray[np.float64]] = {}
    if "clr_base_momentum" in groups[0]:
        label = "betas[0]" if "betas" in groups[0] else "momentum"
        first = groups[0]
        momenta[label] = schedule.momentum(x, first["clr_base_momentum"], first["clr_max_momentum"])
    figure, panels = make_figure(
        1 + len(momenta), width=640, height=280 + 140 * len(momenta), sharex=True
    )
    guides = len(rates) == 1 and not schedule.has_bounds
    _draw_rates(panels[0], x, rates, bounds[0] if guides else None, log)
    for axes, (label, values) in zip(panels[1:], momenta.items(), strict=True):
        axes.plot(x, values, color=GREEN, linewidth=1.8)
        axes.set_ylabel(label)
    name = f"{type(optimizer.optimizer).__name__}, {schedule.name}"
    label_stack(panels, name if title is None else title)
    panels[0].set_xlim(x[0], x[-1])
    if len(rates) > 1:
        figure.legend(loc="outside upper center", ncols=len(rates), frameon=False)
    return figure


def _draw_rates(
    axes: Axes,
    x: npt.NDArray[np.int64],
    rates: Mapping[str, npt.NDArray[np.float64]],
    bounds: tuple[float, float] | None,
    log: bool,
) -> None:
    """Draw a curve per label, with guides at the bounds."""
    highest = 0.0
    for color, (label, values) in zip(cycle(COLORS), rates.items(), strict=False):
        axes.plot(x, values, color=color, linewidth=1.8, label=label)
        highest = max(highest, float(values.max()))
    axes.set_xlim(x[0], x[-1])
    axes.set_ylabel("learning rate")
    if bounds is not None:
        highest = max(highest, bounds[1])
        draw_guides(axes, *bounds)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * highest or 1.0)


def _drawn(name: str, make: Callable[..., Schedule], steps: int) -> dict[str, Any]:
    """Return arguments that show what is special in the curve of a policy."""
    special: dict[str, dict[str, Any]] = {
        "warm_restarts": {"period_multiplier": 2},
        "polynomial": {"power": 2.0},
    }
    return {**arguments_for(make, steps, _STEP_SIZE), **special.get(name, {})}


def plot_policies(folder: str | Path) -> list[Path]:
    """Draw the README's pictures, one per policy, as PNG of 640 × 280 pixels.

    Args:
        folder: the folder to write to; a missing folder is made.

    Returns:
        The paths of the pictures.

    Raises:
        ImportError: without matplotlib.
        OSError: if a file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in plot_policies(folder)][:2]
        ['triangular.png', 'triangular2.png']
    """
    require_matplotlib()
    folder = check_path("folder", folder)
    folder.mkdir(parents=True, exist_ok=True)
    length = 10 * _STEP_SIZE
    figures = {
        name: plot_schedule(make(**_drawn(name, make, length)), length)
        for name, make in POLICIES.items()
    }
    figures["windows"] = plot_schedule(
        {window: triangular(_STEP_SIZE, window=window) for window in WINDOWS}, 4 * _STEP_SIZE
    )
    decays = (0, length // 2, length // 2)
    figures["decays"] = plot_schedule(
        {
            shape: wsd(*decays, shape=shape, end=0.05)
            for shape in ("linear", "cosine", "sqrt", "exp")
        },
        length,
        title="shapes of wsd",
    )
    figures["with_warmup"] = plot_schedule(
        {
            "fixed": fixed().with_warmup(2 * _STEP_SIZE),
            "cosine": cosine(length - 2 * _STEP_SIZE).with_warmup(2 * _STEP_SIZE),
            "triangular": triangular(_STEP_SIZE).with_warmup(2 * _STEP_SIZE),
        },
        length,
    )
    figures["growing_cycles"] = plot_schedule(
        triangular(_STEP_SIZE // 3, period_multiplier=2), length, title="period_multiplier=2"
    )
    table2 = sequence(
        [
            (triangular2(2000, base_lr=1e-3, max_lr=5e-3), 16_000),
            (triangular2(1000, base_lr=1e-4, max_lr=5e-4), 6_000),
            (triangular2(500, base_lr=1e-5, max_lr=5e-5), 3_000),
        ]
    )
    figures["sequence"] = plot_schedule(
        table2, 25_000, log=True, title="sequence: the paper's Table 2"
    )
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]
