"""Averages on the device: their weights beside the host's, and the averages beside torch's."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graph_helpers import Run, assert_together, nothing_waits, scaled
from internals import plan_of
from native_helpers import (
    BY_NAME,
    KERNELS,
    assert_identical,
    held,
    members,
    parameters,
    unaligned,
    wrapped,
)
from test_triton_schedule import POWERS, SCHEDULES
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from triton_helpers import (
    DEVICE,
    INTERPRETED,
    MARKS,
    RUNS,
    SLOW,
    WAYS,
    choose_triton,
    drawn,
    in_both_ways,
    named,
    on_gpus,
    take_way,
)

from clr_optim import CycleEnd, CyclicalOptimizer, Ema
from clr_optim.averages import weights
from clr_optim.backends.base import Course
from clr_optim.backends.triton.clock import Clock
from clr_optim.schedule import fixed, triangular

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)

KEY, COUNT = "clr_average", "clr_averages"

if RUNS:
    import triton
    import triton.language as tl

    from clr_optim.kernels.triton.prepare import average_weight
    from clr_optim.kernels.triton.schedule import cycle_ends, held_tables, phase_tables

    @triton.jit
    def _ends(ints, phases, steps, ends, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0)
        if BLOCK > 0:
            at = at * BLOCK + tl.arange(0, BLOCK)
        tl.store(ends + at, cycle_ends(ints, phases, tl.load(steps + at)))

    @triton.jit
    def _weights(groups, width, ints, phases, control, steps, found, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0)
        if BLOCK > 0:
            at = at * BLOCK + tl.arange(0, BLOCK)
        for group in range(0, 4):
            averages = tl.load(groups + group * width + 5)
            weight = average_weight(averages, ints, phases, control, tl.load(steps + at))
            tl.store(found + at * 4 + group, weight)


# ---- steps and weights


def on_device(steps):
    """Return steps on the device, the grid and the block of a launch that evaluates each.

    A GPU runs a program per step, as in the kernels. The interpreter computes all steps at once.
    """
    block = 1 << (len(steps) - 1).bit_length() if INTERPRETED else 0
    there = torch.tensor([*steps, *[0] * (block - len(steps))], device=DEVICE)
    return there, (1 if INTERPRETED else len(steps),), block


def steps_of(curve):
    """Return steps at the start, around all boundaries of phases, and far out."""
    near = {*range(70)}
    for start in curve._timeline.starts:
        near |= {start + i for i in range(-3, 4)}
    far = {2**k + i for k in (24, 31, 32, 53, 62) for i in range(-8, 9)}
    return sorted(step for step in near | far if step >= 0)[::EVERY]


# The fake device takes each step by itself.
EVERY = 8 if SLOW and not INTERPRETED else 1


@pytest.mark.parametrize("name", [*SCHEDULES, *POWERS][::EVERY])
def test_cycle_ends_on_the_device(name):
    curve = (SCHEDULES | POWERS)[name]
    for warm in (curve, curve.with_warmup(5)):
        steps = steps_of(warm)
        counted = [warm._timeline.ends(step) for step in steps]
        for table, _ in (phase_tables(warm), held_tables(warm)):
            ints = torch.from_numpy(table).to(DEVICE)
            there, grid, block = on_device(steps)
            ends = torch.zeros_like(there)
            _ends[grid](ints, len(ints), there, ends, BLOCK=block)
            assert ends[: len(steps)].tolist() == counted


AVERAGES = [
    Ema(0.999),
    Ema(0.9, 3, start=4),
    Ema(0.5, 2**40, start=2**53 + 1),
    Ema(1.0),
    Ema(0.0, 2),
    CycleEnd(),
    CycleEnd(start=9),
    CycleEnd(start=2**62),
]
OFFSETS = (0, 3, -7, 2**45)


@pytest.mark.parametrize("average", AVERAGES, ids=str)
@pytest.mark.parametrize("name", ["warm_restarts-2", "one_cycle-own", "sequence", "warm-up", "top"])
def test_weights_equal_the_hosts(name, average):
    assert_weights(SCHEDULES[name], average)


@pytest.mark.parametrize("average", AVERAGES, ids=str)
def test_weights_of_a_schedule_that_the_host_evaluates(average):
    assert_weights(triangular(3, scale_fn=lambda cycle: 1 / cycle).with_warmup(5), average)


def assert_weights(curve, average):
    steps = steps_of(curve)
    groups = len(OFFSETS)
    course = Course(0, [0.1] * groups, [(0.0, 1.0)] * groups, None, (), moves=True, offsets=OFFSETS)
    clock = Clock(DEVICE, curve, SimpleNamespace(steps=0), average)
    for moves in (True, False):
        tables = clock.tables(course._replace(moves=moves), np.zeros((groups, 5)), None, clock.open)
        table, width, ints, _, phases, control, *_ = tables
        there, grid, block = on_device(steps)
        found = torch.zeros((len(there), groups), dtype=torch.float64, device=DEVICE)
        _weights[grid](table, width, ints, phases, control, there, found, BLOCK=block)
        for row, offset in zip(found.T.tolist(), OFFSETS, strict=True):
            wanted = [(weights(average, curve, step, [offset]) or [0.0])[0] for step in steps]
            assert row[: len(steps)] == (wanted if moves else [0.0] * len(steps))


# ---- averages


class Model(torch.nn.Module):
    """Parameters as a module, which an AveragedModel can copy."""

    def __init__(self, params, dtype=None):
        super().__init__()
        at_home = [torch.nn.Parameter(p.detach().cpu().to(dtype or p.dtype)) for p in params]
        self.params = torch.nn.ParameterList(at_home)


class Reference:
    """torch's average of an optimizer's parameters, on the CPU."""

    def __init__(self, opt, average, dtype):
        self.opt, self.average, self.dtype = opt, average, dtype
        rule = get_swa_multi_avg_fn()
        if isinstance(average, Ema):
            rule = get_ema_multi_avg_fn(average.decay)
        self.model = AveragedModel(Model(members(opt), dtype), multi_avg_fn=rule)

    def take(self):
        """Take the parameters in, if the step that has just ended falls due, in plain words."""
        average, steps = self.average, self.opt.iteration
        after = steps - average.start
        if isinstance(average, Ema):
            is_due = after > 0 and after % average.every == 0
        else:
            is_due = after > 0 and self.opt.schedule.is_cycle_end(steps)
        if is_due:
            self.model.update_parameters(Model(members(self.opt), self.dtype))
        return is_due

    def compare(self):
        for p, wanted in zip(members(self.opt), self.model.module.params, strict=True):
            # Before its first gradient a parameter has no average, and is equal to it.
            first = p.detach().to(wanted.dtype)
            found = (self.opt.state[p][KEY] if p in self.opt.state else first).cpu()
            assert found.dtype == wanted.dtype
            assert found.shape == wanted.shape
            if isinstance(self.average, Ema) and found.dtype != torch.float64:
                assert torch.equal(found, wanted)
            else:
                # torch rounds 1/n to float32; the interpreter's fused float64 product rounds twice.
                ulp = torch.finfo(torch.float32).eps
                ulp = (
                    1e-15
                    if isinstance(self.average, Ema)
                    else max(ulp, torch.finfo(found.dtype).eps)
                )
                torch.testing.assert_close(found, wanted.detach(), rtol=2 * ulp, atol=2 * ulp)


def grads_for(params, k, idle=()):
    """Set the gradients of a step; none for the parameters at these places."""
    for i, (p, grad) in enumerate(zip(params, drawn_like(params, k), strict=True)):
        p.grad = None if i in idle else grad.to(p.device)


def drawn_like(params, seed):
    return drawn([p.shape for p in params], params[0].dtype, seed)


TYPES = [
    (torch.float32, None),
    (torch.float64, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
DUE = [Ema(0.9), Ema(0.75, 2, start=1), CycleEnd(), CycleEnd(start=3)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("average", DUE, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_averages_equal_torchs(monkeypatch, types, average, way):
    """Odd sizes, an unaligned parameter, an empty one, parameters without gradients, groups."""
    take_way(monkeypatch, way)
    dtype, wide = types
    tensors = drawn([(3, 5), (4099,), (), (0,), (2048,), (1025,)], dtype)
    params = [torch.nn.Parameter(t) for t in (*tensors[:5], unaligned(tensors[5]))]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    average = type(average)(**{**vars(average), "dtype": wide})
    opt = wrapped(torch.optim.SGD(groups, lr=0.1), step_size_up=1, average=average)
    twin = Reference(opt, average, wide or dtype)
    taken = 0
    for k in range(6):
        # The second parameter's gradient comes and goes, the third's comes late for good.
        grads_for(params, k, idle=[i for i, idle in ((1, k % 3 == 1), (2, k < 2)) if idle])
        opt.step()
        taken += twin.take()
        if taken:
            twin.compare()
    assert taken >= 1
    assert [group[COUNT] for group in opt.state_dict()["param_groups"]] == [[taken, 6]] * 2


@pytest.mark.parametrize("cell", in_both_ways((case,) for case in KERNELS), ids=named)
def test_an_average_changes_nothing_else(monkeypatch, cell):
    case, way = cell
    take_way(monkeypatch, way)
    values = drawn([(5, 3), (1100,), ()], torch.float32)
    opt, plain = (
        case.ours(parameters(values), backend="triton", **more)
        for more in ({"average": Ema(0.9, 2)}, {})
    )
    twin = Reference(opt, opt._shared.settings.average, torch.float32)
    for k in range(4):
        for each in (opt, plain):
            grads_for(members(each), k, idle=[1] if k == 2 else [])
            each.step()
        if twin.take():
            twin.compare()
        for p, q in zip(members(opt), members(plain), strict=True):
            assert torch.equal(p, q)
        for ours, others in zip(held(opt), held(plain), strict=True):
            ours = [(name, value) for name, value in ours if name != KEY]
            assert [name for name, _ in ours] == [name for name, _ in others]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, others, strict=True))


def test_the_weight_1_copies_whatever_the_average_holds():
    p = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    opt = wrapped(torch.optim.SGD([p], lr=0.1), average=Ema(0.0))
    for value in (float("inf"), float("nan"), -float("inf"), 3e38):
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p][KEY].fill_(value)
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(opt.state[p][KEY], p.detach())


# ---- steps that are no ordinary ones


@pytest.mark.parametrize("average", [Ema(0.9, 2), CycleEnd()], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adam-wd", "rmsprop-mom-cent"])
def test_a_graph_keeps_averaging(name, average):
    case = BY_NAME[name]
    mixed, eager = (Run(case, average=average) for _ in range(2))
    mixed.eager(0)
    graph = mixed.capture()
    for k in range(1, 16):
        if k in (5, 9):
            for p, grad in zip(mixed.params, mixed.draw(k), strict=True):
                p.grad = grad
            with nothing_waits():
                mixed.opt.step()
        else:
            mixed.replay(graph, k)
    for k in range(16):
        eager.eager(k)
    assert_together(mixed, eager)
    assert all(KEY in mixed.opt.state[p] for p in mixed.params)
    taken = 16 // 2 if isinstance(average, Ema) else 16 // 6
    assert mixed.opt.state_dict()["param_groups"][0][COUNT] == [taken, 16]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_creates_no_average():
    case = BY_NAME["sgd-nest-wd"]
    before, run = Run(case), Run(case, average=Ema(0.9))
    before.eager(0)
    run.opt.load_state_dict(copy.deepcopy(before.opt.state_dict()))
    with pytest.raises(RuntimeError, match="it would create the optimizer's state"):
        run.capture()
    run.eager(1)
    graph = run.capture()
    run.replay(graph, 2)
    assert run.opt.state_dict()["param_groups"][0][COUNT] == [2, 3]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("average", [Ema(0.5), CycleEnd()], ids=str)
def test_an_overflow_takes_no_average(monkeypatch, average, way):
    take_way(monkeypatch, way)
    case = BY_NAME["adam"]
    skipping, plain = (Run(case, step_size_up=1, average=average) for _ in range(2))
    for k, overflow in enumerate([False, True, False, False, True, True, False]):
        scaled(skipping, k, 4.0, overflow)
        skipping.opt.step()
        if not overflow:
            scaled(plain, k, 4.0, False)
            plain.opt.step()
    assert_together(skipping, plain)


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("average", [Ema(0.5), CycleEnd()], ids=str)
def test_a_gate_that_skip_above_closes_takes_no_average(average, is_captured):
    case = BY_NAME["adam"]
    options = {"step_size_up": 1, "average": average, "skip_above": 100.0}
    skipping, plain = (Run(case, **options) for _ in range(2))
    for run in (skipping, plain):
        run.eager(0)
    graph = skipping.capture() if is_captured else None
    for k, value in enumerate([0.0, float("nan"), 0.0, 1e9, float("inf"), 0.0, 0.0], 1):
        if graph is None:
            for p, grad in zip(skipping.params, skipping.draw(k), strict=True):
                p.grad = grad + value
            skipping.opt.step()
        else:
            for static, grad in zip(skipping.static, skipping.draw(k), strict=True):
                static.copy_(grad + value)
            graph.replay()
        if value == 0.0:
            plain.eager(k)
    assert (skipping.opt.skipped, skipping.opt.iteration) == (3, 5)
    assert_identical(skipping.opt, plain.opt)
    counts = [run.opt.state_dict()["param_groups"][0][COUNT] for run in (skipping, plain)]
    assert counts == [[5 if isinstance(average, Ema) else 2, 5]] * 2


@pytest.mark.parametrize("average", [Ema(0.9), Ema(0.9, 3), CycleEnd()], ids=str)
def test_a_run_resumes_exactly(average):
    case = BY_NAME["adam"]
    whole, half, rest = (Run(case, step_size_up=2, average=average) for _ in range(3))
    for k in range(14):
        whole.eager(k)
    for k in range(7):
        half.eager(k)
    for p, q in zip(rest.params, half.params, strict=True):
        p.data.copy_(q.detach())
    rest.opt.load_state_dict(copy.deepcopy(half.opt.state_dict()))
    for k in range(7, 14):
        rest.eager(k)
    assert_together(rest, whole)


def test_a_jump_and_a_checkpoint_begin_from_other_counts():
    run = Run(BY_NAME["sgd"], step_size_up=1, average=CycleEnd())
    for k in range(5):
        run.eager(k)
    older = copy.deepcopy(run.opt.state_dict())
    run.opt.set_iteration(103)
    run.eager(5)
    assert all(torch.equal(run.opt.state[p][KEY], p) for p in run.params)
    assert run.opt.state_dict()["param_groups"][0][COUNT] == [1, 104]
    run.opt.load_state_dict(older)
    before = [run.opt.state[p][KEY].clone() for p in run.params]
    run.eager(6)
    for p, average in zip(run.params, before, strict=True):
        torch.testing.assert_close(run.opt.state[p][KEY], torch.lerp(average, p.detach(), 1 / 3))


def test_a_zero_rate_step_creates_averages_and_takes_none():
    run = Run(BY_NAME["adam"], average=Ema(0.5))
    rates = [group["lr"] for group in run.opt.param_groups]
    for group in run.opt.param_groups:
        group["lr"] = 0.0
    for p in run.params:
        p.grad = torch.zeros_like(p)
    run.opt.step()
    for group, rate in zip(run.opt.param_groups, rates, strict=True):
        group["lr"] = rate
    assert all(torch.equal(run.opt.state[p][KEY], p) for p in run.params)
    assert run.opt.state_dict()["param_groups"][0][COUNT] == [0, 0]
    run.eager(0)
    assert all(torch.equal(run.opt.state[p][KEY], p) for p in run.params)  # the first one copies
    run.eager(1)
    assert not all(torch.equal(run.opt.state[p][KEY], p) for p in run.params)
    assert run.opt.state_dict()["param_groups"][0][COUNT] == [2, 2]


def test_steps_without_any_gradient_take_averages():
    params = parameters(drawn([(5,), (7,)], torch.float32))
    opt = CyclicalOptimizer(
        torch.optim.Adam(params), fixed(0.1), average=Ema(0.5), backend="triton"
    )
    twin = Reference(opt, Ema(0.5), torch.float32)
    for k in range(5):
        grads_for(params, k, idle=(0, 1) if k > 1 else ())
        opt.step()
        twin.take()
        twin.compare()


# ---- GPUs only


@on_gpus
@pytest.mark.parametrize("average", [Ema(0.9, 2), CycleEnd()], ids=str)
def test_native_code_averages_in_ordinary_steps(average):
    """It repeats Triton's launches, and does so after a jump and a checkpoint again."""
    run = Run(BY_NAME["adam"], step_size_up=1, average=average)
    twin = Reference(run.opt, average, torch.float32)
    outcomes = []
    for k in range(24):
        if k == 12:
            run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
        ordinary = plan_of(run.opt).native.launches
        run.eager(k)
        outcomes.append(ordinary is not None and plan_of(run.opt).native.launches is ordinary)
        if twin.take() or k > 2:
            twin.compare()
    assert sum(outcomes) >= 16
    run.opt.set_iteration(101)
    run.eager(0)
    assert all(
        torch.equal(run.opt.state[p][KEY], p) or isinstance(average, Ema) for p in run.params
    )


@on_gpus
@pytest.mark.parametrize("average", [Ema(0.9, 2), CycleEnd()], ids=str)
def test_two_devices_average_at_the_same_steps(average):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    values = drawn([(5, 3), (1100,), (7,)], torch.float32)
    params = [torch.nn.Parameter(v.to(f"cuda:{i}")) for i, v in zip((0, 1, 1), values, strict=True)]
    opt = wrapped(torch.optim.Adam(params), step_size_up=1, average=average, backend="triton")
    twin = Reference(opt, average, torch.float32)
    for k in range(8):
        # The second device joins late, at a position that it takes over.
        grads_for(params, k, idle=(1, 2) if k < 3 else ())
        opt.step()
        if twin.take() or k > 1:
            twin.compare()
    assert {opt.state[p][KEY].device for p in params} == {p.device for p in params}
