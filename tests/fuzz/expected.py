"""The rates that our optimizer must have, computed by the paper from the number of steps alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from clr_optim import schedule as schedules
from clr_optim.schedule import Schedule

Optimizer = torch.optim.Optimizer


def halved(cycle: float) -> float:
    """A ``scale_fn`` of a module, so that it can be pickled."""
    return 0.5**cycle


def _paper(
    step_size: int, amplitude: Callable[[int, int], float], floor: Callable[[int], float]
) -> Callable[[int, float, float], float]:
    """Return the paper's formula.

    Its decays are functions of the cycle (from 1) and the iteration.
    """

    def rate(iteration: int, base_lr: float, max_lr: float) -> float:
        cycle = 1 + iteration // (2 * step_size)
        x = abs(iteration / step_size - 2 * cycle + 1)
        decayed = (max_lr - base_lr) * amplitude(cycle, iteration)
        return floor(iteration) * base_lr + max(0.0, 1 - x) * decayed

    return rate


@dataclass(frozen=True)
class Policy:
    """Options of the wrapper, the schedule they make, and the paper's formula if it has one."""

    options: dict[str, Any]
    schedule: Schedule
    formula: Callable[[int, float, float], float] | None = None


def _policies() -> Iterator[tuple[str, Policy]]:
    def same(iteration: int) -> float:
        return 1.0

    for name, formula in (
        ("triangular", _paper(7, lambda c, t: 1.0, same)),
        ("triangular2", _paper(3, lambda c, t: 2.0 ** (1 - c), same)),
        ("exp_range", _paper(4, lambda c, t: 0.99**t, same)),
        ("exp_range_bounds", _paper(2, lambda c, t: 0.99**t, lambda t: 0.99**t)),
    ):
        size = {"triangular": 7, "triangular2": 3, "exp_range": 4, "exp_range_bounds": 2}[name]
        gamma = {"gamma": 0.99} if name.startswith("exp") else {}
        made = getattr(schedules, name)(size, **gamma)
        yield name, Policy({"policy": name, "step_size_up": size, **gamma}, made, formula)
    halving = {"step_size_up": 3, "scale_fn": halved}
    made = schedules.triangular(3, scale_fn=halved)
    yield "scale_fn", Policy(halving, made, _paper(3, lambda c, t: halved(c), same))
    for name, schedule in (
        ("welch", schedules.triangular(2, 5, window="welch")),
        ("hann", schedules.triangular2(3, 0, window="hann")),
        ("fixed", schedules.fixed()),
        ("decay", schedules.decay(9)),
        ("exp", schedules.exp(gamma=0.9)),
        ("one_cycle", schedules.one_cycle(20)),
        ("warm_restarts", schedules.warm_restarts(3, period_multiplier=2)),
        ("ramp", schedules.ramp(12)),
        ("sequence", schedules.sequence([(schedules.triangular(2), 7), (schedules.exp(), None)])),
        ("own_bounds", schedules.triangular(3, base_lr=0.002, max_lr=0.03)),
        ("wsd", schedules.wsd(4, 6, 9, shape="sqrt", end=0.1)),
        ("wsd_cycles", schedules.wsd_cycles(2, 3, 4, shape="exp", end=0.1, period_multiplier=2)),
        ("polynomial", schedules.polynomial(30, 0.9)),
        ("inverse_sqrt", schedules.inverse_sqrt(5)),
        ("growing", schedules.exp_range(2, gamma=0.99, period_multiplier=2)),
        ("warm-up", schedules.one_cycle(20).with_warmup(6)),
    ):
        yield name, Policy({"policy": schedule}, schedule)


POLICIES = dict(_policies())


@dataclass
class Expected:
    """Where our optimizer must be: everything that its rates depend on."""

    policy: str
    bounds: list[tuple[float, float]]
    momenta: list[tuple[float, float]] | None
    position: int = 0
    #: positions at which a cycle ended
    ends: list[int] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Return the schedule's rates, exactly. The paper's formula must agree up to rounding."""
        policy = POLICIES[self.policy]
        rates = policy.schedule.rates(self.position, self.bounds)
        if policy.formula is not None:
            by_paper = [policy.formula(self.position, *bounds) for bounds in self.bounds]
            assert rates == pytest.approx(by_paper, rel=1e-9, abs=1e-12)
        return rates

    def feed_rates(self, twin: Optimizer, rates: list[float] | None = None) -> None:
        for group, lr in zip(twin.param_groups, rates or self.rates(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def feed(self, twin: Optimizer, rates: list[float] | None = None) -> None:
        self.feed_rates(twin, rates)
        if self.momenta is None:
            return
        momenta = POLICIES[self.policy].schedule.momenta(self.position, self.momenta)
        for group, momentum in zip(twin.param_groups, momenta, strict=True):
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum

    def stepped(self) -> None:
        self.position += 1
        if POLICIES[self.policy].schedule.is_cycle_end(self.position):
            self.ends.append(self.position)
