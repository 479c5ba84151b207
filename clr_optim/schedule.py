"""Learning rate and momentum as pure functions of the integer step.

Every policy is a sequence of phases, and one formula serves them all::

    lr(t) = b(t)·lower + a(t)·(upper − lower)·w(x(t))

``lower`` and ``upper`` are the group's ``base_lr`` and ``max_lr`` unless the phase says otherwise,
``w`` is the window, ``x(t)`` in [0, 1] the position in the cycle (rising for ``step_size_up``
steps, falling for ``step_size_down``), ``a`` and ``b`` the decay of amplitude and lower bound::

    a(t) = cycle_gamma^cycle · gamma^t          b(t) = base_gamma^t

Steps are exact integers: the position is an integer modulo, never a sum, so that step 10**12 is as
right as step 10. Powers are taken as 2^(t·log2(gamma)) in float64, which overflows for no cycle.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186; the
argument names are those of :class:`torch.optim.lr_scheduler.CyclicLR`.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
import pickle
import reprlib
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from clr_optim.checks import (
    LAST_STEP,
    check_bool,
    check_bounds,
    check_choice,
    check_int,
    check_momenta,
    check_number,
    values_of,
)

__all__ = [
    "WINDOWS",
    "Phase",
    "Schedule",
    "decay",
    "exp",
    "exp_range",
    "exp_range_bounds",
    "fixed",
    "one_cycle",
    "ramp",
    "sequence",
    "triangular",
    "triangular2",
    "warm_restarts",
]

#: Version of the dictionary that :meth:`Schedule.to_dict` writes.
FORMAT_VERSION = 1

#: The windows a user may choose; ``"constant"`` (w = 1, no cycle) is for phases without one.
WINDOWS = ("triangle", "welch", "hann")

SCALE_MODES = ("cycle", "iterations")

# Periods of warm restarts are unrolled: this many phases reach past any step an int64 can count.
_MAX_PHASES = 62

# No rate is beyond it: an infinite one would be NaN in the weights as soon as a gradient is 0.
_LARGEST = sys.float_info.max

ScaleFn = Callable[[float], float]


def _step(step: object) -> int:
    """A step of somebody else's; ints of our own come by here at every step of an optimizer."""
    if type(step) is int and step >= 0:
        return step
    return check_int("step", step, minimum=0)


def _power(gamma: float, exponent: int) -> float:
    """gamma^exponent in float64: at most the largest float, so that 0 times it is 0."""
    if gamma == 1.0 or exponent == 0:
        return 1.0
    try:
        power = exponent * math.log2(gamma)
    except OverflowError:  # an exponent beyond float64 itself
        power = -math.inf if gamma < 1.0 else math.inf
    return 2.0**power if power < 1024.0 else _LARGEST


def _held(value: float) -> float:
    """Return the value, or the largest float of its sign where the value is infinite."""
    return max(-_LARGEST, min(value, _LARGEST))


def _window(kind: str, x: float) -> float:
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
        >>> Schedule("mine", [phase])([0, 1, 2], base_lr=0.0, max_lr=1.0).tolist()
        [0.0, 0.25, 0.25]
    """

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
        offset, up = _step(step) % period, self.step_size_up
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
        step = _step(step)
        if self.scale_fn is not None:
            x = step // self.period + 1 if self.scale_mode == "cycle" else step
            # Whatever comes back goes into the weights: None or NaN must not.
            return check_number(f"scale_fn({x})", self.scale_fn(x), minimum=-math.inf)
        scale = _power(self.gamma, step)
        if self.cycle_gamma != 1.0:
            scale *= _power(self.cycle_gamma, step // self.period if self.period else 0)
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
            _power(self.base_gamma, step),
            _window(self.window, self.position(step)),
            self.amplitude(step),
        )


@overload
def _each(function: Callable[[int], float], step: int) -> float: ...
@overload
def _each(
    function: Callable[[int], float], step: npt.NDArray[Any] | Sequence[int]
) -> npt.NDArray[np.float64]: ...
def _each(
    function: Callable[[int], float], step: int | npt.NDArray[Any] | Sequence[int]
) -> float | npt.NDArray[np.float64]:
    """``function`` at one step or at each of an array's, so that both give the same bits."""
    if isinstance(step, numbers.Real):
        return function(check_int("step", step, minimum=0))
    try:
        steps = np.asarray(step)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor without data
        raise TypeError(
            f"step must be an integer or an array of integers, got {step!r} ({error})"
        ) from error
    if steps.ndim == 0:
        return function(check_int("step", steps.item(), minimum=0))
    if steps.size and steps.dtype.kind not in "iuO":
        raise TypeError(
            f"step must be an integer or an array of integers, got an array of {steps.dtype}"
        )
    values = [function(check_int("step", s, minimum=0)) for s in steps.ravel().tolist()]
    return np.array(values, dtype=np.float64).reshape(steps.shape)


def check_growth(schedule: Schedule) -> None:
    """Raise if a lower bound grows beyond all floats before its phase is over."""
    for i, phase in enumerate(schedule.phases):
        if phase.steps is not None and _power(phase.base_gamma, phase.steps - 1) == _LARGEST:
            raise ValueError(
                f"phases[{i}] of the schedule {schedule.name!r} has "
                f"base_gamma={phase.base_gamma!r} and steps={phase.steps}: base_gamma**steps is "
                "beyond the largest float, and the rate would put infinities into the weights; "
                "lower one of the two"
            )


def _end_of_one_cycle(name: str, phases: Sequence[Phase], start_of_last: int) -> int | None:
    """Return the step at which a ``one_cycle``'s only cycle is complete; None of other schedules.

    Its phases rise, fall and fall further, and the last one holds the rate of the last step.
    Told by the name, since a checkpoint that stores the phases has no other word for it.
    """
    last = phases[-1]
    holds = last.window == "constant" and last.steps is None and last.scale_fn is None
    return start_of_last + 1 if name == "one_cycle" and holds and start_of_last else None


def _no_pairs(name: str, pair: str, value: object, error: Exception) -> TypeError:
    return TypeError(f"{name} must be a list of pairs {pair} of numbers, got {value!r} ({error})")


class Schedule:
    """A sequence of phases: a pure function of the integer step.

    Built by the constructors of this module; ``Schedule(name, phases)`` is there for curves that
    none of them draws. After the last phase's ``steps`` that phase goes on.

    Schedules are immutable, compare by value, print readably and round-trip through a plain
    dictionary (:meth:`to_dict`, :meth:`from_dict`).

    Args:
        name: what the schedule is called in messages. The phases of a schedule that is called
            ``"one_cycle"`` are a single cycle, if the last one holds its rate.
        phases: at least one; all but the last have ``steps``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> schedule = triangular(step_size_up=2)
        >>> schedule(1, base_lr=0.0, max_lr=1.0)
        0.5
        >>> schedule([0, 1, 2, 3, 4], base_lr=0.0, max_lr=1.0).tolist()
        [0.0, 0.5, 1.0, 0.5, 0.0]
        >>> schedule == Schedule("triangular", [Phase(step_size_up=2)])
        True
    """

    __slots__ = ("_cycles", "_only_end", "_starts", "name", "phases")

    name: str
    phases: tuple[Phase, ...]
    _starts: list[int]
    _cycles: list[int]
    _only_end: int | None

    def __init__(self, name: str, phases: Sequence[Phase]) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty string, got {name!r}")
        if isinstance(phases, (str, bytes)) or not isinstance(phases, Sequence):
            raise TypeError(f"phases must be a sequence of Phase, got {phases!r}")
        if not phases:
            raise ValueError("phases is empty: a schedule needs at least one Phase")
        starts, cycles = [0], [0]
        for i, phase in enumerate(phases):
            if not isinstance(phase, Phase):
                raise TypeError(f"phases[{i}] must be a Phase, got {phase!r}")
            if i + 1 < len(phases):
                if phase.steps is None:
                    raise ValueError(
                        f"phases[{i}] has steps=None, so that phases[{i + 1}] would never begin: "
                        "give steps to all phases but the last"
                    )
                starts.append(starts[-1] + phase.steps)
                # A cycle cut off by the end of its phase still counts: the next begins a new one.
                begun = -(-phase.steps // phase.period) if phase.period else 0
                cycles.append(cycles[-1] + begun)
        for slot, value in (
            ("name", name),
            ("phases", tuple(phases)),
            ("_starts", starts),
            ("_cycles", cycles),
            ("_only_end", _end_of_one_cycle(name, phases, starts[-1])),
        ):
            object.__setattr__(self, slot, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Schedule is immutable: cannot set {name!r}; build another one")

    def __reduce__(self) -> tuple[type[Schedule], tuple[str, tuple[Phase, ...]]]:
        for phase in self.phases:
            if phase.scale_fn is not None:
                try:
                    pickle.dumps(phase.scale_fn)
                except Exception as error:
                    raise pickle.PicklingError(
                        f"scale_fn={describe_callable(phase.scale_fn)} cannot be pickled: define "
                        "it with `def` at the top of a module, or as an instance of a class there"
                    ) from error
        return (Schedule, (self.name, self.phases))

    # Nothing in a schedule changes, so a copy may be the thing itself, a lambda in it included.
    def __copy__(self) -> Schedule:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return (self.name, self.phases) == (other.name, other.phases)

    def __hash__(self) -> int:
        return hash((self.name, self.phases))

    def __repr__(self) -> str:
        phases = ", ".join(
            "Phase("
            + ", ".join(
                f"{f.name}={getattr(phase, f.name)!r}"
                for f in fields(Phase)
                if getattr(phase, f.name) != f.default
            )
            + ")"
            for phase in self.phases
        )
        return f"Schedule({self.name!r}, [{phases}])"

    @property
    def steps(self) -> int | None:
        """Length of the whole schedule in steps; ``None`` where it is without end."""
        last = self.phases[-1].steps
        return None if last is None else self._starts[-1] + last

    @property
    def has_bounds(self) -> bool:
        """Whether every phase has bounds of its own, so that none is taken from the groups."""
        return all(phase.has_bounds for phase in self.phases)

    @property
    def scale_fn(self) -> ScaleFn | None:
        """The first ``scale_fn`` among the phases."""
        return next((p.scale_fn for p in self.phases if p.scale_fn is not None), None)

    def locate(self, step: int) -> tuple[int, int]:
        """Which phase a step is in.

        Args:
            step: an integer >= 0.

        Returns:
            The index of the phase, and the step counted from its start.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> sequence([(fixed(0.1), 5), (fixed(0.2), None)]).locate(7)
            (1, 2)
        """
        step = _step(step)
        index = bisect_right(self._starts, step) - 1
        return index, step - self._starts[index]

    @overload
    def __call__(self, step: int, base_lr: float = ..., max_lr: float = ...) -> float: ...
    @overload
    def __call__(
        self, step: npt.NDArray[Any] | Sequence[int], base_lr: float = ..., max_lr: float = ...
    ) -> npt.NDArray[np.float64]: ...
    def __call__(
        self,
        step: int | npt.NDArray[Any] | Sequence[int],
        base_lr: float = 0.0,
        max_lr: float = 1.0,
    ) -> float | npt.NDArray[np.float64]:
        """The learning rate at ``step``.

        Args:
            step: an integer >= 0 (0 is the first step), or an array of them.
            base_lr, max_lr: a group's bounds; with the defaults the curve runs from 0 to 1. Phases
                with bounds of their own do not look at them.

        Returns:
            A float, or for an array one of float64 and the same shape.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> triangular(2)([[0, 1], [2, 3]], base_lr=1.0, max_lr=3.0)
            array([[1., 2.],
                   [3., 2.]])
        """
        base, top = check_number("base_lr", base_lr), check_number("max_lr", max_lr)
        check_bounds(base, top)

        def at(step: int) -> float:
            return self.rates(step, [(base, top)])[0]

        return _each(at, step)

    def rates(self, step: int, bounds: Sequence[tuple[float, float]]) -> list[float]:
        """The learning rates at one step for several groups, as an optimizer asks for them.

        A rate that would be infinite is the largest float.

        Args:
            step: an integer >= 0.
            bounds: ``(base_lr, max_lr)`` of each group.

        Returns:
            One rate per group.

        Raises:
            TypeError, ValueError: for a step that is none, and what is no pairs of numbers.

        Example:
            >>> triangular(2).rates(1, [(0.0, 1.0), (1.0, 3.0)])
            [0.5, 2.0]
        """
        index, local = self.locate(step)
        phase = self.phases[index]
        b, w, a = phase.shape(local)
        rates = []
        try:
            for base_lr, max_lr in bounds:
                lower, upper = phase.ends(base_lr, max_lr)
                rate = b * lower + (upper - lower) * w * a
                if not -_LARGEST <= rate <= _LARGEST:
                    check_number("base_lr", base_lr, minimum=-math.inf)
                    check_number("max_lr", max_lr, minimum=-math.inf)
                    lower, upper = _held(lower), _held(upper)
                    rate = _held(_held(b * lower) + _held((upper - lower) * w * a))
                rates.append(rate)
        except (TypeError, ValueError, OverflowError) as error:
            raise _no_pairs("bounds", "(base_lr, max_lr)", bounds, error) from error
        return rates

    @overload
    def momentum(
        self, step: int, base_momentum: float = ..., max_momentum: float = ...
    ) -> float: ...
    @overload
    def momentum(
        self,
        step: npt.NDArray[Any] | Sequence[int],
        base_momentum: float = ...,
        max_momentum: float = ...,
    ) -> npt.NDArray[np.float64]: ...
    def momentum(
        self,
        step: int | npt.NDArray[Any] | Sequence[int],
        base_momentum: float = 0.8,
        max_momentum: float = 0.9,
    ) -> float | npt.NDArray[np.float64]:
        """The momentum at ``step``: it cycles against the rate, highest where the rate is lowest.

        ``max_momentum − a(t)·(max_momentum − base_momentum)·w(x(t))``.

        Args:
            step: an integer >= 0 (0 is the first step), or an array of them.
            base_momentum, max_momentum: its bounds, in [0, 1].

        Returns:
            A float, or for an array one of float64 and the same shape.

        Raises:
            TypeError, ValueError: for a step that is none, and for bounds that are none.

        Example:
            >>> triangular(2).momentum([0, 1, 2], 0.8, 1.0).tolist()
            [1.0, 0.9, 0.8]
        """
        low = check_number("base_momentum", base_momentum, maximum=1.0)
        high = check_number("max_momentum", max_momentum, maximum=1.0)
        check_momenta(low, high)

        def at(step: int) -> float:
            return self.momenta(step, [(low, high)])[0]

        return _each(at, step)

    def momenta(self, step: int, bounds: Sequence[tuple[float, float]]) -> list[float]:
        """The momenta at one step for several groups, as an optimizer asks for them.

        Args:
            step: an integer >= 0.
            bounds: ``(base_momentum, max_momentum)`` of each group.

        Returns:
            One momentum per group.

        Raises:
            TypeError, ValueError: for a step that is none, and what is no pairs of numbers.

        Example:
            >>> triangular(2).momenta(1, [(0.8, 1.0), (0.0, 0.0)])
            [0.9, 0.0]
        """
        index, local = self.locate(step)
        phase = self.phases[index]
        _, w, a = phase.shape(local) if phase.cycle_momentum else (0.0, 0.0, 0.0)
        try:
            return [high - (high - low) * w * a for low, high in bounds]
        except (TypeError, ValueError, OverflowError) as error:
            raise _no_pairs("bounds", "(base_momentum, max_momentum)", bounds, error) from error

    def cycle(self, step: int) -> float:
        """Cycles done at a step, of which 2.5 is half-way through the third; 0.0 without any.

        In a sequence the cycles of all phases count on; one cut off by the end of its phase counts
        as done there. A :func:`one_cycle` is one cycle as long as the whole of it.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: for a step that is none.

        Example:
            >>> triangular(2).cycle(10)
            2.5
        """
        step = check_int("step", step, minimum=0)
        if self._only_end is not None:
            if step >= self._only_end:
                return 1.0
            # The quotient of a very long one is rounded to 1.0 before its end.
            return min(step / self._only_end, math.nextafter(1.0, 0.0))
        index, local = self.locate(step)
        phase = self.phases[index]
        if phase.period == 0:
            return float(self._cycles[index])
        whole, rest = divmod(local, phase.period)
        try:
            return self._cycles[index] + whole + rest / phase.period
        except OverflowError:  # more than a float can say
            return math.inf

    def is_cycle_end(self, step: int) -> bool:
        """Whether the step before this one completed a cycle.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: for a step that is none.

        Example:
            >>> [step for step in range(10) if triangular(2).is_cycle_end(step)]
            [4, 8]
        """
        step = check_int("step", step, minimum=0)
        if step == 0 or self._only_end is not None:
            return step > 0 and step == self._only_end
        # Asked of the step just done, so that a cycle that ends with its phase belongs to it.
        index, local = self.locate(step - 1)
        period = self.phases[index].period
        return period > 0 and (local + 1) % period == 0

    def steps_to_cycle_end(self, step: int) -> int | None:
        """Steps from ``step`` until a cycle is complete, a whole cycle at a cycle's end.

        A cycle cut off by the end of its phase is never complete: the count then runs to the end
        of the first one that is. ``None`` where no cycle will be.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: for a step that is none.

        Example:
            >>> triangular(2).steps_to_cycle_end(5)
            3
        """
        step = check_int("step", step, minimum=0)
        if self._only_end is not None:
            return self._only_end - step if step < self._only_end else None
        index, local = self.locate(step)
        start = step - local
        for i in range(index, len(self.phases)):
            phase = self.phases[i]
            last = i + 1 == len(self.phases)
            if phase.period:
                end = (local // phase.period + 1) * phase.period
                # Past its `steps` the last phase goes on, and so do its cycles.
                if last or end <= (phase.steps or 0):
                    return start + end - step
            start += phase.steps or 0
            local = 0
        return None

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of strings, numbers, lists and None, for :meth:`from_dict`.

        A ``scale_fn`` cannot be stored: its name stands in its place.

        Example:
            >>> fixed(0.1).to_dict()["name"], triangular(2).to_dict()["phases"]
            ('fixed', [{'step_size_up': 2, 'step_size_down': 2}])
        """
        phases = []
        for phase in self.phases:
            row: dict[str, Any] = {}
            for f in fields(Phase):
                value = getattr(phase, f.name)
                if value != f.default:
                    row[f.name] = list(value) if isinstance(value, tuple) else value
            if phase.scale_fn is not None:
                row["scale_fn"] = describe_callable(phase.scale_fn)
            phases.append(row)
        return {"format": FORMAT_VERSION, "name": self.name, "phases": phases}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, scale_fn: ScaleFn | None = None) -> Schedule:
        """The schedule that :meth:`to_dict` described.

        Args:
            data: the dictionary.
            scale_fn: the callable, where the schedule had one.

        Raises:
            TypeError: if ``data`` is no dictionary.
            ValueError: if it is not one of ours, was written by a newer version, or names a
                ``scale_fn`` and none is given.

        Example:
            >>> Schedule.from_dict(triangular(2).to_dict()) == triangular(2)
            True
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"data must be a dictionary from Schedule.to_dict, got {data!r}")
        version = data.get("format")
        if not isinstance(version, int) or version != FORMAT_VERSION:
            raise ValueError(
                f"data has format={version!r}, and this version reads "
                f"{FORMAT_VERSION}: take a dictionary from Schedule.to_dict of this version, or "
                "update clr_optim"
            )
        rows = data.get("phases")
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(f"data['phases'] must be a list of dictionaries, got {rows!r}")
        known = {f.name for f in fields(Phase)}
        phases = []
        for i, row in enumerate(rows):
            unknown = sorted(map(str, set(row) - known))
            if unknown:
                raise ValueError(
                    f"data['phases'][{i}] has unknown keys {unknown}; known: {sorted(known)}"
                )
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
            }
            if "scale_fn" in values:
                if scale_fn is None:
                    raise ValueError(
                        f"data['phases'][{i}] had scale_fn={values['scale_fn']!r}, and code is not "
                        "stored: pass it as from_dict(data, scale_fn=...)"
                    )
                values["scale_fn"] = scale_fn
            phases.append(Phase(**values))
        return cls(data.get("name", ""), phases)

    def to_json(self) -> str:
        """:meth:`to_dict` as one line of JSON, the same for equal schedules.

        Example:
            >>> fixed(0.1).to_json() == fixed(0.1).to_json() != fixed(0.2).to_json()
            True
        """
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, scale_fn: ScaleFn | None = None) -> Schedule:
        """The schedule that :meth:`to_json` wrote.

        Args:
            text: the JSON.
            scale_fn: the callable, where the schedule had one.

        Raises:
            TypeError, ValueError: as :meth:`from_dict`, and for what is no JSON.

        Example:
            >>> Schedule.from_json(triangular(2).to_json())
            Schedule('triangular', [Phase(step_size_up=2, step_size_down=2)])
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"text is no JSON of a schedule: {reprlib.repr(text)}; give what "
                "Schedule.to_json() returned"
            ) from error
        return cls.from_dict(data, scale_fn=scale_fn)


def describe_callable(function: Callable[..., Any]) -> str:
    """``module.name`` of a callable, for messages and checkpoints."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"


def _cyclic(
    name: str,
    step_size_up: int,
    step_size_down: int | None,
    window: str,
    base_lr: float | None,
    max_lr: float | None,
    **options: Any,
) -> Schedule:
    check_choice("window", window, WINDOWS)
    phase = Phase(
        step_size_up=step_size_up,
        step_size_down=step_size_down,
        window=window,
        base_lr=base_lr,
        max_lr=max_lr,
        **options,
    )
    return Schedule(name, [phase])


def _check_gamma(gamma: object) -> float:
    return check_number("gamma", gamma, open_minimum=True, maximum=1.0)


def triangular(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
    scale_fn: ScaleFn | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """The rate rises from ``base_lr`` to ``max_lr`` and falls back, for ever.

    Args:
        step_size_up: steps of the rising half, an integer >= 0.
        step_size_down: steps of the falling half, ``step_size_up`` if ``None``; not both 0.
        window: ``"triangle"``, ``"welch"`` (parabolic) or ``"hann"`` (sinusoidal).
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's own.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`: multiplies the
            amplitude by ``scale_fn(cycle)`` (counted from 1) or ``scale_fn(step)``
            (``scale_mode="iterations"``).

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> triangular(2)([0, 1, 2, 3, 4, 5], base_lr=1.0, max_lr=3.0).tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    """
    return _cyclic(
        "triangular", step_size_up, step_size_down, window, base_lr, max_lr,
        scale_fn=scale_fn, scale_mode=scale_mode,
    )  # fmt: skip


def triangular2(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """As :func:`triangular`, the amplitude halved after each cycle (right at any cycle).

    Args:
        step_size_up, step_size_down, window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> triangular2(1)([1, 3, 5], base_lr=0.0, max_lr=1.0).tolist()
        [1.0, 0.5, 0.25]
    """
    return _cyclic(
        "triangular2", step_size_up, step_size_down, window, base_lr, max_lr, cycle_gamma=0.5
    )


def exp_range(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    gamma: float = 0.99994,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """As :func:`triangular`, the amplitude multiplied by gamma^step: max falls towards base.

    This is the reading of :class:`torch.optim.lr_scheduler.CyclicLR`. The paper's words, that each
    boundary declines, are :func:`exp_range_bounds`.

    Args:
        gamma: factor per step, in (0, 1]; the paper's is 0.99994.
        step_size_up, step_size_down, window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> exp_range(1, gamma=0.5)([1, 3], base_lr=0.0, max_lr=1.0).tolist()
        [0.5, 0.125]
    """
    return _cyclic(
        "exp_range", step_size_up, step_size_down, window, base_lr, max_lr,
        gamma=_check_gamma(gamma),
    )  # fmt: skip


def exp_range_bounds(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    gamma: float = 0.99994,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """As :func:`triangular`, both boundaries multiplied by gamma^step.

    What the paper says ("each boundary value declines by an exponential factor of gamma^iteration")
    and what its figures show; :func:`exp_range` is torch's reading.

    Args:
        gamma: factor per step, in (0, 1]; the paper's is 0.99994.
        step_size_up, step_size_down, window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> exp_range_bounds(1, gamma=0.5)([0, 1, 2, 3], base_lr=1.0, max_lr=2.0).tolist()
        [1.0, 1.0, 0.25, 0.25]
    """
    gamma = _check_gamma(gamma)
    return _cyclic(
        "exp_range_bounds", step_size_up, step_size_down, window, base_lr, max_lr,
        gamma=gamma, base_gamma=gamma,
    )  # fmt: skip


_TOP = (0.0, 1.0)
_BOTTOM = (1.0, 0.0)


def _hold(at: tuple[float, float] = _TOP, **options: Any) -> Phase:
    return Phase(window="constant", lower=at, upper=at, cycle_momentum=False, **options)


def _own(lr: float | None) -> dict[str, Any]:
    lr = None if lr is None else check_number("lr", lr)
    return {"base_lr": lr, "max_lr": lr}


def fixed(lr: float | None = None) -> Schedule:
    """A constant rate.

    Args:
        lr: the rate, >= 0; ``None`` is each group's ``max_lr`` (the rate the user gave it, unless
            told otherwise).

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> fixed()([0, 10**12], base_lr=0.1, max_lr=0.4).tolist()
        [0.4, 0.4]
    """
    return Schedule("fixed", [_hold(**_own(lr))])


def decay(steps: int, *, base_lr: float | None = None, max_lr: float | None = None) -> Schedule:
    """The rate falls in a straight line from ``max_lr`` to ``base_lr``, and stays there.

    The paper's ``decay``, which shows that falling alone does not do what cycling does
    (its Table 1: from 0.007 to 0.001 over 4,000 iterations).

    Args:
        steps: length of the fall, an integer >= 1; ``lr(steps)`` is ``base_lr``.
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's own.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, Table 1.

    Example:
        >>> decay(2)([0, 1, 2, 3], base_lr=1.0, max_lr=2.0).tolist()
        [2.0, 1.5, 1.0, 1.0]
    """
    steps = check_int("steps", steps, minimum=1)
    fall = Phase(step_size_up=0, step_size_down=steps, steps=steps, base_lr=base_lr, max_lr=max_lr)
    return Schedule("decay", [fall, _hold(_BOTTOM, base_lr=base_lr, max_lr=max_lr)])


def exp(lr: float | None = None, *, gamma: float = 0.99994) -> Schedule:
    """The rate falls exponentially, as ``lr``·gamma^step.

    Args:
        lr: the rate of step 0, >= 0; ``None`` is each group's ``max_lr``.
        gamma: factor per step, in (0, 1].

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, which compares cycles with it.

    Example:
        >>> exp(gamma=0.5)([0, 1, 2], max_lr=2.0).tolist()
        [2.0, 1.0, 0.5]
    """
    return Schedule("exp", [_hold(base_gamma=_check_gamma(gamma), **_own(lr))])


def one_cycle(
    total_steps: int,
    *,
    pct_start: float = 0.45,
    final_div_factor: float = 1e4,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """One cycle, then annealing far below it.

    The rate rises from ``base_lr`` to ``max_lr`` for ``pct_start`` of the steps, falls back for as
    many, and in those left falls on to ``base_lr / final_div_factor``, which the last step,
    ``total_steps − 1``, uses (and any after it). Momentum mirrors the cycle and stays at its
    maximum during the annealing. All of it is one cycle, which ends after ``total_steps`` steps.

    Args:
        total_steps: length of the training in steps, an integer >= 3.
        pct_start: the rising part of it, in (0, 0.5].
        final_div_factor: ``base_lr`` divided by the last rate, >= 1.
        window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: L. N. Smith, N. Topin, *Super-Convergence*, arXiv 1708.07120.

    Example:
        >>> one_cycle(6, pct_start=0.34, final_div_factor=10)(
        ...     [0, 1, 2, 3, 4, 5], base_lr=1.0, max_lr=3.0).tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0, 0.1]
    """
    total_steps = check_int("total_steps", total_steps, minimum=3, maximum=LAST_STEP)
    pct_start = check_number("pct_start", pct_start, open_minimum=True, maximum=0.5)
    final_div_factor = check_number("final_div_factor", final_div_factor, minimum=1.0)
    check_choice("window", window, WINDOWS)
    half = min(max(1, round(pct_start * total_steps)), (total_steps - 1) // 2)
    left = total_steps - 1 - 2 * half
    bounds: dict[str, Any] = {"base_lr": base_lr, "max_lr": max_lr}
    end = (1.0 / final_div_factor, 0.0)
    phases = [Phase(step_size_up=half, window=window, steps=2 * half, **bounds)]
    if left:
        phases.append(
            Phase(
                step_size_up=0,
                step_size_down=left,
                window=window,
                steps=left,
                lower=end,
                upper=_BOTTOM,
                cycle_momentum=False,
                **bounds,
            )
        )
    phases.append(_hold(end, **bounds))
    return Schedule("one_cycle", phases)


def warm_restarts(
    period: int,
    *,
    period_multiplier: int = 1,
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """The rate falls from ``max_lr`` to ``base_lr`` along half a cosine, then starts again.

    Args:
        period: steps of the first fall, an integer >= 1.
        period_multiplier: each fall is this many times as long as the one before, an integer >= 1.
            (At most 62 are unrolled, which reaches past 2**62 steps; the last one then repeats.)
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's own.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: I. Loshchilov, F. Hutter, *SGDR*, arXiv 1608.03983; as
    :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` with ``T_0``, ``T_mult``.

    Example:
        >>> warm_restarts(2)([0, 1, 2, 3]).round(12).tolist()
        [1.0, 0.5, 1.0, 0.5]
    """
    period = check_int("period", period, minimum=1)
    multiplier = check_int("period_multiplier", period_multiplier, minimum=1)
    lengths = [period]
    while multiplier > 1 and len(lengths) < _MAX_PHASES and sum(lengths) < 2**62:
        lengths.append(lengths[-1] * multiplier)
    phases = [
        Phase(
            step_size_up=0,
            step_size_down=length,
            window="hann",
            steps=None if i + 1 == len(lengths) else length,
            base_lr=base_lr,
            max_lr=max_lr,
        )
        for i, length in enumerate(lengths)
    ]
    return Schedule("warm_restarts", phases)


def ramp(
    num_steps: int,
    start_lr: float | None = None,
    end_lr: float | None = None,
    *,
    mode: str = "linear",
    ratio: float | None = None,
) -> Schedule:
    """The LR range test's ramp: the rate rises once, from step 0 to step ``num_steps − 1``.

    Args:
        num_steps: an integer >= 2; the last of them, and any after it, uses the upper end.
        start_lr, end_lr: the ends, both or neither; neither takes each group's ``base_lr`` and
            ``max_lr``.
        mode: ``"linear"``, as in the paper, or ``"exponential"`` for searches over decades
            (``start_lr`` must then be above 0; momentum, if cycled, then stays at its maximum).
        ratio: where an exponential ramp is to take each group's bounds: how many times its
            ``base_lr`` each group's ``max_lr`` is, a number above 1, the same for all groups.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.3.

    Example:
        >>> ramp(3, 0.0, 1.0)([0, 1, 2, 3]).tolist()
        [0.0, 0.5, 1.0, 1.0]
        >>> ramp(3, mode="exponential", ratio=16)([0, 1, 2], base_lr=0.5, max_lr=8.0).tolist()
        [0.5, 2.0, 8.0]
    """
    num_steps = check_int("num_steps", num_steps, minimum=2, maximum=LAST_STEP)
    check_choice("mode", mode, ("linear", "exponential"))
    if (start_lr is None) != (end_lr is None):
        raise ValueError(
            f"start_lr={start_lr!r} and end_lr={end_lr!r}: give both ends of the ramp, or neither"
        )
    if start_lr is not None and end_lr is not None:
        start_lr = check_number("start_lr", start_lr, open_minimum=mode == "exponential")
        end_lr = check_number("end_lr", end_lr)
        if end_lr <= start_lr:
            raise ValueError(f"end_lr={end_lr!r} must be above start_lr={start_lr!r}")
    if ratio is not None:
        ratio = check_number("ratio", ratio, minimum=1.0, open_minimum=True)
        if mode == "linear" or start_lr is not None:
            raise ValueError(
                f"ratio={ratio!r} is for exponential ramps between each group's own bounds: leave "
                f"it out with mode={mode!r}, start_lr={start_lr!r}, end_lr={end_lr!r}"
            )
    last = num_steps - 1
    bounds: dict[str, Any] = {"base_lr": start_lr, "max_lr": end_lr}
    if mode == "linear":
        rise = Phase(step_size_up=last, step_size_down=0, steps=last, **bounds)
    else:
        if start_lr is not None and end_lr is not None:
            ratio = end_lr / start_lr
            if math.isinf(ratio):
                raise ValueError(
                    f"end_lr={end_lr!r} is more times start_lr={start_lr!r} than a float can say: "
                    "raise start_lr"
                )
        if ratio is None:
            raise ValueError(
                "start_lr=None and end_lr=None: an exponential ramp needs both ends as numbers, "
                "or the ratio of each group's bounds"
            )
        rise = _hold(_BOTTOM, steps=last, base_gamma=ratio ** (1.0 / last), **bounds)
    top = replace(_hold(_TOP, **bounds), cycle_momentum=mode == "linear")
    return Schedule("ramp", [rise, top])


def sequence(parts: Sequence[tuple[Schedule, int | None]]) -> Schedule:
    """Schedules one after the other, each for so many steps.

    Each part counts its steps and cycles from its own start, as in the paper's code. The last may
    have ``None`` for its steps; it goes on in any case.

    Args:
        parts: ``[(schedule, steps), …]``, at least one, ``steps`` integers >= 1.

    Raises:
        TypeError, ValueError: naming the part and what would be right.

    Example:
        The paper's Table 2:

        >>> table2 = sequence([
        ...     (triangular2(2000, base_lr=0.001, max_lr=0.005), 16_000),
        ...     (triangular2(1000, base_lr=0.0001, max_lr=0.0005), 6_000),
        ...     (triangular2(500, base_lr=0.00001, max_lr=0.00005), 3_000),
        ... ])
        >>> table2([2_000, 17_000, 22_500]).tolist()
        [0.005, 0.0005, 5e-05]
    """
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence):
        raise TypeError(f"parts must be a list of (schedule, steps) pairs, got {parts!r}")
    if not parts:
        raise ValueError("parts is empty: give at least one (schedule, steps) pair")
    phases: list[Phase] = []
    for i, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(f"parts[{i}] must be a pair (schedule, steps), got {part!r}")
        schedule, steps = part
        if not isinstance(schedule, Schedule):
            raise TypeError(f"parts[{i}][0] must be a Schedule, got {schedule!r}")
        last = i + 1 == len(parts)
        if steps is None and not last:
            raise ValueError(
                f"parts[{i}] has steps=None, so that parts[{i + 1}] would never begin: "
                "give steps to all parts but the last"
            )
        left = None if steps is None else check_int(f"parts[{i}][1]", steps, minimum=1)
        if last and len(schedule.phases) > 1:
            phases += schedule.phases  # cut off nowhere: it goes on
            break
        for j, phase in enumerate(schedule.phases):
            if left == 0:
                break
            length = phase.steps if j + 1 < len(schedule.phases) else None
            if left is not None:
                length = left if length is None else min(length, left)
                left -= length
            phases.append(replace(phase, steps=length))
    return Schedule("sequence", phases)
