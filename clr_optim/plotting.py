"""Every picture of the project: schedules, range tests, trainings, the benchmark's results.

Pictures are :class:`matplotlib.figure.Figure` objects of their own: nothing here touches pyplot,
its settings or its windows, so that it works without a display and beside a user's own plots.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clr_optim.checks import (
    check_bool,
    check_bounds,
    check_int,
    check_number,
    check_path,
)
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.range_test import Bounds, RangeTest
from clr_optim.schedule import (
    WINDOWS,
    Schedule,
    exp_range,
    exp_range_bounds,
    one_cycle,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "check_picture",
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

# Okabe and Ito's colours, which colour-blind people can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#5F5F5F"
_COLORS = (_BLUE, _ORANGE, _GREEN, _GREY)
_MORE_COLORS = (*_COLORS, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Widths and dashes too, so that curves that coincide for a while all stay to be seen.
_POLICY_STYLES: dict[str, dict[str, Any]] = {
    "fixed": {"color": _GREY, "linewidth": 1.4, "linestyle": "--"},
    "triangular": {"color": _BLUE, "linewidth": 3.2, "alpha": 0.55},
    "triangular2": {"color": _ORANGE, "linewidth": 1.4},
    "exp_range": {"color": _GREEN, "linewidth": 1.4, "linestyle": (0, (4, 1.5))},
}

# The bounds, step size and decay of the paper's CIFAR-10 runs.
_BASE_LR, _MAX_LR, _STEP_SIZE, _GAMMA = 0.001, 0.006, 2000, 0.99994

_METRIC_LABELS = {
    "loss": "training loss",
    "accuracy": "training accuracy in %",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy in %",
}

# What the benchmark compares, beside torch's default.
_VARIANTS = {
    "forloop": "#D8D8D8",
    "foreach": "#B5B5B5",
    "fused": _GREY,
    "compile": _GREEN,
    "ours": _BLUE,
    "ours_graph": _ORANGE,
}
_LABELS = {"forloop": "for-loop", "ours_graph": "ours, as a graph"}

# Every step is computed: of a choice of steps, cycles could all be missed. This many take seconds.
_MOST_STEPS = 1_000_000


def require_matplotlib() -> None:
    """See to it that pictures can be drawn.

    Raises:
        ImportError: without matplotlib, saying what to install.

    Example:
        >>> require_matplotlib()
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install clr-optim[plot]") from error


def check_picture(path: str | Path) -> None:
    """Raise the error that :func:`save` would, before there is anything to draw.

    Args:
        path: where the picture is to go.

    Raises:
        ImportError: without matplotlib.
        TypeError: for what is no path.
        OSError: naming the path, if its folder is not there or its suffix is no picture's.

    Example:
        >>> check_picture("schedule.png")
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    path = check_path("path", path)
    known = Figure().canvas.get_supported_filetypes()
    if not path.name:
        raise OSError(f"path={str(path)!r} names no file: give one such as 'schedule.png'")
    if path.suffix and path.suffix[1:] not in known:
        raise OSError(f"{path}: a picture's name must end in one of {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture to a file.

    Args:
        figure: the picture.
        path: the file; its suffix says the format, and without one it gets ``.png``.

    Returns:
        The path, with its suffix.

    Raises:
        TypeError: for what is no figure, or no path.
        OSError: naming the path, if the file cannot be written or its suffix is no picture's.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(plot_schedule(triangular(50), 200), f"{folder}/schedule").name
        'schedule.png'
    """
    check_picture(path)
    from matplotlib.figure import Figure

    if not isinstance(figure, Figure):
        raise TypeError(
            f"figure must be a matplotlib Figure, as the plot functions return it, got {figure!r}"
        )
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    if path.suffix != ".png":
        figure.savefig(path)
        return path
    from PIL import Image  # matplotlib's own dependency

    # 64 colours are plenty for lines and text, and make half as large a file.
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def plot_schedule(
    schedule: Schedule | Mapping[str, Schedule] | CyclicalOptimizer[Any],
    steps: int,
    base_lr: float | None = None,
    max_lr: float | None = None,
    *,
    title: str | None = None,
    log: bool = False,
) -> Figure:
    """Learning rate against iteration, of a schedule or of what lies before an optimizer.

    Args:
        schedule: one schedule; several by the name that the legend gives them; or an optimizer, of
            which the next ``steps`` iterations are drawn: the rates of its groups where they
            differ, and below them the momentum (``betas[0]``) if it cycles.
        steps: iterations to show, an integer from 1 to 1,000,000. The last point is the rate after
            so many, so that a whole number of cycles ends where it began.
        base_lr, max_lr: the bounds, of a schedule only: an optimizer has its own. 0.001 and 0.006
            unless told otherwise; phases with bounds of their own do not look at them.
        title: above the picture; ``None`` is the schedule's name, or nothing for several.
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
    _check_title(title)
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
    # max_lr first: callers tend to compute base_lr from it.
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
    figure, (axes,) = _figure(1, width=640, height=280)
    guides = not all(curve.has_bounds for curve in schedule.values())
    _draw_rates(axes, x, rates, (base_lr, max_lr) if guides else None, log)
    _label(axes, title or "")
    if len(rates) > 1:
        figure.legend(loc="outside upper center", ncols=len(rates), frameon=False)
    return figure


def _plot_future(
    optimizer: CyclicalOptimizer[Any], steps: int, title: str | None, log: bool
) -> Figure:
    schedule, groups, begin = optimizer.schedule, optimizer.param_groups, optimizer.iteration
    bounds = optimizer._shared.mirror.bounds()
    names: dict[tuple[float, float], list[str]] = {}  # groups with the same bounds share a curve
    for i, pair in enumerate(bounds):
        names.setdefault(pair, []).append(str(i))
    x = np.arange(begin, begin + steps + 1)
    if schedule.has_bounds:
        names = {bounds[0]: []}
    rates = {
        f"group{'s' * (len(members) > 1)} {', '.join(members)}": schedule(x, *pair)
        for pair, members in names.items()
    }
    if len(rates) == 1:
        rates = {"": next(iter(rates.values()))}
    momenta: dict[str, npt.NDArray[np.float64]] = {}
    if "clr_base_momentum" in groups[0]:
        label = "betas[0]" if "betas" in groups[0] else "momentum"
        first = groups[0]
        momenta[label] = schedule.momentum(x, first["clr_base_momentum"], first["clr_max_momentum"])
    figure, panels = _stack(1 + len(momenta), width=640, height=280 + 140 * len(momenta))
    guides = len(rates) == 1 and not schedule.has_bounds
    _draw_rates(panels[0], x, rates, bounds[0] if guides else None, log)
    for axes, (label, values) in zip(panels[1:], momenta.items(), strict=True):
        axes.plot(x, values, color=_GREEN, linewidth=1.8)
        axes.set_ylabel(label)
    name = f"{type(optimizer.optimizer).__name__}, {schedule.name}"
    _label_stack(panels, name if title is None else title)
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
    highest = 0.0
    for color, (label, values) in zip(cycle(_COLORS), rates.items(), strict=False):
        axes.plot(x, values, color=color, linewidth=1.8, label=label)
        highest = max(highest, float(values.max()))
    axes.set_xlim(x[0], x[-1])
    axes.set_ylabel("learning rate")
    if bounds is not None:
        highest = max(highest, bounds[1])
        _guides(axes, *bounds)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * highest or 1.0)


def plot_range_test(
    result: RangeTest, bounds: Bounds | None = None, *, title: str | None = None
) -> Figure:
    """A range test's curve, as measured and smoothed, with both bounds marked.

    The axis of rates is logarithmic for ``mode="exponential"``.

    Args:
        result: what :func:`~clr_optim.range_test.lr_range_test` returned.
        bounds: ``None`` asks ``result.suggest()``; where that finds none, there are none to see,
            and the picture says so.
        title: above the picture; ``None`` is the two bounds.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: for a result that is none, or has no point.

    Example:
        >>> curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
        >>> plot_range_test(curve, Bounds(0.1, 0.2)).axes[0].get_title()
        'base_lr 0.1, max_lr 0.2'
    """
    if not isinstance(result, RangeTest):
        raise TypeError(f"result must be a RangeTest, as lr_range_test returns it, got {result!r}")
    if not result.lrs:
        raise ValueError("result has no point to draw: the test ended before its first step")
    if bounds is not None and not isinstance(bounds, Bounds):
        raise TypeError(
            f"bounds must be Bounds, as suggest() returns them, or None, got {bounds!r}"
        )
    _check_title(title)
    found = "no bounds found"
    if bounds is None:
        with contextlib.suppress(ValueError):
            bounds = result.suggest()
    if bounds is not None:
        found = f"base_lr {bounds.base_lr:.3g}, max_lr {bounds.max_lr:.3g}"
    figure, (axes,) = _figure(1, width=640, height=320)
    values, smooth = np.array(result.values), np.array(result.smoothed())
    axes.plot(result.lrs, values, color=_BLUE, linewidth=0.8, alpha=0.35, label="measured")
    axes.plot(result.lrs, smooth, color=_BLUE, linewidth=2.2, label="smoothed")
    if bounds is not None:
        axes.axvspan(bounds.base_lr, bounds.max_lr, color=_GREEN, alpha=0.12, linewidth=0)
        places = {bounds.base_lr: ("right", -4, -3), bounds.max_lr: ("left", 4, -3)}
        if _share_of_axis(result, bounds.base_lr) < 0.2:  # there is no room on its left
            places[bounds.base_lr] = ("left", 4, -17)
        if _share_of_axis(result, bounds.max_lr) > 0.8:
            places[bounds.max_lr] = ("right", -4, -31)
        for name, value in (("base_lr", bounds.base_lr), ("max_lr", bounds.max_lr)):
            side, right, up = places[value]
            axes.axvline(value, color=_ORANGE, linewidth=1.4, linestyle="--")
            axes.annotate(
                f"{name} {value:.3g}",
                (value, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(right, up),
                textcoords="offset points",
                ha=side,
                va="top",
                color=_ORANGE,
                fontsize=9,
            )
    _label(axes, found if title is None else title, _METRIC_LABELS[result.metric], "learning rate")
    if result.mode == "exponential":
        axes.set_xscale("log")
    if len(result.lrs) > 1:
        axes.set_xlim(result.lrs[0] if result.mode == "exponential" else 0, result.lrs[-1])
    _limit_to_what_matters(axes, values, smooth)
    axes.legend(frameon=False, loc="best", fontsize=9)
    return figure


def _share_of_axis(result: RangeTest, lr: float) -> float:
    """Where a rate stands on the axis, from 0 on the left to 1."""
    first, last = result.lrs[0], result.lrs[-1]
    if result.mode == "exponential":
        return math.log(lr / first) / math.log(last / first) if last > first else 0.0
    return lr / last if last > 0.0 else 0.0


def _limit_to_what_matters(
    axes: Axes, values: npt.NDArray[np.float64], smooth: npt.NDArray[np.float64]
) -> None:
    """Leave room above for the bounds' names; a loss that blows up may leave the picture."""
    low = float(min(np.quantile(values, 0.01), smooth.min()))
    begin = float(np.median(values[: max(3, len(values) // 20)]))
    high = max(begin, float(np.quantile(values, 0.6)))
    high = min(float(values.max()), high + 0.35 * (high - low))
    room = (high - low) or 1.0
    axes.set_ylim(low - 0.05 * room, high + 0.16 * room)


def plot_history(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    cycle_ends: Sequence[int] = (),
    *,
    title: str = "",
) -> Figure:
    """What a training measured, a panel per quantity, every other cycle shaded.

    Args:
        curves: by the axis' label (with its unit), iterations and values, of the same length.
        cycle_ends: iterations at which a cycle was complete, rising; the first cycle begins at 0.
        title: above the picture.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> figure = plot_history(
        ...     {"training loss": ([0, 1, 2, 3], [4.0, 2.0, 3.0, 1.0])}, cycle_ends=[2, 4])
        >>> len(figure.axes)
        1
    """
    if not isinstance(curves, Mapping):
        raise TypeError(
            f"curves must be a dictionary (iterations, values) by label, got {curves!r}"
        )
    if not curves:
        raise ValueError("curves is empty: give at least one label with iterations and values")
    _check_title(title)
    for label, curve in curves.items():
        if not isinstance(curve, (tuple, list)) or len(curve) != 2:
            raise TypeError(f"curves[{label!r}] must be a pair (iterations, values), got {curve!r}")
        for name, part in zip(("iterations", "values"), curve, strict=True):
            _check_numbers(f"curves[{label!r}], {name}", part)
    _check_numbers("cycle_ends", cycle_ends)
    for label, (iterations, values) in curves.items():
        if len(iterations) != len(values) or not len(values):
            raise ValueError(
                f"curves[{label!r}] has {len(iterations)} iterations and {len(values)} values: "
                "give one value for each, and at least one"
            )
    if any(b <= a for a, b in zip([0, *cycle_ends], cycle_ends, strict=False)):
        raise ValueError(f"cycle_ends must rise from above 0, got {list(cycle_ends)!r}")
    figure, panels = _stack(len(curves), width=640, height=60 + 170 * len(curves))
    begin = min(int(iterations[0]) for iterations, _ in curves.values())
    end = max(int(iterations[-1]) for iterations, _ in curves.values())
    ends = [0, *cycle_ends]
    for color, axes, (label, (iterations, values)) in zip(
        cycle(_COLORS), panels, curves.items(), strict=False
    ):
        _shade_cycles(axes, ends, end)
        axes.plot(
            iterations,
            values,
            color=color,
            # Many points are noise, of which a thick line would be a block.
            linewidth=0.8 if len(values) > 300 and label != "learning rate" else 1.8,
            marker="o" if len(values) < 40 else None,
            markersize=3,
        )
        axes.set_ylabel(label)
        if label == "learning rate":
            axes.set_ylim(0)
    _label_stack(panels, title)
    panels[0].set_xlim(min(begin, ends[0]), max(end, begin + 1))
    return figure


def plot_policies(folder: str | Path) -> list[Path]:
    """Draw the README's pictures, one per policy, as PNG of 640 × 280 pixels.

    Args:
        folder: made if it is not there.

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
    policies = [
        triangular(_STEP_SIZE),
        triangular2(_STEP_SIZE),
        exp_range(_STEP_SIZE, gamma=_GAMMA),
        exp_range_bounds(_STEP_SIZE, gamma=_GAMMA),
        one_cycle(length),
        warm_restarts(_STEP_SIZE, period_multiplier=2),
    ]
    figures = {p.name: plot_schedule(p, length) for p in policies}
    figures["windows"] = plot_schedule(
        {window: triangular(_STEP_SIZE, window=window) for window in WINDOWS}, 4 * _STEP_SIZE
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


def plot_demo_rates(rates: Mapping[str, Mapping[str, Sequence[float]]], period: int) -> Figure:
    """The demo's learning rates against iteration, a panel per optimizer.

    Args:
        rates: by optimizer and policy (``"fixed"``, ``"triangular"``, ``"triangular2"`` or
            ``"exp_range"``), one rate per iteration.
        period: iterations of one cycle, for the marks on the axis.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> figure = plot_demo_rates({"SGD": {"triangular": [0.1, 0.2, 0.1, 0.2]}}, period=2)
        >>> figure.axes[0].get_title()
        'SGD'
    """
    figure, panels = _figure(len(rates), width=900, height=360)
    for axes, (optimizer, curves) in zip(panels, rates.items(), strict=True):
        for policy, values in curves.items():
            axes.plot(np.arange(len(values)), values, label=policy, **_POLICY_STYLES[policy])
        length = max(map(len, curves.values()))
        axes.set_xlim(0, length)
        axes.set_ylim(0, 1.08 * max(max(values) for values in curves.values()))
        _label(axes, optimizer)
        _mark_cycles(axes, period, length)
    _shared_legend(figure, panels)
    return figure


def plot_demo_accuracies(
    accuracies: Mapping[str, Mapping[str, npt.NDArray[np.float64]]],
    every: int,
    period: int,
    seeds: int = 1,
) -> Figure:
    """The demo's test accuracies against iteration, a panel per optimizer.

    Args:
        accuracies: by optimizer and policy, as for :func:`plot_demo_rates`, in percent, shape
            (evaluations,).
        every: iterations from one evaluation to the next; the first is after ``every``.
        period: iterations of one cycle, for the marks on the axis.
        seeds: how many the accuracies are means over.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> accuracies = {"SGD": {"triangular": np.array([80.0, 90.0])}}
        >>> figure = plot_demo_accuracies(accuracies, every=50, period=100, seeds=3)
        >>> figure.axes[0].get_ylabel()
        'test accuracy in %, mean of 3 seeds'
    """
    figure, panels = _figure(len(accuracies), width=900, height=360, sharey=True)
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    everything = np.concatenate([v for curves in accuracies.values() for v in curves.values()])
    for axes, (optimizer, curves) in zip(panels, accuracies.items(), strict=True):
        for policy, values in curves.items():
            axes.plot(
                every * np.arange(1, len(values) + 1),
                values,
                label=policy,
                **_POLICY_STYLES[policy],
            )
        length = every * max(map(len, curves.values()))
        axes.set_xlim(0, length)
        # The first epochs climb from chance; all that differs between policies is above them.
        axes.set_ylim(float(np.percentile(everything, 8)) - 2, float(everything.max()) + 1)
        _label(axes, optimizer, "test accuracy in %" + over)
        _mark_cycles(axes, period, length)
    _shared_legend(figure, panels)
    return figure


def plot_paper_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
) -> Figure:
    """Test accuracy against iteration as in the paper's Fig. 1, two panels a line, 700 px wide.

    Args:
        panels: by title and label, points of an iteration and an accuracy in percent; the same
            label looks the same in each panel.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is no panel.

    Example:
        >>> points = [(500, 60.0), (1000, 70.0)]
        >>> plot_paper_curves({"SGD": {"triangular": points}}).axes[0].get_title()
        'SGD'
    """
    if not panels:
        raise ValueError("panels is empty: give at least one title with its curves")
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = 380 if lines == columns == 1 else 260 * lines
    figure = Figure(figsize=(7, height / 100), dpi=100, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    labels = dict.fromkeys(label for curves in panels.values() for label in curves)
    # Dashes beside colours: there are more curves than colours anyone can tell apart.
    styles = {
        label: {"color": color, "linestyle": dashes, "marker": marker}
        for label, color, dashes, marker in zip(
            labels,
            cycle(_MORE_COLORS),
            cycle(("-", "--", (0, (6, 1.5, 1, 1.5)))),
            cycle("os^Dv"),
            strict=False,
        )
    }
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=label, markersize=2.5, **styles[label])
        values = sorted(value for points in curves.values() for _, value in points)
        # The climb from chance is the same for all; what differs is above it.
        axes.set_ylim(values[len(values) // 12] - 2, values[-1] + 2)
        last = max(at for points in curves.values() for at, _ in points)
        axes.set_xlim(0, 1.1 * last)  # room for the last number on the axis
        _label(axes, title, "test accuracy in %")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def plot_throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The benchmark's speed-ups over torch's default step, a panel per workload and dtype.

    Of rows that were measured on a GPU, two: of the time on the device, and of that on the host,
    where a graph, of which only the replay is launched, would dwarf all else.

    Args:
        rows: as in the benchmark's JSON; each has ``"rule"``, ``"workload"``, ``"dtype"`` and
            ``"times"``, the medians by variant; ``"wrong"``, the variants that do not do the work,
            is optional, and they are left out.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> times = {"default": {"median_s": 0.004}, "ours": {"median_s": 0.001}}
        >>> row = {"rule": "adam", "workload": "MLP", "dtype": "float32", "times": times}
        >>> plot_throughput([row]).axes[0].get_title()
        'MLP, float32'
    """
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        title = f"{row['workload']}, {row['dtype']}"
        if "median_s" in row["times"]["default"]:
            panels.setdefault((title, "median_s"), []).append(row)
            continue
        for where in ("device", "host"):
            panels.setdefault((f"{title}: {where}", f"{where}_median_s"), []).append(row)
    # The default itself is the line at 1.
    variants = [n for n in _VARIANTS if any(n in row["times"] for row in rows)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(6.4 * columns, 0.5 + 2.5 * lines), dpi=100, layout="constrained")
    all_axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    width = 0.8 / len(variants)
    for axes, ((title, key), members) in zip(all_axes, panels.items(), strict=False):
        speeds: list[float] = []
        labels: list[tuple[int, float, float]] = []
        tallest = [1.0] * len(members)
        for i, variant in enumerate(variants):
            for x, row in enumerate(members):
                if variant not in row["times"] or variant in row.get("wrong", ()):
                    continue
                if (variant, key) == ("ours_graph", "host_median_s"):
                    continue
                times = row["times"]
                speed = times["default"][key] / times[variant][key]
                speeds.append(speed)
                place = x + (i - (len(variants) - 1) / 2) * width
                # On a logarithmic axis bars begin at 1: upwards is faster, downwards slower.
                axes.bar(place, speed - 1, width, bottom=1, color=_VARIANTS[variant])
                tallest[x] = max(tallest[x], speed)
                if variant == "ours":
                    labels.append((x, place, speed))
        for x, place, speed in labels:  # on a GPU above the bars on both sides
            axes.annotate(
                f"{speed:.3g}×" if speed < 100 else f"{speed:.0f}×",
                (place, max(speed, 1) if key == "median_s" else tallest[x]),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_yscale("log")
        axes.set_ylim(min(*speeds, 0.8) / 1.15, max(*speeds, 2) * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.axhline(1, color=_GREY, linewidth=0.8)
        axes.set_xticks(range(len(members)), [row["rule"].replace("_", "\n") for row in members])
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0, labelsize=9)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.legend(
        handles=[Patch(color=_VARIANTS[n], label=_LABELS.get(n, n)) for n in variants],
        title="speed-up over torch's default step",
        loc="outside upper center",
        ncols=len(variants),
        frameon=False,
    )
    return figure


def _check_title(title: object) -> None:
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string, got {title!r}")


def _check_numbers(name: str, values: object) -> None:
    """Raise unless these are numbers; NaN and infinities leave a gap in a curve."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a list of numbers, got {value!r} in it")


def _figure(
    columns: int, *, width: int, height: int, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=sharey)[0])


def _stack(rows: int, *, width: int, height: int) -> tuple[Figure, list[Axes]]:
    """Panels above each other, with one axis of iterations."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def _label(axes: Axes, title: str, y: str = "learning rate", x: str = "iteration") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


def _label_stack(panels: Sequence[Axes], title: str) -> None:
    for axes in panels:
        _label(axes, "", axes.get_ylabel())
        axes.label_outer()
    panels[0].set_title(title, fontsize=11)


def _guides(axes: Axes, base_lr: float, max_lr: float) -> None:
    """Name the bounds at the right-hand edge, where no curve is."""
    apart = max_lr - base_lr > 0.08 * max_lr
    names = {"base_lr": base_lr, "max_lr": max_lr} if apart else {"bounds": max_lr}
    for name, value in names.items():
        axes.axhline(value, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            name,
            (1, value),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=_GREY,
            fontsize=9,
        )


def _mark_cycles(axes: Axes, period: int, length: int) -> None:
    axes.set_xticks(range(0, length + 1, period))
    _shade_cycles(axes, range(0, length + 1, period), length)


def _shade_cycles(axes: Axes, ends: Sequence[int], length: int) -> None:
    """Shade every other cycle, from ``ends[0]`` on, the last one as far as it was run."""
    for begin, end in list(zip(ends, [*ends[1:], length], strict=True))[1::2]:
        if begin < length:
            axes.axvspan(begin, min(end, length), color="#EEEEEE", linewidth=0, zorder=0)


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
