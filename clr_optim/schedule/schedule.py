"""Schedule: a curve that is immutable, compares by value, composes and is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clr_optim.checks import check_int, check_number
from clr_optim.schedule import phase as formula
from clr_optim.schedule import store
from clr_optim.schedule.curve import Curve, marked_phases
from clr_optim.schedule.phase import Phase, ScaleFns


class Schedule(Curve):
    """A sequence of phases: a pure function of the integer step.

    The constructors of :mod:`clr_optim.schedule` build schedules. Call ``Schedule(name, phases)``
    for a curve that no constructor draws. The last phase goes on after its ``steps``.

    Schedules are immutable, compare by value, and round-trip through a plain dictionary
    (:meth:`to_dict`, :meth:`from_dict`).

    Args:
        name: the name of the schedule in messages. The name ``"one_cycle"`` makes all phases a
            single cycle, if the last phase holds its rate.
        phases: at least one; all but the last have ``steps``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> from clr_optim.schedule import triangular
        >>> schedule = triangular(step_size_up=2)
        >>> schedule(1, base_lr=0.0, max_lr=1.0)
        0.5
        >>> schedule([0, 1, 2, 3, 4], base_lr=0.0, max_lr=1.0).tolist()
        [0.0, 0.5, 1.0, 0.5, 0.0]
        >>> schedule.momenta(1, [(0.8, 1.0), (0.0, 0.0)])
        [0.9, 0.0]
        >>> schedule.cycle(10), schedule.is_cycle_end(8), schedule.steps_to_cycle_end(5)
        (2.5, True, 3)
        >>> schedule == Schedule("triangular", [Phase(step_size_up=2)])
        True
        >>> schedule.to_dict()["phases"]
        [{'step_size_up': 2, 'step_size_down': 2}]
        >>> schedule == Schedule.from_dict(schedule.to_dict())
        True
        >>> Schedule.from_json(schedule.to_json())
        Schedule('triangular', [Phase(step_size_up=2, step_size_down=2)])
    """

    __module__ = "clr_optim.schedule"  # pickles name the public module
    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Schedule is immutable: cannot set {name!r}; build another one")

    def __reduce__(self) -> tuple[type[Schedule], tuple[str, tuple[Phase, ...]]]:
        store.check_picklable(self.phases)
        return (Schedule, (self.name, self.phases))

    # A schedule is immutable, so its copy is the schedule itself, even with a lambda in it.
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
        return store.to_repr(self.name, self.phases)

    def with_warmup(self, steps: int, start: float = 0.0) -> Schedule:
        """Return this schedule after a warm-up.

        The rate rises in a straight line from ``start · max_lr`` at step 0 to the schedule's own
        first rate at step ``steps``. From there on the schedule counts its steps, and its cycles:
        a warm-up is no cycle. Momentum goes from its maximum to the schedule's first momentum.

        Args:
            steps: length of the warm-up, an integer >= 1.
            start: the first rate divided by ``max_lr``, >= 0. The rate falls if ``start · max_lr``
                is above the schedule's first rate.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> from clr_optim.schedule import triangular
            >>> schedule = triangular(4).with_warmup(5)
            >>> schedule([0, 4, 5, 9], base_lr=1.0, max_lr=3.0).tolist()
            [0.0, 0.8, 1.0, 3.0]
            >>> [step for step in range(25) if schedule.is_cycle_end(step)]
            [13, 21]
        """
        steps = check_int("steps", steps, minimum=1)
        start = check_number("start", start)
        phases = marked_phases(self)
        first = phases[0]
        b, w, a = first.shape(0)
        reached = w * a
        if not 0.0 <= reached <= 1.0:
            raise ValueError(
                f"with_warmup: the scale_fn of {self.name!r} returns {a!r} at the start, so that "
                "the first rate is outside of the bounds: use a scale_fn from 0 to 1"
            )
        top = [
            b * low - reached * low + reached * high
            for low, high in zip(first.lower, first.upper, strict=True)
        ]
        rise = Phase(
            step_size_up=steps,
            step_size_down=0,
            steps=steps,
            lower=(0.0, start),
            upper=(top[0], top[1]),
            cycle_steps=0,
            cycle_momentum=first.cycle_momentum and reached > 0.0,
            base_lr=first.base_lr,
            max_lr=first.max_lr,
        )
        return Schedule(self.name, [rise, *phases])

    def between(self, low: float, high: float) -> Schedule:
        """Return this schedule with these bounds, so that it ignores the bounds of groups.

        ``base_lr`` becomes ``low`` and ``max_lr`` becomes ``high``. A policy that falls towards
        ``end · max_lr`` falls towards ``low + end · (high − low)``, and a warm-up begins likewise;
        a warm-up from above ``max_lr`` begins at ``start · high``.

        Args:
            low, high: the bounds, numbers >= 0 in this order. A schedule that falls exponentially
                takes ``low=0`` only.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> from clr_optim.schedule import triangular
            >>> triangular(2).between(0.0, 0.1)([0, 1, 2]).tolist()
            [0.0, 0.05, 0.1]
            >>> from clr_optim.schedule import linear
            >>> linear(2).between(1.0, 3.0)([0, 1, 2]).tolist()
            [3.0, 2.0, 1.0]
        """
        low, high = check_number("low", low), check_number("high", high)
        if low > high:
            raise ValueError(
                f"low={low!r} is above high={high!r}: swap the two; for a rise, use ramp(steps) or "
                "fixed().with_warmup(steps)"
            )
        if any(phase.has_bounds for phase in self.phases):
            raise ValueError(
                f"between({low!r}, {high!r}): the schedule {self.name!r} has bounds already; leave "
                "them out of its constructor"
            )
        return Schedule(self.name, [_between(phase, low, high) for phase in self.phases])

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary of strings, numbers, lists and None, for :meth:`from_dict`.

        A ``scale_fn`` is replaced by its name, since code cannot be stored.
        """
        return store.to_dict(self.name, self.phases)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, scale_fn: ScaleFns = None) -> Schedule:
        """Return the schedule that :meth:`to_dict` described.

        Args:
            data: the dictionary.
            scale_fn: the callable, if the schedule had one; if it had several, a dictionary from
                the names in ``data`` to callables.

        Raises:
            TypeError: if ``data`` is not a dictionary.
            ValueError: if ``data`` is not a dictionary from :meth:`to_dict`, if a newer version
                wrote it, or if its functions and ``scale_fn`` do not fit together.
        """
        return cls(*store.from_dict(data, scale_fn))

    def to_json(self) -> str:
        """Return :meth:`to_dict` as one line of JSON, the same for equal schedules."""
        return store.to_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str, *, scale_fn: ScaleFns = None) -> Schedule:
        """Return the schedule that :meth:`to_json` wrote.

        Args:
            text: the JSON.
            scale_fn: as in :meth:`from_dict`.

        Raises:
            TypeError, ValueError: as :meth:`from_dict`, and if ``text`` is not JSON.
        """
        return cls.from_dict(store.from_json(text), scale_fn=scale_fn)


# doctest finds a class by its __module__, which is the public module.
__test__ = {"Schedule": Schedule}


def _between(phase: Phase, low: float, high: float) -> Phase:
    """Return a phase with bounds; a multiple of ``max_lr`` alone is measured from ``low``."""

    def measured(end: tuple[float, float]) -> tuple[float, float]:
        base, top = end
        return (1.0 - top, top) if base == 0.0 and top <= 1.0 else end

    is_exponential = phase.base_gamma != 1.0 or phase.base_drop != 1.0
    if low > 0.0 and is_exponential and phase.lower[0] == 0.0:
        raise ValueError(
            f"low={low!r} has no effect on an exponential fall, which approaches 0: give low=0.0"
        )
    lower, upper = measured(phase.lower), measured(phase.upper)
    return replace(phase, base_lr=low, max_lr=high, lower=lower, upper=upper)


def check_growth(schedule: Schedule) -> None:
    """Raise if the lower end of a phase grows beyond the largest float before the phase is over."""
    for i, phase in enumerate(schedule.phases):
        if formula.overflows(phase):
            raise ValueError(
                f"phases[{i}] of the schedule {schedule.name!r} has "
                f"base_gamma={phase.base_gamma!r} and steps={phase.steps}: base_gamma**steps is "
                "beyond the largest float, and the rate would put infinities into the weights; "
                "lower one of the two"
            )
