"""One phase of a schedule: its window, its decay and its ends."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
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

WINDOWS = ("triangle", "welch", "hann")

SCALE_MODES = ("cycle", "iterations")

# No rate is beyond it: an infinite one would be NaN in the weights as soon as a gradient is 0.
LARGEST = sys.float_info.max

ScaleFn = Callable[[float], float]


def check_step(step: object) -> int:
    """A step of somebody else's; ints of our own come by here at every step of an optimizer."""
    if type(step) is int and step >= 0:
        return step
    return check_int("step", step, minimum=0)


def power(gamma: float, exponent: int) -> float:
    """gamma^exponent in float64: at most the largest float, so that 0 times it is 0."""
    if gamma == 1.0 or exponent == 0:
        return 1.0
    try:
        power = exponent * math.log2(gamma)
    except OverflowError:  # an exponent beyond float64 itself
        power = -math.inf if gamma < 1.0 else math.inf
    return 2.0**power if power < 1024.0 else LARGEST


def clamp(value: float) -> float:
    """Return the value, or the largest float of its sign where the value is infinite."""
    return max(-LARGEST, min(value, LARGEST))


def window_value(kind: str, x: float) -> float:
    if kind == "triangle":
        return x
    if kind == "welch":
        return x * (2.0 - x)
    if kind == "hann":
        # Half a period of 1 − cos, written so that it does not cancel near x = 0.
        return math.sin(0.5 * math.pi * x) ** 2
    return 1.0


def _check_ends(name: str, value: object) -> tuple[float, float]:
    ends = values_of(value)
    if ends is None or len(ends) != 2:
        raise TypeError(
            f"{name} must be a pair (multiple of base_lr, multiple of max_lr), got {value!r}"
        )
    return (check_number(f"{name}[0]", ends[0]), check_number(f"{name}[1]", ends[1]))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a schedule with one window, one cycle length and one decay.

    Steps inside a phase count from its own start, and so do its cycles.

    Args:
        step_size_up: steps of the rising half of a cycle, an integer >= 0.
        step_size_down: steps of the falling half; ``None`` is ``step_size_up``. Not both may be 0,
            except with ``window="constant"``, which has no cycle.
        window: ``"triangle"``, ``"welch"`` (parabolic), ``"hann"`` (sinusoidal) or ``"constant"``.
        steps: how many steps the phase lasts; ``None``, in the last phase only, is without end.
        gamma: factor of the amplitude per step.
        cycle_gamma: factor of the amplitude per cycle.
        base_gamma: factor of the lower bound per step; above 1 only where ``steps`` is given, and
            an optimizer takes the phase only if ``base_gamma**steps`` is a finite number. The
            other two are in (0, 1].
        base_lr, max_lr: bounds of the phase's own, instead of each group's.
        lower, upper: the phase's ends as multiples ``(of base_lr, of max_lr)``, summed;
            ``(1, 0)`` and ``(0, 1)`` are the bounds themselves.
        cycle_momentum: whether momentum moves in this phase, where it is cycled at all;
            otherwise it stays at its maximum.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`: the amplitude is
            multiplied by ``scale_fn(cycle)``, cycles counted from 1, or by
            ``scale_fn(step)`` for ``scale_mode="iterations"``, the only one of the two that goes
            with ``window="constant"``.

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
    window: str = "triangle"
    steps: int | None = None
    gamma: float = 1.0
    cycle_gamma: float = 1.0
    base_gamma: float = 1.0
    base_lr: float | None = None
    max_lr: float | None = None
    lower: tuple[float, float] = (1.0, 0.0)
    upper: tuple[float, float] = (0.0, 1.0)
    cycle_momentum: bool = True
    scale_fn: ScaleFn | None = None
    scale_mode: str = "cycle"

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("step_size_up", check_int("step_size_up", self.step_size_up, minimum=0))
        down = self.step_size_up if self.step_size_down is None else self.step_size_down
        put("step_size_down", check_int("step_size_down", down, minimum=0))
        check_choice("window", self.window, (*WINDOWS, "constant"))
        if (self.period == 0) != (self.window == "constant"):
            raise ValueError(
                f"step_size_up={self.step_size_up} and step_size_down={self.step_size_down} do not "
                f"go with window={self.window!r}: a cycle needs at least one step up or down, "
                "and window='constant' has no cycle"
            )
        if self.steps is not None:
            put("steps", check_int("steps", self.steps, minimum=1))
        for name in ("gamma", "cycle_gamma", "base_gamma"):
            # The lower bound of a phase that ends may rise; without end it would overflow.
            rises = name == "base_gamma" and self.steps is not None
            top = math.inf if rises else 1.0
            put(name, check_number(name, getattr(self, name), open_minimum=True, maximum=top))
        if (self.base_lr is None) != (self.max_lr is None):
            raise ValueError(
                f"base_lr={self.base_lr!r} and max_lr={self.max_lr!r}: a phase has both bounds of "
                "its own or neither"
            )
        if self.base_lr is not None and self.max_lr is not None:
            put("base_lr", check_number("base_lr", self.base_lr))
            put("max_lr", check_number("max_lr", self.max_lr))
            check_bounds(self.base_lr, self.max_lr)
        put("lower", _check_ends("lower", self.lower))
        put("upper", _check_ends("upper", self.upper))
        put("cycle_momentum", check_bool("cycle_momentum", self.cycle_momentum))
        if self.scale_fn is not None and not callable(self.scale_fn):
            raise TypeError(f"scale_fn must be a callable of one number, got {self.scale_fn!r}")
        check_choice("scale_mode", self.scale_mode, SCALE_MODES)
        if self.scale_fn is not None and self.window == "constant" and self.scale_mode == "cycle":
            raise ValueError(
                f"scale_fn={self.scale_fn!r} with scale_mode='cycle' scales the amplitude of a "
                "cycle, and a phase with window='constant' has none: use scale_mode='iterations'"
            )

    @functools.cached_property
    def period(self) -> int:
        """Steps of one cycle; 0 where there is none."""
        down = self.step_size_up if self.step_size_down is None else self.step_size_down
        return self.step_size_up + down

    @property
    def has_bounds(self) -> bool:
        """Whether the phase has bounds of its own."""
        return self.base_lr is not None

    def position(self, step: int) -> float:
        """How far up the cycle a step is: 0 at its ends, 1 at its top (and where there is none).

        Args:
            step: an integer >= 0, counted from the phase's start.

        Returns:
            x(step), in [0, 1].

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.
        """
        period = self.period
        if period == 0:
            return 1.0
        offset, up = check_step(step) % period, self.step_size_up
        return offset / up if offset < up else (period - offset) / (period - up)

    def amplitude(self, step: int) -> float:
        """What is left of the amplitude at a step: 1 at first.

        Args:
            step: an integer >= 0, counted from the phase's start.

        Returns:
            a(step), or what ``scale_fn`` returns.

        Raises:
            TypeError, ValueError: if ``scale_fn`` returns no finite number.
        """
        step = check_step(step)
        if self.scale_fn is not None:
            x = step // self.period + 1 if self.scale_mode == "cycle" else step
            # Whatever comes back goes into the weights: None or NaN must not.
            return check_number(f"scale_fn({x})", self.scale_fn(x), minimum=-math.inf)
        scale = power(self.gamma, step)
        if self.cycle_gamma != 1.0:
            scale *= power(self.cycle_gamma, step // self.period if self.period else 0)
        return scale

    def ends(self, base_lr: float, max_lr: float) -> tuple[float, float]:
        """The lower and the upper end of the rate for a group.

        Args:
            base_lr, max_lr: the group's bounds; a phase with bounds of its own does not look at
                them.

        Returns:
            ``(lower, upper)`` of the module's formula.

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
        """All of the module's formula that does not depend on the bounds.

        Args:
            step: an integer >= 0, counted from the phase's start.

        Returns:
            b, w and a, the decay of the lower bound, the window, what is left of the amplitude.

        Example:
            >>> Phase(step_size_up=2, gamma=0.5).shape(1)
            (1.0, 0.5, 0.5)
        """
        return (
            power(self.base_gamma, step),
            window_value(self.window, self.position(step)),
            self.amplitude(step),
        )


TOP = (0.0, 1.0)
BOTTOM = (1.0, 0.0)


def hold(at: tuple[float, float] = TOP, **options: Any) -> Phase:
    return Phase(window="constant", lower=at, upper=at, cycle_momentum=False, **options)


# doctest finds a class by its __module__, which is the public one.
__test__ = {"Phase": Phase}
