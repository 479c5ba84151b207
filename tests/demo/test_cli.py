"""The command ``clr-optim``: subcommands, exit codes, messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

import clr_optim
from clr_optim import plotting, schedule
from clr_optim.cli import info, main
from clr_optim.kernels.native import NoKernelsError, loader
from clr_optim.rules import STATE_SLOTS


def _error(capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()  # no usage text
    return line


def test_without_arguments_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: clr-optim")
    for name in ("demo", "plot", "bench", "info"):
        assert name in out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"clr-optim {clr_optim.__version__}\n"


def test_python_m():
    done = subprocess.run(
        [sys.executable, "-m", "clr_optim", "--version"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"clr-optim {clr_optim.__version__}\n"


def test_info_names_versions_and_every_optimizer(capsys, monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "torch")
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["clr_optim"] == clr_optim.__version__
    assert {"python", "torch", "triton", "numpy", "CPU", "GPU"} <= set(rows)
    assert {"kernels", "extension", "openmp"} <= set(rows)
    module = loader.load()
    assert rows["kernels"].split(", since ")[0] in module.kernel_sets()
    assert rows["extension"] == module.__file__
    for cls in STATE_SLOTS:
        assert rows[cls.__name__].startswith("torch: ")
        assert "CLR_OPTIM_BACKEND" in rows[cls.__name__]


def test_info_survives_a_backend_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "abacus")
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["Adam"].startswith("none: CLR_OPTIM_BACKEND='abacus'")


def test_info_shows_why_there_are_no_kernels(capsys, monkeypatch):
    error = NoKernelsError("no extension:\n  install one")
    monkeypatch.setattr(loader, "_load", lambda: error)
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "native")
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["kernels"] == "none: no extension: install one"
    assert rows["Adam"] == "torch: the kernels cannot serve, see above"
    assert rows["LBFGS"] == "torch: no fused kernel for LBFGS"


def test_plot_draws_the_policies_into_docs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert len(paths) == len(schedule.POLICIES) + 5
    for path in paths:
        assert path.startswith("docs")
        with Image.open(tmp_path / path) as image:
            assert image.format == "PNG"


@pytest.mark.parametrize(
    ("options", "expected", "bounds"),
    [
        (["triangular"], schedule.triangular(2000), (0.0015, 0.006)),
        (
            ["triangular2", "--step-size-up", "5", "--step-size-down", "3", "--window", "hann"],
            schedule.triangular2(5, 3, window="hann"),
            (0.0015, 0.006),
        ),
        (
            ["exp_range", "--gamma", "0.9", "--max-lr", "0.4"],
            schedule.exp_range(gamma=0.9),
            (0.1, 0.4),
        ),
        (
            ["exp_range_bounds", "--base-lr", "0.001"],
            schedule.exp_range_bounds(),
            (0.001, 0.006),
        ),
        (["one_cycle"], schedule.one_cycle(100), (0.0015, 0.006)),
        (["warm_restarts"], schedule.warm_restarts(2000), (0.0015, 0.006)),
        (["warm_restarts", "--period", "7"], schedule.warm_restarts(7), (0.0015, 0.006)),
        (
            [
                "wsd",
                "--warmup",
                "9",
                "--stable",
                "50",
                "--decay",
                "20",
                "--shape",
                "exp",
                "--end",
                "0.1",
            ],
            schedule.wsd(9, 50, 20, shape="exp", end=0.1),
            (0.0015, 0.006),
        ),
        (["wsd"], schedule.wsd(10, 68, 22), (0.0015, 0.006)),
        (["polynomial", "--power", "0.9"], schedule.polynomial(100, 0.9), (0.0015, 0.006)),
        (
            ["triangular", "--step-size-up", "5", "--period-multiplier", "2"],
            schedule.triangular(5, period_multiplier=2),
            (0.0015, 0.006),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_plot_draws_the_schedule_asked_for(
    options, expected, bounds, tmp_path, capsys, monkeypatch
):
    drawn = []
    real = plotting.plot_schedule
    monkeypatch.setattr(
        plotting, "plot_schedule", lambda *args: (drawn.append(args), real(*args))[1]
    )
    out = tmp_path / "mine.png"
    assert main(["plot", "--policy", *options, "--steps", "100", "--out", str(out)]) == 0
    assert drawn == [(expected, 100, *bounds)]
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as image:
        assert image.size == (1280, 560)


def test_plot_names_the_file_after_the_policy(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "--policy", "triangular"]) == 0
    assert capsys.readouterr().out == "triangular.png\n"
    assert (tmp_path / "triangular.png").exists()


# (options of plot, part of the message)
WRONG_PLOTS = [
    (["--policy", "triangular", "--step-size-up", "0"], "--step-size-up=0"),
    (["--policy", "exp_range", "--gamma", "1.5"], "error: --gamma must be a finite number"),
    (["--policy", "triangular", "--base-lr", "1"], "--base-lr=1.0 is above --max-lr=0.006"),
    (["--policy", "triangular", "--max-lr", "nan"], "--max-lr must be a finite number"),
    (["--policy", "triangular", "--steps", "0"], "error: --steps must be an integer >= 1"),
    (["--policy", "one_cycle", "--steps", "2"], "error: --steps must be an integer >= 3"),
    (
        ["--policy", "triangular", "--gamma", "0.9"],
        "--gamma has no effect with --policy triangular",
    ),
    (
        ["--policy", "cosine", "--base-lr", "0.001"],
        "--base-lr has no effect with --policy cosine",
    ),
    (
        ["--policy", "one_cycle", "--step-size-up", "9"],
        "--step-size-up has no effect with --policy one_cycle",
    ),
    (["--steps", "9", "--base-lr", "1"], "--base-lr, --steps: only together with --policy"),
    (["--policy", "triangular", "--out", "picture.nonsense"], "nonsense"),
    (["--policy", "triangular", "--out", "no/such/folder/a.png"], "no/such/folder/a.png"),
]


@pytest.mark.parametrize(("options", "words"), WRONG_PLOTS)
def test_plot_refuses_in_the_librarys_words(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = _error(capsys, ["plot", *options])
    assert error.startswith("clr-optim: error: ")
    assert words in error
    assert not list(tmp_path.iterdir())


# command lines that argparse refuses
WRONG_COMMANDS = [
    ["nonsense"],
    ["plot", "--policy", "nonsense"],
    ["plot", "--policy", "triangular", "--window", "nonsense"],
    ["plot", "--policy", "triangular", "--steps", "nonsense"],
    ["info", "nonsense"],
]


@pytest.mark.parametrize("argv", WRONG_COMMANDS, ids=" ".join)
def test_what_argparse_refuses_is_quoted(argv, capsys):
    assert "nonsense" in _error(capsys, argv)


def test_interrupt_ends_without_traceback(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "_info", interrupted)
    assert main(["info"]) == 130
