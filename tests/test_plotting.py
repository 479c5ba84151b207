"""The pictures: what is drawn, where it is written, what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clr_optim import plotting
from clr_optim.schedule import fixed, sequence, triangular, triangular2


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _has_color(pixels, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - rgb).max(axis=-1) < 40).sum() > 50


def _curves(axes):
    """The lines that were drawn as data, without the guides."""
    return [line for line in axes.lines if len(line.get_xdata()) > 2]


def test_schedule_is_drawn_step_by_step_between_its_bounds():
    schedule = triangular2(5)
    figure = plotting.plot_schedule(schedule, 30, base_lr=0.25, max_lr=1.0)
    (axes,) = figure.axes
    (curve,) = _curves(axes)
    assert curve.get_xdata().tolist() == list(range(31))
    assert curve.get_ydata().tolist() == [schedule(t, 0.25, 1.0) for t in range(31)]
    assert axes.get_xlabel() == "iteration"
    assert axes.get_ylabel() == "learning rate"
    assert axes.get_title() == "triangular2"
    assert axes.get_xlim() == (0, 30)
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1.0
    assert {text.get_text() for text in axes.texts} == {"base_lr", "max_lr"}


def test_bounds_that_coincide_share_a_label_and_own_bounds_have_none():
    (axes,) = plotting.plot_schedule(fixed(), 10, base_lr=0.1, max_lr=0.1).axes
    assert [text.get_text() for text in axes.texts] == ["bounds"]
    own = sequence([(triangular(2, base_lr=1.0, max_lr=2.0), 4), (fixed(3.0), None)])
    (axes,) = plotting.plot_schedule(own, 10).axes
    assert not axes.texts
    assert axes.get_ylim()[1] > 3.0


def test_several_schedules_have_a_legend_outside_the_axes():
    curves = {f"curve {i}": triangular(i) for i in range(1, 7)}
    figure = plotting.plot_schedule(curves, 20, log=True)
    (axes,) = figure.axes
    assert len(_curves(axes)) == 6
    assert axes.get_yscale() == "log"
    assert axes.get_legend() is None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(curves)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": 1_000_001}, "steps must be at most 1,000,000"),
        ({"base_lr": 2.0, "max_lr": 1.0}, "base_lr=2.0 is above max_lr=1.0"),
        ({"max_lr": float("nan")}, "max_lr must be a finite number"),
        ({"base_lr": -1.0}, "base_lr must be a finite number >= 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        plotting.plot_schedule(triangular(5), **{"steps": 10, **arguments})


def test_rates_of_zero_and_a_single_step_are_drawn(tmp_path):
    plotting.save(plotting.plot_schedule(fixed(0.0), 1, 0.0, 0.0), tmp_path / "zero.png")
    assert _pixels(tmp_path / "zero.png").min() < 50


def test_policies_are_pictures_of_modest_size(tmp_path):
    paths = plotting.plot_policies(tmp_path / "docs")
    assert [path.stem for path in paths] == [
        "triangular",
        "triangular2",
        "exp_range",
        "exp_range_bounds",
        "one_cycle",
        "warm_restarts",
        "windows",
        "sequence",
    ]
    contents = set()
    for path in paths:
        assert path.parent == tmp_path / "docs"
        assert path.stat().st_size <= 30_000
        contents.add(path.read_bytes())
        pixels = _pixels(path)
        assert pixels.shape == (280, 640, 3)
        assert _has_color(pixels, plotting._BLUE)
    assert len(contents) == len(paths)
    windows = _pixels(tmp_path / "docs" / "windows.png")
    assert _has_color(windows, plotting._ORANGE)
    assert _has_color(windows, plotting._GREEN)
    # The same pictures are the same files, so that drawing them again changes no checkout.
    again = plotting.plot_policies(tmp_path / "again")
    assert {path.read_bytes() for path in again} == contents


def test_save_adds_png_and_keeps_other_suffixes(tmp_path):
    figure = plotting.plot_schedule(triangular(5), 20)
    assert plotting.save(figure, tmp_path / "plain") == tmp_path / "plain.png"
    assert _pixels(tmp_path / "plain.png").shape == (280, 640, 3)
    assert plotting.save(figure, str(tmp_path / "vector.svg")) == tmp_path / "vector.svg"
    assert "<svg" in (tmp_path / "vector.svg").read_text()


def test_demo_pictures_show_every_policy():
    steps, values = np.arange(8), np.array([90.0, 91.0, 93.0, 92.0])
    policies = ("fixed", "triangular", "triangular2", "exp_range")
    rates = {name: {p: (steps + 1.0).tolist() for p in policies} for name in ("SGD", "Adam")}
    figure = plotting.plot_demo_rates(rates, 4)
    assert [axes.get_title() for axes in figure.axes] == ["SGD", "Adam"]
    for axes in figure.axes:
        assert [line.get_label() for line in _curves(axes)] == list(policies)
        assert axes.get_xticks().tolist() == [0, 4, 8]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(policies)

    accuracies = {name: dict.fromkeys(policies, values) for name in ("SGD", "Adam")}
    figure = plotting.plot_demo_accuracies(accuracies, 2, 4, seeds=3)
    for axes in figure.axes:
        assert _curves(axes)[0].get_xdata().tolist() == [2, 4, 6, 8]
        assert axes.get_xlabel() == "iteration"
        assert axes.get_ylabel() == "test accuracy in %, mean of 3 seeds"


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    code = (
        "import sys\n"
        "from clr_optim import cli, plotting, schedule\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figure = plotting.plot_schedule(schedule.fixed(), 9)\n"
        f"plotting.save(figure, {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
