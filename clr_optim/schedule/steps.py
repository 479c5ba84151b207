"""Check a step, and evaluate a function at one step or at an array of steps."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from clr_optim.checks import check_int

#: Several steps at once.
Steps = npt.NDArray[Any] | Sequence[int]


def check_step(step: object) -> int:
    """Return a step as an int >= 0. Each step of an optimizer comes here: an int passes at once."""
    if type(step) is int and step >= 0:
        return step
    return check_int("step", step, minimum=0)


@overload
def evaluate(function: Callable[[int], float], step: int) -> float: ...
@overload
def evaluate(function: Callable[[int], float], step: Steps) -> npt.NDArray[np.float64]: ...
def evaluate(
    function: Callable[[int], float], step: int | Steps
) -> float | npt.NDArray[np.float64]:
    """Call ``function`` with one step, or with each step of an array: both give the same bits."""
    if isinstance(step, numbers.Real):
        return function(check_int("step", step, minimum=0))
    try:
        steps = np.asarray(step)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list; a tensor without data
        raise TypeError(
            f"step must be an integer or an array of integers, got {step!r} ({error})"
        ) from error
    if steps.ndim == 0:
        return function(check_int("step", steps.item(), minimum=0))
    if steps.size and steps.dtype.kind not in "iuO":
        raise TypeError(
            f"step must be an integer or an array of integers, got an array of {steps.dtype}"
        )
    values = [function(check_int("step", s, minimum=0)) for s in steps.ravel().tolist()]
    return np.array(values, dtype=np.float64).reshape(steps.shape)
