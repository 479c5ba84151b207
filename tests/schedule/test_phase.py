"""Compare each setting of a phase with its formula, written here in exact arithmetic."""

from __future__ import annotations

import math
import pickle
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clr_optim.schedule import Phase, Schedule, one_cycle, sequence, triangular

LOW = {"lower": (0.0, 0.0)}


def of(**settings):
    return Schedule("mine", [Phase(**settings)])


def to_power(x: Fraction, power: float) -> float:
    """Return x^power in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(x.numerator) / Decimal(x.denominator)
        return float(exact ** Decimal(power))


def position(step: int, up: int, top: int, down: int) -> Fraction:
    """Return the position in a cycle that rises, rests and falls."""
    offset = step % (up + top + down)
    if offset < up:
        return Fraction(offset, up)
    return Fraction(1) if offset <= up + top else Fraction(up + top + down - offset, down)


@given(
    step=st.integers(0, 10**6) | st.integers(0, 2**70),
    sizes=st.tuples(*[st.integers(0, 50)] * 3).filter(lambda s: s[0] + s[2] > 0),
    power=st.sampled_from([0.3, 0.5, 0.9, 1.0, 2.0, 7.5]),
)
def test_a_window_with_a_top_to_a_power(step, sizes, power):
    up, top, down = sizes
    phase = Phase(step_size_up=up, step_size_top=top, step_size_down=down, power=power)
    assert phase.period == sum(sizes)
    x = position(step, up, top, down)
    assert phase.position(step) == pytest.approx(float(x), rel=2e-16)
    assert phase.shape(step)[1] == pytest.approx(to_power(x, power), rel=1e-15 * max(1, power))


@given(step=st.integers(0, 9_999), down=st.integers(1, 9_999))
def test_the_sqrt_window_is_1_less_the_root_of_the_progress(step, down):
    step %= down
    with localcontext() as context:
        context.prec = 60
        exact = float(1 - (Decimal(step) / Decimal(down)).sqrt())
    window = Phase(step_size_up=0, step_size_down=down, window="sqrt").shape(step)[1]
    assert window == pytest.approx(exact, rel=4e-16 * max(1.0, math.sqrt(down)))


@given(step=st.integers(0, 10**9), scale=st.integers(1, 10**5))
def test_the_inverse_window_to_the_power_of_one_half(step, scale):
    schedule = of(window="inverse", step_size_down=scale, power=0.5, **LOW)
    exact = to_power(Fraction(scale, scale + step), 0.5)
    assert schedule(step, 0.1, 2.0) == pytest.approx(2.0 * exact, rel=1e-15)
    assert schedule.cycle(step) == 0.0
    assert schedule.steps_to_cycle_end(step) is None


def test_a_drop_is_an_exponential_fall_that_keeps_the_top_exact():
    settings = {"step_size_up": 0, "step_size_top": 3, "step_size_down": 4, "base_drop": 0.0625}
    schedule = of(**settings, lower=(0.0, 1.0))
    falls = [3.0, 3.0, 3.0, 3.0, 1.5, 0.75, 0.375]
    assert schedule(range(14), 1.0, 3.0).tolist() == falls * 2
    # Momentum mirrors the position.
    assert schedule.momentum(range(7), 0.0, 1.0).tolist() == [0, 0, 0, 0, 0.25, 0.5, 0.75]


def test_a_boxcar_makes_stairs():
    stairs = of(window="boxcar", step_size_up=0, step_size_down=30, cycle_gamma=0.5, **LOW)
    for step in (0, 29, 30, 89, 1000, 10**9):
        assert stairs(step, 0.0, 0.1) == 0.1 * 0.5 ** (step // 30)
    assert [step for step in range(99) if stairs.is_cycle_end(step)] == [30, 60, 90]


@given(
    step=st.integers(0, 10**5), stride=st.integers(1, 500), window=st.sampled_from(["hann", "sqrt"])
)
def test_a_stride_holds_the_rate(step, stride, window):
    settings = {
        "step_size_up": 700, "step_size_down": 300, "window": window, "gamma": 0.999,
        "base_gamma": 0.9999,
    }  # fmt: skip
    strided, smooth = of(**settings, stride=stride), of(**settings)
    assert strided(step, 0.1, 1.0) == smooth(step // stride * stride, 0.1, 1.0)
    assert strided.steps_to_cycle_end(step) == smooth.steps_to_cycle_end(step)


@given(step=st.integers(0, 500), cycles=st.integers(0, 9))
def test_decays_go_on_from_the_first_step_and_cycle(step, cycles):
    settings = {"step_size_up": 3, "gamma": 0.99, "cycle_gamma": 0.75, "base_gamma": 0.98}
    whole = of(**settings)
    rest = of(**settings, first_step=6 * cycles, first_cycle=cycles)
    assert rest(step, 0.1, 1.0) == whole(step + 6 * cycles, 0.1, 1.0)
    assert rest.momentum(step) == whole.momentum(step + 6 * cycles)
    for mode in ("cycle", "iterations"):
        scaled = {"step_size_up": 3, "scale_fn": lambda x: 1 / (x + 1), "scale_mode": mode}
        rest = of(**scaled, first_step=6 * cycles, first_cycle=cycles)
        assert rest(step, 0.1, 1.0) == of(**scaled)(step + 6 * cycles, 0.1, 1.0)


def test_a_schedule_without_the_new_settings_is_stored_as_before():
    stored = '{"format":1,"name":"triangular","phases":[{"step_size_down":2,"step_size_up":2}]}'
    assert triangular(2).to_json() == stored
    assert Schedule.from_json(stored) == triangular(2)


def test_every_new_setting_round_trips():
    phase = Phase(
        step_size_up=1, step_size_top=2, step_size_down=3, power=0.5, base_drop=0.25, stride=4,
        first_step=5, first_cycle=6, cycle_start=7, cycle_steps=8, window="sqrt",
    )  # fmt: skip
    schedule = Schedule("mine", [phase])
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    assert len(schedule.to_dict()["phases"][0]) == 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size_top": -1}, "step_size_top must be an integer >= 0, got -1"),
        ({"stride": 0}, "stride must be an integer >= 1, got 0"),
        ({"first_step": -1}, "first_step must be an integer >= 0"),
        ({"first_cycle": 0.5}, "first_cycle must be a whole number"),
        ({"cycle_steps": -1}, "cycle_steps must be an integer >= 0"),
        ({"cycle_start": 3}, "cycle_start=3 with cycle_steps=None"),
        ({"cycle_start": 3, "cycle_steps": 3}, "cycle_start=3 with cycle_steps=3"),
        ({"power": 0.0}, "power must be a finite number > 0, got 0.0"),
        ({"base_drop": 1.5}, "base_drop must be a finite number > 0 and <= 1, got 1.5"),
        ({"window": "boxcar", "power": 2.0}, "power=2.0 has no effect with window='boxcar'"),
        ({"window": "inverse"}, "step_size_up=2, .* do not go with window='inverse'"),
        ({"step_size_up": 0, "step_size_top": 5}, "do not go with window='triangle'"),
        (
            {"step_size_up": 0, "window": "constant", "base_drop": 0.5},
            "base_drop=0.5 has no effect with window='constant'",
        ),
        ({"step_size_up": 0, "window": "constant", "step_size_top": 5}, "has no cycle"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Phase(**{"step_size_up": 2, **settings})


# ---- cycles over several phases, and none


def ends(schedule, until=60):
    return [step for step in range(until) if schedule.is_cycle_end(step)]


def test_cycle_ends_of_composed_schedules():
    assert ends(triangular(4).with_warmup(5), 25) == [13, 21]
    assert ends(one_cycle(20)) == [20]
    assert ends(one_cycle(20).with_warmup(5)) == [25]
    both = sequence([(one_cycle(20), 20), (one_cycle(20), None)])
    assert ends(both) == [20, 40]
    assert [both.cycle(step) for step in (0, 10, 20, 35, 40, 50)] == [0, 0.5, 1, 1.75, 2, 2]
    # A cycle that is cut off counts, and no hook fires.
    cut = sequence([(one_cycle(20), 12), (triangular(3).with_warmup(4), None)])
    assert ends(cut, 30) == [22, 28]
    assert [cut.cycle(step) for step in (6, 12, 14, 19, 22)] == [0.3, 1, 1, 1.5, 2]


def test_a_part_of_one_cycle_knows_its_place():
    begin = Phase(step_size_up=4, step_size_down=0, steps=4, cycle_steps=9)
    middle = Phase(window="constant", steps=3, cycle_start=4, cycle_steps=9)
    end = Phase(step_size_up=0, step_size_down=8, cycle_start=7, cycle_steps=9)
    schedule = Schedule("mine", [begin, middle, end])
    assert ends(schedule) == [9]
    assert [schedule.steps_to_cycle_end(step) for step in (0, 4, 8, 9, 30)] == [9, 5, 1, None, None]
    assert [schedule.cycle(step) for step in (0, 3, 9, 30)] == [0, 3 / 9, 1, 1]
