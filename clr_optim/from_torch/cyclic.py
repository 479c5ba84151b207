"""Read a CyclicLR or a OneCycleLR of torch as a schedule of ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from clr_optim.schedule import Phase, Schedule, exp_range, triangular, triangular2
from clr_optim.schedule.phase import BOTTOM, TOP, hold, window_value

__all__ = ["read_cyclic", "read_one_cycle"]


def read_cyclic(
    scheduler: CyclicLR, groups: int
) -> tuple[Schedule, list[tuple[float, float]], list[tuple[float, float]] | None]:
    """Return policy, bounds and bounds of momentum of a CyclicLR."""
    total = scheduler.total_size
    sizes = (total * scheduler.step_ratio, total - total * scheduler.step_ratio)
    up, down = (round(size) for size in sizes)
    for name, size in zip(("step_size_up", "step_size_down"), sizes, strict=True):
        if abs(size - round(size)) > 1e-9 * total:
            raise ValueError(
                f"scheduler has {name}={size:g}, and the halves of a cycle are whole steps here: "
                f"construct CyclicalOptimizer(optimizer, step_size_up={max(up, 1)}, "
                f"step_size_down={down}, ...), whose rates are nearly the same, then call "
                "set_iteration with the run's step"
            )
    if len(scheduler.base_lrs) != groups or len(scheduler.max_lrs) != groups:
        raise ValueError(
            f"scheduler has base_lrs={scheduler.base_lrs} and max_lrs={scheduler.max_lrs} for "
            f"{groups} parameter groups: append the bounds of groups that were added later"
        )
    if scheduler._scale_fn_custom is not None:
        schedule = triangular(
            up,
            down,
            scale_fn=scheduler._scale_fn_custom,
            scale_mode="cycle" if scheduler.scale_mode == "cycle" else "iterations",
        )
    elif scheduler.mode == "exp_range":
        schedule = exp_range(up, down, gamma=scheduler.gamma)
    else:
        schedule = (triangular2 if scheduler.mode == "triangular2" else triangular)(up, down)
    momenta = None
    if scheduler.cycle_momentum:
        momenta = _pairs(scheduler.base_momentums, scheduler.max_momentums)
    return schedule, _pairs(scheduler.base_lrs, scheduler.max_lrs), momenta


def read_one_cycle(
    scheduler: OneCycleLR, groups: list[dict[str, Any]]
) -> tuple[Schedule, list[tuple[float, float]], list[tuple[float, float]] | None]:
    """Return policy, bounds and bounds of momentum of a OneCycleLR, which stores them in groups."""
    keys = ["initial_lr", "max_lr", "min_lr"]
    if scheduler.cycle_momentum:
        keys += ["base_momentum", "max_momentum"]
    for i, group in enumerate(groups):
        missing = [key for key in keys if key not in group]
        if missing:
            raise ValueError(
                f"scheduler needs {missing} in parameter group {i}, which was added later or "
                "loaded from a checkpoint without them: write these keys, as the constructor of "
                "OneCycleLR does"
            )
    initial, top, low = ([float(group[key]) for group in groups] for key in keys[:3])
    # Skip frozen groups: at rate 0 every factor is right.
    finals = [end / start for start, end in zip(initial, low, strict=True) if start > 0.0] or [1.0]
    if max(finals) - min(finals) > 1e-9 * max(finals):
        raise ValueError(
            f"scheduler: min_lr={low} divided by initial_lr={initial} differs between parameter "
            "groups, and OneCycleLR has one factor: give all groups the same factor"
        )
    turns = [float(phase["end_step"]) for phase in scheduler._schedule_phases]
    schedule = _torch_one_cycle(
        int(turns[-1]) + 1,
        turns[:-1],
        final=finals[0],
        window="hann" if scheduler._anneal_func_type == "cos" else "triangle",
    )
    momenta = None
    if scheduler.cycle_momentum:
        momenta = _pairs(*([group[key] for group in groups] for key in keys[3:]))
    return schedule, list(zip(initial, top, strict=True)), momenta


def _pairs(low: Iterable[Any], high: Iterable[Any]) -> list[tuple[float, float]]:
    return [(float(b), float(m)) for b, m in zip(low, high, strict=True)]


@dataclass(frozen=True)
class _Stretch:
    """A rise or fall that may begin and end between two steps: the ``scale_fn`` of its phase.

    Args:
        first: the step at which the phase begins.
        last: the step after which the curve is constant.
        start, end: the ends of the curve, in steps.
        rises: whether the curve rises from 0 to 1; otherwise the curve falls from 1 to 0.
        window: the form of the curve.
    """

    first: int
    last: int
    start: float
    end: float
    rises: bool
    window: str

    def __call__(self, step: float) -> float:
        x = (min(self.first + step, self.last) - self.start) / (self.end - self.start)
        return window_value(self.window, x if self.rises else 1.0 - x)


def _torch_one_cycle(
    total_steps: int, turns: Sequence[float], *, final: float, window: str
) -> Schedule:
    """Return the curve of :class:`torch.optim.lr_scheduler.OneCycleLR`.

    The rate rises from ``base_lr`` to ``max_lr`` until ``turns[0]`` and falls to
    ``final · base_lr``. The last step, ``total_steps − 1``, uses that rate, and so does any step
    after it. With two turns the rate first falls to ``base_lr``, until ``turns[1]``.

    torch turns at ``pct_start · total_steps − 1``, which may lie between two steps, while a cycle
    of a phase has whole steps. (:func:`one_cycle` rounds.) A curve that turns between two steps
    becomes a ``scale_fn`` without cycles.

    Args:
        total_steps: an integer >= 1.
        turns: one or two turns, in steps.
        final: the last rate divided by ``base_lr``.
        window: ``"triangle"`` or ``"hann"``.
    """
    last, end = total_steps - 1, (final, 0.0)
    top, last_turn = round(turns[0]), round(turns[-1])
    are_whole = all(abs(turn - round(turn)) < 1e-9 for turn in turns)
    if are_whole and 0 < top <= last_turn < last:
        left = last - last_turn
        halves: dict[str, Any] = {"step_size_up": 0, "step_size_down": left, "steps": left}
        if len(turns) == 1:
            # The phase ends at the top of its cycle, so that no cycle is complete there.
            rise = Phase(step_size_up=top, step_size_down=left, window=window, steps=top)
            fall = Phase(window=window, lower=end, **halves)
        else:
            rise = Phase(step_size_up=top, window=window, steps=last_turn)
            fall = Phase(window=window, lower=end, upper=BOTTOM, cycle_momentum=False, **halves)
        return Schedule("one_cycle", [rise, fall, hold(end)])
    ends = [(BOTTOM, TOP), (end, TOP)]
    if len(turns) == 2:
        ends = [(BOTTOM, TOP), (BOTTOM, TOP), (end, BOTTOM)]
    phases = []
    first, start = 0, 0.0
    for i, ((lower, upper), turn) in enumerate(zip(ends, [*turns, float(last)], strict=True)):
        # As in torch, a phase ends with the last step that is not beyond its turn.
        next_first = math.floor(turn) + 1
        is_last = i + 1 == len(ends) or next_first > last
        if is_last or next_first > first:
            phases.append(
                Phase(
                    window="constant",
                    steps=None if is_last else next_first - first,
                    lower=lower,
                    upper=upper,
                    cycle_momentum=i < 2,
                    scale_fn=_Stretch(first, last, start, turn, i == 0, window),
                    scale_mode="iterations",
                )
            )
            first = next_first
        if is_last:
            break
        start = turn
    return Schedule("one_cycle", phases)
