"""Stretch a schedule that counts epochs to one that counts steps and changes once per epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from clr_optim.schedule import Phase, Schedule
from clr_optim.schedule.curve import marked_phases

__all__ = ["stretch"]

_LENGTHS = (
    "step_size_up", "step_size_down", "step_size_top", "steps", "stride", "first_step",
    "cycle_start", "cycle_steps",
)  # fmt: skip


@dataclass(frozen=True)
class _OfEpoch:
    """A function of the epoch as one of the step: a ``scale_fn``."""

    function: Callable[[float], float]
    steps_per_epoch: int

    def __call__(self, step: float) -> float:
        return self.function(int(step) // self.steps_per_epoch)


def stretch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """Return a schedule whose rate at a step is that of another one at the step's epoch.

    Args:
        schedule: the schedule that counts epochs.
        steps_per_epoch: an integer >= 1.
    """
    if steps_per_epoch == 1:
        return schedule
    phases = [_stretched(phase, steps_per_epoch) for phase in marked_phases(schedule)]
    return Schedule(schedule.name, phases)


def _stretched(phase: Phase, steps: int) -> Phase:
    values = {name: getattr(phase, name) for name in _LENGTHS}
    settings: dict[str, Any] = {
        name: None if value is None else value * steps for name, value in values.items()
    }
    for name in ("gamma", "base_gamma"):
        settings[name] = getattr(phase, name) ** (1.0 / steps)
    if phase.scale_fn is not None and phase.scale_mode == "iterations":
        settings["scale_fn"] = _OfEpoch(phase.scale_fn, steps)
    return replace(phase, **settings)
