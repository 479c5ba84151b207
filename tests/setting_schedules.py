"""Schedules for the settings of any optimizer, and a plain optimizer with their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from clr_optim.schedule import Schedule, exp_range, triangular, triangular2

#: by key: a schedule for a setting that is a number, or one for each member of a tuple. Periods
#: differ, so that the settings move apart.
_OF: Mapping[str, Any] = {
    "weight_decay": triangular(3, base_lr=0.0, max_lr=0.2),
    "momentum": triangular(2, base_lr=0.5, max_lr=0.9),
    "betas": (
        triangular2(3, base_lr=0.5, max_lr=0.875),
        triangular(4, 2, base_lr=0.9, max_lr=0.99),
    ),
    "eps": triangular(5, base_lr=1e-6, max_lr=1e-4),
    "rho": triangular(3, base_lr=0.7, max_lr=0.95),
    "alpha": triangular(2, base_lr=0.8, max_lr=0.95),
    "lr_decay": exp_range(3, gamma=0.9, base_lr=0.0, max_lr=0.1),
    "momentum_decay": triangular(3, base_lr=0.001, max_lr=0.004),
    "dampening": triangular(3, base_lr=0.0, max_lr=0.5),
    "decay": triangular(3, base_lr=0.25, max_lr=0.75),
    "lambd": triangular(3, base_lr=1e-4, max_lr=1e-2),
}


def schedules_for(optimizer: torch.optim.Optimizer) -> dict[str, Schedule]:
    """Return a schedule for every setting of an optimizer that is a number."""
    group = optimizer.param_groups[0]
    found: dict[str, Schedule] = {}
    for key in group.keys() & _OF.keys():
        # Nesterov's momentum knows no dampening; without momentum SGD and RMSprop have no buffer.
        if key in ("momentum", "dampening") and not group["momentum"]:
            continue
        if key == "dampening" and group["nesterov"]:
            continue
        schedules = _OF[key]
        if isinstance(group[key], (tuple, list)) is not isinstance(schedules, tuple):
            continue  # Adafactor's eps has two numbers, and the first may be None
        if isinstance(schedules, tuple):
            found.update({f"{key}[{i}]": each for i, each in enumerate(schedules)})
        else:
            found[key] = schedules
    return found


def numbers_at(schedules: Mapping[str, Schedule], step: int) -> Iterator[tuple[str, float]]:
    """Yield the name and the number of each setting at a step."""
    for name, schedule in schedules.items():
        yield name, float(schedule([step])[0])


def number_in(group: Mapping[str, Any], name: str) -> float:
    """Return the number of a setting."""
    key, _, place = name.rstrip("]").partition("[")
    return float(group[key][int(place)] if place else group[key])


def feed(
    twin: torch.optim.Optimizer, lr: float, schedules: Mapping[str, Schedule], step: int
) -> None:
    """Give a plain optimizer the rate and the settings of a step, by hand."""
    for group in twin.param_groups:
        group["lr"] = lr
        for name, number in numbers_at(schedules, step):
            key, _, place = name.rstrip("]").partition("[")
            if place:
                values = list(group[key])
                values[int(place)] = number
                group[key] = tuple(values)
            else:
                group[key] = number
