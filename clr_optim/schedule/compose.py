"""Schedules one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clr_optim.checks import check_int
from clr_optim.schedule.curve import marked_phases
from clr_optim.schedule.phase import Phase
from clr_optim.schedule.schedule import Schedule


def sequence(parts: Sequence[tuple[Schedule, int | None]]) -> Schedule:
    """Run schedules one after the other, each for a number of steps.

    Each part counts steps and cycles from its own start, as in the code of the paper. The last part
    goes on after its steps, which may be ``None``: it holds its last rate if it is finite, as
    :func:`one_cycle` is, and repeats if it repeats, as :func:`warm_restarts`.

    Args:
        parts: ``[(schedule, steps), …]``, at least one, ``steps`` integers >= 1.

    Raises:
        TypeError, ValueError: naming the part and what would be right.

    Example:
        The paper's Table 2:

        >>> from clr_optim.schedule import triangular2
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
            phases += marked_phases(
                schedule
            )  # all phases, since the last part goes on after its steps
            break
        for j, phase in enumerate(marked_phases(schedule)):
            if left == 0:
                break
            length = phase.steps if j + 1 < len(schedule.phases) else None
            if left is not None:
                length = left if length is None else min(length, left)
                left -= length
            phases.append(replace(phase, steps=length))
    return Schedule("sequence", phases)
