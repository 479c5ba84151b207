"""Formulas of schedules, exact at any position: the tests compare host and device with them."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

from clr_optim import schedule

BASE, MAX = 0.001, 0.006


def triangle(step, up, down=None):
    """Return where in its rise or fall a step is, exactly."""
    period = up + (up if down is None else down)
    at = step % period
    return Fraction(at, up) if at < up else Fraction(period - at, period - up)


def amplitude(of, upper=MAX, lower=BASE):
    return float(Fraction(lower) + (Fraction(upper) - Fraction(lower)) * of)


def power(gamma, step):
    """Return a power to forty digits."""
    with localcontext() as context:
        context.prec = 40
        return Fraction(Decimal(gamma) ** step)


SLOW = 1 - 2.0**-31  # 2**31 steps leave a measurable size
FORMULAS = {
    "triangular": (
        schedule.triangular(step_size_up=2000, step_size_down=3001),
        lambda t: amplitude(triangle(t, 2000, 3001)),
    ),
    "longer than an int32": (
        schedule.triangular(step_size_up=2**31 + 7, step_size_down=2**33),
        lambda t: amplitude(triangle(t, 2**31 + 7, 2**33)),
    ),
    "triangular2": (
        schedule.triangular2(step_size_up=2**30),
        lambda t: amplitude(triangle(t, 2**30) / 2 ** min(t // 2**31, 2000)),
    ),
    "exp_range": (
        schedule.exp_range(step_size_up=7, gamma=SLOW),
        lambda t: amplitude(triangle(t, 7) * power(SLOW, min(t, 2**44))),
    ),
    "sequence": (
        schedule.sequence(
            [(schedule.triangular(step_size_up=3), 2**31 + 1), (schedule.triangular(5), None)]
        ),
        lambda t: amplitude(
            triangle(t, 3) if t < 2**31 + 1 else triangle(t - 2**31 - 1, 5)
        ),
    ),
}  # fmt: skip
