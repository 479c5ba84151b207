"""Pictures of results: the paper's accuracies and the benchmark's speed-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from clr_optim.plotting.canvas import (
    BLUE,
    GREEN,
    GREY,
    MORE_COLORS,
    ORANGE,
    label_axes,
    require_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the benchmark compares, beside torch's default.
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
        # The climb from chance is the same for all; what differs is above it.
        axes.set_ylim(values[len(values) // 12] - 2, values[-1] + 2)
        last = max(at for points in curves.values() for at, _ in points)
        axes.set_xlim(0, 1.1 * last)  # room for the last number on the axis
        label_axes(axes, title, "test accuracy in %")
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
        axes.axhline(1, color=GREY, linewidth=0.8)
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
