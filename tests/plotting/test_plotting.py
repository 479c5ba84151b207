"""Pictures: their curves, their files, and the errors for wrong arguments."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from clr_optim import Bounds, CyclicalOptimizer, RangeTest, plotting
from clr_optim.plotting import canvas
from clr_optim.schedule import POLICIES, fixed, sequence, triangular, triangular2


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _has_color(pixels, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - rgb).max(axis=-1) < 40).sum() > 50


def _curves(axes):
    """Return the lines that show data, without the guides."""
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


# (arguments of plot_schedule, words of the message)
WRONG_SCHEDULE = [
    ({"steps": 0}, "steps must be an integer >= 1, got 0"),
    ({"steps": 1.5}, "steps must be a whole number"),
    ({"steps": 1_000_001}, "steps must be at most 1,000,000"),
    ({"base_lr": 2.0, "max_lr": 1.0}, "base_lr=2.0 is above max_lr=1.0"),
    ({"max_lr": float("nan")}, "max_lr must be a finite number"),
    ({"base_lr": -1.0}, "base_lr must be a finite number >= 0"),
    ({"schedule": None}, "schedule must be a Schedule, several of them .*got None"),
    ({"schedule": {}}, "schedule must be a Schedule, several"),
    ({"schedule": {"mine": 3}}, "schedule must be a Schedule, several .*got {'mine': 3}"),
    ({"title": 3}, "title must be a string, got 3"),
    ({"log": "yes"}, "log must be True or False, got 'yes'"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_SCHEDULE)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        plotting.plot_schedule(**{"schedule": triangular(5), "steps": 10, **arguments})


def test_rates_of_zero_and_a_single_step_are_drawn(tmp_path):
    plotting.save(plotting.plot_schedule(fixed(0.0), 1, 0.0, 0.0), tmp_path / "zero.png")
    assert _pixels(tmp_path / "zero.png").min() < 50


def test_policies_are_pictures_of_modest_size(tmp_path):
    paths = plotting.plot_policies(tmp_path / "docs")
    assert [path.stem for path in paths] == [
        *POLICIES,
        "windows",
        "decays",
        "with_warmup",
        "growing_cycles",
        "sequence",
    ]
    contents = set()
    for path in paths:
        assert path.parent == tmp_path / "docs"
        assert path.stat().st_size <= 30_000
        contents.add(path.read_bytes())
        pixels = _pixels(path)
        assert pixels.shape == (560, 1280, 3)
        assert _has_color(pixels, canvas.BLUE)
    assert len(contents) == len(paths)
    windows = _pixels(tmp_path / "docs" / "windows.png")
    assert _has_color(windows, canvas.ORANGE)
    assert _has_color(windows, canvas.GREEN)
    # The same pictures are the same bytes, so that drawing them again changes no checkout.
    again = plotting.plot_policies(tmp_path / "again")
    assert {path.read_bytes() for path in again} == contents


def test_save_adds_png_and_keeps_other_suffixes(tmp_path):
    figure = plotting.plot_schedule(triangular(5), 20)
    assert plotting.save(figure, tmp_path / "plain") == tmp_path / "plain.png"
    assert _pixels(tmp_path / "plain.png").shape == (560, 1280, 3)
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


def _params(n):
    return [torch.zeros(2, requires_grad=True) for _ in range(n)]


def test_the_next_steps_of_an_optimizer_begin_at_its_position():
    opt = CyclicalOptimizer(torch.optim.SGD(_params(1), lr=1.0), "triangular2", step_size_up=5)
    opt.set_iteration(7)
    figure = plotting.plot_schedule(opt, 20)
    (axes,) = figure.axes
    (curve,) = _curves(axes)
    assert curve.get_xdata().tolist() == list(range(7, 28))
    assert curve.get_ydata().tolist() == [opt.lr_at(t)[0] for t in range(7, 28)]
    assert axes.get_xlim() == (7, 27)
    assert axes.get_title() == "SGD, triangular2"
    assert {text.get_text() for text in axes.texts} == {"base_lr", "max_lr"}
    assert opt.iteration == 7


def test_groups_that_differ_have_a_curve_each_and_equal_ones_share_it():
    first, second, third = _params(3)
    groups = [{"params": [first]}, {"params": [second], "lr": 0.5}, {"params": [third]}]
    opt = CyclicalOptimizer(torch.optim.SGD(groups, lr=1.0), step_size_up=5)
    figure = plotting.plot_schedule(opt, 20)
    one, other = _curves(figure.axes[0])
    assert one.get_ydata().tolist() == [opt.lr_at(t)[0] for t in range(21)]
    assert other.get_ydata().tolist() == [opt.lr_at(t)[1] for t in range(21)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["groups 0, 2", "group 1"]
    own = sequence([(triangular(2, base_lr=1.0, max_lr=2.0), 4), (fixed(3.0), None)])
    opt = CyclicalOptimizer(torch.optim.SGD(_params(2), lr=1.0), own)
    assert len(_curves(plotting.plot_schedule(opt, 20).axes[0])) == 1


@pytest.mark.parametrize(
    ("make", "label", "key"),
    [
        (lambda: torch.optim.SGD(_params(1), lr=1.0, momentum=0.9), "momentum", "momentum"),
        (lambda: torch.optim.Adam(_params(1), lr=1.0), "betas[0]", "betas"),
    ],
)
def test_momentum_that_cycles_is_drawn_below(make, label, key):
    opt = CyclicalOptimizer(make(), step_size_up=3, cycle_momentum=True)
    rates, momenta = plotting.plot_schedule(opt, 12, title="mine").axes
    assert rates.get_title() == "mine"
    assert momenta.get_ylabel() == label
    (curve,) = _curves(momenta)
    for value in curve.get_ydata()[:5]:
        held = opt.param_groups[0][key]
        assert value == (held[0] if key == "betas" else held)
        opt.step()


def test_an_optimizer_has_bounds_of_its_own():
    opt = CyclicalOptimizer(torch.optim.SGD(_params(1), lr=1.0))
    with pytest.raises(ValueError, match=r"max_lr=2.0: an optimizer is drawn with its own bounds"):
        plotting.plot_schedule(opt, 10, max_lr=2.0)


def _range_test(mode="linear", **options):
    lrs = np.linspace(0.01, 1, 100) if mode == "linear" else np.geomspace(1e-4, 1, 100)
    values = 1 / (1 + 20 * lrs) + 10 * np.maximum(0, lrs - 0.4) ** 2
    return RangeTest(lrs.tolist(), values.tolist(), mode=mode, **options)


@pytest.mark.parametrize("mode", ["linear", "exponential"])
def test_a_range_test_shows_raw_and_smoothed_curve_and_both_bounds(mode):
    result = _range_test(mode)
    bounds = result.suggest()
    (axes,) = plotting.plot_range_test(result).axes
    raw, smooth = _curves(axes)
    assert raw.get_xdata().tolist() == smooth.get_xdata().tolist() == result.lrs
    assert raw.get_ydata().tolist() == result.values
    assert smooth.get_ydata().tolist() == result.smoothed()
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert marks == [bounds.base_lr, bounds.max_lr]
    assert [text.get_text() for text in axes.texts] == [
        f"base_lr {bounds.base_lr:.3g}",
        f"max_lr {bounds.max_lr:.3g}",
    ]
    assert axes.get_xscale() == {"linear": "linear", "exponential": "log"}[mode]
    assert axes.get_xlabel() == "learning rate"
    assert axes.get_ylabel() == "training loss"


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("accuracy", "training accuracy in %"),
        ("validation_loss", "validation loss"),
        ("validation_accuracy", "validation accuracy in %"),
    ],
)
def test_a_range_test_names_what_was_measured(metric, label):
    result = _range_test(metric=metric)
    (axes,) = plotting.plot_range_test(result, Bounds(0.1, 0.3), title="mine").axes
    assert axes.get_ylabel() == label
    assert axes.get_title() == "mine"


def test_every_bound_has_its_name_inside_the_picture(tmp_path):
    result = _range_test()
    for bounds in (Bounds(0.02, 0.05), Bounds(0.02, 0.98), Bounds(0.9, 0.99), Bounds(0.4, 0.5)):
        figure = plotting.plot_range_test(result, bounds)
        plotting.save(figure, tmp_path / "a.png")
        figure.draw_without_rendering()  # in the figure's pixels, which are not the file's
        (axes,) = figure.axes
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(0 < box.x0 < box.x1 < 640 for box in boxes)
        assert not boxes[0].overlaps(boxes[1])


def test_a_curve_without_bounds_is_drawn_and_says_so():
    flat = RangeTest([0.1 * i for i in range(50)], [1.0] * 50)
    (axes,) = plotting.plot_range_test(flat).axes
    assert axes.get_title() == "no bounds found"
    assert not axes.texts
    one = RangeTest([0.1], [1.0], mode="exponential")
    assert len(plotting.plot_range_test(one).axes[0].lines) == 2


def test_what_is_no_range_test_is_refused():
    with pytest.raises(TypeError, match=r"result must be a RangeTest.* got 3"):
        plotting.plot_range_test(3)
    with pytest.raises(ValueError, match="no point to draw"):
        plotting.plot_range_test(RangeTest([], []))
    curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
    with pytest.raises(TypeError, match=r"bounds must be Bounds, .*got \(1, 2\)"):
        plotting.plot_range_test(curve, (1, 2))
    with pytest.raises(TypeError, match="title must be a string"):
        plotting.plot_range_test(curve, title=3)


@pytest.mark.parametrize(
    ("figure", "path", "error", "words"),
    [
        (3, "a.png", TypeError, "figure must be a matplotlib Figure.* got 3"),
        (None, None, TypeError, "path must be a string or a Path, got None"),
        (None, "", OSError, "names no file: give one such as"),
        (None, "a.docx", OSError, "a.docx: a picture's name must end in one of"),
        (None, "nowhere/a.png", OSError, "nowhere/a.png: there is no such folder"),
    ],
)
def test_what_cannot_be_saved(figure, path, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        plotting.save(figure or plotting.plot_schedule(triangular(3), 5), path)
    assert not list(tmp_path.iterdir())


def test_a_history_has_a_panel_for_each_curve_with_every_other_cycle_shaded(tmp_path):
    steps = list(range(1, 26))
    curves = {
        "training loss": (steps, [1 / s for s in steps]),
        "test accuracy in %": ([5, 10, 15, 20, 25], [1.0, 2.0, 3.0, 4.0, 5.0]),
        "learning rate": (steps, [0.1] * 25),
    }
    figure = plotting.plot_history(curves, [10, 20], title="mine")
    assert [axes.get_ylabel() for axes in figure.axes] == list(curves)
    assert figure.axes[0].get_title() == "mine"
    assert figure.axes[-1].get_xlabel() == "iteration"
    for axes, (iterations, values) in zip(figure.axes, curves.values(), strict=True):
        (curve,) = _curves(axes)
        assert curve.get_xdata().tolist() == iterations
        assert curve.get_ydata().tolist() == values
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (10, 20)
    # The shade of an unfinished last cycle ends at the last step.
    (axes,) = plotting.plot_history({"loss": (steps, steps)}, [6, 12, 18, 24]).axes
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches] == [(6, 12), (18, 24)]
    (axes,) = plotting.plot_history({"loss": (steps, steps)}, [20, 40]).axes
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in axes.patches] == [(20, 25)]


# (curves, ends of cycles, words of the message)
WRONG_HISTORY = [
    ({}, [], "curves is empty"),
    ({"loss": ([1, 2], [1.0])}, [], r"curves\['loss'\] has 2 iterations and 1 values"),
    ({"loss": ([], [])}, [], "has 0 iterations"),
    ({"loss": ([1], [1.0])}, [4, 4], r"cycle_ends must rise from above 0, got \[4, 4\]"),
    ({"loss": ([1], [1.0])}, [0], "cycle_ends must rise"),
    (None, [], "curves must be a dictionary"),
    ({"loss": 3}, [], r"curves\['loss'\] must be a pair .iterations, values., got 3"),
    ({"loss": (1, 2)}, [], r"curves\['loss'\], iterations must be a list of numbers, got 1"),
    ({"loss": ([1], ["x"])}, [], r"curves\['loss'\], values must be a list of numbers, got 'x'"),
    ({"loss": ([1], [1.0])}, None, "cycle_ends must be a list of numbers, got None"),
    ({"loss": ([1], [1.0])}, [None], "cycle_ends must be a list of numbers, got None in it"),
]


@pytest.mark.parametrize(("curves", "ends", "words"), WRONG_HISTORY)
def test_a_history_that_cannot_be_is_refused(curves, ends, words):
    with pytest.raises((TypeError, ValueError), match=words):
        plotting.plot_history(curves, ends)


def test_constant_rates_are_grey_and_cycles_coloured_on_any_page(tmp_path):
    points = [(300, 40.0), (600, 45.0), (1200, 50.0)]
    figure = plotting.plot_constant_and_cycled(
        {"0.001": points, "0.01": points}, {"triangular": points, "one": points}, title="six"
    )
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in _curves(axes)}
    assert list(curves) == ["0.001", "0.01", "triangular", "one"]
    assert list(curves["one"].get_xdata()) == [300, 600, 1200]
    colors = [line.get_color() for line in curves.values()]
    assert colors[:2] == [canvas.MIDDLE] * 2
    assert len(set(colors)) == 3
    assert curves["0.001"].get_linestyle() != curves["0.01"].get_linestyle()
    assert (axes.get_title(), axes.get_ylabel()) == ("six", "test accuracy in %")
    for color in (canvas.MIDDLE, *canvas.BRIGHT_COLORS):
        assert min(_contrast(color, page) for page in ("#FFFFFF", "#0D1117")) >= 3
    files = [
        plotting.save(
            plotting.plot_constant_and_cycled({"0.01": points}, {}), tmp_path / name
        ).read_bytes()
        for name in ("a.svg", "b.svg")
    ]
    assert files[0] == files[1]
    assert b"#ffffff" not in files[0]  # no background
    with pytest.raises(ValueError, match="give at least one label"):
        plotting.plot_constant_and_cycled({}, {})


def _contrast(one, other):
    """Return the contrast of two colours, as WCAG 2 defines it."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_paper_curves_have_two_panels_a_line_and_a_look_per_label(tmp_path):
    curve = [(10, 20.0), (20, 40.0), (30, 60.0)]
    panels = {
        "SGD": {"fixed": curve, "triangular": curve},
        "Adam": {"triangular": curve},
        "AdaGrad": {f"row {i}": curve for i in range(9)},
    }
    figure = plotting.plot_paper_curves(panels)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(panels)
    (line,) = shown[1].lines
    assert list(line.get_xdata()) == [10, 20, 30]
    assert list(line.get_ydata()) == [20.0, 40.0, 60.0]
    assert shown[1].get_ylabel() == "test accuracy in %"

    def look(line):
        return line.get_color(), line.get_linestyle(), line.get_marker()

    assert look(line) == look(shown[0].lines[1])
    looks = {look(line) for axes in (shown[0], shown[2]) for line in axes.lines}
    assert len(looks) == 11
    path = plotting.save(figure, tmp_path / "curves")
    assert _pixels(path).shape[1] == 1400
    with pytest.raises(ValueError, match="panels is empty"):
        plotting.plot_paper_curves({})


def test_results_and_optimizers_draw_themselves(tmp_path):
    curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
    figure = curve.plot(tmp_path / "curve.png", bounds=Bounds(0.1, 0.2), title="mine")
    assert figure.axes[0].get_title() == "mine"
    assert _pixels(tmp_path / "curve.png").shape == (640, 1280, 3)
    assert curve.plot().axes[0].get_title() == "no bounds found"
    adam = torch.optim.Adam([torch.zeros(3, requires_grad=True)], lr=1e-3)
    opt = CyclicalOptimizer(adam, step_size_up=10, cycle_momentum=True)
    opt.step()
    rates, momenta = opt.plot(40, str(tmp_path / "next.svg")).axes
    assert _curves(rates)[0].get_xdata().tolist() == list(range(1, 42))
    assert _curves(rates)[0].get_ydata().tolist() == [opt.lr_at(t)[0] for t in range(1, 42)]
    assert momenta.get_ylabel() == "betas[0]"
    assert (tmp_path / "next.svg").read_text().startswith("<?xml")
    assert opt.plot(4, log=True).axes[0].get_yscale() == "log"


def test_a_plot_method_refuses_a_file_before_it_draws(tmp_path):
    curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
    with pytest.raises(OSError, match="a picture's name must end in one of"):
        curve.plot(tmp_path / "curve.docx")
    with pytest.raises(TypeError, match="bounds must be Bounds"):
        curve.plot(bounds=(0.1, 0.2))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5]).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(figure)).axes[0].get_ylabel() == "training loss"
