"""Figures, axes, colours and files: what all pictures share."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clr_optim.checks import check_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F5F5F"
COLORS = (BLUE, ORANGE, GREEN, GREY)
MORE_COLORS = (*COLORS, "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
        >>> from clr_optim.plotting import plot_schedule
        >>> from clr_optim.schedule import triangular
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


def check_title(title: object) -> None:
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string, got {title!r}")


def check_numbers(name: str, values: object) -> None:
    """Raise unless these are numbers; NaN and infinities leave a gap in a curve."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a list of numbers, got {value!r} in it")


def make_row(
    columns: int, *, width: int, height: int, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=sharey)[0])


def make_stack(rows: int, *, width: int, height: int) -> tuple[Figure, list[Axes]]:
    """Panels above each other, with one axis of iterations."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    return figure, list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])


def label_axes(axes: Axes, title: str, y: str = "learning rate", x: str = "iteration") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


def label_stack(panels: Sequence[Axes], title: str) -> None:
    for axes in panels:
        label_axes(axes, "", axes.get_ylabel())
        axes.label_outer()
    panels[0].set_title(title, fontsize=11)


def draw_guides(axes: Axes, base_lr: float, max_lr: float) -> None:
    """Name the bounds at the right-hand edge, where no curve is."""
    apart = max_lr - base_lr > 0.08 * max_lr
    names = {"base_lr": base_lr, "max_lr": max_lr} if apart else {"bounds": max_lr}
    for name, value in names.items():
        axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            name,
            (1, value),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=GREY,
            fontsize=9,
        )


def mark_cycles(axes: Axes, period: int, length: int) -> None:
    axes.set_xticks(range(0, length + 1, period))
    shade_cycles(axes, range(0, length + 1, period), length)


def shade_cycles(axes: Axes, ends: Sequence[int], length: int) -> None:
    """Shade every other cycle, from ``ends[0]`` on, the last one as far as it was run."""
    for begin, end in list(zip(ends, [*ends[1:], length], strict=True))[1::2]:
        if begin < length:
            axes.axvspan(begin, min(end, length), color="#EEEEEE", linewidth=0, zorder=0)


def add_shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
