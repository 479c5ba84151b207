"""Other code edits groups in place, or interrupts a step: the cycle goes on."""

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import Any

import pytest
import torch

from clr_optim import CyclicalOptimizer

BACKENDS = ["native", "torch"]


def make(backend: str, groups: int = 1, cls: Any = torch.optim.SGD) -> Any:
    params = [torch.ones(3, requires_grad=True) for _ in range(groups)]
    inner = cls([{"params": [p]} for p in params], lr=0.4)
    opt = CyclicalOptimizer(inner, step_size_up=10, backend=backend)
    steps(opt, 3)
    return opt


def steps(opt: Any, count: int) -> None:
    for _ in range(count):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.full((3,), 0.1)
        opt.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_may_be_replaced_in_its_list(groups, backend):
    opt = make(backend, groups)
    opt.param_groups[0] = dict(opt.param_groups[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(opt, 4)
    assert opt.iteration == 7
    assert [group["lr"] for group in opt.param_groups] == opt.lr_at(7)
    assert [group["clr_step"] for group in opt.param_groups] == [7] * groups


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_that_other_code_deletes_stay(backend):
    opt = make(backend, 2)
    for group in opt.param_groups:
        del group["clr_base_lr"], group["clr_max_lr"]
    steps(opt, 1)
    assert [(g["clr_base_lr"], g["clr_max_lr"]) for g in opt.param_groups] == [(0.1, 0.4)] * 2
    assert opt.iteration == 4


class Interrupting:
    """Leaves Ctrl-C pending as its last reference goes."""

    __del__ = functools.partial(ctypes.pythonapi.PyErr_SetInterrupt)


class PendingSignal(torch.optim.SGD):
    armed = False

    def step(self, closure=None):
        super().step()
        if type(self).armed:
            type(self).armed = False
            self.last = Interrupting()
            vars(self).pop("last")  # Ctrl-C is pending as this step returns


def test_ctrl_c_that_is_pending_as_the_step_returns_counts_the_step(ctrl_c):
    opt = make("torch", cls=PendingSignal)
    PendingSignal.armed = True
    before = opt.param_groups[0]["params"][0].clone()
    with pytest.raises(KeyboardInterrupt):
        steps(opt, 1)
    assert not torch.equal(before, opt.param_groups[0]["params"][0])
    assert opt.iteration == 4
