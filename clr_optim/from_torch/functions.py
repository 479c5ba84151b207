"""Read a LambdaLR or a MultiplicativeLR, whose rates are a user's function of the step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from torch.optim import lr_scheduler as torchs

from clr_optim.from_torch.of_transformers import known_phases
from clr_optim.schedule import Phase, ScaleFn

__all__ = ["by_function", "read_lambda", "read_multiplicative"]


def by_function(function: ScaleFn, **settings: Any) -> Phase:
    """Return a phase whose rate is a function of the step, times the initial rate."""
    return Phase(
        window="constant",
        lower=(0.0, 0.0),
        scale_fn=function,
        scale_mode="iterations",
        cycle_momentum=False,
        **settings,
    )


def read_lambda(scheduler: torchs.LambdaLR, _: float) -> list[Phase]:
    """Return the phases of a LambdaLR.

    The functions of transformers become phases. Any other function becomes a ``scale_fn``.
    """
    functions = scheduler.lr_lambdas
    courses = [known_phases(function) for function in functions]
    if courses[0] is not None and all(course == courses[0] for course in courses):
        return courses[0]
    return [by_function(_only(functions, "LambdaLR"))]


def read_multiplicative(scheduler: torchs.MultiplicativeLR, _: float) -> list[Phase]:
    """Return the phases of a MultiplicativeLR."""
    return [by_function(_Product(_only(scheduler.lr_lambdas, "MultiplicativeLR")))]


def _only(functions: list[Any], cls: str) -> ScaleFn:
    """Return the function of all groups; raise if the groups have several."""
    for i, function in enumerate(functions):
        if not _are_equal(function, functions[0]):
            raise ValueError(
                f"scheduler: {cls} has another function for parameter group {i} "
                f"({function!r}) than for group 0 ({functions[0]!r}), and a schedule is one "
                "function for all groups: give all groups one function, and each its own lr"
            )
    only: ScaleFn = functions[0]
    return only


def _are_equal(one: object, other: object) -> bool:
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        parts = [(each.func, each.args, each.keywords) for each in (one, other)]
        return parts[0] == parts[1]
    return bool(one == other)


@dataclass(frozen=True)
class _Product:
    """The product of a function over the steps from 1 to the current one: a ``scale_fn``."""

    function: ScaleFn
    #: the last step and its product
    _last: list[tuple[int, float]] = field(
        default_factory=lambda: [(0, 1.0)], compare=False, repr=False
    )

    def __call__(self, step: float) -> float:
        last, product = self._last[0]
        if last > step:
            last, product = 0, 1.0
        for k in range(last + 1, int(step) + 1):
            product *= self.function(k)
        self._last[0] = (int(step), product)
        return product
