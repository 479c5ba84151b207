"""The formula of the learning rate: :class:`Phase` states the formula, :func:`rates` computes it.

Steps are exact integers. The position in a cycle is an integer modulo, never a sum, so that step
10**12 is as exact as step 10.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clr_optim.checks import (
    check_bool,
    check_bounds,
    check_choice,
    check_int,
    check_number,
    values_of,
)
from clr_optim.schedule.steps import check_step

#: The windows of cycles.
WINDOWS = ("triangle", "welch", "hann", "sqrt")

# The other windows of a phase: at the top throughout (with cycles and without), and the endless
# fall.
_FLAT = ("boxcar", "constant")
_ENDLESS = ("constant", "inverse")

#: What ``scale_fn`` is called with: the number of the cycle, or of the step.
SCALE_MODES = ("cycle", "iterations")

ScaleFn = Callable[[float], float]
#: the functions of a stored schedule: one, or several by their names
ScaleFns = ScaleFn | Mapping[str, ScaleFn] | None

#: The ends of a phase, as multiples of ``base_lr`` and ``max_lr``.
TOP, BOTTOM = (0.0, 1.0), (1.0, 0.0)

# The least values of integer settings.
_INTEGERS = {
    "step_size_up": 0, "step_size_down": 0, "step_size_top": 0, "stride": 1, "first_step": 0,
    "first_cycle": 0, "cycle_start": 0,
}  # fmt: skip

# Rates are finite: an infinite rate times a gradient of 0 would write NaN into the weights.
LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a schedule, with one window, one cycle length and one decay.

    At step ``t``, counted from the start of the phase, the learning rate is::

        lr(t) = b(t)·lower + a(t)·(upper − lower)·w(x(t))^power

    - ``lower`` and ``upper`` are the group's ``base_lr`` and ``max_lr``, unless the arguments of
      these names say otherwise.
    - ``x(t)``, from 0 to 1, is the position in the cycle. The position rises for ``step_size_up``
      steps, stays at 1 for ``step_size_top`` steps and falls for ``step_size_down`` steps.
    - ``w`` is the window, the form of the rise.
    - ``a(t) = cycle_gamma^(first_cycle + cycle) · gamma^(first_step + t)`` is the decay of the
      amplitude.
    - ``b(t) = base_gamma^(first_step + t) · base_drop^(1 − x(t))`` is the decay of the lower end.

    Args:
        step_size_up: steps of the rising half of a cycle, an integer >= 0.
        step_size_down: steps of the falling half; ``None`` is ``step_size_up``. At least one half
            has a step, except with ``window="constant"``, which has no cycle.
        step_size_top: steps at the top, between the rise and the fall.
        window: ``"triangle"``, ``"welch"`` (parabolic), ``"hann"`` (sinusoidal) or ``"sqrt"``
            (1 − √(1 − x)); ``"boxcar"`` (1 throughout, so that only decays move the rate) or
            ``"constant"`` (the same without cycles); or ``"inverse"``, a fall without cycle and end
            with ``x(t) = step_size_down / (step_size_down + t)``.
        power: exponent of the window, above 0.
        steps: the length of the phase; ``None``, in the last phase only, is without end.
        gamma: factor of the amplitude per step, in (0, 1].
        cycle_gamma: factor of the amplitude per cycle, in (0, 1].
        base_gamma: factor of the lower end per step, above 0. A factor above 1 needs ``steps``, and
            an optimizer refuses the phase if ``base_gamma**steps`` is not a finite number.
        base_drop: factor of the lower end at the bottom of a cycle, in (0, 1]: an exponential fall.
        stride: the rate changes after so many steps, an integer >= 1: ``t`` is rounded down to a
            multiple. Use the steps of an epoch for a schedule that changes once per epoch.
        first_step, first_cycle: steps and cycles done before the phase, integers >= 0, from which
            the decays and the numbers of ``scale_fn`` go on.
        cycle_start, cycle_steps: if ``cycle_steps`` is ``None``, each period is a cycle that ends.
            If ``cycle_steps`` is 0, as in a warm-up, no cycle ends. Otherwise the phase is part of
            one cycle of ``cycle_steps`` steps and begins after ``cycle_start`` of these.
        base_lr, max_lr: bounds of the phase, both or neither; neither takes each group's bounds.
        lower, upper: the ends of the rate. Each is a pair of factors, of ``base_lr`` and of
            ``max_lr``, whose products are summed: ``(1, 0)`` is ``base_lr``, ``(0, 1)`` is
            ``max_lr``.
        cycle_momentum: whether momentum cycles in this phase, if the optimizer cycles momentum;
            otherwise momentum stays at its maximum.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`. The amplitude is
            multiplied by ``scale_fn(cycle)``, with cycles counted from 1, or by ``scale_fn(step)``
            for ``scale_mode="iterations"``. With ``window="constant"``, use ``"iterations"``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        Up for two steps, down for four:

        >>> phase = Phase(step_size_up=2, step_size_down=4, gamma=0.5)
        >>> phase.period, phase.position(1), phase.position(3), phase.amplitude(3)
        (6, 0.5, 0.75, 0.125)
        >>> from clr_optim.schedule import Schedule
        >>> Schedule("mine", [phase])([0, 1, 2], base_lr=0.0, max_lr=1.0).tolist()
        [0.0, 0.25, 0.25]
    """

    __module__ = "clr_optim.schedule"  # pickles name the public module

    step_size_up: int = 0
    step_size_down: int | None = None
    step_size_top: int = 0
    window: str = "triangle"
    power: float = 1.0
    steps: int | None = None
    gamma: float = 1.0
    cycle_gamma: float = 1.0
    base_gamma: float = 1.0
    base_drop: float = 1.0
    stride: int = 1
    first_step: int = 0
    first_cycle: int = 0
    cycle_start: int = 0
    cycle_steps: int | None = None
    base_lr: float | None = None
    max_lr: float | None = None
    lower: tuple[float, float] = BOTTOM
    upper: tuple[float, float] = TOP
    cycle_momentum: bool = True
    scale_fn: ScaleFn | None = None
    scale_mode: str = "cycle"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        down = self.step_size_up if self.step_size_down is None else self.step_size_down
        put("step_size_down", down)
        for name, least in _INTEGERS.items():
            put(name, check_int(name, getattr(self, name), minimum=least))
        check_choice("window", self.window, (*WINDOWS, *_FLAT, "inverse"))
        if self.steps is not None:
            put("steps", check_int("steps", self.steps, minimum=1))
        if self.cycle_steps is not None:
            put("cycle_steps", check_int("cycle_steps", self.cycle_steps, minimum=0))
        if self.cycle_start and self.cycle_start >= (self.cycle_steps or 0):
            raise ValueError(
                f"cycle_start={self.cycle_start} with cycle_steps={self.cycle_steps}: the phase "
                "begins within its cycle; leave cycle_start out, or raise cycle_steps above it"
            )
        for name in ("gamma", "cycle_gamma", "base_gamma", "base_drop", "power"):
            # The lower end may rise in a phase that ends. In an endless phase it would overflow.
            rises = name == "base_gamma" and self.steps is not None
            top = math.inf if rises or name == "power" else 1.0
            put(name, check_number(name, getattr(self, name), open_minimum=True, maximum=top))
        _check_window(self)
        if (self.base_lr is None) != (self.max_lr is None):
            raise ValueError(
                f"base_lr={self.base_lr!r} and max_lr={self.max_lr!r}: a phase has either both "
                "bounds or neither"
            )
        if self.base_lr is not None and self.max_lr is not None:
            put("base_lr", check_number("base_lr", self.base_lr))
            put("max_lr", check_number("max_lr", self.max_lr))
            check_bounds(self.base_lr, self.max_lr)
        put("lower", _check_end("lower", self.lower))
        put("upper", _check_end("upper", self.upper))
        put("cycle_momentum", check_bool("cycle_momentum", self.cycle_momentum))
        if self.scale_fn is not None and not callable(self.scale_fn):
            raise TypeError(f"scale_fn must be a callable of one number, got {self.scale_fn!r}")
        check_choice("scale_mode", self.scale_mode, SCALE_MODES)
        if self.scale_fn is not None and self.period == 0 and self.scale_mode == "cycle":
            raise ValueError(
                f"scale_fn={self.scale_fn!r} with scale_mode='cycle' scales the amplitude of a "
                f"cycle, and a phase with window={self.window!r} has none: use "
                "scale_mode='iterations'"
            )

    @functools.cached_property
    def period(self) -> int:
        """Steps of one cycle; 0 in a phase without cycles."""
        if self.window in _ENDLESS:
            return 0
        return self.step_size_up + self.step_size_top + (self.step_size_down or 0)

    @property
    def has_bounds(self) -> bool:
        """Whether the phase has its own bounds, so that it ignores the bounds of groups."""
        return self.base_lr is not None

    def position(self, step: int) -> float:
        """Return the position in the cycle: 0 at both ends, 1 at the top and without a cycle.

        Args:
            step: an integer >= 0, counted from the start of the phase.

        Returns:
            x(step), in [0, 1].

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.
        """
        return _position(self, self._rounded(step))

    def amplitude(self, step: int) -> float:
        """Return the decay of the amplitude: 1 at step 0.

        Args:
            step: an integer >= 0, counted from the start of the phase.

        Returns:
            a(step), or the value that ``scale_fn`` returns.

        Raises:
            TypeError, ValueError: if ``scale_fn`` does not return a finite number.
        """
        return _amplitude(self, self._rounded(step))

    def ends(self, base_lr: float, max_lr: float) -> tuple[float, float]:
        """Return the ends of the rate for a group.

        Args:
            base_lr, max_lr: the bounds of the group; a phase with its own bounds ignores them.

        Returns:
            ``(lower, upper)`` of the formula.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> Phase(step_size_up=1, upper=(0.0, 0.5)).ends(0.1, 0.8)
            (0.1, 0.4)
        """
        if self.base_lr is not None and self.max_lr is not None:
            base_lr, max_lr = self.base_lr, self.max_lr
        (lower_base, lower_max), (upper_base, upper_max) = self.lower, self.upper
        try:
            return (
                lower_base * base_lr + lower_max * max_lr,
                upper_base * base_lr + upper_max * max_lr,
            )
        except (TypeError, OverflowError):
            check_number("base_lr", base_lr)
            check_number("max_lr", max_lr)
            raise

    def shape(self, step: int) -> tuple[float, float, float]:
        """Return the parts of the formula that do not depend on the bounds.

        Args:
            step: an integer >= 0, counted from the start of the phase.

        Returns:
            ``(b, w, a)``, the decay of the lower end, the window to its power, and the decay of
            the amplitude.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> Phase(step_size_up=2, gamma=0.5).shape(1)
            (1.0, 0.5, 0.5)
        """
        step = self._rounded(step)
        x = _position(self, step)
        w = window_value(self.window, x)
        if self.power != 1.0:
            w **= self.power
        b = 1.0
        if self.base_gamma != 1.0 or self.base_drop != 1.0:
            b = _power(self.base_gamma, self.first_step + step, self.base_drop, 1.0 - x)
        return b, w, _amplitude(self, step)

    def _rounded(self, step: object) -> int:
        """Return a step rounded down to a multiple of the stride."""
        step = check_step(step)
        return step if self.stride == 1 else step - step % self.stride


# doctest finds a class by its __module__, which is the public module.
__test__ = {"Phase": Phase}


def rates(
    phase: Phase, shape: tuple[float, float, float], bounds: Sequence[tuple[float, float]]
) -> list[float]:
    """Return the learning rate of each group in a phase, by the formula of Phase.

    Args:
        phase: the phase.
        shape: what :meth:`Phase.shape` returns at the step.
        bounds: ``(base_lr, max_lr)`` of each group.
    """
    b, w, a = shape
    rates = []
    try:
        for base_lr, max_lr in bounds:
            lower, upper = phase.ends(base_lr, max_lr)
            rate = b * lower + (upper - lower) * w * a
            if not -LARGEST <= rate <= LARGEST:
                check_number("base_lr", base_lr, minimum=-math.inf)
                check_number("max_lr", max_lr, minimum=-math.inf)
                lower, upper = _clamp(lower), _clamp(upper)
                rate = _clamp(_clamp(b * lower) + _clamp((upper - lower) * w * a))
            rates.append(rate)
    except (TypeError, ValueError, OverflowError) as error:
        raise _not_pairs("(base_lr, max_lr)", bounds, error) from error
    return rates


def momenta(
    phase: Phase, shape: tuple[float, float, float], bounds: Sequence[tuple[float, float]]
) -> list[float]:
    """Return the momentum of each group in a phase: momentum falls as the rate rises.

    Args:
        phase: the phase.
        shape: what :meth:`Phase.shape` returns at the step.
        bounds: ``(base_momentum, max_momentum)`` of each group.
    """
    _, w, a = shape if phase.cycle_momentum else (0.0, 0.0, 0.0)
    try:
        return [high - (high - low) * w * a for low, high in bounds]
    except (TypeError, ValueError, OverflowError) as error:
        raise _not_pairs("(base_momentum, max_momentum)", bounds, error) from error


def hold(at: tuple[float, float] = TOP, **settings: Any) -> Phase:
    """Return a phase of constant rate, at these multiples of ``base_lr`` and ``max_lr``."""
    return Phase(window="constant", lower=at, upper=at, cycle_momentum=False, **settings)


def _position(phase: Phase, step: int) -> float:
    """Return x of a step that is a multiple of the stride."""
    period, down = phase.period, phase.step_size_down or 0
    if period == 0:
        return down / (down + step) if phase.window == "inverse" else 1.0
    offset, up = step % period, phase.step_size_up
    if offset < up:
        return offset / up
    left = period - offset
    return left / down if left < down else 1.0


def _amplitude(phase: Phase, step: int) -> float:
    """Return a of a step that is a multiple of the stride, or the value of ``scale_fn``."""
    if phase.scale_fn is None and phase.gamma == phase.cycle_gamma == 1.0:
        return 1.0
    time, cycle = phase.first_step + step, phase.first_cycle
    if phase.period:
        cycle += step // phase.period
    if phase.scale_fn is not None:
        x = cycle + 1 if phase.scale_mode == "cycle" else time
        # The value goes into the weights: refuse None and NaN.
        return check_number(f"scale_fn({x})", phase.scale_fn(x), minimum=-math.inf)
    return _power(phase.gamma, time, phase.cycle_gamma, cycle)


def window_value(window: str, x: float) -> float:
    """Return w(x) for a position x in [0, 1]."""
    if window == "triangle":
        return x
    if window == "welch":
        return x * (2.0 - x)
    if window == "hann":
        # Equal to (1 − cos(πx))/2, without cancellation near x = 0.
        return math.sin(0.5 * math.pi * x) ** 2
    if window == "sqrt":
        # Equal to 1 − √(1 − x), without cancellation near x = 0.
        return x / (1.0 + math.sqrt(1.0 - x))
    return x if window == "inverse" else 1.0


def overflows(phase: Phase) -> bool:
    """Return whether the lower end of a phase grows beyond the largest float before it is over."""
    if phase.steps is None:
        return False
    return _power(phase.base_gamma, phase.first_step + phase.steps - 1, 1.0, 0) == LARGEST


def _power(gamma: float, time: int, other: float, count: float) -> float:
    """Return gamma^time · other^count, at most the largest float.

    The product is 2 to the sum of the logarithms. Infinity would not do: a lower end of 0 times the
    product must be 0.

    Args:
        gamma, time: a factor above 0, and its exponent.
        other, count: a factor in (0, 1], and its exponent.
    """
    power = 0.0
    try:
        if gamma != 1.0:
            power = time * math.log2(gamma)
        if other != 1.0:
            power += count * math.log2(other)
    except OverflowError:  # an exponent that no float can hold
        power = math.inf if gamma > 1.0 else -math.inf
    return 2.0**power if power < 1024.0 else LARGEST


def _clamp(value: float) -> float:
    """Return the value, or the largest float of its sign if the value is infinite."""
    return max(-LARGEST, min(value, LARGEST))


def _check_window(phase: Phase) -> None:
    """Raise if the step sizes or the power of a phase do not go with its window."""
    window, up, top, down = (
        phase.window, phase.step_size_up, phase.step_size_top, phase.step_size_down or 0,
    )  # fmt: skip
    if window == "inverse":
        if up or top or not down:
            raise ValueError(
                f"step_size_up={up}, step_size_top={top} and step_size_down={down} do not go with "
                "window='inverse', which falls only: give step_size_up=0 and a step_size_down >= 1"
            )
    elif (up + down == 0) != (window == "constant") or (top and window == "constant"):
        raise ValueError(
            f"step_size_up={up} and step_size_down={down} do not go with window={window!r}: a "
            "cycle needs at least one step up or down, and window='constant' has no cycle"
        )
    if phase.power != 1.0 and window in _FLAT:
        raise ValueError(
            f"power={phase.power!r} has no effect with window={window!r}, whose value is 1: leave "
            "it out"
        )
    if phase.base_drop != 1.0 and window == "constant":
        raise ValueError(
            f"base_drop={phase.base_drop!r} has no effect with window='constant', which has no "
            "cycle: leave it out"
        )


def _check_end(name: str, value: object) -> tuple[float, float]:
    """Return an end of a phase as two factors."""
    factors = values_of(value)
    if factors is None or len(factors) != 2:
        raise TypeError(
            f"{name} must be a pair (multiple of base_lr, multiple of max_lr), got {value!r}"
        )
    return (check_number(f"{name}[0]", factors[0]), check_number(f"{name}[1]", factors[1]))


def _not_pairs(pair: str, bounds: object, error: Exception) -> TypeError:
    return TypeError(f"bounds must be a list of pairs {pair} of numbers, got {bounds!r} ({error})")
