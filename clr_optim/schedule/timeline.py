"""The phases of a schedule in time: which phase holds a step, and where cycles end."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from clr_optim.checks import check_int
from clr_optim.schedule.phase import Phase
from clr_optim.schedule.steps import check_step


class Timeline:
    """The start of each phase, and the cycles before it.

    Args:
        name: the name of the schedule; ``"one_cycle"`` makes all phases one cycle.
        phases: the phases; all but the last have ``steps``.
    """

    __slots__ = ("begun", "only_end", "phases", "starts")

    def __init__(self, name: str, phases: Sequence[Phase]) -> None:
        self.phases = phases
        self.starts = [0]
        #: Cycles begun before each phase.
        self.begun = [0]
        for phase in phases[:-1]:
            steps = phase.steps or 0
            self.starts.append(self.starts[-1] + steps)
            # If the end of a phase cuts off a cycle, that cycle counts: the next phase begins one.
            begun = -(-steps // phase.period) if phase.period else 0
            self.begun.append(self.begun[-1] + begun)
        #: The end of the only cycle of a ``one_cycle``; None for other schedules.
        self.only_end = _end_of_one_cycle(name, phases[-1], self.starts[-1])

    def locate(self, step: int) -> tuple[int, int]:
        """Return the index of the phase that holds a step, and the step counted from its start."""
        step = check_step(step)
        index = bisect_right(self.starts, step) - 1
        return index, step - self.starts[index]

    def cycle(self, step: int) -> float:
        """Return the cycles done at a step, with the part of the current cycle as fraction."""
        step = check_int("step", step, minimum=0)
        if self.only_end is not None:
            if step >= self.only_end:
                return 1.0
            # In a very long cycle the quotient is rounded to 1.0 before the end.
            return min(step / self.only_end, math.nextafter(1.0, 0.0))
        index, local = self.locate(step)
        phase = self.phases[index]
        if phase.period == 0:
            return float(self.begun[index])
        whole, rest = divmod(local, phase.period)
        try:
            return self.begun[index] + whole + rest / phase.period
        except OverflowError:  # more cycles than a float can hold
            return math.inf

    def is_cycle_end(self, step: int) -> bool:
        """Return whether step ``step - 1`` completed a cycle."""
        step = check_int("step", step, minimum=0)
        if step == 0 or self.only_end is not None:
            return step > 0 and step == self.only_end
        # Locate the step before: a cycle that ends together with its phase belongs to that phase.
        index, local = self.locate(step - 1)
        period = self.phases[index].period
        return period > 0 and (local + 1) % period == 0

    def steps_to_cycle_end(self, step: int) -> int | None:
        """Return the steps from ``step`` to the next cycle end; None if no cycle ends."""
        step = check_int("step", step, minimum=0)
        if self.only_end is not None:
            return self.only_end - step if step < self.only_end else None
        index, local = self.locate(step)
        start = step - local
        for i in range(index, len(self.phases)):
            phase = self.phases[i]
            last = i + 1 == len(self.phases)
            if phase.period:
                end = (local // phase.period + 1) * phase.period
                # The last phase goes on after its `steps`, and so do its cycles.
                if last or end <= (phase.steps or 0):
                    return start + end - step
            start += phase.steps or 0
            local = 0
        return None


def _end_of_one_cycle(name: str, last: Phase, start_of_last: int) -> int | None:
    """Return the step at which a ``one_cycle``'s only cycle is complete; None for other schedules.

    The phases of a ``one_cycle`` rise, fall and fall further; the last one holds the rate of the
    last step. The name decides, since checkpoints of earlier versions hold no other mark.
    """
    holds = last.window == "constant" and last.steps is None and last.scale_fn is None
    return start_of_last + 1 if name == "one_cycle" and holds and start_of_last else None
