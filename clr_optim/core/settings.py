"""Settings: the arguments of a CyclicalOptimizer's constructor, apart from bounds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer

from clr_optim.averages import Average
from clr_optim.core.followed import schedules_json
from clr_optim.gate import Spike
from clr_optim.keys import BASE_MOMENTUM, MAX_MOMENTUM
from clr_optim.plan import Extras
from clr_optim.schedule import Schedule

__all__ = ["HIGH_MOMENTUM", "LOW_MOMENTUM", "Settings"]

#: The bounds of momentum in torch's CyclicLR.
LOW_MOMENTUM, HIGH_MOMENTUM = 0.8, 0.9


@dataclass(frozen=True)
class Settings:
    """The settings of one optimizer, fixed by the constructor.

    Args:
        optimizer: the wrapped optimizer.
        schedule: the policy.
        cycle_momentum: whether momentum cycles against the rate.
        max_grad_norm: the norm to clip to, if any.
        backend: the backend that the user asked for, ``"auto"`` included.
        schedules: the schedules of settings by name: one for all groups, or one per group, ``None``
            for a group whose setting stays.
        skip_above: the norm above which a step is skipped, if any.
        average: which average of the parameters the steps keep, if any.
        master_weights: whether bfloat16 parameters have float32 masters.
    """

    optimizer: Optimizer
    schedule: Schedule
    cycle_momentum: bool
    max_grad_norm: float | None
    backend: str
    schedules: Mapping[str, Schedule | Sequence[Schedule | None]] = field(default_factory=dict)
    skip_above: float | Spike | None = None
    average: Average | None = None
    master_weights: bool = False
    #: the policy as the groups hold it
    schedule_json: str = field(init=False)
    #: whether the host must call the user's function to find a rate
    has_scale_fn: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule_json", self.schedule.to_json())
        object.__setattr__(self, "has_scale_fn", self.schedule.scale_fn is not None)

    @functools.cached_property
    def extras(self) -> Extras:
        """The state that steps keep beside torch's."""
        return Extras(self.average, self.master_weights)

    def schedules_of(self, index: int) -> dict[str, Schedule]:
        """Return the schedules of a group's settings by name, as the constructor was given."""
        found = {}
        for name, given in self.schedules.items():
            if isinstance(given, Schedule):
                found[name] = given
            elif index < len(given) and (schedule := given[index]) is not None:
                found[name] = schedule
        return found

    def with_momentum_schedule(self, groups: int) -> list[int]:
        """Return the numbers of the groups whose ``momentum`` follows a schedule."""
        return [i for i in range(groups) if "momentum" in self.schedules_of(i)]

    @functools.cached_property
    def common_schedules(self) -> dict[str, Schedule]:
        """The schedules that all groups follow, also groups that join."""
        return {name: s for name, s in self.schedules.items() if isinstance(s, Schedule)}

    @functools.cached_property
    def schedules_by_text(self) -> dict[str, dict[str, Schedule]]:
        """The schedules of a group by the text that the group holds under ``clr_schedules``."""
        lists = (each for each in self.schedules.values() if not isinstance(each, Schedule))
        count = max(map(len, lists), default=0)
        found = [self.common_schedules, *map(self.schedules_of, range(count))]
        return {schedules_json(each): each for each in [{}, *found]}

    @property
    def momentum_vanishes(self) -> bool:
        """Whether the cycle reaches a momentum of 0, where SGD and RMSprop keep no buffer.

        A step without momentum leaves the buffer alone and has another kernel, so the host must
        choose the kernel.
        """
        return self.cycle_momentum and any(
            "betas" not in group and group[BASE_MOMENTUM] <= 0.0 < group[MAX_MOMENTUM]
            for group in self.optimizer.param_groups
            if BASE_MOMENTUM in group and MAX_MOMENTUM in group
        )
