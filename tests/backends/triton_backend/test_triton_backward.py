"""Steps in backward on the device: the same bits as ordinary steps, one launch per parameter."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from graph_helpers import SHAPES, Graph, Run, assert_together, nothing_waits
from native_helpers import BY_NAME, assert_identical
from triton_helpers import DEVICE, MARKS, choose_triton, kernels, on_gpus, take_two_launches

from clr_optim import CycleEnd, CyclicalOptimizer, Ema
from clr_optim.backends.triton.launch import Launch
from clr_optim.schedule import triangular

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)


class InBackward(Run):
    """A run whose parameters are updated in backward passes, by the same gradients."""

    def __init__(self, case, **options):
        super().__init__(case, **options)
        self.handle = self.opt.step_in_backward()

    def backward(self, number, idle=(), grads=None):
        """Run a backward pass; some parameters have no part in the loss."""
        grads = self.draw(number) if grads is None else grads
        parts = [
            (param * grad).sum()
            for i, (param, grad) in enumerate(zip(self.params, grads, strict=True))
            if i not in idle
        ]
        if parts:
            torch.stack(parts).sum().backward()

    def eager(self, number, idle=None):
        self.backward(number, () if idle is None else (idle,))
        assert all(param.grad is None for param in self.params)
        self.opt.step()


def beside(case, steps=4, idle=lambda k: None, **options):
    """Compare steps in backward with ordinary ones."""
    ours, twin = InBackward(case, **copy.copy(options)), Run(case, **options)
    for k in range(steps):
        for run in (ours, twin):
            run.eager(k, idle=idle(k))
        assert_together(ours, twin)
    return ours, twin


@kernels
def test_each_rule(case):
    """The second parameter's gradient is missing once, the third's comes late."""
    beside(case, idle=lambda k: {0: 2, 2: 1}.get(k), shapes=[(5, 3), (2500,), ()])


@pytest.mark.parametrize("average", [Ema(0.9), Ema(0.5, 2), CycleEnd()], ids=str)
def test_averages_move_once(average):
    """Those of updated parameters move in backward, the others in the step."""
    ours, _ = beside(
        BY_NAME["adam"], steps=6, idle=lambda k: k % 3, average=average, step_size_up=1
    )
    assert all("clr_average" in ours.opt.state[p] for p in ours.params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_each_dtype(dtype):
    beside(BY_NAME["rmsprop-mom-cent"], dtype=dtype, average=Ema(0.9))


def test_masters():
    options = {"dtype": torch.bfloat16, "master_weights": True, "average": Ema(0.9)}
    ours, _ = beside(BY_NAME["adam"], idle=lambda k: k % 3, **options)
    assert any(ours.opt.state[p]["clr_rest"].any() for p in ours.params)


def test_many_rows_take_two_launches(monkeypatch):
    take_two_launches(monkeypatch)
    beside(BY_NAME["nadam"], steps=4, idle=lambda k: k % 2, average=Ema(0.5))


def test_settings_that_follow_schedules():
    schedules = {"weight_decay": triangular(2).between(0.0, 0.1)}
    beside(BY_NAME["adam-wd"], steps=5, schedules=schedules)


def test_momentum_that_cycles():
    case = BY_NAME["sgd-nest-wd"]
    beside(replace(case, wrap={**case.wrap, "cycle_momentum": True}), steps=5)


def test_rates_that_the_host_evaluates():
    policy = triangular(3, scale_fn=lambda cycle: 1 / cycle)
    beside(BY_NAME["adam"], steps=8, policy=policy, step_size_up=2000)


def test_a_row_of_many_chunks_advances_its_counter_once():
    """Each chunk takes a program, and the programs of one row share a counter."""
    ours, _ = beside(BY_NAME["adam"], steps=2, shapes=[(9001,), (3,)])
    assert [int(ours.opt.state[p]["step"]) for p in ours.params] == [2, 2]


def test_nothing_waits_for_the_device():
    ours, twin = InBackward(BY_NAME["adam"]), Run(BY_NAME["adam"])
    for k in range(4):
        grads = ours.draw(k)
        if k < 2:
            ours.eager(k)
        else:
            with nothing_waits():
                ours.backward(k, grads=grads)
                ours.opt.step()
        twin.eager(k)
    assert_together(ours, twin)


def test_a_pass_after_replays_goes_on_at_the_devices_position():
    ours, twin = Run(BY_NAME["adam"]), Run(BY_NAME["adam"])
    for run in (ours, twin):
        run.eager(0)
    graph = ours.capture()
    for k in (1, 2, 3):
        ours.replay(graph, k)
        twin.eager(k)
    with ours.opt.step_in_backward():
        for k in (4, 5, 6):
            grads = ours.draw(k)
            with nothing_waits():
                InBackward.backward(ours, k, grads=grads)
                ours.opt.step()
            twin.eager(k)
    ours.replay(graph, 7)
    twin.eager(7)
    assert_together(ours, twin)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_after_a_backward_pass_is_refused():
    run = InBackward(BY_NAME["adam"])
    run.eager(0)
    run.backward(1)
    before = [p.detach().clone() for p in run.params]
    with (
        pytest.raises(RuntimeError, match="remove the handle and then capture"),
        Graph().capture(),
    ):
        run.opt.step()
    assert all(torch.equal(p, q) for p, q in zip(run.params, before, strict=True))


def test_ordinary_steps_follow_after_the_handle_is_removed():
    ours, twin = beside(BY_NAME["adam"], steps=3, average=Ema(0.9))
    ours.handle.remove()
    for k in range(3, 8):
        for run in (ours, twin):
            Run.eager(run, k)
        assert_together(ours, twin)


def test_groups_and_checkpoints_between_steps():
    ours, twin = (
        CyclicalOptimizer(torch.optim.Adam([p], lr=0.1), step_size_up=2, backend="triton")
        for p in (torch.nn.Parameter(torch.ones(5, device=DEVICE)) for _ in range(2))
    )
    ours.step_in_backward()
    for k in range(6):
        if k in (2, 3):
            for opt in (ours, twin):
                late = torch.nn.Parameter(torch.full((3 + k,), 2.0, device=DEVICE))
                opt.add_param_group({"params": [late]})
        if k == 4:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        for opt in (ours, twin):
            params = [p for group in opt.param_groups for p in group["params"]]
            sum((p * (k + 1)).sin().sum() for p in params).backward()
            opt.step()
            opt.zero_grad()
        assert_identical(ours, twin)


def test_dropping_the_optimizer_frees_it():
    """Native code keeps no reference to the tables that would keep the optimizer alive."""
    run = InBackward(BY_NAME["adam"])
    for k in range(3):
        run.eager(k)
    params, handle, opt = run.params, run.handle, weakref.ref(run.opt)
    gc.disable()
    try:
        del run
        assert opt() is None
    finally:
        gc.enable()
    params[0].sum().backward()
    assert params[0].grad is not None
    handle.remove()


# ---- GPUs only


@on_gpus
def test_hooks_on_several_streams_come_in_order():
    """Autograd runs each hook on the stream of the parameter's first use."""
    ours, twin = InBackward(BY_NAME["adam"]), Run(BY_NAME["adam"])
    side = torch.cuda.Stream()
    for k in range(4):
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        parts = []
        for i, (param, grad) in enumerate(zip(ours.params, ours.draw(k), strict=True)):
            with torch.cuda.stream(side if i % 2 else main):
                parts.append((param * grad).sum())
        main.wait_stream(side)
        torch.stack(parts).sum().backward()
        ours.opt.step()
        twin.eager(k)
    assert_together(ours, twin)


@on_gpus
@pytest.mark.parametrize("name", ["adam", "sgd", "nadam"])
def test_native_code_launches_from_the_second_pass_on(monkeypatch, name):
    """Triton launches once for each parameter, and again after a change of the rows."""
    updates = []
    update_row = Launch.update_row
    monkeypatch.setattr(
        Launch, "update_row", lambda *args: (updates.append(args[1]), update_row(*args))[1]
    )
    ours, twin = InBackward(BY_NAME[name], average=Ema(0.9)), Run(BY_NAME[name], average=Ema(0.9))
    for k in range(12):
        if k == 6:
            for run in (ours, twin):
                run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
        for run in (ours, twin):
            run.eager(k, idle=1 if k == 4 else None)
        assert_together(ours, twin)
        assert len(updates) in (len(SHAPES), 2 * len(SHAPES))
