"""Losses that grow end a range test, and noisy losses do not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clr_optim.range_test import RangeTest, lr_range_test
from clr_optim.range_test.divergence import Divergence


def end_of(losses: Any, factor: float = 3.0) -> int | None:
    """Return the number of the loss that ends the test."""
    divergence = Divergence(factor)
    return next((i for i, loss in enumerate(losses) if divergence.is_reached(float(loss))), None)


# Random losses of n steps, which do not depend on the rate.
NOISE = {
    "about 0": lambda g, n: 0.02 * g.standard_normal(n),
    "a little above 0": lambda g, n: 0.005 + 0.02 * g.standard_normal(n),
    "a little below 0": lambda g, n: -0.005 + 0.02 * g.standard_normal(n),
    "long tails": lambda g, n: g.laplace(size=n),
    "of both signs in turn": lambda g, n: np.where(np.arange(n) % 2, 1, -1) * g.random(n),
    "waves": lambda g, n: np.sin(np.arange(n) / g.uniform(1, 6) + g.uniform(0, 6)),
    "periodic": lambda g, n: np.resize([0.01, 0.05, 0.02, 0.03, -0.04, 0.01], n),
    "tiny": lambda g, n: 1e-30 * g.standard_normal(n),
    "none": lambda g, n: np.zeros(n),
    "first one at 0": lambda g, n: np.append(0.0, g.random(n - 1)),
    "about a level": lambda g, n: 2.0 + g.standard_normal(n),
    "about a level below 0": lambda g, n: -2.0 + g.standard_normal(n),
    "one hard batch an epoch": lambda g, n: np.resize([*[0.01] * 39, 50.0], n),
}


@pytest.mark.parametrize("factor", [1.5, 3.0])
@pytest.mark.parametrize("noise", NOISE)
def test_noise_does_not_end_the_test(noise, factor):
    ends = [end_of(NOISE[noise](np.random.default_rng(s), 200), factor) for s in range(40)]
    assert sum(end is not None for end in ends) <= 1, ends


def test_with_noise_the_result_is_complete():
    losses = iter(NOISE["periodic"](None, 60))
    model = nn.Linear(1, 1)
    result = lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [0],
        step_fn=lambda model, batch: 0.0 * model.weight.sum() + next(losses),
        start_lr=1e-9, end_lr=1e-8, num_steps=60,
    )  # fmt: skip
    assert not result.diverged
    assert len(result.lrs) == 60


STEPS = np.arange(200.0)
BLOWS_UP = np.where(STEPS < 100, 0.0, 0.01 * 1.3 ** (STEPS - 100))

# (losses, their noise, the last allowed step)
GROWTH = [
    pytest.param(2 * np.exp(-STEPS / 30) + 0.3 + 0.1 * BLOWS_UP, 0.05, 138, id="after a fall"),
    pytest.param(2 * np.exp(-STEPS / 30) + 0.3 + 0.1 * BLOWS_UP, 0.5, 141, id="noisy"),
    pytest.param(BLOWS_UP, 1.0, 132, id="about 0"),
    pytest.param(-5 * (1 - np.exp(-STEPS / 30)) + BLOWS_UP, 0.1, 133, id="below 0"),
    pytest.param(1000 + np.exp(-STEPS / 30) + BLOWS_UP, 0.1, 152, id="from a level"),
    pytest.param(1.1**STEPS, 0.01, 18, id="from the first step on"),
    pytest.param(3.0 ** STEPS[:100], 0.01, 10, id="at once"),
    pytest.param(0.5 + 0.05 * STEPS, 0.05, 40, id="in a line"),
    # Three losses are needed to tell a jump from a hard batch.
    pytest.param(np.where(STEPS < 50, 1.0, 1e6), 0.0, 52, id="a jump"),
    pytest.param(np.where(STEPS < 50, 0.0, 1.0), 0.0, 60, id="a jump from 0"),
]


@pytest.mark.parametrize(("losses", "noise", "latest"), GROWTH)
def test_growth_ends_the_test_soon(losses, noise, latest):
    for seed in range(20):
        drawn = losses + noise * np.random.default_rng(seed).standard_normal(len(losses))
        end = end_of(drawn)
        assert end is not None
        assert end <= latest
        assert end >= 9


def test_a_loss_that_is_not_finite_ends_the_test_whatever_the_factor():
    assert end_of([1.0, 2.0, math.nan], math.inf) == 2
    assert end_of([1.0, math.inf]) == 1
    assert end_of(1.3**STEPS, math.inf) is None
    assert end_of(np.zeros(50), math.inf) is None


# ---- advice fits the curve


def curve(values: Any, **options: Any) -> RangeTest:
    lrs = options.pop("lrs", None)
    if lrs is None:
        lrs = np.linspace(options.pop("start", 0.01), 1.0, len(values)).tolist()
    return RangeTest(lrs, list(map(float, values)), **options)


# (curve, words of the advice, words that would mislead)
ADVICE = [
    (curve(np.linspace(1, 3, 50)), "Lower start_lr", "raise end_lr"),
    (curve(np.linspace(1, 3, 50), start=0.0), "Lower end_lr", "start_lr"),
    (curve([1.0] * 50), "raise end_lr", "start_lr"),
    (curve([1.0] * 50, interrupted=True), "let the test run to its end", "raise end_lr"),
    (curve([1.0] * 50, diverged=True), "Lower start_lr", "raise end_lr"),
    (curve([1.0, 2.0], diverged=True), "divide start_lr and end_lr by 10", "num_steps"),
    (curve([1.0, 2.0], diverged=True, start=0.0), "divide end_lr by 10", "start_lr"),
    (curve([1.0, 2.0], interrupted=True), "let the test run longer", "num_steps"),
    (curve([1.0, 2.0]), "raise num_steps", "end_lr"),
    (curve([1.0, 2.0], metric="validation_loss"), "validate_every", "end_lr"),
    (curve([100.0] * 50, metric="accuracy"), "raise end_lr", "start_lr"),
]  # fmt: skip


@pytest.mark.parametrize(("result", "words", "wrong"), ADVICE)
def test_advice_names_what_would_help(result, words, wrong):
    with pytest.raises(ValueError, match="curve") as error:
        result.suggest()
    assert words in str(error.value)
    assert wrong not in str(error.value)


def test_noise_as_large_as_the_fall_asks_for_less_noise():
    values = 2.0 - 0.5 * np.linspace(0, 1, 60) + 0.8 * np.random.default_rng(0).standard_normal(60)
    with pytest.raises(ValueError, match="accumulate"):
        curve(values).suggest()


# ---- batches of other formats


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return self.layer(x + offset)


class NoLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Pair:
    """A batch of the user's class."""

    x, y = torch.ones(2, 4), torch.ones(2, 3)


class InPlace(Pair):
    def to(self, device):
        """Return nothing, since the batch moves itself."""


class MadeOfTwo(tuple):
    def __new__(cls, x, y):
        return super().__new__(cls, (x, y))


X, Y = torch.ones(2, 4), torch.ones(2, 3)
# (model, batch, words of the message beside step_fn)
UNFIT = [
    (NoLoss, X, "a batch is a Tensor"),
    (NoLoss, X.numpy(), "a batch is a ndarray"),
    (NoLoss, None, "a batch is a NoneType"),
    (NoLoss, "text", "a batch is a str"),
    (NoLoss, {1, 2}, "a batch is a set"),
    (NoLoss, Pair(), "a batch is a Pair"),
    (NoLoss, InPlace(), "a batch is a InPlace"),
    (NoLoss, (X,), "a batch is a tuple of 1"),
    (NoLoss, [], "a batch is a list of 0"),
    (NoLoss, (X, Y, Y), "NoLoss.forward"),
    (TwoInputs, (X, Y), "TwoInputs.forward"),
    (NoLoss, {"x": X, "y": Y}, "target_key='labels'"),
    (NoLoss, {"z": X, "labels": Y}, "NoLoss.forward"),
    (NoLoss, {0: X, "labels": Y}, "NoLoss.forward"),
]


@pytest.mark.parametrize(("model", "batch", "words"), UNFIT)
def test_batches_that_do_not_fit_name_step_fn(model, batch, words):
    net = model()
    with pytest.raises(ValueError, match="step_fn") as error:
        lr_range_test(
            net, torch.optim.SGD(net.parameters(), lr=0.1), [batch], nn.functional.mse_loss,
            start_lr=0, end_lr=1, num_steps=3,
        )  # fmt: skip
    assert words in str(error.value)


# (batch, words of the note)
INSIDE = [
    (((X, X), Y), "step_fn"),
    ((X.numpy(), Y), "step_fn"),
    ((X, "labels"), "step_fn"),
]


@pytest.mark.parametrize(("batch", "words"), INSIDE)
def test_an_error_inside_the_model_or_loss_tells_how_they_were_called(batch, words):
    net = NoLoss()
    with pytest.raises((TypeError, AttributeError)) as error:
        lr_range_test(
            net, torch.optim.SGD(net.parameters(), lr=0.1), [batch], nn.functional.mse_loss,
            start_lr=0, end_lr=1, num_steps=3,
        )  # fmt: skip
    if hasattr(error.value, "add_note"):  # Python 3.11
        assert words in "".join(error.value.__notes__)


@pytest.mark.parametrize("batch", [(X, Y), MadeOfTwo(X, Y), [X, Y]])
def test_batches_of_odd_classes_are_moved(batch):
    net = NoLoss()
    result = lr_range_test(
        net, torch.optim.SGD(net.parameters(), lr=0.1), [batch], nn.functional.mse_loss,
        start_lr=0, end_lr=1, num_steps=3,
    )  # fmt: skip
    assert len(result.lrs) == 3


def test_a_batch_that_moves_itself_is_given_to_step_fn():
    net = NoLoss()
    result = lr_range_test(
        net, torch.optim.SGD(net.parameters(), lr=0.1), [InPlace()],
        step_fn=lambda net, batch: nn.functional.mse_loss(net(batch.x), batch.y),
        start_lr=0, end_lr=1, num_steps=3,
    )  # fmt: skip
    assert len(result.lrs) == 3


# (result of step_fn, words of the message)
LOSSES = [
    (lambda loss: None, "step_fn returned None"),
    (lambda loss: {"nll": loss}, r"no 'loss'.*\['nll'\]"),
    (lambda loss: (loss, 1), "got 2 values"),
    (lambda loss: loss.item(), "scalar tensor"),
]


@pytest.mark.parametrize(("returned", "words"), LOSSES)
def test_a_wrong_result_of_step_fn_is_named(returned, words):
    net = NoLoss()
    with pytest.raises(ValueError, match=words):
        lr_range_test(
            net, torch.optim.SGD(net.parameters(), lr=0.1), [X], start_lr=0, end_lr=1, num_steps=3,
            step_fn=lambda net, batch: returned(net(batch).sum()),
        )  # fmt: skip


def test_a_model_that_returns_no_loss_names_step_fn():
    net = NoLoss()
    with pytest.raises(ValueError, match=r"NoLoss returned a Tensor without a loss.*step_fn"):
        lr_range_test(
            net, torch.optim.SGD(net.parameters(), lr=0.1), [{"x": X}],
            start_lr=0, end_lr=1, num_steps=3,
        )  # fmt: skip
