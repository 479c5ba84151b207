"""Bounds that are read off curves with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from range_test_helpers import accuracy_curve
from torch import Tensor, nn

from clr_optim.range_test import RangeTest, lr_range_test

# ---- curves with a known answer


class Quadratic(nn.Module):
    """Has curvatures from L to L/100. Plain gradient descent is stable below 2/L."""

    def __init__(self, largest: float, dim: int, seed: int) -> None:
        super().__init__()
        start = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
        self.w = nn.Parameter(start)
        self.register_buffer("h", largest * torch.logspace(0, -2, dim))

    def forward(self, noise: Tensor) -> Tensor:
        return 0.5 * (self.h * self.w**2).sum() + (noise * self.h * self.w).sum()


def quadratic_test(mode: str, seed: int) -> tuple[float, RangeTest]:
    """Return ``(L, range test)`` of a random quadratic with noisy gradients."""
    rng = np.random.default_rng(seed)
    largest, dim = 10 ** rng.uniform(-2, 3), int(rng.integers(2, 40))
    steps, noise = int(rng.choice([60, 100, 200, 400])), float(rng.choice([0.003, 0.01, 0.03, 0.1]))
    generator = torch.Generator().manual_seed(seed)
    batches = [noise * torch.randn(dim, generator=generator) for _ in range(steps)]
    if mode == "linear":
        start, end = 0.0, rng.uniform(3, 8)
    else:
        start, end = 10 ** rng.uniform(-5, -3), 10 ** rng.uniform(0.8, 2)
    model = Quadratic(largest, dim, seed)
    result = lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
        step_fn=lambda model, batch: model(batch), mode=mode, num_steps=steps,
        start_lr=start / largest, end_lr=end / largest,
    )  # fmt: skip
    return largest, result


@pytest.mark.parametrize("mode", ["linear", "exponential"])
@pytest.mark.parametrize("seed", range(25))
def test_max_lr_of_a_quadratic_is_within_a_factor_of_two_below_its_limit(mode, seed):
    largest, result = quadratic_test(mode, seed)
    bounds = result.suggest()
    assert 1.0 <= bounds.max_lr * largest <= 2.0, bounds
    assert 0.0 < bounds.base_lr <= bounds.max_lr / 2
    assert 0.0 <= bounds.confidence <= 1.0
    assert f"max_lr={bounds.max_lr:.3g}" in bounds.reason
    assert result.suggest(base="max/3").base_lr == pytest.approx(bounds.max_lr / 3)
    for method in ("steepest", "minimum/10", "valley"):
        other = result.suggest(method)
        assert 0.0 < other.max_lr < 3.0 / largest, other
        assert other.base_lr == other.max_lr / 4
        assert other.method == method
        assert "max/4" in other.reason


@pytest.mark.parametrize("mode", ["linear", "exponential"])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_flat_curves_are_refused(mode, noise, seed):
    rng = np.random.default_rng(seed)
    for n in (30, 100, 300):
        lrs = np.geomspace(1e-6, 1, n) if mode == "exponential" else np.linspace(0, 1, n)
        values = 2.3 + noise * rng.standard_normal(n)
        with pytest.raises(ValueError, match=r"flat.*raise end_lr|improved before"):
            RangeTest(lrs.tolist(), values.tolist(), mode=mode).suggest()


def test_rates_too_small_to_train_are_flat():
    model = Quadratic(1.0, 5, 0)
    result = lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=1.0), [torch.zeros(5)],
        step_fn=lambda model, batch: model(batch), start_lr=1e-9, end_lr=1e-5, num_steps=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"flat: loss is .*raise end_lr"):
        result.suggest()


@pytest.mark.parametrize("start", [2.5, 10.0])
@pytest.mark.parametrize("mode", ["linear", "exponential"])
def test_rates_that_all_diverge_are_refused(mode, start):
    model = Quadratic(1.0, 5, 0)
    result = lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=1.0), [torch.zeros(5)],
        step_fn=lambda model, batch: model(batch), start_lr=start, end_lr=100.0, num_steps=100,
        mode=mode,
    )  # fmt: skip
    assert result.diverged
    assert len(result.lrs) < 100
    with pytest.raises(ValueError, match="start_lr"):
        result.suggest()


def test_a_curve_that_only_gets_worse_is_refused():
    with pytest.raises(ValueError, match=r"gets worse and has not improved before.*start_lr"):
        RangeTest(np.linspace(0.1, 1, 50).tolist(), np.linspace(1, 3, 50).tolist()).suggest()


@pytest.mark.parametrize("n", [0, 1, 9])
def test_a_curve_too_short_is_refused(n):
    result = RangeTest([0.1 * (i + 1) for i in range(n)], [1.0 / (i + 1) for i in range(n)])
    for method in ("range", "steepest", "minimum/10", "valley"):
        with pytest.raises(ValueError, match=f"{n} points.*num_steps"):
            result.suggest(method)


@pytest.mark.parametrize("noise", [0.0, 2.0, 5.0])
def test_both_ends_of_an_accuracy_curve(noise):
    bounds = accuracy_curve(noise=noise).suggest()
    assert 0.0005 < bounds.base_lr < 0.003
    assert 0.004 < bounds.max_lr < 0.008
    assert "accuracy rose from" in bounds.reason
    assert "points" in bounds.reason
    assert bounds.confidence > 0.5


def test_noise_lowers_the_confidence():
    clear, noisy = accuracy_curve(noise=0.5).suggest(), accuracy_curve(noise=8.0).suggest()
    assert noisy.confidence < clear.confidence


def test_a_curve_that_turns_ragged_breaks_there():
    rng = np.random.default_rng(0)
    lrs = np.linspace(0, 1, 400)
    values = np.exp(-20 * lrs) + np.where(lrs > 0.6, 0.5, 0.005) * rng.standard_normal(400)
    bounds = RangeTest(lrs.tolist(), values.tolist()).suggest()
    assert 0.35 < bounds.max_lr < 0.5


def test_no_break_in_sight_is_said_and_trusted_little():
    lrs = np.linspace(0, 1, 100)
    bounds = RangeTest(lrs.tolist(), np.exp(-10 * lrs).tolist()).suggest()
    assert "raise end_lr" in bounds.reason
    assert bounds.confidence <= 0.4
    assert bounds.max_lr < 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=0, max_size=60),
    st.sampled_from(["linear", "exponential"]),
    st.sampled_from(["loss", "accuracy"]),
    st.sampled_from(["range", "steepest", "minimum/10", "valley"]),
    st.booleans(),
)
def test_whatever_the_curve_bounds_are_usable_or_refused(values, mode, metric, method, diverged):
    lrs = np.geomspace(1e-6, 10, len(values)).tolist()
    result = RangeTest(lrs, values, mode=mode, metric=metric, diverged=diverged)
    assert len(result.smoothed()) == len(values)
    try:
        bounds = result.suggest(method)
    except ValueError:
        return
    assert 0.0 < bounds.base_lr < bounds.max_lr <= 10
    assert 0.0 <= bounds.confidence <= 1.0


def test_smoothing_keeps_straight_lines_and_knows_the_spacing_of_rates():
    lrs = [0.01, 0.02, 0.03, 0.07, 0.08, 0.2, 0.3, 0.31, 0.5, 0.9]
    line = [3.0 - 2.0 * lr for lr in lrs]
    assert RangeTest(lrs, line, smoothing=0.4).smoothed() == pytest.approx(line)
    line = [3.0 - math.log(lr) for lr in lrs]
    logarithmic = RangeTest(lrs, line, mode="exponential", smoothing=0.4)
    assert logarithmic.smoothed() == pytest.approx(line)
    assert RangeTest(lrs, line, smoothing=0.0).smoothed() == pytest.approx(line)


def test_a_fall_within_its_noise_gives_no_rate_of_0():
    """A plateau as noisy as the fall before is deep. A linear test starts at rate 0."""
    found = 0
    for seed in range(400):
        noise = np.random.default_rng(seed).standard_normal(60)
        losses = 2 - np.minimum(np.linspace(0, 20, 60), 1) + 0.15 * noise
        try:
            bounds = RangeTest(np.linspace(0, 1, 60).tolist(), losses.tolist()).suggest()
        except ValueError:
            continue
        found += 1
        assert 0 < bounds.base_lr < bounds.max_lr
    for seed in range(1500):
        walk = np.cumsum(np.random.default_rng(seed).standard_normal(30)).tolist()
        rates = np.linspace(0, 1, 30).tolist()
        try:
            bounds = RangeTest(rates, walk, metric="validation_loss", smoothing=0.3).suggest()
        except ValueError:
            continue
        found += 1
        assert 0 <= bounds.base_lr < bounds.max_lr
    assert found > 500
