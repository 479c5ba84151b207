"""Compare schedules with independent formulas, in exact fractions where possible."""

from __future__ import annotations

import base64
import copy
import math
import pickle
import re
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clr_optim.schedule import (
    Phase,
    Schedule,
    decay,
    exp,
    exp_range,
    exp_range_bounds,
    fixed,
    one_cycle,
    ramp,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
)

BASE, MAX = 0.001, 0.006
PROBES = [0, 1, 2, 999, 1999, 2000, 2001, 3999, 4000, 4001, 123_456, 10**9 + 7, 10**12, 10**12 + 1]


def paper_triangle(step: int, step_size: int) -> Fraction:
    """Return the paper's max(0, 1 − x), in exact arithmetic."""
    cycle = math.floor(1 + Fraction(step, 2 * step_size))
    x = abs(Fraction(step, step_size) - 2 * cycle + 1)
    return max(Fraction(0), 1 - x)


def close(value: float, exact: Fraction | float, relative: float = 1e-15) -> bool:
    return abs(Fraction(value) - Fraction(exact)) <= Fraction(relative) * abs(Fraction(exact))


def bounds() -> tuple[Fraction, Fraction]:
    return Fraction(BASE), Fraction(MAX)


@pytest.mark.parametrize("step_size", [1, 7, 1000, 2000])
@pytest.mark.parametrize("step", PROBES)
def test_triangular_is_the_papers_code(step, step_size):
    base, top = bounds()
    exact = base + (top - base) * paper_triangle(step, step_size)
    assert close(triangular(step_size)(step, BASE, MAX), exact, 4e-16)


@pytest.mark.parametrize("step", [0, 1, 2000, 3999, 4000, 6000, 4000 * 52 + 2000])
def test_triangular2_halves_the_amplitude_each_cycle(step):
    base, top = bounds()
    cycle = step // 4000
    exact = base + (top - base) * paper_triangle(step, 2000) / 2**cycle
    assert close(triangular2(2000)(step, BASE, MAX), exact, 4e-16)


def test_triangular2_is_right_where_torch_overflows():
    schedule = triangular2(step_size_up=1)
    for cycle in (1025, 1074, 1080, 5000, 10**15):
        step = 2 * cycle + 1  # the top of a cycle counted from 0
        exact = Fraction(1, 2**cycle) if cycle < 2000 else Fraction(0)
        got = schedule(step)
        assert got == float(exact)
        assert schedule(step, BASE, MAX) == BASE if cycle >= 1080 else True
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    reference = torch.optim.lr_scheduler.CyclicLR(
        optimizer, BASE, MAX, step_size_up=1, mode="triangular2", cycle_momentum=False
    )
    with pytest.raises(OverflowError):
        reference.scale_fn(1026)


@pytest.mark.parametrize("step", [0, 1, 1999, 2000, 30_000, 100_000])
def test_exp_range_in_both_readings(step):
    base, top = bounds()
    with_gamma = Fraction(0.99994) ** step
    triangle = paper_triangle(step, 2000)
    torchs = base + (top - base) * triangle * with_gamma
    assert close(exp_range(2000)(step, BASE, MAX), torchs, 1e-14)
    papers = (base + (top - base) * triangle) * with_gamma
    assert close(exp_range_bounds(2000)(step, BASE, MAX), papers, 1e-14)


def test_exp_range_at_a_trillion_is_its_limit():
    assert exp_range(2000)(10**12 + 2000, BASE, MAX) == BASE
    assert exp_range_bounds(2000)(10**12 + 2000, BASE, MAX) == 0.0
    slow = 1 - 2**-42  # decays to e^-0.227; the reference is float64 pow
    step = 10**12 + 2000
    assert close(exp_range(2000, gamma=slow)(step), math.exp(step * math.log1p(-(2**-42))), 1e-12)


@pytest.mark.parametrize(
    ("window", "formula"),
    [
        ("triangle", lambda x: x),
        # Welch's parabola over the whole cycle, whose middle is the top
        ("welch", lambda x: 1 - (1 - x) ** 2),
        ("hann", lambda x: (1 - math.cos(math.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize(("up", "down"), [(4, 4), (3, 5), (0, 6), (6, 0), (1, 9)])
def test_windows_and_unequal_halves(window, formula, up, down):
    schedule = triangular(up, down, window=window)
    for step in range(3 * (up + down)):
        offset = step % (up + down)
        x = offset / up if offset < up else (up + down - offset) / down
        assert schedule(step) == pytest.approx(formula(x), abs=1e-15)


def test_halves_of_zero_are_sawteeth():
    assert triangular(4, 0)([0, 1, 2, 3, 4]).tolist() == [0.0, 0.25, 0.5, 0.75, 0.0]
    assert triangular(0, 4)([0, 1, 2, 3, 4]).tolist() == [1.0, 0.75, 0.5, 0.25, 1.0]


def test_fixed_decay_and_exp():
    assert fixed()([0, 10**12], BASE, MAX).tolist() == [MAX, MAX]
    assert fixed(0.03)(5) == 0.03
    # the paper's Table 1: 0.007 to 0.001 over 4000 iterations, then constant
    table = decay(4000, base_lr=0.001, max_lr=0.007)
    for step in (0, 1, 1000, 3999):
        exact = Fraction(0.007) + (Fraction(0.001) - Fraction(0.007)) * Fraction(step, 4000)
        assert close(table(step), exact, 1e-15)
    assert table([4000, 4001, 10**12]).tolist() == [0.001] * 3
    for step in (0, 1, 70_000):
        assert close(exp(0.006)(step), Fraction(0.006) * Fraction(0.99994) ** step, 1e-14)
    assert exp(gamma=0.5)(3, BASE, MAX) == MAX / 8


def test_table_2_of_the_paper():
    rows = [  # base_lr, max_lr, step size, start, end
        (0.001, 0.005, 2000, 0, 16_000),
        (0.0001, 0.0005, 1000, 16_000, 22_000),
        (0.00001, 0.00005, 500, 22_000, 25_000),
    ]
    table2 = sequence([(triangular2(s, base_lr=b, max_lr=m), e - a) for b, m, s, a, e in rows])
    assert table2.steps == 25_000
    assert table2.has_bounds
    for base, top, step_size, start, end in rows:
        for step in {start, start + 1, start + step_size, (start + end) // 2 + 17, end - 1}:
            local = step - start  # cycles count from the start of the row
            exact = Fraction(base) + (Fraction(top) - Fraction(base)) * paper_triangle(
                local, step_size
            ) / 2 ** (local // (2 * step_size))
            assert close(table2(step), exact, 1e-15)
    assert table2.cycle(15_999) == pytest.approx(4 - 1 / 4000)
    assert table2.cycle(16_000) == 4.0
    assert table2.cycle(17_000) == 4.5
    assert table2.is_cycle_end(16_000)
    assert table2.steps_to_cycle_end(15_999) == 1
    assert table2.steps_to_cycle_end(16_000) == 2000


def test_one_cycle():
    schedule = one_cycle(100, pct_start=0.4, final_div_factor=100)
    base, top = 0.01, 0.1
    assert schedule(0, base, top) == base
    assert schedule(40, base, top) == top
    assert schedule(80, base, top) == base
    assert schedule(99, base, top) == pytest.approx(base / 100, rel=1e-14)
    assert schedule(200, base, top) == schedule(99, base, top)
    rates = schedule(np.arange(100), base, top)
    assert (np.diff(rates[:41]) > 0).all()
    assert (np.diff(rates[40:]) < 0).all()
    momenta = schedule.momentum(np.arange(100), 0.85, 0.95)
    assert momenta[0] == momenta[80] == momenta[99] == 0.95
    assert momenta[40] == pytest.approx(0.85)
    assert (np.diff(momenta[:41]) < 0).all()
    # odd lengths and the extremes of pct_start still reach the end on the last step
    for total in range(3, 30):
        for pct in (1e-6, 0.3, 0.45, 0.5):
            s = one_cycle(total, pct_start=pct, final_div_factor=10)
            assert s(total - 1, 1.0, 2.0) == pytest.approx(0.1)


@given(
    total=st.integers(3, 60) | st.sampled_from([1000, 2**53 + 5, 2**63 - 1]),
    pct_start=st.floats(1e-6, 0.5),
    final_div_factor=st.sampled_from([1.0, 10.0, 1e4, 1e300]),
    window=st.sampled_from(["triangle", "welch", "hann"]),
)
def test_one_cycle_is_one_cycle(total, pct_start, final_div_factor, window):
    """The cycle ends after the last step, and at no other step."""
    schedule = one_cycle(
        total, pct_start=pct_start, final_div_factor=final_div_factor, window=window
    )
    stored = Schedule.from_json(schedule.to_json())
    probes = range(2 * total) if total < 100 else [0, 1, total // 2, total - 1, total, total + 1]
    for step in probes:
        for each in (schedule, stored):
            assert each.is_cycle_end(step) == (step == total)
            assert each.steps_to_cycle_end(step) == (total - step if step < total else None)
    cycles = [schedule.cycle(step) for step in probes]
    assert cycles == sorted(cycles)
    assert [cycle == 1.0 for cycle in cycles] == [step >= total for step in probes]
    assert cycles[0] == 0.0


def test_a_one_cycle_is_stored_as_before():
    """A checkpoint of an earlier version resumes without a warning of another policy."""
    assert one_cycle(20).to_json() == (
        '{"format":1,"name":"one_cycle","phases":['
        '{"step_size_down":9,"step_size_up":9,"steps":18},'
        '{"cycle_momentum":false,"lower":[0.0001,0.0],"step_size_down":1,"steps":1,'
        '"upper":[1.0,0.0]},'
        '{"cycle_momentum":false,"lower":[0.0001,0.0],"step_size_down":0,"upper":[0.0001,0.0],'
        '"window":"constant"}]}'
    )


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_warm_restarts_are_torchs(multiplier):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=MAX)
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, 5, T_mult=multiplier, eta_min=BASE
    )
    schedule = warm_restarts(5, period_multiplier=multiplier)
    for step in range(400):
        assert schedule(step, BASE, MAX) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_warm_restarts_unroll_to_at_most_62_phases():
    for multiplier in (2, 3, 10, 1000):
        schedule = warm_restarts(1, period_multiplier=multiplier)
        assert len(schedule.phases) <= 62
        assert schedule.phases[-1].steps is None
    schedule = warm_restarts(1, period_multiplier=2)
    for n in (1, 5, 39, 61):
        assert schedule(2**n - 1) == 1.0  # the n-th restart
    assert 0.0 <= schedule(10**30) <= 1.0


def test_ramps():
    linear = ramp(11, 0.0, 0.02)
    for step in range(11):
        assert close(linear(step), Fraction(0.02) * Fraction(step, 10), 4e-16)
    assert linear([10, 11, 10**12]).tolist() == [0.02] * 3
    assert linear.steps_to_cycle_end(0) == 11  # a finite schedule's cycle ends after its last step
    wide = ramp(5, 1e-6, 1e-2, mode="exponential")
    assert wide([0, 1, 2, 3, 4]).tolist() == pytest.approx(
        [1e-6, 1e-5, 1e-4, 1e-3, 1e-2], rel=1e-13
    )
    assert wide(4) == 1e-2
    assert ramp(3)([0, 1, 2], BASE, MAX).tolist() == [BASE, pytest.approx((BASE + MAX) / 2), MAX]


def test_an_exponential_ramp_between_each_groups_own_bounds():
    schedule = ramp(5, mode="exponential", ratio=1e4)
    assert not schedule.has_bounds
    own = ramp(5, 1e-6, 1e-2, mode="exponential")
    for step in range(7):
        wide, narrow, frozen = schedule.rates(step, [(1e-6, 1e-2), (1e-7, 1e-3), (0.0, 0.0)])
        assert wide == own(step)
        assert narrow == pytest.approx(wide / 10, rel=1e-13)
        assert frozen == 0.0
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "ratio must be a finite number > 1, got 1.0", {"ratio": 1.0}),
        (TypeError, "ratio must be a number, got 'x'", {"ratio": "x"}),
        (ValueError, "leave it out with mode='linear'", {"ratio": 2.0, "mode": "linear"}),
        (ValueError, "start_lr=1.0, end_lr=2.0", {"ratio": 2.0, "start_lr": 1.0, "end_lr": 2.0}),
        (ValueError, "or the ratio of each group's bounds", {}),
    ],
)
def test_wrong_ratios_are_refused(error, message, arguments):
    with pytest.raises(error, match=message):
        ramp(3, **{"mode": "exponential", **arguments})


def test_sequence_flattens_nests_and_cuts():
    inner = sequence([(triangular(2), 6), (fixed(), None)])
    outer = sequence([(inner, 8), (triangular(1), 3), (exp(gamma=0.5), None)])
    flat = [triangular(2)(s) for s in range(6)] + [1.0, 1.0] + [0.0, 1.0, 0.0] + [1.0, 0.5, 0.25]
    assert [outer(s) for s in range(14)] == flat
    # 6 steps hold one and a half cycles of 4: the half cycle counts, and is never complete
    assert [outer.cycle(s) for s in range(13)] == [
        0,
        0.25,
        0.5,
        0.75,
        1,
        1.25,
        2,
        2,
        2,
        2.5,
        3,
        4,
        4,
    ]
    assert [s for s in range(20) if outer.is_cycle_end(s)] == [4, 10]
    assert [outer.steps_to_cycle_end(s) for s in (0, 3, 4, 7, 9, 10, 13)] == [
        4, 1, 6, 3, 1, None, None,
    ]  # fmt: skip
    assert sequence([(triangular(2), 3)])(7) == triangular(2)(7)  # the last goes on


def test_momentum_cycles_against_the_rate():
    schedule = triangular2(4)
    steps = np.arange(40)
    rate = schedule(steps)
    assert np.allclose(schedule.momentum(steps, 0.8, 0.9), 0.9 - 0.1 * rate, rtol=1e-15)
    assert schedule.momentum(0, 0.8, 0.9) == 0.9
    assert schedule.momentum(4, 0.8, 0.9) == pytest.approx(0.8)
    assert fixed().momentum(3, 0.8, 0.9) == 0.9


def test_scale_fn_in_both_modes():
    by_cycle = triangular(2, scale_fn=lambda cycle: 1 / cycle)
    assert by_cycle([2, 6, 10]).tolist() == [1.0, 1 / 2, 1 / 3]
    by_step = triangular(2, scale_fn=lambda step: 0.5**step, scale_mode="iterations")
    assert by_step([2, 6]).tolist() == [0.25, 0.5**6]


ALL = [
    triangular(3, 5),
    triangular2(3, window="welch"),
    exp_range(4, gamma=0.9),
    exp_range_bounds(4, gamma=0.9, base_lr=0.1, max_lr=0.2),
    fixed(),
    fixed(0.1),
    decay(7),
    exp(gamma=0.9),
    one_cycle(20, window="hann"),
    warm_restarts(3, period_multiplier=2),
    ramp(5),
    ramp(5, 1e-5, 1.0, mode="exponential"),
    sequence([(triangular2(2), 8), (fixed(), 3), (decay(4), None)]),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_a_number_in_a_number_out_an_array_in_an_array_out(schedule):
    steps = np.arange(60).reshape(6, 10)
    out = schedule(steps, BASE, MAX)
    assert out.dtype == np.float64
    assert out.shape == steps.shape
    singles = [schedule(int(s), BASE, MAX) for s in steps.ravel()]
    assert all(type(x) is float for x in singles)
    assert out.ravel().tolist() == singles
    assert schedule(np.int64(3), BASE, MAX) == singles[3]
    assert schedule(range(60), BASE, MAX).tolist() == singles
    assert schedule([], BASE, MAX).shape == (0,)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_round_trips_compare_and_print(schedule):
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule
    assert eval(repr(schedule)) == schedule
    assert hash(Schedule.from_dict(schedule.to_dict())) == hash(schedule)
    assert [s for s in ALL if s == schedule] == [schedule]
    assert schedule != "schedule"
    with pytest.raises(AttributeError, match="immutable"):
        schedule.name = "other"


def test_a_scale_fn_is_named_not_stored():
    schedule = triangular(2, scale_fn=math.sqrt)
    data = schedule.to_dict()
    assert data["phases"][0]["scale_fn"] == "math.sqrt"
    with pytest.raises(ValueError, match=r"scale_fn='math.sqrt'.*from_dict\(data, scale_fn="):
        Schedule.from_dict(data)
    assert Schedule.from_dict(data, scale_fn=math.sqrt) == schedule
    assert Schedule.from_dict(data, scale_fn={"math.sqrt": math.sqrt}) == schedule
    with pytest.raises(ValueError, match=r"has \['math.exp'\], and data has.*\['math.sqrt'\]"):
        Schedule.from_dict(data, scale_fn={"math.exp": math.exp})
    with pytest.raises(ValueError, match=r"scale_fn=math\.sqrt has no effect: data names no fun"):
        Schedule.from_dict(triangular(2).to_dict(), scale_fn=math.sqrt)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(pickle.PicklingError, match=r"scale_fn=.*lambda.*cannot be pickled"):
        pickle.dumps(triangular(2, scale_fn=lambda x: x))


def test_several_scale_fns_come_back_to_their_phases():
    schedule = sequence(
        [(triangular(2, scale_fn=math.erf), 4), (triangular(2, scale_fn=math.erfc), None)]
    )
    data = schedule.to_dict()
    both = {"math.erf": math.erf, "math.erfc": math.erfc}
    assert Schedule.from_dict(data, scale_fn=both) == schedule
    assert Schedule.from_json(schedule.to_json(), scale_fn=both) == schedule
    with pytest.raises(ValueError, match=r"a dictionary with the names \['math.erf', 'math.erfc'"):
        Schedule.from_dict(data, scale_fn=math.erf)
    with pytest.raises(ValueError, match=r"phases'\]\[1\] had scale_fn='math.erfc'"):
        Schedule.from_dict(data, scale_fn={"math.erf": math.erf})


# Written before `clr_optim.schedule` became a package. Phases are stored with a cached period.
OLD_PICKLE = (
    "gASV8QEAAAAAAACMEmNscl9vcHRpbS5zY2hlZHVsZZSMCFNjaGVkdWxllJOUjARtaW5llGgAjAVQaGFzZZSTlCmBlH2U"
    "KIwMc3RlcF9zaXplX3VwlEsCjA5zdGVwX3NpemVfZG93bpRLAowGd2luZG93lIwEaGFubpSMBXN0ZXBzlEsFjAVnYW1t"
    "YZRHP/AAAAAAAACMC2N5Y2xlX2dhbW1hlEc/8AAAAAAAAIwKYmFzZV9nYW1tYZRHP/AAAAAAAACMB2Jhc2VfbHKURz+5"
    "mZmZmZmajAZtYXhfbHKURz/JmZmZmZmajAVsb3dlcpRHP/AAAAAAAABHAAAAAAAAAACGlIwFdXBwZXKURwAAAAAAAAAA"
    "Rz/wAAAAAAAAhpSMDmN5Y2xlX21vbWVudHVtlIiMCHNjYWxlX2ZulE6MCnNjYWxlX21vZGWUjAVjeWNsZZSMBnBlcmlv"
    "ZJRLBHViaAUpgZR9lChoCEsDaAlLA2gKjAh0cmlhbmdsZZRoDE5oDUc/4AAAAAAAAGgORz/wAAAAAAAAaA9HP/AAAAAA"
    "AABoEE5oEU5oEkc/8AAAAAAAAEcAAAAAAAAAAIaUaBRHAAAAAAAAAABHP/AAAAAAAACGlGgWiGgXjARtYXRolIwEc3Fy"
    "dJSTlGgYaBloGksGdWKGlIaUUpRoBoaULg=="
)


def test_an_old_pickle_loads_and_a_new_one_names_the_public_module():
    schedule, phase = pickle.loads(base64.b64decode(OLD_PICKLE))
    first = Phase(step_size_up=2, window="hann", steps=5, base_lr=0.1, max_lr=0.2)
    second = Phase(step_size_up=3, gamma=0.5, scale_fn=math.sqrt)
    assert (schedule, phase) == (Schedule("mine", [first, second]), first)
    assert schedule.rates(13, [(0.0, 3.0)]) == [2 * math.sqrt(2)]
    modules = set(re.findall(rb"clr_optim[.a-z]*", pickle.dumps((schedule, phase), protocol=4)))
    assert modules == {b"clr_optim.schedule"}


steps = st.integers(0, 2**62)
sizes = st.integers(0, 10_000)


@given(step=steps, up=sizes, down=sizes, window=st.sampled_from(["triangle", "welch", "hann"]))
def test_a_cycle_stays_within_its_bounds_and_repeats(step, up, down, window):
    if up + down == 0:
        return
    schedule = triangular(up, down, window=window)
    rate = schedule(step, BASE, MAX)
    assert BASE <= rate <= MAX * (1 + 1e-15)
    assert schedule(step + up + down, BASE, MAX) == rate
    assert schedule(step - step % (up + down) + up, BASE, MAX) == pytest.approx(
        MAX if down else BASE
    )


@given(step=steps, up=st.integers(1, 500), parts=st.lists(st.integers(1, 2000), max_size=5))
def test_steps_to_cycle_end_leads_to_the_next_end(step, up, parts):
    step %= 20_000
    schedule = sequence(
        [*((triangular(up + i), n) for i, n in enumerate(parts)), (triangular(up), None)]
    )
    ahead = schedule.steps_to_cycle_end(step)
    assert ahead is not None
    assert ahead > 0
    assert schedule.is_cycle_end(step + ahead)
    assert not any(schedule.is_cycle_end(s) for s in range(step + 1, step + ahead))
    assert schedule(step + ahead - 1) >= 0


@given(step=st.integers(0, 10**6), gamma=st.floats(0.9, 1.0))
def test_exp_range_bounds_is_triangular_times_the_decay(step, gamma):
    schedule = exp_range_bounds(100, gamma=gamma)(step, BASE, MAX)
    expected = triangular(100)(step, BASE, MAX) * gamma**step
    assert schedule == pytest.approx(expected, rel=1e-9, abs=1e-300)


def cyclic_lr_rates(steps, cycle_momentum, **options):
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0, momentum=0.5
    )
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        optimizer, [0.001, 0.2], [0.006, 0.9], cycle_momentum=cycle_momentum, **options
    )
    optimizer._opt_called = True
    rates = np.empty((steps, 2))
    momenta = np.empty((steps, 2))
    for k in range(steps):
        for i, group in enumerate(optimizer.param_groups):
            rates[k, i], momenta[k, i] = group["lr"], group["momentum"]
        scheduler.step()
    return rates, momenta


SCALE_FNS = {
    "cycle": {"scale_fn": lambda c: 0.5 * (1 + math.sin(c * math.pi / 2.0)), "scale_mode": "cycle"},
    "iterations": {"scale_fn": lambda x: 0.99999**x, "scale_mode": "iterations"},
}


HALVES = [(2000, None), (700, 300), (1000, 3000), (20, None), (3, 8)]


@pytest.mark.parametrize(
    ("up", "down", "cycle_momentum"),
    [(up, down, True) for up, down in HALVES] + [(2000, None, False)],
)
@pytest.mark.parametrize(
    "policy", ["triangular", "triangular2", "exp_range", "scale-cycle", "scale-iterations"]
)
def test_agrees_with_cyclic_lr_over_100_000_steps(policy, up, down, cycle_momentum):
    # The drift of CyclicLR from its own closed form.
    tolerance = 1e-12 if up + (down or up) >= 1000 else 1e-10
    steps = 100_000
    mine = {
        "triangular": lambda: triangular(up, down),
        "triangular2": lambda: triangular2(up, down),
        "exp_range": lambda: exp_range(up, down),
    }
    if policy in mine:
        options = {"mode": policy, "gamma": 0.99994}
        schedule = mine[policy]()
    else:
        options = SCALE_FNS[policy.removeprefix("scale-")]
        schedule = triangular(up, down, **options)
    if policy == "triangular2":
        steps = min(steps, 1000 * (up + (down or up)))  # where CyclicLR overflows
    rates, momenta = cyclic_lr_rates(
        steps, cycle_momentum, step_size_up=up, step_size_down=down, **options
    )
    ours = np.array([schedule.rates(k, [(0.001, 0.006), (0.2, 0.9)]) for k in range(steps)])
    assert np.abs(ours / rates - 1).max() <= tolerance
    if cycle_momentum:
        ours = np.array([schedule.momenta(k, [(0.8, 0.9)] * 2) for k in range(steps)])
        assert np.abs(ours / momenta - 1).max() <= tolerance


def test_evaluating_raises_no_warning_at_any_size():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for schedule in ALL:
            for step in (0, 2**31, 2**53 + 1, 2**63, 10**40, 10**400):
                assert schedule(step, BASE, MAX) >= 0


def test_a_schedule_of_phases_by_hand():
    rise = Phase(step_size_up=4, step_size_down=0, steps=4, lower=(0.1, 0.0))
    rest = Phase(window="constant", lower=(0.0, 1.0), upper=(0.0, 1.0))
    schedule = Schedule("warm-up", [rise, rest])
    assert schedule([0, 2, 4, 100], 0.1, 1.0).tolist() == pytest.approx([0.01, 0.505, 1.0, 1.0])


# ---- rates that would be infinite


LARGEST = sys.float_info.max


def test_ends_of_a_ramp_too_far_apart_are_refused():
    with pytest.raises(ValueError, match=r"end_lr=1e\+300 is more times start_lr=1e-300 than"):
        ramp(5, 1e-300, 1e300, mode="exponential")


def test_a_phase_that_rises_beyond_all_floats_stays_at_the_largest():
    rises = Phase(window="constant", base_gamma=10.0, steps=1000, upper=(1.0, 0.0))
    schedule = Schedule("rises", [rises, Phase(window="constant")])
    assert schedule([300, 500, 999], 1.0, 2.0).tolist() == [approx(1e300), LARGEST, LARGEST]
    assert schedule([300, 500, 999], 0.0, 2.0).tolist() == [0.0] * 3


def approx(value):
    return pytest.approx(value, rel=1e-12)


def test_the_last_phase_goes_on_at_the_largest_float():
    rises = Phase(window="constant", base_gamma=10.0, steps=10, upper=(1.0, 0.0))
    schedule = Schedule("rises", [rises])
    assert schedule([5, 400, 10**12], 1.0, 2.0).tolist() == [approx(1e5), LARGEST, LARGEST]
    assert schedule([5, 400, 10**12], 0.0, 2.0).tolist() == [0.0] * 3
    assert schedule.rates(400, [(0.0, 1.0), (1e-9, 1.0)]) == [0.0, approx(1e-9 * LARGEST)]


@pytest.mark.parametrize(
    ("of_step", "expected"),
    [
        (lambda step: 1e308, LARGEST),
        (lambda step: -1e308, -LARGEST),
        (lambda step: -1.0, -100.0),  # below the base, as in torch
        (lambda step: torch.tensor(0.5), 50.0),
        (lambda step: np.float32(0.5), 50.0),
    ],
)
def test_what_a_scale_fn_returns_gives_a_finite_rate(of_step, expected):
    schedule = triangular(2, scale_fn=of_step, scale_mode="iterations")
    assert schedule(2, 0.0, 100.0) == expected
    assert schedule(0, 0.0, 100.0) == 0.0


factors = st.sampled_from([0.0, 1e-300, 0.5, 1.0, 2.0, 1e200, 1e308, LARGEST])


@given(
    step=st.integers(0, 12) | st.integers(10**3, 10**15),
    base_gamma=st.sampled_from([1e-300, 0.5, 1.0, 1.5, 1e30, 1e150]),
    lower=st.tuples(factors, factors),
    upper=st.tuples(factors, factors),
    bounds=st.tuples(factors, factors),
    scale=st.none() | st.sampled_from([-LARGEST, -1.0, -0.0, 1e-300, LARGEST]),
)
def test_no_rate_is_infinite_or_nan(step, base_gamma, lower, upper, bounds, scale):
    phase = Phase(
        step_size_up=2,
        step_size_down=1,
        steps=3,
        base_gamma=base_gamma,
        lower=lower,
        upper=upper,
        scale_fn=None if scale is None else lambda cycle: scale,
    )
    schedule = Schedule("extreme", [phase])
    assert math.isfinite(schedule.rates(step, [tuple(sorted(bounds))])[0])
    assert math.isfinite(schedule.momenta(step, [(0.0, 1.0)])[0])


def test_rates_of_bounds_that_are_nan_or_infinite_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(TypeError, match=r"bounds must be a list of pairs .*finite number"):
            triangular(2).rates(1, [(0.0, bad)])


# ---- numbers of other types


@pytest.mark.parametrize(
    "number", [np.float64, np.float32, np.array, torch.tensor, lambda x: torch.tensor([x])]
)
def test_numbers_may_be_numpys_or_in_tensors(number):
    assert triangular(number(2), base_lr=number(0.5), max_lr=number(1.0)) == triangular(
        2, base_lr=0.5, max_lr=1.0
    )
    assert exp_range(4, gamma=number(0.5)) == exp_range(4, gamma=0.5)
    assert fixed(number(0.25)) == fixed(0.25)
    assert ramp(number(5), number(0.25), number(0.5)) == ramp(5, 0.25, 0.5)
    assert triangular(2)(number(3), number(0.25), number(0.5)) == triangular(2)(3, 0.25, 0.5)
    pair = Phase(step_size_up=2, lower=[number(0.5), number(0.25)])
    assert pair.lower == (0.5, 0.25)
    assert Schedule.from_json(fixed(number(0.25)).to_json()) == fixed(0.25)


@pytest.mark.parametrize(
    "value",
    [True, torch.tensor(True), np.bool_(True), torch.tensor([0.1, 0.2]), np.array([]), 1j,
     torch.tensor(1j), torch.ones((), device="meta"), "0.1", None, {"lr": 0.1}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_is_none_in_a_tensor_either(value):
    with pytest.raises(TypeError, match="max_lr must be a number, got"):
        triangular(2)(0, 0.0, value)
