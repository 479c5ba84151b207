"""torch's CyclicLR and OneCycleLR read as schedules of ours, in mid-run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from clr_optim.checks import check_int, check_number
from clr_optim.schedule import Phase, Schedule, exp_range, triangular, triangular2
from clr_optim.schedule.phase import BOTTOM, TOP, hold, window_value

__all__ = ["TorchsCourse", "read_scheduler"]


class TorchsCourse(NamedTuple):
    """What a torch scheduler does, in our words, and where it is; bounds per group."""

    schedule: Schedule
    position: int
    bounds: list[tuple[float, float]]
    momenta: list[tuple[float, float]] | None


# What decides over a scheduler's rates: torch's own, or we do not know them.
_RATE_METHODS = ("step", "get_lr", "_update_lr", "scale_fn", "_anneal_func")

# Far above CyclicLR's drift from its closed form and the rounding of a rate in float32.
_SAME_RATE = 1e-6


def read_scheduler(scheduler: object) -> TorchsCourse:
    """What a torch scheduler does from here on, if its optimizer is where the scheduler is."""
    if not isinstance(scheduler, (CyclicLR, OneCycleLR)):
        raise TypeError(
            "scheduler must be a CyclicLR or a OneCycleLR of torch.optim.lr_scheduler, got an "
            f"object of type {type(scheduler).__name__}: for others construct "
            "CyclicalOptimizer(optimizer, policy) with a policy of clr_optim.schedule (schedulers "
            "one after the other are a sequence) and go to the run's step with set_iteration"
        )
    torchs = CyclicLR if isinstance(scheduler, CyclicLR) else OneCycleLR
    for method in _RATE_METHODS:
        theirs = getattr(scheduler, method, None)
        if getattr(theirs, "__func__", theirs) is not getattr(torchs, method, None):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__} with another {method} than "
                f"{torchs.__name__}'s, so its rates are not known: construct "
                "CyclicalOptimizer(optimizer, policy) with a policy or scale_fn that gives them "
                "and go to the run's step with set_iteration"
            )
    position = check_int("scheduler.last_epoch", scheduler.last_epoch, minimum=0)
    groups = scheduler.optimizer.param_groups
    over = False
    if isinstance(scheduler, CyclicLR):
        schedule, bounds, momenta = _read_cyclic(scheduler, len(groups))
    else:
        schedule, bounds, momenta = _read_one_cycle(scheduler, groups)
        # It overshoots there.
        over = position > scheduler._schedule_phases[-1]["end_step"]
    for i, (base, top) in enumerate(bounds):
        for name, bound in (("base_lr", base), ("max_lr", top)):
            check_number(f"scheduler: {name} of parameter group {i}", bound)
        if base > top:
            raise ValueError(
                f"scheduler: base_lr={base!r} is above max_lr={top!r} in parameter group {i}, and "
                "no cycle is upside down here: construct CyclicalOptimizer(optimizer, policy, ...) "
                "with the two in order, and set_iteration half a cycle further"
            )
    if not over:
        for i, rate in enumerate(schedule.rates(position, bounds)):
            _check_is_schedulers(i, "lr", groups[i]["lr"], rate, bounds[i][1], position)
        for i, momentum in enumerate(schedule.momenta(position, momenta or [])):
            name = "betas" if "betas" in groups[i] else "momentum"
            held = groups[i][name][0] if name == "betas" else groups[i][name]
            _check_is_schedulers(i, name, held, momentum, 1.0, position)
    return TorchsCourse(schedule, position, bounds, momenta)


def _check_is_schedulers(
    group: int, name: str, held: Any, due: float, scale: float, position: int
) -> None:
    """Raise unless what a group holds is what its scheduler has put there."""
    rounding = torch.finfo(held.dtype).eps if isinstance(held, Tensor) else 0.0
    if not abs(float(held) - due) <= max(_SAME_RATE, rounding) * scale:  # NaN is not
        raise ValueError(
            f"scheduler: parameter group {group} has {name}={float(held):.9g}, and at its step "
            f"{position} the scheduler says {due:.9g}: another scheduler or other code has "
            "written it, or only one of optimizer and scheduler was restored. Put right which of "
            "the two is wrong; several schedulers on one optimizer are one policy here, a sequence"
        )


def _read_cyclic(
    scheduler: CyclicLR, groups: int
) -> tuple[Schedule, list[tuple[float, float]], list[tuple[float, float]] | None]:
    """Policy, bounds and bounds of momentum of a CyclicLR."""
    total = scheduler.total_size
    sizes = (total * scheduler.step_ratio, total - total * scheduler.step_ratio)
    up, down = (round(size) for size in sizes)
    for name, size in zip(("step_size_up", "step_size_down"), sizes, strict=True):
        if abs(size - round(size)) > 1e-9 * total:
            raise ValueError(
                f"scheduler has {name}={size:g}, and cycles are of whole steps here: construct "
                f"CyclicalOptimizer(optimizer, step_size_up={max(up, 1)}, step_size_down={down}, "
                "...), whose rates are nearly the same, and go to the run's step with set_iteration"
            )
    if len(scheduler.base_lrs) != groups or len(scheduler.max_lrs) != groups:
        raise ValueError(
            f"scheduler has base_lrs={scheduler.base_lrs} and max_lrs={scheduler.max_lrs} for "
            f"{groups} parameter groups: append those of the groups that were added since"
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


def _read_one_cycle(
    scheduler: OneCycleLR, groups: list[dict[str, Any]]
) -> tuple[Schedule, list[tuple[float, float]], list[tuple[float, float]] | None]:
    """Policy, bounds and bounds of momentum of a OneCycleLR, which keeps these in the groups."""
    keys = ["initial_lr", "max_lr", "min_lr"]
    if scheduler.cycle_momentum:
        keys += ["base_momentum", "max_momentum"]
    for i, group in enumerate(groups):
        missing = [key for key in keys if key not in group]
        if missing:
            raise ValueError(
                f"scheduler needs {missing} in parameter group {i}, which was added since or "
                "loaded from a checkpoint without: put them there, as OneCycleLR does when it is "
                "constructed"
            )
    initial, top, low = ([float(group[key]) for group in groups] for key in keys[:3])
    # A frozen group, of rate 0, has any.
    finals = [end / start for start, end in zip(initial, low, strict=True) if start > 0.0] or [1.0]
    if max(finals) - min(finals) > 1e-9 * max(finals):
        raise ValueError(
            f"scheduler: min_lr={low} are not the same part of initial_lr={initial} in all "
            "parameter groups, as OneCycleLR makes them: put them right"
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
    """A rise or fall between ends that need not be whole steps: the ``scale_fn`` of its phase.

    Args:
        first: the step at which the phase begins.
        last: the step from which on the curve stays as it is.
        start, end: the ends of the curve, in steps.
        rises: from 0 to 1, or falls from 1 to 0.
        window: its form.
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
    """The curve of :class:`torch.optim.lr_scheduler.OneCycleLR`.

    It rises from ``base_lr`` to ``max_lr`` until ``turns[0]`` and falls to ``final · base_lr``,
    which the last step, ``total_steps − 1``, uses (and any after it). With two turns it first
    falls to ``base_lr``, until ``turns[1]``.

    torch turns at ``pct_start · total_steps − 1``, which may lie between two steps, while the
    cycles of a phase are of whole ones. (:func:`one_cycle` rounds.) Such a curve is a ``scale_fn``,
    and has no cycles.

    Args:
        total_steps: an integer >= 1.
        turns: one or two, in steps.
        final: the last rate as a multiple of ``base_lr``.
        window: ``"triangle"`` or ``"hann"``.
    """
    last, end = total_steps - 1, (final, 0.0)
    top, fallen = round(turns[0]), round(turns[-1])
    whole = all(abs(turn - round(turn)) < 1e-9 for turn in turns)
    if whole and 0 < top <= fallen < last:
        left = last - fallen
        options: dict[str, Any] = {"step_size_up": 0, "step_size_down": left, "steps": left}
        if len(turns) == 1:
            # Cut off at its top, so that no cycle is complete there.
            rise = Phase(step_size_up=top, step_size_down=left, window=window, steps=top)
            fall = Phase(window=window, lower=end, **options)
        else:
            rise = Phase(step_size_up=top, window=window, steps=fallen)
            fall = Phase(window=window, lower=end, upper=BOTTOM, cycle_momentum=False, **options)
        return Schedule("one_cycle", [rise, fall, hold(end)])
    ends = [(BOTTOM, TOP), (end, TOP)]
    if len(turns) == 2:
        ends = [(BOTTOM, TOP), (BOTTOM, TOP), (end, BOTTOM)]
    phases = []
    first, start = 0, 0.0
    for i, ((lower, upper), turn) in enumerate(zip(ends, [*turns, float(last)], strict=True)):
        # A turn is reached at the last step that is not beyond it, as in torch.
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
