"""The rows of the paper's tables, against the paper's formulas, and Caffe's momentum."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from clr_optim.bench.paper import ROWS, CaffeSGD, Run, Scale
from clr_optim.bench.paper.rows import stages


def cyclic(t, step_size, base_lr, max_lr):
    """Compute a rate and the cycle's number by the paper's code."""
    number = math.floor(1 + t / (2 * step_size))
    x = abs(t / step_size - 2 * number + 1)
    return base_lr + (max_lr - base_lr) * max(0, 1 - x), number


def triangular(t, step_size=2000, base_lr=0.001, max_lr=0.006):
    return cyclic(t, step_size, base_lr, max_lr)[0]


def triangular2(t, step_size, base_lr, max_lr):
    rate, number = cyclic(t, step_size, base_lr, max_lr)
    return base_lr + (rate - base_lr) / 2 ** (number - 1)


def table2(t):
    if t < 16_000:
        return triangular2(t, 2000, 0.001, 0.005)
    if t < 22_000:
        return triangular2(t - 16_000, 1000, 0.0001, 0.0005)
    return triangular2(t - 22_000, 500, 0.00001, 0.00005)


def exp_range(t):
    return 0.001 + (triangular(t) - 0.001) * 0.99994**t


def windowed(shape):
    return lambda t: 0.001 + 0.005 * shape((triangular(t) - 0.001) / 0.005)


def restarts(t):
    start = 1600 * (2 ** math.floor(math.log2(t / 1600 + 1)) - 1)
    return 0.001 + 0.0025 * (1 + math.cos(math.pi * (t - start) / (start + 1600)))


def one_cycle(t):
    if t <= 21_600:
        return triangular(t, 10_800)
    return 0.001 + (0.001 / 1e4 - 0.001) * (t - 21_600) / 2399


FORMULAS = {
    "fixed": lambda t: 0.001,
    "fixed-stepped": lambda t: 0.001 if t < 60_000 else 0.0001 if t < 65_000 else 0.00001,
    "triangular2": table2,
    "decay": lambda t: max(0.007 - 0.006 * t / 4000, 0.001),
    "exp": lambda t: 0.001 * 0.99994**t,
    "exp_range": exp_range,
    "exp_range_bounds": lambda t: triangular(t) * 0.99994**t,
    "nesterov-fixed": lambda t: 0.001,
    "nesterov-triangular": triangular,
    "adam-fixed": lambda t: 0.0005,
    "adam-triangular": lambda t: triangular(t, 2000, 0.0005, 0.002),
    "adam-triangular-70k": lambda t: triangular(t, 2000, 0.0005, 0.002),
    "rmsprop-fixed": lambda t: 0.0001,
    "rmsprop-triangular": lambda t: triangular(t, 2000, 0.0001, 0.0003),
    "rmsprop-triangular-70k": lambda t: triangular(t, 2000, 0.0001, 0.0003),
    "adagrad-fixed": lambda t: 0.003,
    "adagrad-triangular": lambda t: triangular(t, 2000, 0.003, 0.035),
    "adadelta-fixed": lambda t: 0.01,
    "adadelta-triangular": lambda t: triangular(t, 2000, 0.01, 0.1),
    "window-triangle": triangular,
    "window-welch": windowed(lambda x: 1 - (1 - x) ** 2),
    "window-hann": windowed(lambda x: (1 - math.cos(math.pi * x)) / 2),
    "one_cycle": one_cycle,
    "warm_restarts": restarts,
}


@pytest.mark.parametrize("name", ROWS)
def test_rates_are_the_papers_for_every_group(name, data):
    run = Run(ROWS[name], 0, Scale(), data)
    for t in [*range(0, run.iterations, 777), 15_999, 16_000, 21_999, 22_500, run.iterations - 1]:
        if t < run.iterations:
            expected = [FORMULAS[name](t) * ratio for ratio in (1, 2, 1, 2)]
            assert run.optimizer.lr_at(t) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_scaled_rows_keep_their_shape(name, data):
    whole, tenth = (Run(ROWS[name], 0, Scale(Fraction(f)), data) for f in ("1", "0.1"))
    assert whole.iterations == 10 * tenth.iterations
    steps = range(0, tenth.iterations, 97)
    rates = [tenth.optimizer.lr_at(t)[0] for t in steps]
    # One-cycle's last step has the last rate at every scale.
    tolerance = 2e-2 if name == "one_cycle" else 1e-9
    assert rates == pytest.approx([whole.optimizer.lr_at(10 * t)[0] for t in steps], rel=tolerance)


def test_published_figures():
    """Tables 1 and 3 of the paper, as (iterations, accuracy in percent)."""
    found = {
        name: (row.iterations, row.published) for name, row in ROWS.items() if row.table != "beyond"
    }
    assert found == {
        "fixed": (70_000, 81.4), "fixed-stepped": (70_000, 81.4), "triangular2": (25_000, 81.4),
        "decay": (25_000, 78.5), "exp": (70_000, 79.1),
        "exp_range": (42_000, 82.2), "exp_range_bounds": (42_000, 82.2),
        "nesterov-fixed": (70_000, 82.1), "nesterov-triangular": (25_000, 81.3),
        "adam-fixed": (70_000, 81.4), "adam-triangular": (25_000, 79.8),
        "adam-triangular-70k": (70_000, 81.1),
        "rmsprop-fixed": (70_000, 75.2), "rmsprop-triangular": (25_000, 72.8),
        "rmsprop-triangular-70k": (70_000, 75.1),
        "adagrad-fixed": (70_000, 74.6), "adagrad-triangular": (25_000, 76.0),
        "adadelta-fixed": (70_000, 67.3), "adadelta-triangular": (25_000, 67.3),
    }  # fmt: skip
    assert all(reference in ROWS for row in ROWS.values() for reference in row.references)


@pytest.mark.parametrize("factor", ["1/3", "0.0001"])
def test_scales_that_leave_no_whole_lengths_are_refused(factor):
    with pytest.raises(ValueError, match="must be a whole number >= 1"):
        Scale(Fraction(factor)).steps(2000)


def test_stages_are_table_2_scaled():
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in stages(Scale(Fraction("0.1"))).splitlines()[2:]
    ]
    assert table == [
        ["0.001", "0.005", "200", "0", "1,600"],
        ["0.0001", "0.0005", "100", "1,600", "2,200"],
        ["1e-05", "5e-05", "50", "2,200", "2,500"],
    ]


@pytest.mark.parametrize("nesterov", [False, True])
def test_caffes_momentum_is_torchs_at_a_constant_rate(nesterov):
    ours, expected = (torch.tensor([1.0, -2.0], dtype=torch.float64) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    caffe, plain = CaffeSGD([ours], **options), torch.optim.SGD([expected], **options)
    for k in range(5):
        for param, optimizer in ((ours, caffe), (expected, plain)):
            param.grad = torch.tensor([0.5 + k, -1.0], dtype=torch.float64)
            optimizer.step()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("nesterov", "expected"), [(False, -0.36), (True, -0.594)])
def test_caffes_momentum_keeps_the_rate_of_its_time(nesterov, expected):
    """By hand: gradients 1 and 0.85 at rates 0.1 and 0.2 give V = 0.1, then 0.09 + 0.17 = 0.26.

    Plain momentum moves by −0.1 − 0.26, Nesterov's by −1.9·0.1 − (1.9·0.26 − 0.9·0.1).
    """
    param = torch.zeros(1, dtype=torch.float64)
    optimizer = CaffeSGD([param], lr=0.1, momentum=0.9, nesterov=nesterov)
    for lr, grad in ((0.1, 1.0), (0.2, 0.85)):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    assert param.item() == pytest.approx(expected)
