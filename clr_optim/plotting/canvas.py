"""The parts that all pictures share: figures, axes, colours and files."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clr_optim.checks import check_path
from clr_optim.pictures import enter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito: colour-blind people can tell them apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F5F5F"
COLORS = (BLUE, ORANGE, GREEN, GREY)
MORE_COLORS = (*COLORS, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Colours with a contrast of at least 3 to white and to the dark pages of GitHub (#0D1117).
MIDDLE = "#737B84"
BRIGHT_COLORS = ("#2F8AD8", "#D9640A", "#0F9D75")


def require_matplotlib() -> None:
    """Raise an error if matplotlib is missing.

    Raises:
        ImportError: without matplotlib; the message names the package to install.

    Example:
        >>> require_matplotlib()
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error


@enter
def check_picture(path: str | Path) -> None:
    """Raise the error that :func:`save` would raise, before the picture is drawn.

    Args:
        path: the file to write.

    Raises:
        ImportError: without matplotlib.
        TypeError: if ``path`` is not a path.
        OSError: naming the path, if its folder is missing or its suffix is not a picture's.

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


@enter
def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture to a file.

    Args:
        figure: the picture.
        path: the file. Its suffix gives the format; without a suffix, ``.png`` is added. A PNG has
            twice the pixels of the figure in each direction, for dense screens.

    Returns:
        The path, with its suffix.

    Raises:
        TypeError: if ``figure`` is not a figure, or ``path`` is not a path.
        OSError: naming the path, if the file cannot be written or its suffix is not a picture's.

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
    if path.suffix == ".svg":
        from matplotlib import rc_context

        # The same picture is the same file: no date, and no random names.
        with rc_context({"svg.hashsalt": "clr_optim"}):
            figure.savefig(path, metadata={"Date": None})
        return path
    if path.suffix != ".png":
        figure.savefig(path)
        return path
    from PIL import Image  # installed with matplotlib

    # 64 colours suffice for lines and text, and halve the size of the file.
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=2 * figure.dpi)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def check_title(title: object) -> None:
    """Raise unless the title is a string or None."""
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string, got {title!r}")


def check_numbers(name: str, values: object) -> None:
    """Raise unless the values are numbers. NaN and infinities pass: they leave a gap in a curve."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a list of numbers, got {value!r} in it")


def make_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float,
    height: float,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of this size in pixels, and its panels line by line."""
    require_matplotlib()
    from clr_optim.plotting.figure import Picture

    figure = Picture(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, list(panels.flat)


def grid_of(panels: int) -> tuple[int, int]:
    """Return the rows and columns of a grid with at most two columns."""
    columns = min(2, panels)
    return -(-panels // columns), columns


def suit_any_background(figure: Figure) -> None:
    """Make the background transparent, and write and draw axes in a grey for dark and light."""
    figure.patch.set_alpha(0.0)
    for axes in figure.axes:
        axes.patch.set_alpha(0.0)
        axes.tick_params(colors=MIDDLE, labelcolor=MIDDLE)
        for spine in axes.spines.values():
            spine.set_color(MIDDLE)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(MIDDLE)
        if legend := axes.get_legend():
            for text in legend.get_texts():
                text.set_color(MIDDLE)


def label_axes(axes: Axes, title: str, y: str = "learning rate", x: str = "iteration") -> None:
    """Write the title and the names of both axes; iterations get whole numbers."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


def label_stack(panels: Sequence[Axes], title: str) -> None:
    """Label panels that stand above each other and share the axis of iterations."""
    for axes in panels:
        label_axes(axes, "", axes.get_ylabel())
        axes.label_outer()
    panels[0].set_title(title, fontsize=11)


def draw_guides(axes: Axes, base_lr: float, max_lr: float) -> None:
    """Draw a line at each bound, with its name right of the axes."""
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
    """Write a number at the end of each cycle, and shade every other cycle."""
    axes.set_xticks(range(0, length + 1, period))
    shade_cycles(axes, range(0, length + 1, period), length)


def shade_cycles(axes: Axes, ends: Sequence[int], length: int) -> None:
    """Shade every other cycle from ``ends[0]`` on; an unfinished last cycle ends at ``length``."""
    for begin, end in list(zip(ends, [*ends[1:], length], strict=True))[1::2]:
        if begin < length:
            axes.axvspan(begin, min(end, length), color="#EEEEEE", linewidth=0, zorder=0)


def add_shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Add one legend for all panels, above them."""
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
