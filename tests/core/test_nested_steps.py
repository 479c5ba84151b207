"""Steps that a finalizer takes in the middle of native code or of the take-over of its values."""

from __future__ import annotations

import ctypes
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from internals import before_values_are_taken_over, plan_of, take_the_general_way

from clr_optim import CyclicalOptimizer
from clr_optim.checks import LAST_STEP

pytestmark = pytest.mark.usefixtures("native_kernels")


def many(count: int = 30, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """Return parameters with gradients, a group for each, and their optimizer."""
    params = [torch.nn.Parameter(torch.zeros(5)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD([{"params": [p]} for p in params], lr=0.1)
    return params, CyclicalOptimizer(optimizer, step_size_up=50, **options)


def test_a_finalizer_steps_while_the_position_is_read():
    _, opt = many()
    armed: list[bool] = []
    nested: list[bool] = []

    class Stepping:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            if armed:
                armed.clear()
                opt.step()
                nested.append(True)

    threshold = gc.get_threshold()
    try:
        for k in range(120):
            for _ in range(4):
                opt.step()
            gc.collect()
            armed.append(True)
            Stepping()
            # So that one of the next allocations, in another place each time, starts a collection.
            gc.set_threshold(max(1, gc.get_count()[0] + k % 40), 1000, 1000)
            opt.get_last_lr()
            gc.set_threshold(10**6)
            gc.collect()
            assert not armed
            assert opt.iteration == 4 * (k + 1) + len(nested)
        assert len(nested) > 60
    finally:
        gc.set_threshold(*threshold)


def test_a_step_while_the_values_are_taken_over(monkeypatch):
    _, opt = many(2)
    for _ in range(9):
        opt.step()
    before_values_are_taken_over(monkeypatch, opt, opt.step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opt.iteration in (9, 10)
        assert opt.iteration == 10
        opt.step()
        opt.step(lambda: torch.zeros(()))
    assert opt.iteration == 12
    assert [group["lr"] for group in opt.param_groups] == opt.lr_at(12)


def test_a_gradient_whose_finalizer_steps_is_let_go_after_an_overflow():
    params, opt = many()
    late = [torch.nn.Parameter(torch.zeros(5)) for _ in range(400)]
    opt.add_param_group({"params": late, "lr": 0.1})
    opt.step()
    raised = []

    def step() -> None:
        for p in late:
            p.grad = torch.ones_like(p)
        try:
            opt.step()
        except RuntimeError as error:
            raised.append(str(error))

    class Overflow(torch.Tensor):
        """Drops a gradient when the step asks, as another thread may do at any time."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__bool__:
                if params[0].grad is not None:
                    weakref.finalize(params[0].grad, step)
                params[0].grad = None
                return True
            return super().__torch_function__(func, types, args, kwargs or {})

    opt.found_inf = torch.ones(()).as_subclass(Overflow)
    opt.register_cycle_end_hook(lambda _: None)
    opt.step()
    del opt.found_inf
    assert len(raised) == 1
    assert "within a step of the same optimizer" in raised[0]
    opt.step()
    assert opt.iteration == 2
    assert all((p != 0).all() for p in late)


def test_a_plan_that_the_garbage_collector_has_cleared_takes_no_step():
    _, opt = many(1)
    opt.step()
    plan = plan_of(opt).native
    slot = ctypes.pythonapi.PyType_GetSlot
    slot.argtypes, slot.restype = [ctypes.py_object, ctypes.c_int], ctypes.c_void_p
    clear = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object)(slot(type(plan), 51))  # tp_clear
    assert clear(plan) == 0
    assert plan.step(vars(opt)) == plan_of(opt).lib.REPLACED


def test_the_last_positions_are_reached():
    _, opt = many(1)
    opt.step()
    opt.set_iteration(LAST_STEP - 20)
    for _ in range(20):
        opt.step()
    assert opt.iteration == LAST_STEP


@pytest.mark.parametrize("general_way", [False, True])
def test_state_that_changed_places(general_way, monkeypatch):
    ours, torchs = [], []
    for params in (ours, torchs):
        params += [torch.nn.Parameter(torch.full((3,), float(k))) for k in (1, 2)]
    opt = CyclicalOptimizer(torch.optim.Adam(ours, lr=0.1), base_lr=0.1, max_lr=0.1)
    plain = torch.optim.Adam(torchs, lr=0.1)
    if general_way:
        take_the_general_way(monkeypatch)
    for k in range(9):
        for params in (ours, torchs):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 1.0 + 3 * i + k)
        opt.step()
        plain.step()
        if k == 5:
            for optimizer, (first, second) in ((opt, ours), (plain, torchs)):
                one, two = optimizer.state.pop(first), optimizer.state.pop(second)
                optimizer.state[second] = one
                optimizer.state[first] = two
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p, q)
