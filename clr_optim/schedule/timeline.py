"""The phases of a schedule in time: which phase holds a step, and where cycles end."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from clr_optim.checks import check_int
from clr_optim.schedule.phase import Phase
from clr_optim.schedule.steps import check_step


class Span(NamedTuple):
    """The cycles of a phase.

    Args:
        start: steps of the current cycle before the phase.
        steps: length of a cycle; 0 if no cycle ends in the phase.
        repeats: whether the phase begins cycle after cycle. Otherwise the phase is part of one
            cycle.
    """

    start: int
    steps: int
    repeats: bool

    def ends(self, steps: int) -> int:
        """Return how many cycles end in the first ``steps`` steps of the phase."""
        if self.steps == 0:
            return 0
        done = (self.start + steps) // self.steps
        return done if self.repeats else min(done, 1)


class Timeline:
    """The start of each phase, and the cycles and cycle ends before it.

    Args:
        name: the name of the schedule; ``"one_cycle"`` makes all phases one cycle.
        phases: the phases; all but the last have ``steps``.
    """

    __slots__ = ("begun", "ended", "phases", "spans", "starts")

    def __init__(self, name: str, phases: Sequence[Phase]) -> None:
        self.phases = phases
        self.starts = [0]
        for phase in phases[:-1]:
            self.starts.append(self.starts[-1] + (phase.steps or 0))
        self.spans = _spans(name, phases, self.starts)
        #: Cycles begun and cycle ends before each phase.
        self.begun, self.ended = [0], [0]
        for phase, span in zip(phases[:-1], self.spans, strict=False):
            # If the end of a phase cuts off a cycle, that cycle counts: the next phase begins one.
            begun = int(span.steps > 0 and span.start == 0)
            if span.repeats:
                begun = -(-(phase.steps or 0) // span.steps)
            self.begun.append(self.begun[-1] + begun)
            self.ended.append(self.ended[-1] + span.ends(phase.steps or 0))

    def locate(self, step: int) -> tuple[int, int]:
        """Return the index of the phase that holds a step, and the step counted from its start."""
        step = check_step(step)
        index = bisect_right(self.starts, step) - 1
        return index, step - self.starts[index]

    def cycle(self, step: int) -> float:
        """Return the cycles done at a step, with the part of the current cycle as fraction."""
        index, local = self.locate(check_int("step", step, minimum=0))
        start, steps, repeats = self.spans[index]
        done = self.begun[index]
        if steps == 0:
            return float(done)
        if start:
            done = max(done - 1, 0)  # the current cycle began before the phase
        position = start + local
        if repeats:
            whole, position = divmod(position, steps)
            done += whole
        elif position >= steps:
            return done + 1.0
        try:
            # In a very long cycle the sum is rounded to a whole number before the end.
            return min(done + position / steps, math.nextafter(done + 1.0, 0.0))
        except OverflowError:  # more cycles than a float can hold
            return math.inf

    def is_cycle_end(self, step: int) -> bool:
        """Return whether step ``step - 1`` completed a cycle."""
        step = check_int("step", step, minimum=0)
        if step == 0:
            return False
        # Locate the step before: a cycle that ends together with its phase belongs to that phase.
        index, local = self.locate(step - 1)
        start, steps, repeats = self.spans[index]
        position = start + local + 1
        return steps > 0 and (position % steps == 0 if repeats else position == steps)

    def ends(self, step: int) -> int:
        """Return how many cycles have ended up to a step: the cycle ends from 1 to ``step``.

        Args:
            step: an integer >= 0.

        Raises:
            TypeError, ValueError: if ``step`` is not an integer >= 0.

        Example:
            >>> timeline = Timeline("triangular", [Phase(step_size_up=2)])
            >>> [timeline.ends(step) for step in (0, 3, 4, 7, 8)]
            [0, 0, 1, 1, 2]
        """
        index, local = self.locate(check_int("step", step, minimum=0))
        return self.ended[index] + self.spans[index].ends(local)

    def steps_to_cycle_end(self, step: int) -> int | None:
        """Return the steps from ``step`` to the next cycle end; None if no cycle ends."""
        index, local = self.locate(check_int("step", step, minimum=0))
        passed = -local
        for i in range(index, len(self.phases)):
            length = self.phases[i].steps or 0
            start, steps, repeats = self.spans[i]
            if steps:
                end = (local // steps + 1) * steps if repeats else steps - start
                # The last phase goes on after its `steps`, and so do its cycles.
                if local < end and (i + 1 == len(self.phases) or end <= length):
                    return passed + end
            passed += length
            local = 0
        return None


def _spans(name: str, phases: Sequence[Phase], starts: Sequence[int]) -> list[Span]:
    """Return the cycles of each phase."""
    last = phases[-1]
    # All phases of a `one_cycle` are one cycle, which ends after the first step of the last phase.
    # The name decides, since checkpoints of earlier versions hold no other mark.
    holds = last.window == "constant" and last.steps is None and last.scale_fn is None
    is_marked = any(phase.cycle_steps is not None for phase in phases)
    if name == "one_cycle" and holds and starts[-1] and not is_marked:
        return [Span(start, starts[-1] + 1, False) for start in starts]
    return [
        Span(0, phase.period, phase.period > 0)
        if phase.cycle_steps is None
        else Span(phase.cycle_start, phase.cycle_steps, False)
        for phase in phases
    ]
