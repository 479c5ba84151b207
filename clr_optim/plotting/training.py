"""Pictures of trainings: range tests, histories and the demo's runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clr_optim.pictures import enter
from clr_optim.plotting.canvas import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    ORANGE,
    add_shared_legend,
    check_numbers,
    check_title,
    label_axes,
    label_stack,
    make_figure,
    mark_cycles,
    shade_cycles,
)
from clr_optim.range_test import Bounds, RangeTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Widths and dashes differ too, so that curves remain visible where they coincide.
_POLICY_STYLES: dict[str, dict[str, Any]] = {
    "fixed": {"color": GREY, "linewidth": 1.4, "linestyle": "--"},
    "triangular": {"color": BLUE, "linewidth": 3.2, "alpha": 0.55},
    "triangular2": {"color": ORANGE, "linewidth": 1.4},
    "exp_range": {"color": GREEN, "linewidth": 1.4, "linestyle": (0, (4, 1.5))},
}

_METRIC_LABELS = {
    "loss": "training loss",
    "accuracy": "training accuracy in %",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy in %",
}


@enter
def plot_range_test(
    result: RangeTest, bounds: Bounds | None = None, *, title: str | None = None
) -> Figure:
    """Draw the curve of a range test, measured and smoothed, and mark both bounds.

    The axis of rates is logarithmic for ``mode="exponential"``.

    Args:
        result: the result of :func:`~clr_optim.range_test.lr_range_test`.
        bounds: the bounds to mark; ``None`` takes those of ``result.suggest()``. If the curve has
            none, the title says so.
        title: the title; ``None`` is the two bounds.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: naming the argument and what would be right.

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
    check_title(title)
    found = "no bounds found"
    if bounds is None:
        with contextlib.suppress(ValueError):
            bounds = result.suggest()
    if bounds is not None:
        found = f"base_lr {bounds.base_lr:.3g}, max_lr {bounds.max_lr:.3g}"
    figure, (axes,) = make_figure(width=640, height=320)
    values, smooth = np.array(result.values), np.array(result.smoothed())
    axes.plot(result.lrs, values, color=BLUE, linewidth=0.8, alpha=0.35, label="measured")
    axes.plot(result.lrs, smooth, color=BLUE, linewidth=2.2, label="smoothed")
    if bounds is not None:
        _mark_bounds(axes, result, bounds)
    label_axes(
        axes, found if title is None else title, _METRIC_LABELS[result.metric], "learning rate"
    )
    if result.mode == "exponential":
        axes.set_xscale("log")
    if len(result.lrs) > 1:
        axes.set_xlim(result.lrs[0] if result.mode == "exponential" else 0, result.lrs[-1])
    _limit_values(axes, values, smooth)
    axes.legend(frameon=False, loc="best", fontsize=9)
    return figure


def _mark_bounds(axes: Axes, result: RangeTest, bounds: Bounds) -> None:
    """Draw a line and a name at each bound, with the names inside the picture."""
    axes.axvspan(bounds.base_lr, bounds.max_lr, color=GREEN, alpha=0.12, linewidth=0)
    places = {bounds.base_lr: ("right", -4, -3), bounds.max_lr: ("left", 4, -3)}
    if _place_on_axis(result, bounds.base_lr) < 0.2:  # no room on the left of the line
        places[bounds.base_lr] = ("left", 4, -17)
    if _place_on_axis(result, bounds.max_lr) > 0.8:
        places[bounds.max_lr] = ("right", -4, -31)
    for name, value in (("base_lr", bounds.base_lr), ("max_lr", bounds.max_lr)):
        side, right, up = places[value]
        axes.axvline(value, color=ORANGE, linewidth=1.4, linestyle="--")
        axes.annotate(
            f"{name} {value:.3g}",
            (value, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(right, up),
            textcoords="offset points",
            ha=side,
            va="top",
            color=ORANGE,
            fontsize=9,
        )


def _place_on_axis(result: RangeTest, lr: float) -> float:
    """Return the place of a rate on the axis, from 0 on the left to 1 on the right."""
    first, last = result.lrs[0], result.lrs[-1]
    if result.mode == "exponential":
        return math.log(lr / first) / math.log(last / first) if last > first else 0.0
    return lr / last if last > 0.0 else 0.0


def _limit_values(
    axes: Axes, values: npt.NDArray[np.float64], smooth: npt.NDArray[np.float64]
) -> None:
    """Leave room above for the names of the bounds; a diverging loss may leave the picture."""
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
    """Draw the history of a training, a panel per quantity, and shade every other cycle.

    Args:
        curves: a pair (iterations, values), of the same length, by label of the axis with its unit.
        cycle_ends: iterations at which a cycle was complete, rising; the first cycle begins at 0.
        title: the title.

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
    check_title(title)
    for label, curve in curves.items():
        if not isinstance(curve, (tuple, list)) or len(curve) != 2:
            raise TypeError(f"curves[{label!r}] must be a pair (iterations, values), got {curve!r}")
        for name, part in zip(("iterations", "values"), curve, strict=True):
            check_numbers(f"curves[{label!r}], {name}", part)
    check_numbers("cycle_ends", cycle_ends)
    for label, (iterations, values) in curves.items():
        if len(iterations) != len(values) or not len(values):
            raise ValueError(
                f"curves[{label!r}] has {len(iterations)} iterations and {len(values)} values: "
                "give one value for each, and at least one"
            )
    if any(b <= a for a, b in zip([0, *cycle_ends], cycle_ends, strict=False)):
        raise ValueError(f"cycle_ends must rise from above 0, got {list(cycle_ends)!r}")
    figure, panels = make_figure(len(curves), width=640, height=60 + 170 * len(curves), sharex=True)
    begin = min(int(iterations[0]) for iterations, _ in curves.values())
    end = max(int(iterations[-1]) for iterations, _ in curves.values())
    ends = [0, *cycle_ends]
    for color, axes, (label, (iterations, values)) in zip(
        cycle(COLORS), panels, curves.items(), strict=False
    ):
        shade_cycles(axes, ends, end)
        axes.plot(
            iterations,
            values,
            color=color,
            # A thick line through many noisy points would look like a block.
            linewidth=0.8 if len(values) > 300 and label != "learning rate" else 1.8,
            marker="o" if len(values) < 40 else None,
            markersize=3,
        )
        axes.set_ylabel(label)
        if label == "learning rate":
            axes.set_ylim(0)
    label_stack(panels, title)
    panels[0].set_xlim(min(begin, ends[0]), max(end, begin + 1))
    return figure


def plot_demo_rates(rates: Mapping[str, Mapping[str, Sequence[float]]], period: int) -> Figure:
    """Draw the demo's learning rates against iteration, a panel per optimizer.

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
    figure, panels = make_figure(1, len(rates), width=900, height=360)
    for axes, (optimizer, curves) in zip(panels, rates.items(), strict=True):
        for policy, values in curves.items():
            axes.plot(np.arange(len(values)), values, label=policy, **_POLICY_STYLES[policy])
        length = max(map(len, curves.values()))
        axes.set_xlim(0, length)
        axes.set_ylim(0, 1.08 * max(max(values) for values in curves.values()))
        label_axes(axes, optimizer)
        mark_cycles(axes, period, length)
    add_shared_legend(figure, panels)
    return figure


def plot_demo_accuracies(
    accuracies: Mapping[str, Mapping[str, npt.NDArray[np.float64]]],
    every: int,
    period: int,
    seeds: int = 1,
) -> Figure:
    """Draw the demo's test accuracies against iteration, a panel per optimizer.

    Args:
        accuracies: by optimizer and policy, as for :func:`plot_demo_rates`, in percent, shape
            (evaluations,).
        every: iterations from one evaluation to the next; the first is after ``every``.
        period: iterations of one cycle, for the marks on the axis.
        seeds: the number of seeds of which the accuracies are means.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> accuracies = {"SGD": {"triangular": np.array([80.0, 90.0])}}
        >>> figure = plot_demo_accuracies(accuracies, every=50, period=100, seeds=3)
        >>> figure.axes[0].get_ylabel()
        'test accuracy in %, mean of 3 seeds'
    """
    figure, panels = make_figure(1, len(accuracies), width=900, height=360, sharey=True)
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
        # Cut off the climb from chance, which is the same for all policies.
        axes.set_ylim(float(np.percentile(everything, 8)) - 2, float(everything.max()) + 1)
        label_axes(axes, optimizer, "test accuracy in %" + over)
        mark_cycles(axes, period, length)
    add_shared_legend(figure, panels)
    return figure
