"""Curve: learning rate, momentum and cycles as pure functions of the step, from phases.

The formula is in ``phase.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import numpy.typing as npt

from clr_optim.checks import check_bounds, check_momenta, check_number
from clr_optim.schedule import phase as formula
from clr_optim.schedule.phase import Phase, ScaleFn
from clr_optim.schedule.steps import Steps, evaluate
from clr_optim.schedule.timeline import Timeline


class Curve:
    """What a :class:`Schedule` computes from its phases.

    Args:
        name, phases: as for :class:`Schedule`.
    """

    __slots__ = ("_timeline", "name", "phases")

    name: str
    phases: tuple[Phase, ...]
    _timeline: Timeline

    def __init__(self, name: str, phases: Sequence[Phase]) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty string, got {name!r}")
        _check_phases(phases)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "phases", tuple(phases))
        object.__setattr__(self, "_timeline", Timeline(name, self.phases))

    @property
    def steps(self) -> int | None:
        """Length of the whole schedule in steps; ``None`` without end."""
        last = self.phases[-1].steps
        return None if last is None else self._timeline.starts[-1] + last

    @property
    def has_bounds(self) -> bool:
        """Whether every phase has its own bounds, so that the bounds of groups are ignored."""
        return all(phase.has_bounds for phase in self.phases)

    @property
    def reads_base_lr(self) -> bool:
        """Whether the rates depend on the ``base_lr`` of groups, and not on ``max_lr`` alone."""
        return any(
            phase.lower[0] != 0.0 or phase.upper[0] != 0.0
            for phase in self.phases
            if not phase.has_bounds
        )

    @property
    def moves_momentum(self) -> bool:
        """Whether momentum cycles in a phase, if the optimizer cycles momentum."""
        return any(phase.cycle_momentum for phase in self.phases)

    @property
    def scale_fn(self) -> ScaleFn | None:
        """The first ``scale_fn`` among the phases."""
        return next((p.scale_fn for p in self.phases if p.scale_fn is not None), None)

    def locate(self, step: int) -> tuple[int, int]:
        """Find the phase that holds a step.

        Args:
            step: an integer >= 0.

        Returns:
            The index of the phase, and the step counted from the start of the phase.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> from clr_optim.schedule import fixed, sequence
            >>> sequence([(fixed(0.1), 5), (fixed(0.2), None)]).locate(7)
            (1, 2)
        """
        return self._timeline.locate(step)

    @overload
    def __call__(self, step: int, base_lr: float = ..., max_lr: float = ...) -> float: ...
    @overload
    def __call__(
        self, step: Steps, base_lr: float = ..., max_lr: float = ...
    ) -> npt.NDArray[np.float64]: ...
    def __call__(
        self, step: int | Steps, base_lr: float = 0.0, max_lr: float = 1.0
    ) -> float | npt.NDArray[np.float64]:
        """Return the learning rate at ``step``.

        Args:
            step: an integer >= 0 (0 is the first step), or an array of them.
            base_lr, max_lr: the bounds of a group; with the defaults the rate runs from 0 to 1.
                Phases with their own bounds ignore these.

        Returns:
            A float; for an array, an array of float64 and the same shape.

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
        return evaluate(lambda step: self.rates(step, [(base, top)])[0], step)

    def rates(self, step: int, bounds: Sequence[tuple[float, float]]) -> list[float]:
        """Return the learning rates at one step for several groups, as an optimizer needs them.

        A rate that would be infinite is the largest float.

        Args:
            step: an integer >= 0.
            bounds: ``(base_lr, max_lr)`` of each group.

        Returns:
            One rate per group.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> from clr_optim.schedule import triangular
            >>> triangular(2).rates(1, [(0.0, 1.0), (1.0, 3.0)])
            [0.5, 2.0]
        """
        return rates_and_momenta(self, step, bounds, ())[0]

    @overload
    def momentum(
        self, step: int, base_momentum: float = ..., max_momentum: float = ...
    ) -> float: ...
    @overload
    def momentum(
        self, step: Steps, base_momentum: float = ..., max_momentum: float = ...
    ) -> npt.NDArray[np.float64]: ...
    def momentum(
        self, step: int | Steps, base_momentum: float = 0.8, max_momentum: float = 0.9
    ) -> float | npt.NDArray[np.float64]:
        """Return the momentum at ``step``: highest at the lowest rate, lowest at the highest.

        ``max_momentum − a(t)·(max_momentum − base_momentum)·w(x(t))``.

        Args:
            step: an integer >= 0 (0 is the first step), or an array of them.
            base_momentum, max_momentum: the bounds of the momentum, in [0, 1].

        Returns:
            A float; for an array, an array of float64 and the same shape.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Example:
            >>> from clr_optim.schedule import triangular
            >>> triangular(2).momentum([0, 1, 2], 0.8, 1.0).tolist()
            [1.0, 0.9, 0.8]
        """
        low = check_number("base_momentum", base_momentum, maximum=1.0)
        high = check_number("max_momentum", max_momentum, maximum=1.0)
        check_momenta(low, high)
        return evaluate(lambda step: self.momenta(step, [(low, high)])[0], step)

    def momenta(self, step: int, bounds: Sequence[tuple[float, float]]) -> list[float]:
        """Return the momenta at one step for several groups, as an optimizer needs them.

        Args:
            step: an integer >= 0.
            bounds: ``(base_momentum, max_momentum)`` of each group.

        Returns:
            One momentum per group.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.
        """
        return rates_and_momenta(self, step, (), bounds)[1]

    def cycle(self, step: int) -> float:
        """Return the cycles done at a step: 2.5 is half-way through the third; 0.0 without cycles.

        The count goes on through all phases of a sequence. A cycle that the end of its phase cuts
        off counts as done there. A :func:`one_cycle` is one cycle from start to end.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: if ``step`` is not an integer >= 0.
        """
        return self._timeline.cycle(step)

    def is_cycle_end(self, step: int) -> bool:
        """Return whether the step before this one completed a cycle.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: if ``step`` is not an integer >= 0.
        """
        return self._timeline.is_cycle_end(step)

    def cycle_ends(self, step: int) -> int:
        """Return how many of the steps before ``step`` have completed a cycle.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: if ``step`` is not an integer >= 0.

        Example:
            >>> from clr_optim.schedule import triangular
            >>> [triangular(2).cycle_ends(step) for step in (3, 4, 8)]
            [0, 1, 2]
        """
        return self._timeline.ends(step)

    def steps_to_cycle_end(self, step: int) -> int | None:
        """Return the steps from ``step`` until a cycle is complete: a whole cycle at a cycle's end.

        A cycle that the end of its phase cuts off is never complete: the count then runs to the
        end of the first complete cycle.

        Args:
            step: an integer >= 0.

        Returns:
            The steps; ``None`` if no further cycle will be complete.

        Raises:
            TypeError, ValueError: if ``step`` is not an integer >= 0.
        """
        return self._timeline.steps_to_cycle_end(step)


def rates_and_momenta(
    schedule: Curve,
    step: int,
    bounds: Sequence[tuple[float, float]],
    momentum_bounds: Sequence[tuple[float, float]],
) -> tuple[list[float], list[float]]:
    """Return rates and momenta of several groups at one step, from one call of a ``scale_fn``.

    Args:
        schedule: the schedule.
        step: an integer >= 0.
        bounds: ``(base_lr, max_lr)`` of each group.
        momentum_bounds: ``(base_momentum, max_momentum)`` of each group.

    Returns:
        One rate for each of ``bounds``, and one momentum for each of ``momentum_bounds``.
    """
    index, local = schedule._timeline.locate(step)
    phase = schedule.phases[index]
    shape = phase.shape(local)
    return (
        formula.rates(phase, shape, bounds),
        formula.momenta(phase, shape, momentum_bounds) if momentum_bounds else [],
    )


def marked_phases(schedule: Curve) -> list[Phase]:
    """Return the phases of a schedule such that their cycles are the same in another schedule."""
    return [
        replace(phase, cycle_start=span.start, cycle_steps=span.steps)
        if phase.cycle_steps is None and span.steps and not span.repeats
        else phase
        for phase, span in zip(schedule.phases, schedule._timeline.spans, strict=True)
    ]


def _check_phases(phases: object) -> None:
    if isinstance(phases, (str, bytes)) or not isinstance(phases, Sequence):
        raise TypeError(f"phases must be a sequence of Phase, got {phases!r}")
    if not phases:
        raise ValueError("phases is empty: a schedule needs at least one Phase")
    for i, phase in enumerate(phases):
        if not isinstance(phase, Phase):
            raise TypeError(f"phases[{i}] must be a Phase, got {phase!r}")
        if phase.steps is None and i + 1 < len(phases):
            raise ValueError(
                f"phases[{i}] has steps=None, so that phases[{i + 1}] would never begin: "
                "give steps to all phases but the last"
            )
