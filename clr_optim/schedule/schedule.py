"""Learning rate and momentum as pure functions of the integer step: a sequence of phases."""

from __future__ import annotations

import json
import math
import numbers
import pickle
import reprlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from clr_optim.checks import check_bounds, check_int, check_momenta, check_number
from clr_optim.schedule.phase import LARGEST, Phase, ScaleFn, check_step, clamp, power

#: Version of the dictionary that :meth:`Schedule.to_dict` writes.
FORMAT_VERSION = 1


@overload
def each_step(function: Callable[[int], float], step: int) -> float: ...
@overload
def each_step(
    function: Callable[[int], float], step: npt.NDArray[Any] | Sequence[int]
) -> npt.NDArray[np.float64]: ...
def each_step(
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
        if phase.steps is not None and power(phase.base_gamma, phase.steps - 1) == LARGEST:
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
        >>> from clr_optim.schedule import triangular
        >>> schedule = triangular(step_size_up=2)
        >>> schedule(1, base_lr=0.0, max_lr=1.0)
        0.5
        >>> schedule([0, 1, 2, 3, 4], base_lr=0.0, max_lr=1.0).tolist()
        [0.0, 0.5, 1.0, 0.5, 0.0]
        >>> schedule == Schedule("triangular", [Phase(step_size_up=2)])
        True
    """

    __module__ = "clr_optim.schedule"  # pickles name the public module
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
        >>> from clr_optim.schedule import fixed, sequence
            >>> sequence([(fixed(0.1), 5), (fixed(0.2), None)]).locate(7)
            (1, 2)
        """
        step = check_step(step)
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
        >>> from clr_optim.schedule import triangular
            >>> triangular(2)([[0, 1], [2, 3]], base_lr=1.0, max_lr=3.0)
            array([[1., 2.],
                   [3., 2.]])
        """
        base, top = check_number("base_lr", base_lr), check_number("max_lr", max_lr)
        check_bounds(base, top)

        def at(step: int) -> float:
            return self.rates(step, [(base, top)])[0]

        return each_step(at, step)

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
        >>> from clr_optim.schedule import triangular
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
                if not -LARGEST <= rate <= LARGEST:
                    check_number("base_lr", base_lr, minimum=-math.inf)
                    check_number("max_lr", max_lr, minimum=-math.inf)
                    lower, upper = clamp(lower), clamp(upper)
                    rate = clamp(clamp(b * lower) + clamp((upper - lower) * w * a))
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
        >>> from clr_optim.schedule import triangular
            >>> triangular(2).momentum([0, 1, 2], 0.8, 1.0).tolist()
            [1.0, 0.9, 0.8]
        """
        low = check_number("base_momentum", base_momentum, maximum=1.0)
        high = check_number("max_momentum", max_momentum, maximum=1.0)
        check_momenta(low, high)

        def at(step: int) -> float:
            return self.momenta(step, [(low, high)])[0]

        return each_step(at, step)

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
        >>> from clr_optim.schedule import triangular
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
        >>> from clr_optim.schedule import triangular
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
        >>> from clr_optim.schedule import triangular
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
        >>> from clr_optim.schedule import triangular
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
        >>> from clr_optim.schedule import fixed, triangular
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
        >>> from clr_optim.schedule import triangular
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
        >>> from clr_optim.schedule import fixed
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
        >>> from clr_optim.schedule import triangular
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


# doctest finds a class by its __module__, which is the public one.
__test__ = {"Schedule": Schedule}
