"""Cycle ends: hook, ``cycle``, ``steps_to_cycle_end`` and ``lr_at`` agree, for every policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import (
    POLICIES,
    Schedule,
    cosine,
    decay,
    exp,
    exp_range,
    exp_range_bounds,
    fixed,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    ramp,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
    wsd,
    wsd_cycles,
)

FAR = 400


@dataclass(frozen=True)
class Policy:
    """A schedule, the ends of its cycles before ``FAR``, and the step from which it is over."""

    make: Callable[[], Schedule]
    ends: tuple[int, ...]
    over: int | None = None


def every(period: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start + period, FAR, period))


# The ends by the rule. A repeating policy ends a cycle when the steps since its start are a
# multiple of its period; a finite one after its last step; a warm-up and an endless fall never.
CASES = {
    "triangular": Policy(lambda: triangular(2, 3), every(5)),
    "triangular2": Policy(lambda: triangular2(4), every(8)),
    "exp_range": Policy(lambda: exp_range(3, gamma=0.9), every(6)),
    "exp_range_bounds": Policy(lambda: exp_range_bounds(1, gamma=0.9), every(2)),
    "triangular, growing": Policy(
        lambda: triangular(1, period_multiplier=2), (2, 6, 14, 30, 62, 126, 254)
    ),
    "warm_restarts": Policy(lambda: warm_restarts(7), every(7)),
    "warm_restarts, growing": Policy(
        lambda: warm_restarts(1, period_multiplier=3), (1, 4, 13, 40, 121, 364)
    ),
    "one_cycle": Policy(lambda: one_cycle(20), (20,), 20),
    "one_cycle without annealing": Policy(lambda: one_cycle(5, pct_start=0.5), (5,), 5),
    "ramp": Policy(lambda: ramp(9), (9,), 9),
    "ramp, exponential": Policy(lambda: ramp(9, mode="exponential", ratio=8), (9,), 9),
    "decay": Policy(lambda: decay(11), (11,), 11),
    "linear": Policy(lambda: linear(13), (13,), 13),
    "cosine": Policy(lambda: cosine(6), (6,), 6),
    "polynomial": Policy(lambda: polynomial(10, 2), (10,), 10),
    "wsd": Policy(lambda: wsd(3, 5, 4), (12,), 12),
    "wsd without warm-up": Policy(lambda: wsd(0, 0, 4, shape="exp", end=0.1), (4,), 4),
    "wsd_cycles": Policy(lambda: wsd_cycles(3, 5, 4, shape="sqrt"), every(9, 3)),
    "fixed": Policy(fixed, ()),
    "exp": Policy(lambda: exp(gamma=0.9), ()),
    "inverse_sqrt": Policy(lambda: inverse_sqrt(8), ()),
}
NAMES = sorted(CASES)


def test_every_policy_has_a_case():
    assert POLICIES.keys() <= {case.make().name for case in CASES.values()}


def assert_agree(schedule: Schedule, ends: list[int], far: int = FAR) -> None:
    """Assert that the three questions about cycles have the answers that these ends give."""
    stored = Schedule.from_json(schedule.to_json())
    assert stored == schedule
    assert [step for step in range(far) if schedule.is_cycle_end(step)] == ends
    assert [step for step in range(far) if stored.is_cycle_end(step)] == ends
    counted = [sum(end <= step for end in ends) for step in range(far)]
    assert [schedule._timeline.ends(step) for step in range(far)] == counted
    last = ends[-1] if ends else 0
    for step in range(last):
        ahead = min(end for end in ends if end > step) - step
        assert schedule.steps_to_cycle_end(step) == ahead
    after = schedule.steps_to_cycle_end(last)
    assert after is None or last + after >= far
    cycles = [schedule.cycle(step) for step in range(far)]
    assert cycles == sorted(cycles)
    for end in ends:
        # A cycle is done exactly there, and not before.
        assert cycles[end] == math.floor(cycles[end - 1]) + 1
        assert cycles[end - 1] < cycles[end]


@pytest.mark.parametrize("name", NAMES)
def test_one_policy(name):
    case = CASES[name]
    schedule = case.make()
    assert_agree(schedule, list(case.ends))
    if case.over is not None:  # the last rate stays
        last = schedule(case.over, 0.25, 1.0)
        assert {schedule(step, 0.25, 1.0) for step in range(case.over, FAR)} == {last}
        assert schedule.steps_to_cycle_end(case.over) is None
        assert {schedule.cycle(step) for step in range(case.over, FAR)} == {1.0}


@given(
    first=st.sampled_from(NAMES),
    second=st.sampled_from(NAMES),
    length=st.integers(1, 60),
    warmups=st.tuples(*[st.integers(0, 9)] * 3),
)
def test_two_policies_with_and_without_warm_up(first, second, length, warmups):
    """A sequence, each part with a warm-up or none, and a warm-up before the whole."""
    parts = []
    for name, warmup in zip((first, second), warmups[:2], strict=True):
        schedule = CASES[name].make()
        parts.append(schedule.with_warmup(warmup) if warmup else schedule)
    whole = sequence([(parts[0], length), (parts[1], None)])
    begins = [warmups[0], length + warmups[1]]
    ends = [begins[0] + end for end in CASES[first].ends if begins[0] + end <= length]
    ends += [begins[1] + end for end in CASES[second].ends]
    if warmups[2]:
        whole = whole.with_warmup(warmups[2])
        ends = [warmups[2] + end for end in ends]
    assert_agree(whole, [end for end in ends if end < 300], far=300)
    for step in range(0, 300, 7):  # each part counts its steps from its start
        local = step - warmups[2]
        if local >= length:
            assert whole(step, 0.25, 1.0) == parts[1](local - length, 0.25, 1.0)
        elif local >= 0:
            assert whole(step, 0.25, 1.0) == parts[0](local, 0.25, 1.0)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("first", NAMES)
def test_every_composition_of_two(first, warmup):
    for second in NAMES:
        parts = [CASES[name].make() for name in (first, second)]
        if warmup:
            parts = [schedule.with_warmup(warmup) for schedule in parts]
        ends = [warmup + end for end in CASES[first].ends if warmup + end <= 20]
        ends += [20 + warmup + end for end in CASES[second].ends if 20 + warmup + end < 80]
        assert_agree(sequence([(parts[0], 20), (parts[1], None)]), ends, far=80)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_the_hook_of_an_optimizer(name, backend, warmup):
    schedule = CASES[name].make()
    if warmup:
        schedule = schedule.with_warmup(warmup)
    weight = torch.nn.Parameter(torch.ones(3))
    opt = CyclicalOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        schedule,
        backend=backend,
        base_lr=0.25 if schedule.reads_base_lr else None,
    )
    fired, rates, ahead, cycles = [], [], [], []
    has_cycles = schedule.steps_to_cycle_end(0) is not None
    with nullcontext() if has_cycles else pytest.warns(UserWarning, match="has no cycles"):
        opt.register_cycle_end_hook(lambda opt: fired.append(opt.iteration))
    due = [opt.lr_at(step) for step in range(50)]
    for _ in range(50):
        rates.append(opt.get_last_lr())
        ahead.append(opt.steps_to_cycle_end)
        cycles.append(opt.cycle)
        weight.grad = torch.ones(3)
        opt.step()
    assert fired == [warmup + end for end in CASES[name].ends if warmup + end <= 50]
    assert rates == due
    assert cycles == [schedule.cycle(step) for step in range(50)]
    for step, steps in enumerate(ahead):
        later = [end for end in fired if end > step]
        if later:
            assert steps == later[0] - step
        else:
            assert steps is None or step + steps > 50


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("far", [2**40, 2**62, 10**30])
def test_the_count_of_cycle_ends_far_out(name, far):
    """The count goes up by one at a cycle end, however far, and stays at all other steps."""
    schedule = CASES[name].make().with_warmup(5)
    count = schedule._timeline.ends
    for step in range(far, far + 20):
        assert count(step + 1) - count(step) == schedule.is_cycle_end(step + 1)
    if schedule.steps_to_cycle_end(far) is None:
        assert count(far) == len(CASES[name].ends)
    elif name in ("triangular", "triangular2", "exp_range", "exp_range_bounds", "warm_restarts"):
        assert count(far) == (far - 5) // CASES[name].ends[0]


@pytest.mark.parametrize("step", [-1, 1.5, None, "3"])
def test_the_count_of_cycle_ends_refuses_wrong_steps(step):
    with pytest.raises((TypeError, ValueError), match="step must be"):
        triangular(2)._timeline.ends(step)


def test_a_warm_up_is_no_cycle():
    """The examples of the design."""
    assert_agree(triangular(4).with_warmup(5), [*range(13, FAR, 8)])
    assert_agree(one_cycle(20), [20])
    assert_agree(sequence([(one_cycle(20), 20), (triangular(4), None)]), [20, *range(28, FAR, 8)])
    # As the docs once made a warm-up: a ramp that the next part cuts off before its end.
    assert_agree(sequence([(ramp(6), 5), (triangular(4), None)]), [*range(13, FAR, 8)])
