"""Pictures of results: the accuracies of the paper and the speed-ups of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from clr_optim.plotting.canvas import (
    BLUE,
    BRIGHT_COLORS,
    GREEN,
    GREY,
    MIDDLE,
    MORE_COLORS,
    ORANGE,
    grid_of,
    label_axes,
    make_figure,
    suit_any_background,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The variants that the benchmark compares with torch's default, and their colours.
_VARIANTS = {
    "forloop": "#D8D8D8",
    "foreach": "#B5B5B5",
    "fused": GREY,
    "compile": GREEN,
    "ours": BLUE,
    "ours_graph": ORANGE,
}
_LABELS = {"forloop": "for-loop", "ours_graph": "ours, as a graph"}


def plot_paper_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
) -> Figure:
    """Draw test accuracy against iteration as in the paper's Fig. 1, two panels a line.

    The picture is 700 pixels wide.

    Args:
        panels: by title and label, points of an iteration and an accuracy in percent. A label has
            the same colour, dashes and marker in each panel.

    Raises:
        ImportError: without matplotlib.
        ValueError: without a panel.

    Example:
        >>> points = [(500, 60.0), (1000, 70.0)]
        >>> plot_paper_curves({"SGD": {"triangular": points}}).axes[0].get_title()
        'SGD'
    """
    if not panels:
        raise ValueError("panels is empty: give at least one title with its curves")
    lines, columns = grid_of(len(panels))
    height = 380 if len(panels) == 1 else 260 * lines
    figure, grid = make_figure(lines, columns, width=700, height=height)
    labels = dict.fromkeys(label for curves in panels.values() for label in curves)
    # There are more curves than distinguishable colours: vary the dashes and markers too.
    styles: dict[str, dict[str, Any]] = {
        label: {"color": color, "linestyle": dashes, "marker": marker}
        for label, color, dashes, marker in zip(
            labels,
            cycle(MORE_COLORS),
            cycle(("-", "--", (0, (6, 1.5, 1, 1.5)))),
            cycle("os^Dv"),
            strict=False,
        )
    }
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for label, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=label, markersize=2.5, **styles[label])
        values = sorted(value for points in curves.values() for _, value in points)
        # Cut off the climb from chance, which is the same for all curves.
        axes.set_ylim(values[len(values) // 12] - 2, values[-1] + 2)
        last = max(at for points in curves.values() for at, _ in points)
        axes.set_xlim(0, 1.1 * last)  # room for the last number on the axis
        label_axes(axes, title, "test accuracy in %")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def plot_constant_and_cycled(
    constant: Mapping[str, Sequence[tuple[int, float]]],
    cycled: Mapping[str, Sequence[tuple[int, float]]],
    *,
    title: str = "",
) -> Figure:
    """Draw test accuracy against iteration: rates without cycles in grey, cycles in colour.

    The picture is 700 pixels wide. Its background is transparent, and its text has a grey that dark
    and light pages show equally well. Dotted lines mark the quarters of the run.

    Args:
        constant, cycled: by label, points of an iteration and an accuracy in percent.
        title: the title.

    Raises:
        ImportError: without matplotlib.
        ValueError: without a curve.

    Example:
        >>> points = [(600, 40.0), (1200, 50.0)]
        >>> figure = plot_constant_and_cycled({"0.01": points}, {"triangular": points})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['0.01', 'triangular']
    """
    if not constant and not cycled:
        raise ValueError("constant and cycled are empty: give at least one label with its points")
    figure, (axes,) = make_figure(width=700, height=400)
    for (label, points), dashes in zip(
        constant.items(), cycle(("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))), strict=False
    ):
        axes.plot(*zip(*points, strict=True), label=label, color=MIDDLE, ls=dashes, lw=1.3)
    for (label, points), color in zip(cycled.items(), cycle(BRIGHT_COLORS), strict=False):
        axes.plot(*zip(*points, strict=True), label=label, color=color, lw=2.4)
    last = max(at for points in (*constant.values(), *cycled.values()) for at, _ in points)
    for quarter in (1, 2, 3, 4):
        axes.axvline(last * quarter / 4, color=MIDDLE, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlim(0, 1.02 * last)
    label_axes(axes, title, "test accuracy in %")
    axes.legend(frameon=False, loc="lower right", fontsize=9, ncols=2)
    suit_any_background(figure)
    return figure


def plot_throughput(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the benchmark's speed-ups over torch's default step, a panel per workload and dtype.

    Rows that a GPU measured have two panels: the time on the device and the time on the host. The
    host panel leaves out graphs: a replay is a single launch, whose bar would dwarf all others.

    Args:
        rows: as in the benchmark's JSON. Each has ``"rule"``, ``"workload"``, ``"dtype"`` and
            ``"times"``, the medians by variant. The optional ``"wrong"`` names variants that do
            not do the work; these are left out.

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
    # The default has no bars: it is the line at 1.
    variants = [n for n in _VARIANTS if any(n in row["times"] for row in rows)]
    lines, columns = grid_of(len(panels))
    figure, grid = make_figure(lines, columns, width=640 * columns, height=50 + 250 * lines)
    from matplotlib.patches import Patch

    for axes, ((title, key), members) in zip(grid, panels.items(), strict=False):
        _draw_speeds(axes, members, key, variants)
        axes.set_title(title, fontsize=11)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.legend(
        handles=[Patch(color=_VARIANTS[n], label=_LABELS.get(n, n)) for n in variants],
        title="speed-up over torch's default step",
        loc="outside upper center",
        ncols=len(variants),
        frameon=False,
    )
    return figure


def _draw_speeds(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, variants: Sequence[str]
) -> None:
    """Draw a bar per row and variant, and write the speed-ups of our variant above the bars."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    width = 0.8 / len(variants)
    speeds: list[float] = []
    labels: list[tuple[int, float, float]] = []
    tallest = [1.0] * len(rows)
    for i, variant in enumerate(variants):
        for x, row in enumerate(rows):
            if variant not in row["times"] or variant in row.get("wrong", ()):
                continue
            if (variant, key) == ("ours_graph", "host_median_s"):
                continue
            times = row["times"]
            speed = times["default"][key] / times[variant][key]
            speeds.append(speed)
            place = x + (i - (len(variants) - 1) / 2) * width
            # On the logarithmic axis bars begin at 1: faster goes up, slower goes down.
            axes.bar(place, speed - 1, width, bottom=1, color=_VARIANTS[variant])
            tallest[x] = max(tallest[x], speed)
            if variant == "ours":
                labels.append((x, place, speed))
    for x, place, speed in labels:
        # On a GPU the neighbouring bars may be taller: write above all of them.
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
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["rule"].replace("_", "\n") for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0, labelsize=9)
