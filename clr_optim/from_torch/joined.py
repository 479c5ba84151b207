"""Read schedulers of torch that are made of others: SequentialLR and ChainedScheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch.optim import lr_scheduler as torchs

from clr_optim.checks import check_int
from clr_optim.from_torch.cyclic import read_cyclic
from clr_optim.from_torch.functions import read_lambda, read_multiplicative
from clr_optim.from_torch.known import known_class, position_of
from clr_optim.from_torch.product import product
from clr_optim.from_torch.shapes import READERS
from clr_optim.schedule import Phase, Schedule, sequence

__all__ = ["read_phases"]

# Schedulers that multiply the present rate, whatever other schedulers made of it.
_FACTORS = (
    torchs.LinearLR, torchs.ConstantLR, torchs.StepLR, torchs.MultiStepLR, torchs.ExponentialLR,
    torchs.PolynomialLR, torchs.MultiplicativeLR,
)  # fmt: skip


def read_phases(scheduler: Any, low: float) -> list[Phase]:
    """Return the phases of a scheduler.

    Args:
        scheduler: the scheduler. A CyclicLR brings its bounds.
        low: the lower bound of all groups. The upper bound of a group is its initial rate.

    Raises:
        TypeError, ValueError: for a course that no schedule of ours has.
    """
    return _READERS[known_class(scheduler)](scheduler, low)


def _cyclic(scheduler: torchs.CyclicLR, _: float) -> list[Phase]:
    """Return the phases of a CyclicLR that is part of a sequence: they bring its bounds."""
    groups = len(scheduler.optimizer.param_groups)
    schedule, bounds, momenta = read_cyclic(scheduler, groups)
    low, high = bounds[0]
    if momenta is not None or any(each != (low, high) for each in bounds) or low > high:
        raise ValueError(
            f"scheduler has a CyclicLR within a SequentialLR, with bounds {bounds} by group and "
            f"cycle_momentum={momenta is not None}: give all groups the same bounds, base_lr "
            "below max_lr, and cycle_momentum=False"
        )
    return [replace(phase, base_lr=low, max_lr=high) for phase in schedule.phases]


def _one_cycle(scheduler: torchs.OneCycleLR, _: float) -> list[Phase]:
    raise TypeError(
        "scheduler has a OneCycleLR within a SequentialLR, where it replaces the initial lr of the "
        "others: construct CyclicalOptimizer(optimizer, sequence([...])) of clr_optim.schedule, "
        "then call set_iteration with the run's step"
    )


def _sequential(scheduler: Any, low: float) -> list[Phase]:
    """Return the phases of schedulers one after the other; each counts from its own start."""
    schedulers = scheduler._schedulers
    milestones = [
        check_int("scheduler: a milestone of SequentialLR", each, minimum=1)
        for each in scheduler._milestones
    ]
    if milestones != sorted(milestones):
        raise ValueError(
            f"scheduler has the milestones {milestones}, which must rise: give them in order"
        )
    parts: list[tuple[Schedule, int | None]] = []
    position = position_of(scheduler)
    ends: list[int | None] = [*milestones, None]
    for i, (start, end) in enumerate(zip([0, *milestones], ends, strict=True)):
        inner = schedulers[i]
        if start == end:
            continue  # torch never runs this one
        if i and known_class(inner) is torchs.MultiplicativeLR:
            raise ValueError(
                "scheduler has a MultiplicativeLR after another scheduler, whose last rate it "
                "goes on from: give a LambdaLR with the product, which counts from its own start"
            )
        is_active = start <= position and (end is None or position < end)
        # torch cannot begin a nested one in mid-course, and lets one that is first run ahead.
        is_nested = known_class(inner) is torchs.SequentialLR
        if is_nested and (i or (is_active and inner.last_epoch != position)):
            raise ValueError(
                "scheduler has a SequentialLR within a SequentialLR, whose steps torch counts "
                "wrong: give one SequentialLR with the schedulers and milestones of both"
            )
        if is_active:
            own = position_of(inner)
            if own != position - start:
                raise ValueError(
                    f"scheduler is at its step {position}, where its {type(inner).__name__} "
                    f"{i} should be at {position - start} and is at {own}: load all of them "
                    "from one checkpoint"
                )
        phases = read_phases(inner, low)
        parts.append((Schedule("part", phases), None if end is None else end - start))
    return list(sequence(parts).phases)


def _links(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers of a chain, and of the chains within it."""
    for each in scheduler._schedulers:
        if known_class(each) is torchs.ChainedScheduler:
            yield from _links(each)
        else:
            yield each


def _chained(scheduler: Any, low: float) -> list[Phase]:
    """Return the phases of a product of schedulers."""
    schedulers = list(_links(scheduler))
    if len(schedulers) == 1:
        return read_phases(schedulers[0], low)
    cosines = []
    for each in schedulers:
        cls = known_class(each)
        if cls is torchs.CosineAnnealingLR and each.eta_min == 0:
            cosines.append(each)
        elif cls not in _FACTORS:
            why = ", an eta_min other than 0" if cls is torchs.CosineAnnealingLR else ""
            raise ValueError(
                f"scheduler is a ChainedScheduler with a {cls.__name__}{why}: the chain is no "
                "product of its schedulers, since this one does not multiply the rate that the "
                "others leave; give a SequentialLR, or a LambdaLR with the rates that are meant"
            )
    if len(cosines) > 1:
        raise ValueError(
            "scheduler is a ChainedScheduler with several CosineAnnealingLR, which is no product "
            "after the first T_max: give a LambdaLR with the rates that are meant"
        )
    factors = product([read_phases(each, low) for each in schedulers if each not in cosines])
    if not cosines:
        return factors
    fall, rise = read_phases(cosines[0], low)
    rest = Schedule("rest", factors)
    last = rest.phases[-1]
    is_over = last.window == "constant" and last.base_gamma == 1.0 and last.scale_fn is None
    if not is_over or len(rest.phases) - 1 > rest.locate(fall.steps or 0)[0]:
        raise ValueError(
            f"scheduler is a ChainedScheduler with a CosineAnnealingLR of T_max={fall.steps}, and "
            "the other schedulers still change the rate then: torch's rate is no product "
            "after T_max; give a SequentialLR, or a LambdaLR with the rates that are meant"
        )
    # At T_max torch's rate is 0. The cosine then adds the initial rate anew.
    falling = Schedule("fall", product([[fall, rise], factors]))
    return list(sequence([(falling, fall.steps), (Schedule("rise", [rise]), None)]).phases)


_READERS: dict[type, Callable[[Any, float], list[Phase]]] = {
    **READERS,
    torchs.CyclicLR: _cyclic,
    torchs.OneCycleLR: _one_cycle,
    torchs.LambdaLR: read_lambda,
    torchs.MultiplicativeLR: read_multiplicative,
    torchs.SequentialLR: _sequential,
    torchs.ChainedScheduler: _chained,
}
