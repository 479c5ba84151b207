"""Save and load a run in its middle, with a wrapped or a plain optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer

#: Steps before the checkpoint and after. The checkpoint cuts the cycle of four steps on its way
#: down.
BEFORE, AFTER = 3, 5

Make = Callable[[Any], torch.optim.Optimizer]


def wrap(optimizer: torch.optim.Optimizer) -> CyclicalOptimizer[Any]:
    return CyclicalOptimizer(optimizer, "triangular2", step_size_up=2, backend="torch")


def with_own_entries(opt: Any) -> None:
    """Put a user's entries into ``state`` and groups, some under other classes' names."""
    opt.state["epochs"] = 3
    opt.state["averages"] = {"step": 2, "exp_avg": torch.ones(2)}
    opt.state[("a", 1)] = [torch.zeros(1), "text"]
    for group in opt.param_groups:
        group["decay_rate_of_mine"] = 0.5
        for param in group["params"]:
            if isinstance(opt.state.get(param), dict):
                opt.state[param].update(mine=torch.ones(5), prev_of_mine="text", sum_of_mine=None)


def resumes(
    make: Make,
    problem: Callable[[], Any],
    step: Callable[[Any, Any, int], object],
    *,
    wrapped: bool,
    own: bool,
    tensors: Callable[[Any], list[Tensor]],
) -> bool:
    """Return whether a resumed run goes on bit for bit as the run that wrote the checkpoint.

    Args:
        make: makes the optimizer of a problem.
        problem: makes the same problem each time.
        step: takes one training step of a problem by an optimizer.
        wrapped: whether the optimizer is wrapped.
        own: whether the user keeps entries in state and groups.
        tensors: returns a problem's parameters.
    """
    first, second = problem(), problem()
    whole, resumed = make(first), make(second)
    if wrapped:
        whole, resumed = wrap(whole), wrap(resumed)
    for k in range(BEFORE):
        step(first, whole, k)
    if own:
        with_own_entries(whole)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for mine, other in zip(tensors(second), tensors(first), strict=True):
        mine.data.copy_(other)
    if wrapped:
        assert resumed.iteration == BEFORE
        assert resumed.get_last_lr() == whole.get_last_lr()
    for k in range(BEFORE, BEFORE + AFTER):
        step(first, whole, k)
        step(second, resumed, k)
    if own and resumed.state.get("epochs") != 3:
        return False
    return all(map(torch.equal, tensors(first), tensors(second)))


def assert_resumes_as_unwrapped(*args: Any, **kwargs: Any) -> None:
    """Assert that the wrapped optimizer resumes wherever the plain one does."""
    try:
        plain = resumes(*args, wrapped=False, **kwargs)
    except Exception:
        plain = False
    try:
        assert resumes(*args, wrapped=True, **kwargs) or not plain
    except Exception:
        if plain:
            raise
