"""Every picture of the project: schedules, policies, the demo's results, the benchmark's.

Pictures are :class:`matplotlib.figure.Figure` objects of their own: nothing here touches pyplot,
its settings or its windows, so that it works without a display and beside a user's own plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clr_optim.schedule import (
    WINDOWS,
    Schedule,
    check_bounds,
    check_int,
    check_number,
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
    "plot_policies",
    "plot_schedule",
    "plot_throughput",
    "require_matplotlib",
    "save",
]

# Okabe and Ito's colours, which colour-blind people can tell apart.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#5F5F5F"
_COLORS = (_BLUE, _ORANGE, _GREEN, _GREY)

# Widths and dashes too, so that curves that coincide for a while all stay to be seen.
_POLICY_STYLES: dict[str, dict[str, Any]] = {
    "fixed": {"color": _GREY, "linewidth": 1.4, "linestyle": "--"},
    "triangular": {"color": _BLUE, "linewidth": 3.2, "alpha": 0.55},
    "triangular2": {"color": _ORANGE, "linewidth": 1.4},
    "exp_range": {"color": _GREEN, "linewidth": 1.4, "linestyle": (0, (4, 1.5))},
}

# The bounds, step size and decay of the paper's CIFAR-10 runs.
_BASE_LR, _MAX_LR, _STEP_SIZE, _GAMMA = 0.001, 0.006, 2000, 0.99994

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
    """Raise an ImportError that says what to install, if matplotlib is not there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install clr-optim[plot]") from error


def check_picture(path: str | Path) -> None:
    """Raise the error that :func:`save` would, before there is anything to draw.

    Raises:
        ImportError: without matplotlib.
        OSError: naming the path, if its folder is not there or its suffix is no picture's.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    path = Path(path)
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:] not in known:
        raise OSError(f"{path}: a picture's name must end in one of {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder")


def save(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` to ``path`` and return that; without a suffix it gets ``.png``."""
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
    schedule: Schedule | Mapping[str, Schedule],
    steps: int,
    base_lr: float = _BASE_LR,
    max_lr: float = _MAX_LR,
    *,
    title: str | None = None,
    log: bool = False,
) -> Figure:
    """Learning rate against iteration.

    Args:
        schedule: one schedule, or several by the name that the legend gives them.
        steps: iterations to show, an integer from 1 to 1,000,000. The last point is the rate after
            so many, so that a whole number of cycles ends where it began.
        base_lr, max_lr: the group's bounds; phases with bounds of their own do not look at them.
        title: above the picture; ``None`` is the schedule's name, or nothing for several.
        log: draw the rate on a logarithmic axis.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: naming the argument, its value and what would be right.
    """
    steps = check_int("steps", steps, minimum=1)
    if steps > _MOST_STEPS:
        raise ValueError(f"steps must be at most {_MOST_STEPS:,}, got {steps:,}")
    # max_lr first: callers tend to compute base_lr from it.
    max_lr, base_lr = check_number("max_lr", max_lr), check_number("base_lr", base_lr)
    check_bounds(base_lr, max_lr)
    if isinstance(schedule, Schedule):
        title = schedule.name if title is None else title
        curves = {"": schedule}
    else:
        curves = dict(schedule)
    figure, (axes,) = _figure(1, width=640, height=280)
    x = np.arange(steps + 1)
    highest = 0.0
    for color, (label, curve) in zip(cycle(_COLORS), curves.items(), strict=False):
        rates = curve(x, base_lr=base_lr, max_lr=max_lr)
        axes.plot(x, rates, color=color, linewidth=1.8, label=label)
        highest = max(highest, float(rates.max()))
    axes.set_xlim(0, steps)
    if not all(curve.has_bounds for curve in curves.values()):
        highest = max(highest, max_lr)
        _guides(axes, base_lr, max_lr)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.08 * highest or 1.0)
    _label(axes, title or "")
    if len(curves) > 1:
        figure.legend(loc="outside upper center", ncols=len(curves), frameon=False)
    return figure


def plot_policies(folder: str | Path) -> list[Path]:
    """Draw the README's pictures, one per policy, as PNG of 640 × 280 pixels.

    Args:
        folder: made if it is not there.

    Returns:
        The paths of the pictures.
    """
    require_matplotlib()
    folder = Path(folder)
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
        rates: by optimizer and policy, one rate per iteration.
        period: iterations of one cycle, for the marks on the axis.
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
        accuracies: by optimizer and policy, in percent, shape (evaluations,).
        every: iterations from one evaluation to the next; the first is after ``every``.
        period: iterations of one cycle, for the marks on the axis.
        seeds: how many the accuracies are means over.
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


def plot_throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The benchmark's speed-ups over torch's default step, a panel per workload and dtype.

    Of rows that were measured on a GPU, two: of the time on the device, and of that on the host,
    where a graph, of which only the replay is launched, would dwarf all else.

    Args:
        rows: as in the benchmark's JSON; each has ``"rule"``, ``"workload"``, ``"dtype"`` and
            ``"times"``, the medians by variant; ``"wrong"``, the variants that do not do the work,
            is optional, and they are left out.
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


def _figure(
    columns: int, *, width: int, height: int, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=sharey)[0])


def _label(axes: Axes, title: str, y: str = "learning rate") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


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
    for end in range(period, length, period):
        axes.axvline(end, color="#DDDDDD", linewidth=0.8, zorder=0)


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
