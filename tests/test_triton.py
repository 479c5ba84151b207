"""The Triton backend against torch's own for-loop step, and its schedule against the host's.

They run in Triton's interpreter on the CPU, in a process of its own, since Triton decides when it
is imported: ``TRITON_INTERPRET=1 pytest tests/test_triton.py`` (``make interpreted``); and compiled
where there is a GPU (``make gpu-check``). The bounds are those of contract.py. A program costs
the interpreter some milliseconds: it tries each setting and each dtype, and only some of both.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
import warnings
import weakref

import changes
import numpy as np
import pytest
import test_distributed
import torch
from changes import PATTERNS, drop
from contract import name_of
from native_helpers import (
    BY_NAME,
    CASES,
    DTYPES,
    HALF,
    KERNELS,
    MIXED_GROUPS,
    assert_close,
    assert_first_gradient_is_whole,
    assert_identical,
    assert_nan_and_inf_where_torch_has_them,
    assert_no_nan_at_a_rate_beyond_all_floats,
    assert_pattern,
    feed,
    held,
    like,
    many_groups,
    members,
    parameters,
    tensors_of,
    unaligned,
    wrapped,
)
from test_long_horizon import FORMULAS
from triton_helpers import (
    DEVICE,
    INTERPRETED,
    RUNS,
    Contract,
    Twins,
    assert_alike,
    drawn,
    on_device,
    twins,
)

from clr_optim import CyclicalOptimizer, schedule
from clr_optim.schedule import Phase, Schedule

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not RUNS,
        reason="runs with TRITON_INTERPRET=1 (`make interpreted`) or on a GPU, with Triton",
    ),
    # The interpreter computes with numpy, which warns of every NaN and Inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="runs compiled, without TRITON_INTERPRET"),
]


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "triton")  # what "auto" means here


def on_gpus(test):
    for mark in gpu:
        test = mark(test)
    return test


def some(cells, every):
    """Every so many of the cells under the interpreter, all of them on a GPU."""
    return list(cells)[::every] if INTERPRETED else list(cells)


def named(cell):
    return "-".join(name_of(part) if not callable(part) else part.__name__ for part in cell)


kernels = pytest.mark.parametrize("case", KERNELS, ids=name_of)


# ---- the schedule


def _windows():
    for window in schedule.WINDOWS:
        own = {"window": window, "step_size_up": 7}
        yield f"triangular-{window}", schedule.triangular(step_size_down=3, **own)
        yield f"triangular2-{window}", schedule.triangular2(**own)
        yield f"exp_range-{window}", schedule.exp_range(gamma=0.999, **own)
        yield f"exp_range_bounds-{window}", schedule.exp_range_bounds(gamma=0.999, **own)
        yield f"one_cycle-{window}", schedule.one_cycle(100, window=window)
        yield (
            f"one-sided-{window}",
            Schedule("x", [Phase(step_size_up=0, step_size_down=5, window=window)]),
        )


SCHEDULES = {
    **dict(_windows()),
    "slow": schedule.triangular(step_size_up=2000, step_size_down=3001),
    "rising-only": Schedule("x", [Phase(step_size_up=6, step_size_down=0)]),
    "warm_restarts": schedule.warm_restarts(10),
    "warm_restarts-2": schedule.warm_restarts(3, period_multiplier=2),
    "warm_restarts-3": schedule.warm_restarts(10, period_multiplier=3, base_lr=0.0, max_lr=0.3),
    "one_cycle-own": schedule.one_cycle(37, pct_start=0.2, base_lr=0.01, max_lr=0.5),
    "decay": schedule.decay(20),
    "decay-own": schedule.decay(20, base_lr=0.0, max_lr=0.1),
    "exp": schedule.exp(gamma=0.999),
    "exp-own": schedule.exp(0.3, gamma=0.9),
    "exp-never-falls": schedule.exp(gamma=1.0),
    "ramp": schedule.ramp(100),
    "ramp-own": schedule.ramp(50, 1e-6, 1.0),
    "ramp-exponential": schedule.ramp(50, 1e-6, 10.0, mode="exponential"),
    "fixed": schedule.fixed(),
    "fixed-own": schedule.fixed(0.25),
    "sequence": schedule.sequence(
        [
            (schedule.triangular2(step_size_up=4, window="hann"), 20),
            (schedule.fixed(0.02), 5),
            (schedule.one_cycle(40, window="welch"), 40),
            (schedule.warm_restarts(4, period_multiplier=2), 50),
            (schedule.exp_range(step_size_up=3, gamma=0.9), None),
        ]
    ),
    "rises-for-ever": Schedule("x", [Phase(window="constant", base_gamma=1.5, steps=10)]),
    "rises-from-0": Schedule(
        "x", [Phase(step_size_up=3, base_gamma=3.0, steps=4, base_lr=0.0, max_lr=1.0)]
    ),
    "ends-beyond-floats": Schedule(
        "x",
        [
            Phase(step_size_up=3, steps=7, base_lr=1e200, max_lr=1e300, lower=(1e200, 1e10)),
            Phase(step_size_up=3, steps=9, base_lr=1e200, max_lr=1e300, upper=(0.0, 1e10)),
            Phase(step_size_up=2, base_lr=1e300, max_lr=1e308, lower=(0.0, 9.0), upper=(1e9, 9.0)),
        ],
    ),
    "own-bounds": Schedule(
        "x",
        [
            Phase(step_size_up=3, steps=1, base_lr=0.1, max_lr=0.2),
            Phase(step_size_up=3, steps=13, base_lr=0.2, max_lr=0.7, base_gamma=1.05),
            Phase(step_size_up=5, steps=9, lower=(0.5, 0.0), upper=(2.0, 0.5), cycle_gamma=0.3),
            Phase(window="constant", steps=4, lower=(0.0, 1.0), cycle_momentum=False),
            Phase(step_size_up=5, base_lr=0.0, max_lr=1.0, gamma=0.99999),
        ],
    ),
}
BOUNDS = (0.001, 0.006, 0.8, 0.95)


def assert_schedule(of, steps):
    rates, momenta = on_device(of, steps, BOUNDS)
    expected = of(steps, *BOUNDS[:2]), of.momentum(steps, *BOUNDS[2:])
    # Three float64 ulps, five with a GPU's own exp2; what atol leaves out has no 53 bits.
    tolerance = 7e-16 if INTERPRETED else 1.1e-15
    for found, wanted in zip((rates, momenta), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule(name):
    of = SCHEDULES[name]
    steps = set(range(100_001))
    for start in itertools.accumulate(phase.steps or 0 for phase in of.phases[:-1]):
        for period in {0, 1, 2, of.phases[0].period}:
            steps.update((start - 1 + period, start + period, start + 1 + period))
    generator = np.random.default_rng(4)
    steps.update(int(2**x) for x in generator.uniform(8, 40, 600))
    steps.update(generator.integers(0, 2**40, 300).tolist())
    assert_schedule(of, sorted(step for step in steps if 0 <= step <= 2**40))


def test_a_scale_fn_is_not_for_the_device():
    from clr_optim.kernels.triton.schedule import phase_tables

    with pytest.raises(ValueError, match="scale_fn: evaluate it on the host"):
        phase_tables(schedule.triangular(scale_fn=lambda x: 1.0))


# ---- the contract

_crossed = [(case, DTYPES[i % 4]) for i, case in enumerate(CASES)]
CELLS = (
    [*_crossed, *(cell for cell in itertools.product(KERNELS, DTYPES) if cell not in _crossed)]
    if INTERPRETED
    else list(itertools.product(CASES, DTYPES))
)


def values_of(count=2):
    channels, vector, scalar = drawn([(2, 3, 2, 2), (17,), ()], torch.float64)
    return [channels.to(memory_format=torch.channels_last), vector, scalar][:count]


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_contract(cell):
    case, dtype = cell
    contract = Contract(case, dtype, values_of())
    assert members(contract.ours)[0].is_contiguous(memory_format=torch.channels_last)
    for k in range(8):
        grads = [
            like(g, p)
            for g, p in zip(
                drawn([(2, 3, 2, 2), (17,)], torch.float64, k + 1),
                members(contract.ours),
                strict=True,
            )
        ]
        # The vector's first gradient comes late, and some are missing.
        contract.step([grads[0], None if k in (0, 5) else grads[1]])
    contract.compare()


LAYOUTS = {
    "transposed": lambda draw: draw((6, 9)).t(),
    "permuted": lambda draw: draw((3, 4, 5)).permute(2, 0, 1),
    "empty": lambda draw: draw((0, 3)),
    "scalar": lambda draw: draw(()),
    "ones": lambda draw: draw((1, 1, 5, 1)),
    "one-channel": lambda draw: draw((4, 1, 3, 3)).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("cell", some(itertools.product(KERNELS, DTYPES), 5), ids=named)
def test_layouts(cell):
    case, dtype = cell
    generator = torch.Generator().manual_seed(3)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    contract = Contract(case, dtype, [make(draw) for make in LAYOUTS.values()])
    for _ in range(3):
        contract.step([like(draw(p.shape), p) for p in members(contract.ours)])
    contract.compare()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_sizes_around_a_block_and_a_chunk(name, dtype):
    from clr_optim.kernels.triton import multi_tensor

    block = multi_tensor.shape_of(dtype.itemsize).block
    chunk = block * multi_tensor.BLOCKS_PER_CHUNK
    sizes = [(n,) for n in (0, 1, block - 1, block, block + 1, chunk - 1, chunk, chunk + 1)]
    contract = Contract(BY_NAME[name], dtype, drawn(sizes, torch.float64))
    for k in range(2):
        contract.step(drawn(sizes, dtype, seed=k + 1))
    contract.compare()


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("cell", some(itertools.product(KERNELS, DTYPES), 3), ids=named)
def test_nan_and_inf(cell):
    case, dtype = cell
    special = torch.tensor([SPECIAL] * 6, dtype=torch.float64, device=DEVICE)
    values = [special.flatten(), torch.ones(6, dtype=torch.float64, device=DEVICE)]
    gradients = [special.t().flatten(), special[0]]
    contract = Contract(case, dtype, values)
    for k in range(4):
        grads = gradients if k < 2 else [g.nan_to_num(0.25, 0.5, -0.5) for g in gradients]
        contract.step([like(g, p) for g, p in zip(grads, members(contract.ours), strict=True)])
        _, _, mine, theirs = contract.segments[-1]
        assert_pattern(mine[-1], theirs[-1].to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", KERNELS, ids=name_of)
def test_nan_and_inf_of_extreme_values(case, dtype):
    assert_nan_and_inf_where_torch_has_them(case, dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name_of)
@kernels
def test_no_nan_at_a_rate_beyond_all_floats(case, dtype):
    assert_no_nan_at_a_rate_beyond_all_floats(case, dtype, "triton", DEVICE)


# ---- gradients that come and go, and the launches


@pytest.mark.parametrize(
    "cell",
    some(
        itertools.product(
            # The others have gradients that no kernel takes, or are made for the CPU.
            [p for p in PATTERNS if p not in ("expanded", "all")],
            ["sgd-damp", "adamw-ams", "adagrad-decay", "rmsprop-mom"],
        ),
        3,
    ),
    ids="-".join,
)
def test_gradient_patterns(cell):
    pattern, name = cell
    pair = twins(BY_NAME[name], ((5, 3), (7,), (), (7,)), backend="auto")
    for k in range(7):
        PATTERNS[pattern](pair, k)
        pair.step()


def test_a_parameter_that_joins_later_counts_its_own_steps():
    pair = twins(BY_NAME["adam"], ((5,), (3,), (2,)))
    for k in range(4):
        pair.draw()
        drop(pair, lambda i: i == 2 and k < 2)  # noqa: B023
        pair.step()
    for opt in pair.both():
        opt.add_param_group({"params": parameters(drawn([(4,)], torch.float64, 8)), "lr": 0.02})
    pair.run(2)
    assert [int(pair.ours.state[p]["step"]) for p in members(pair.ours)] == [6, 6, 4, 2]


def test_the_first_gradient_of_a_tensor_is_not_dampened():
    assert_first_gradient_is_whole("triton", drawn)


def test_a_buffer_of_none_is_a_first_step():
    pair = twins(BY_NAME["sgd-damp"])
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["momentum_buffer"] = None
    pair.run(3)


def test_memory_that_nothing_has_written_is_not_computed_with(monkeypatch):
    empty_like = torch.empty_like

    def garbage(like, **options):
        tensor = empty_like(like, **options)
        tensor.view(torch.int64).fill_(0x7FF4 << 48)  # a signaling NaN
        return tensor

    monkeypatch.setattr(torch, "empty_like", garbage)
    pair = twins(BY_NAME["sgd-nest-wd"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.run(2)


def test_3000_tensors():
    shapes = [(1 + i % 7,) for i in range(3000)]
    pair = twins(BY_NAME["sgd-wd"], shapes)
    pair.draw()
    pair.step()


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=name_of)
def test_counters_of_many_tensors(default):
    """More than one program of `advance` has; tensors of no elements cost no others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # the counters' dtype, as torch has it
    try:
        pair = twins(BY_NAME["adam"], [(3,), *[(0,)] * 700, (2,)])
        pair.run(2)
    finally:
        torch.set_default_dtype(before)
    counters = [pair.ours.state[p]["step"] for p in members(pair.ours)]
    assert {(t.dtype, int(t)) for t in counters} == {(default, 2)}


def test_a_largest_average_that_is_nan_stays():
    pair = twins(BY_NAME["adamw-ams"])
    pair.run(1)
    for opt in pair.both():
        opt.state[members(opt)[1]]["max_exp_avg_sq"][2] = math.nan
    pair.run(2)
    assert members(pair.ours)[1].isnan().nonzero().tolist() == [[2]]


def test_an_average_of_the_last_gradient_alone_is_that_gradient():
    (p,) = parameters(drawn([(3,)], torch.float32))
    opt = wrapped(torch.optim.Adam([p], lr=0.1, betas=(0.0, 0.9)), backend="triton")
    for value in (1e10, 1e-10):
        p.grad = torch.full_like(p, value)
        opt.step()
    assert torch.equal(opt.state[p]["exp_avg"], p.grad)


@kernels
def test_several_dtypes_share_one_position(case):
    values = drawn([(5, 3)], torch.float64)
    dtypes = DTYPES if case is KERNELS[0] else DTYPES[1:3]
    mixed = case.ours([p for d in dtypes for p in parameters(values, d)], backend="triton")
    alone = [case.ours(parameters(values, d), backend="triton") for d in dtypes]
    for k in range(3):
        for p, single in zip(members(mixed), alone, strict=True):
            (p.grad,) = drawn([(5, 3)], p.dtype, seed=k)
            members(single)[0].grad = p.grad.clone()
            single.step()
        mixed.step()
    for p, single, state in zip(members(mixed), alone, held(mixed), strict=True):
        assert torch.equal(p, members(single)[0])
        for (_, a), (_, b) in zip(state, held(single)[0], strict=True):
            assert torch.equal(a, b)


class Counted:
    """A kernel that counts its launches and their programs."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]

    def taken(self):
        grids, self.grids = self.grids, []
        return grids


@pytest.fixture
def launches(monkeypatch):
    from clr_optim.kernels.triton import multi_tensor

    found = []
    for name in ("multi_tensor", "advance"):
        found.append(Counted(getattr(multi_tensor, name)))
        monkeypatch.setattr(multi_tensor, name, found[-1])
    return found


def test_a_launch_for_each_bucket_and_one_more(launches):
    update, advance = launches
    dtypes = (torch.float32, torch.bfloat16)
    params = [p for d in dtypes for p in parameters(drawn([(5,), (4, 2), (9000,)], d))]
    opt = wrapped(torch.optim.AdamW(params, lr=0.1), backend="triton", max_grad_norm=1.0)
    for k in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        # A program for each chunk, of which the largest tensors have two.
        assert update.taken() == [(4,), (4,)], k
        assert advance.taken() == [(1,)], k
    for p in params[:3]:
        p.grad = None
    params[3].grad = None
    opt.step()
    assert (update.taken(), advance.taken()) == ([(3,)], [(1,)])
    opt.zero_grad()
    opt.step()
    assert update.taken() == []
    assert opt.iteration == 5


def test_settings_do_not_split_a_bucket(launches):
    groups = [
        {"params": parameters(drawn([(3,)], torch.float64)), **own}
        for own in (
            {}, {"lr": 0.2}, {"betas": (0.5, 0.6)}, {"eps": 0.1, "weight_decay": 0.1},
            {"maximize": True},
        )
    ]  # fmt: skip
    opt = wrapped(torch.optim.Adam(groups, lr=0.1), backend="triton")
    for p in members(opt):
        p.grad = torch.ones_like(p)
    opt.step()
    assert [counted.taken() for counted in launches] == [[(5,)], [(1,)]]


def test_auto_returns_to_the_kernels(launches):
    pair = twins(BY_NAME["sgd-mom"], backend="auto")
    pair.run(1)
    PATTERNS["other_layout"](pair, 1)
    pair.step()
    launches[0].taken()
    pair.run(1)
    assert launches[0].taken() == [(2,)]


# ---- groups


@pytest.mark.parametrize("name", MIXED_GROUPS)
def test_groups(name):
    pair = Twins(many_groups(*MIXED_GROUPS[name], draw=drawn), backend="auto")
    for k in range(5):
        pair.draw()
        drop(pair, lambda i: (i + k) % 4 == 0)  # noqa: B023
        pair.step()


@pytest.mark.parametrize("name", ["sgd-mom", "adamw"])
def test_parameters_that_share_memory(name):
    def make():
        (base, other) = drawn([(24,), (3,)], torch.float64)
        views = [torch.nn.Parameter(base[:16]), torch.nn.Parameter(base[8:])]
        return BY_NAME[name].make([*views, *parameters([other])])

    Twins(make, backend="auto").run(3)


# ---- the position


def at_backend(case, backend, **options):
    values = drawn([(5, 3), (7,)], torch.float64)
    return case.ours(parameters(values), backend=backend, **{"step_size_up": 3, **options})


def run_both(ours, theirs, steps, seed=0):
    for k in range(steps):
        for p, q in zip(members(ours), members(theirs), strict=True):
            p.grad = like(drawn([p.shape], p.dtype, seed + k)[0], p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert_alike(ours, theirs)
    assert ours.get_last_lr() == theirs.get_last_lr()
    assert ours.iteration == theirs.iteration


POLICIES = {
    "triangular2": {"policy": "triangular2"},
    "exp_range": {"policy": "exp_range", "gamma": 0.9, "window": "hann"},
    "one_cycle": {"policy": schedule.one_cycle(8)},
    "warm_restarts": {"policy": schedule.warm_restarts(2, period_multiplier=2)},
    "own-bounds": {"policy": SCHEDULES["own-bounds"]},
    "scale_fn-cycle": {"scale_fn": lambda x: 1 / 2 ** (x - 1)},
    "scale_fn-iterations": {"scale_fn": lambda x: 0.9**x, "scale_mode": "iterations"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["sgd-wd", "adam-cycled"])
def test_policies(name, policy):
    options = dict(POLICIES[policy])
    if isinstance(options.get("policy"), Schedule):
        options = {"step_size_up": 2000, **options}  # as if nothing was said
    run_both(*(at_backend(BY_NAME[name], b, **options) for b in ("triton", "torch")), 9)


@pytest.mark.parametrize("cycle_momentum", [True, False])
@pytest.mark.parametrize(
    "name", ["sgd-mom", "sgd-nest", "sgd-damp", "adam", "adamw-ams", "rmsprop-mom-cent"]
)
def test_cycled_momentum(name, cycle_momentum):
    options = {"cycle_momentum": cycle_momentum}
    if cycle_momentum:
        options |= {"base_momentum": 0.3, "max_momentum": 0.95}
    run_both(*(at_backend(BY_NAME[name], b, **options) for b in ("triton", "torch")), 8)


@pytest.mark.parametrize("name", ["sgd", "adam", "sgd-mom-cycled"])
def test_a_step_without_any_gradient_advances(name):
    pair = [at_backend(BY_NAME[name], b) for b in ("triton", "torch")]
    for opt in pair:
        opt.step()
    assert pair[0].iteration == 1
    assert not pair[0].state
    run_both(*pair, 2)
    for opt in pair:
        opt.zero_grad()
        opt.step()
        opt.step()
    assert pair[0].iteration == 5
    run_both(*pair, 3)


@pytest.mark.parametrize("name", ["sgd", "adam-cycled", "rmsprop"])
def test_position_and_bounds_changed_in_mid_run(name):
    pair = [at_backend(BY_NAME[name], b) for b in ("triton", "torch")]
    run_both(*pair, 2)
    for position in (7, 0, 2**40 + 1):
        for opt in pair:
            opt.set_iteration(position)
        run_both(*pair, 2)
    for opt in pair:
        opt.set_bounds(base_lr=0.1, max_lr=0.3)
    run_both(*pair, 2)
    assert pair[0].iteration == 2**40 + 5


@pytest.mark.parametrize("edge", [2**24, 2**31, 2**32, 2**53])
@pytest.mark.parametrize("policy", ["triangular", "exp_range", "longer than an int32"])
def test_the_rate_far_along(policy, edge):
    """Used by the kernel, at the device's own position: the way of a weight pulled by ones."""
    of, formula = FORMULAS[policy]
    weight = drawn([(3,)], torch.float64)[0].zero_().requires_grad_()
    weight.grad = -torch.ones_like(weight)
    opt = wrapped(
        torch.optim.SGD([weight], lr=0.006), policy=of, step_size_up=2000,
        base_lr=0.001, max_lr=0.006,
    )  # fmt: skip
    opt.set_iteration(edge - 2)
    for step in range(edge - 2, edge + 2):
        with torch.no_grad():
            weight.zero_()
        opt.step()
        assert weight.tolist() == pytest.approx([formula(step)] * 3, rel=2e-15, abs=0)
        assert opt.iteration == step + 1


@pytest.mark.parametrize("name", ["adam", "adagrad-decay", "rmsprop"])
def test_torchs_own_counter_stalls_where_it_does_in_torch(name):
    """In float32 at 2**24; the cycle goes on."""
    pair = twins(BY_NAME[name], backend="auto")
    pair.run(2)
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["step"].fill_(2**24 - 2)
    for expected in (-1, 0, 0):
        pair.run(1)
        for opt in pair.both():
            assert {opt.state[p]["step"].item() for p in members(opt)} == {2**24 + expected}
    assert pair.ours.iteration == 5


@pytest.mark.parametrize("setting", ["weight-decay", "betas", "eps", "maximize", "amsgrad-on"])
def test_settings_changed_in_mid_run(setting):
    pair = twins(BY_NAME["adam"], backend="auto")
    pair.run(2)
    before = dict(pair.theirs.param_groups[0])
    for _ in range(2):
        for opt in pair.both():
            opt.param_groups[0].update(changes.SETTINGS[setting])
        pair.run(2)
        for opt in pair.both():
            opt.param_groups[0].update({k: before[k] for k in changes.SETTINGS[setting]})
        pair.run(1)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adamw", "adam-cycled", "rmsprop-mom-cent"])
def test_a_zero_rate_step_makes_state_and_nothing_else(name, warm):
    """As ``torch.distributed.checkpoint`` takes it, before it reads or writes state."""
    pair = twins(BY_NAME[name])
    pair.run(warm)
    before = [p.detach().clone() for p in members(pair.ours)]
    position, rates = pair.ours.iteration, pair.ours.get_last_lr()
    feed(pair.theirs, pair.ours)
    for opt in pair.both():
        kept = [group["lr"] for group in opt.param_groups]
        for group in opt.param_groups:
            group["lr"] = 0.0
        for p in members(opt):
            p.grad = torch.zeros_like(p)
        opt.step()
        for group, lr in zip(opt.param_groups, kept, strict=True):
            group["lr"] = lr
    assert (pair.ours.iteration, pair.ours.get_last_lr()) == (position, rates)
    assert_alike(*pair.both())
    if not warm:  # else the momentum of a twin, times 0, is as little
        assert all(torch.equal(p, v) for p, v in zip(members(pair.ours), before, strict=True))
    assert all(held(pair.ours))
    pair.run(3)
    assert pair.ours.iteration == position + 3


# ---- clipping


@pytest.mark.parametrize("limit", [1e-3, 1.0, math.inf])
@pytest.mark.parametrize("name", ["sgd-wd", "adamw-ams", "rmsprop-mom-cent-max"])
def test_clipping(name, limit):
    pair = twins(BY_NAME[name], ((5, 3), (7,), ()), max_grad_norm=limit)
    assert pair.ours.grad_norm is None
    for k in range(4):
        pair.draw()
        drop(pair, lambda i: i == k)  # noqa: B023
        kept = [(p, p.grad, p.grad.clone()) for p in members(pair.ours) if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(members(pair.theirs), limit)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)
        for p, grad, values in kept:
            assert p.grad is grad
            assert torch.equal(grad, values)


def test_clipping_where_there_is_no_gradient():
    pair = twins(BY_NAME["adam"], max_grad_norm=1.0)
    pair.step()
    assert float(pair.ours.grad_norm) == 0.0
    assert pair.ours.iteration == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_clipping_nan_and_inf(name, value):
    pair = twins(BY_NAME[name], max_grad_norm=1.0)
    for k in range(3):
        pair.draw()
        if k != 1:
            for opt in pair.both():
                members(opt)[0].grad[0, 0] = value
        norm = torch.nn.utils.clip_grad_norm_(members(pair.theirs), 1.0)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=name_of)
def test_clipping_in_other_dtypes(dtype):
    case, shapes = BY_NAME["adam-wd"], ((5, 3), (300,))
    values = drawn(shapes, dtype)
    ours = case.ours(parameters(values), backend="triton", max_grad_norm=0.5)
    theirs = case.make(parameters(values, torch.float64))
    for k in range(3):
        for p, q, g in zip(*map(members, (ours, theirs)), drawn(shapes, dtype, k + 9), strict=True):
            p.grad, q.grad = g.clone(), g.double()
        norm = torch.nn.utils.clip_grad_norm_(members(theirs), 0.5)
        feed(theirs, ours)
        theirs.step()
        ours.step()
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=4 * torch.finfo(dtype).eps)
        for p, q in zip(*map(members, (ours, theirs)), strict=True):
            assert_close(p, q.to(dtype), 4 * torch.finfo(dtype).eps)


def test_clipping_one_norm_over_both_backends():
    pair = Twins(
        many_groups(*MIXED_GROUPS["adamw-differentiable"], draw=drawn),
        backend="auto",
        max_grad_norm=0.5,
    )
    for _ in range(3):
        pair.draw()
        kept = [(p, p.grad, p.grad.clone()) for p in members(pair.ours)]
        norm = torch.nn.utils.clip_grad_norm_(members(pair.theirs), 0.5)
        pair.step()
        assert_close(pair.ours.grad_norm, norm, 1e-12)
        assert all(p.grad is g and torch.equal(g, values) for p, g, values in kept)


# ---- memory


def test_a_default_device_is_not_ours():
    """Who sets one means the model's tensors, and not what a step keeps on the host."""
    pair = twins(BY_NAME["adam-wd"], max_grad_norm=0.5)
    with torch.device("meta"):
        pair.ours.step()  # nothing has a gradient
    for _ in range(2):
        pair.draw()
        feed(pair.theirs, pair.ours)
        with torch.device("meta"):
            pair.ours.step()
            assert pair.ours.grad_norm.device == DEVICE
            assert pair.ours.iteration
        torch.nn.utils.clip_grad_norm_(members(pair.theirs), 0.5)
        pair.theirs.step()
        assert_alike(pair.ours, pair.theirs)


def test_steps_in_inference_mode_and_out_of_it():
    """Which torch takes where there is no state."""
    pair = twins(BY_NAME["sgd"])
    for k in range(5):
        pair.draw()
        with torch.inference_mode(k in (0, 3)):
            pair.step()
            pair.ours.set_bounds(max_lr=0.1 * (k + 1))
        assert pair.ours.iteration == k + 1


def test_gradients_dropped_between_scan_and_launch(monkeypatch):
    """By another thread's zero_grad(), whose forward pass then takes their memory."""
    size = 200_000
    (weight,) = parameters(drawn([(size,)], torch.float32))
    opt = wrapped(torch.optim.SGD([weight], lr=1.0), backend="triton", base_lr=1.0, max_lr=1.0)
    weight.grad = torch.ones_like(weight)
    opt.step()
    fused, taken = opt._shared.fused, []
    gates = fused._gates

    def others(*args):
        weight.grad = None
        taken.extend(torch.full((size,), 7.0, device=DEVICE) for _ in range(4))
        return gates(*args)

    monkeypatch.setattr(fused, "_gates", others)
    weight.grad = torch.ones_like(weight)
    reference = weakref.ref(weight.grad)
    before = weight.detach().clone()
    opt.step()
    assert torch.equal(weight, before - 1)
    assert reference() is None  # let go of after the step


@pytest.mark.parametrize("first", [True, False])
def test_ctrl_c_between_device_and_host(first, monkeypatch):
    """The device has gone on, and the host has not heard of it."""
    from clr_optim.backends.triton import _Position

    pair = twins(BY_NAME["adam-wd"])
    if not first:
        pair.draw()
        pair.step()

    def interrupted(*args):
        raise KeyboardInterrupt

    pair.draw()
    feed(pair.theirs, pair.ours)
    with monkeypatch.context() as patch:
        patch.setattr(_Position, "advanced", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.ours.step()
    pair.theirs.step()
    assert pair.ours.iteration == 2 - first
    assert_alike(pair.ours, pair.theirs)
    for _ in range(2):
        pair.draw()
        pair.step()
    assert pair.ours.iteration == 4 - first
    assert not pair.ours._shared.fused.uncertain


def test_a_device_that_joins_stands_where_the_others_do(monkeypatch):
    """Though the host may not know where that is; another device is played by another index."""
    from clr_optim.plan import Bucket

    begin = Bucket.begin

    def on_two(self, first):
        begin(self, first)
        if self.dtype == torch.float64 and DEVICE.type == "cpu":
            self.device = torch.device("cpu", 1)

    monkeypatch.setattr(Bucket, "begin", on_two)
    weights = parameters(drawn([(4,)], torch.float32)) + parameters(drawn([(4,)], torch.float64))
    opt = wrapped(torch.optim.SGD(weights[:1], lr=0.1), backend="triton", step_size_up=4)
    for overflow in (0.0, 0.0, 1.0, 0.0, 1.0):
        weights[0].grad = torch.ones_like(weights[0])
        opt.grad_scale = torch.ones((), device=DEVICE)
        opt.found_inf = torch.full((), overflow, device=DEVICE)
        opt.step()
    del opt.grad_scale, opt.found_inf
    opt.optimizer.add_param_group({"params": weights[1:], "lr": 0.1})
    weights[1].grad = torch.ones_like(weights[1])
    opt.step()
    positions = opt._shared.fused._positions.values()
    assert [position.ask() for position in positions] == [4] * (2 if DEVICE.type == "cpu" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("which", ["parameters", "gradients", "both"])
def test_tensors_that_are_not_aligned(which, dtype):
    contract = Contract(BY_NAME["adamw-ams"], dtype, drawn([(3, 5), (17,)], torch.float64))
    if which != "gradients":
        for opt in (contract.ours, contract.theirs):
            for p in members(opt)[1:]:
                p.data = unaligned(p.detach())
        contract.segments = []
        contract._take()
    for k in range(3):
        grads = drawn([(3, 5), (17,)], dtype, k + 1)
        if which != "parameters" and k != 1:  # and aligned again in between
            grads = [grads[0], unaligned(grads[1])]
            assert grads[1].data_ptr() % 16
        contract.step(grads)
    contract.compare()


EVENTS = [
    getattr(changes, name)
    for name in (
        # Those that make no tensors, which would be on the CPU.
        "swap_data", "swap_layout", "shrink", "shrink_in_place", "grow", "replace_state",
        "swap_state_data", "transpose_state", "widen_counters", "half_the_counters",
        "one_counter_for_two", "one_buffer_for_two", "delete_state_tensor", "none_in_state",
        "delete_state_of_one", "clear_state_of_one", "clear_state", "new_state_dicts",
        "new_state_object", "load_own", "load_other", "cast_with_state", "remove_in_place",
        "reverse_in_place", "new_list", "a_tuple", "new_group_dict", "freeze", "share_memory",
    )
]  # fmt: skip


def add_group(opt):
    values = drawn(((3, 2), ()), torch.float64, 8)
    opt.add_param_group({"params": parameters(values), "lr": 0.02})


def _cells():
    names = [case.name for case in KERNELS]
    for i, event in enumerate([*EVENTS, add_group]):
        # A kernel that counts steps, and one of the others, each in turn.
        chosen = ["sgd-nest-wd", names[2 + i % 8]] if INTERPRETED else names
        yield from ((event, BY_NAME[name]) for name in chosen)


@pytest.mark.parametrize("cell", list(_cells()), ids=named)
def test_events(cell):
    event, case = cell
    pair = twins(case, ((5, 3), (7,), (), (7,)), backend="auto")
    tolerance = 1e-5 if event.__name__ == "cast_with_state" else 1e-12
    pair.run(2)
    pair.each(event)
    pair.step(tolerance)  # with what gradients are left
    pair.run(1, tolerance)
    pair.each(event)
    pair.run(1, tolerance)


@pytest.mark.skipif(RUNS and not INTERPRETED, reason="the machine's tensors are on the CPU")
def test_any_order_of_events(launches):
    """Seeds of the fuzzer, whose own tests play more of them: these go through the kernels."""
    from fuzz.run import drawn, play

    for seed in range(100, 106):
        play(*drawn("triton", seed, 40))
    update, _ = launches
    assert len(update.taken()) > 40


@pytest.mark.parametrize("duplicate", [copy.deepcopy, changes.through_pickle])
@pytest.mark.parametrize("name", ["sgd-mom", "adamw-ams"])
def test_a_copy_and_the_original_go_on(name, duplicate):
    pair = twins(BY_NAME[name])
    pair.run(2)
    other = Twins.__new__(Twins)
    other.theirs, other.ours = duplicate(pair.theirs), duplicate(pair.ours)
    other.generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        pair.run(1)
        other.run(2)
    assert not torch.equal(members(pair.ours)[0], members(other.ours)[0])


@kernels
def test_a_backward_through_an_older_graph_raises(case):
    weight, idle = members(twins(case, ((3, 3), (3,))).ours)
    opt = case.ours([weight, idle], backend="triton")
    weight.grad = torch.ones_like(weight)
    loss = (weight @ weight).sum()
    other = (idle**2).sum()
    versions = weight._version, idle._version
    opt.step()
    assert weight._version > versions[0]
    assert idle._version == versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    idle.grad = None
    other.backward()  # it had no gradient, so nothing moved it


def test_training_a_model():
    def make(backend):
        torch.manual_seed(6)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
        )
        model = model.double().to(DEVICE, memory_format=torch.channels_last)
        case = BY_NAME["adamw"]
        return model, case.ours(model.parameters(), backend=backend, max_grad_norm=1.0)

    runs = [make("torch"), make("triton")]
    generator = torch.Generator().manual_seed(11)
    for _ in range(5):
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64).to(DEVICE)
        y = torch.randint(0, 3, (8,), generator=generator).to(DEVICE)
        for model, opt in runs:
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    assert_alike(runs[1][1], runs[0][1], 1e-10)


# ---- checkpoints


@kernels
def test_a_run_may_change_backend_at_checkpoints(case):
    pair = twins(case)
    others = ("torch", "native") if INTERPRETED else ("torch", "auto")
    for backend in (others[0], "triton", others[1], "triton"):
        pair.run(2)
        pair.ours = changes.reload(pair.ours, backend)
        assert pair.ours.iteration == int(pair.ours.param_groups[0]["clr_step"])
        assert_alike(*pair.both())
    pair.run(2)


def test_a_checkpoint_is_as_torch_writes_it():
    pair = twins(BY_NAME["adamw-ams"])
    pair.run(3)
    ours, theirs = pair.ours.state_dict(), pair.theirs.state_dict()
    assert list(ours["state"]) == list(theirs["state"])
    for mine, other in zip(ours["state"].values(), theirs["state"].values(), strict=True):
        assert list(mine) == list(other)
        for name, t in other.items():
            assert (mine[name].device, mine[name].dtype) == (t.device, t.dtype), name
        assert mine["step"].item() == 3
    pair.run(1)
    assert ours["state"][0]["step"].item() in (3, 4)  # torch's own are views of what goes on
    pair.theirs.load_state_dict(copy.deepcopy(pair.ours.state_dict()))
    pair.run(2)


def test_a_checkpoint_keeps_state_of_no_parameter():
    pair = twins(BY_NAME["adam"])
    pair.run(1)
    pair.ours.state["global_step"] = 5
    saved = pair.ours.state_dict()
    assert saved["state"]["global_step"] == 5
    pair.ours.load_state_dict(saved)
    pair.run(1)


def test_a_plain_checkpoint_loads_and_the_position_is_set():
    pair = twins(BY_NAME["adam"])
    pair.run(3)
    pair.ours.load_state_dict(copy.deepcopy(pair.theirs.state_dict()))
    assert pair.ours.iteration == 0
    pair.run(2)
    pair.ours.set_iteration(9)
    pair.run(2)


# ---- refusals


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-cycled"])
@pytest.mark.skipif(RUNS and not INTERPRETED, reason="the ranks' tensors are on the CPU")
def test_a_ranks_part_of_dtensors(ranks, name, max_norm):
    expected, norms = test_distributed.reference(BY_NAME[name], max_norm)
    for result in ranks.run(2, test_distributed.train, name, "fsdp", "triton", max_norm):
        assert result["backends"] == {"triton"}
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
        for ours, theirs in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(RUNS and not INTERPRETED, reason="the ranks' tensors are on the CPU")
def test_the_norm_on_a_rank_without_gradients(ranks):
    found = ranks.run(2, test_distributed.norm_of_the_first_ranks_gradient, "triton")
    assert found == [pytest.approx(12**0.5)] * 2


@on_gpus
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam-wd"])
def test_dtensors_on_a_gpu(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = BY_NAME[name]
    dist = torch.distributed
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        torch.manual_seed(0)
        plain = torch.nn.Linear(70, 30).to(DEVICE)
        sharded = copy.deepcopy(plain)
        fully_shard(sharded, mesh=init_device_mesh("cuda", (1,)))
        ours = case.ours(sharded.parameters(), backend="triton", max_grad_norm=0.5)
        theirs = case.ours(plain.parameters(), backend="torch", max_grad_norm=0.5)
        for _ in range(4):
            x = torch.randn(8, 70, device=DEVICE)
            for model, opt in ((sharded, ours), (plain, theirs)):
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
    finally:
        dist.destroy_process_group()


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inner = torch.optim.SGD(parameters([torch.ones(3)]), lr=0.1)
    groups = str(inner.param_groups)
    with pytest.raises(ValueError, match=r"(?s)'triton' cannot serve SGD: .* on cpu, .*INTERPRET"):
        CyclicalOptimizer(inner, backend="triton")
    assert str(inner.param_groups) == groups


def test_the_host_knows_where_a_kernels_own_scalars_begin():
    from clr_optim.backends import triton
    from clr_optim.kernels.triton import multi_tensor

    assert len(multi_tensor.GROUP) == triton._OWN


def test_a_triton_that_cannot_compile_is_a_build_error(monkeypatch):
    from clr_optim.backends.triton import BuildError, try_out
    from clr_optim.kernels.triton import multi_tensor

    class Broken:
        def __getitem__(self, grid):
            raise OSError("fatal error: Python.h: No such file or directory\nmore")

    try_out(DEVICE)
    monkeypatch.setattr(multi_tensor, "open_gate", Broken())
    with pytest.raises(
        BuildError, match=r"Triton on .*: OSError: fatal error: Python\.h.*directory$"
    ):
        try_out(DEVICE)


def test_by_name_it_refuses_other_optimizers():
    inner = torch.optim.NAdam(parameters(drawn([(3,)], torch.float32)))
    with pytest.raises(ValueError, match="'triton' cannot serve NAdam: no fused kernel for NAdam"):
        CyclicalOptimizer(inner, backend="triton")


def test_by_name_it_refuses_what_only_torch_can_do_and_changes_nothing():
    pair = twins(BY_NAME["sgd-mom"])
    pair.run(2)
    pair.draw()
    p = members(pair.ours)[0]
    good = p.grad
    p.grad = good.t().contiguous().t()
    before = copy.deepcopy(tensors_of(pair.ours))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'triton' cannot serve 1 .*another layout"):
            pair.ours.step()
    assert pair.ours.iteration == 2
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())
    p.grad = good
    pair.step()
    pair.run(2)


def test_explain_names_it():
    opt = wrapped(torch.optim.Adam(parameters(drawn([(3,)], torch.float32))), backend="triton")
    assert opt.explain().startswith("triton: 1 parameter tensors, 3 values, Adam")


WITHOUT_TRITON = """
import importlib.util, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else found(name, *more)
from clr_optim import CyclicalOptimizer
try:
    CyclicalOptimizer(torch.optim.SGD([torch.ones(1)], lr=0.1), backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_it_says_how_to_get_it():
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=dict(os.environ), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "Triton is not installed: pip install" in out.stdout


# ---- on a GPU only


@on_gpus
def test_nothing_is_compiled_anew_as_a_run_goes_on(monkeypatch):
    import triton

    params = parameters(drawn([(33,), (5, 7), (1,)], torch.float32))
    opt = wrapped(
        torch.optim.AdamW(params, lr=0.1), backend="triton", cycle_momentum=True, step_size_up=50
    )
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda *args, **more: compiled.append(more) or False
    )
    grads = [torch.randn_like(p) for p in params]
    at_first = None
    for k in range(1000):
        for i, p in enumerate(params):
            p.grad = None if (k >> i) & 1 and k % 5 else grads[i]
        group = opt.param_groups[0]
        group["weight_decay"] = 0.0 if k % 7 == 0 else 0.01 * k
        group["betas"] = (group["betas"][0], 1.0 if k % 11 == 0 else 0.999 - 1e-4 * k)
        if k % 100 == 0:
            opt.set_bounds(base_lr=0.0, max_lr=0.1 / (1 + k))
        opt.step()
        if k == 0:
            at_first = len(compiled)
    assert len(compiled) == at_first


@on_gpus
def test_a_tensor_of_more_elements_than_an_int32_counts():
    count = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip("needs 13 GB of the GPU's memory")
    p = torch.nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    p.grad[-5:] = torch.arange(2, 7, device=DEVICE)
    opt = wrapped(torch.optim.SGD([p], lr=0.5), base_lr=0.5, max_lr=0.5, backend="triton")
    opt.step()
    assert p[-5:].tolist() == [-1.0, -1.5, -2.0, -2.5, -3.0]
    assert all(bool((part == -0.5).all()) for part in p.detach()[:-5].split(2**28))


@on_gpus
def test_a_side_stream():
    pair = twins(BY_NAME["adamw-ams"], ((300, 300), (7,)), max_grad_norm=1.0)

    def step():
        pair.draw()
        torch.nn.utils.clip_grad_norm_(members(pair.theirs), 1.0)
        pair.step()

    step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    pair.ours.step()


@on_gpus
def test_two_devices(launches):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pair = Twins(
        lambda: torch.optim.Adam(
            [
                torch.nn.Parameter(v.to(f"cuda:{i}"))
                for i, v in enumerate(drawn([(5, 3), (7,)], torch.float64))
            ],
            lr=0.1,
            foreach=False,
        )
    )
    pair.run(4)
    assert [len(counted.taken()) for counted in launches] == [8, 8]


@on_gpus
def test_counters_are_on_the_device_and_in_a_state_dict_on_the_cpu():
    pair = twins(BY_NAME["adam"])
    pair.run(2)
    for p in members(pair.ours):
        assert pair.ours.state[p]["step"].device == DEVICE
    saved = pair.ours.state_dict()
    for state in saved["state"].values():
        assert state["step"].device.type == "cpu"
        assert state["step"].item() == 2
    pair.run(1)


@on_gpus
@kernels
def test_a_checkpoint_moves_from_the_cpu(case):
    def make(device, backend):
        values = [v.to(device) for v in drawn([(5, 3), (7,)], torch.float64)]
        return case.ours(parameters(values), backend=backend)

    there, here = make("cpu", "torch"), make(DEVICE, "triton")

    def step(opt, k):
        for i, p in enumerate(members(opt)):
            p.grad = drawn([p.shape], torch.float64, 10 * k + i)[0].to(p.device)
        opt.step()

    for k in range(3):
        step(there, k)
    # A copy, as a file is: torch's loading shares the counters, which are on the CPU anyway.
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    for p, q in zip(members(here), members(there), strict=True):
        p.data.copy_(q.detach())
    assert here.iteration == 3
    for k in range(3, 6):
        step(there, k)
        step(here, k)
    assert_alike(here, there)


@on_gpus
def test_an_amp_overflow_moves_nothing():
    pair = twins(BY_NAME["adam"], max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    opt = pair.ours
    for k in range(4):
        opt.zero_grad()
        scaler.scale(sum((p**2).sum() for p in members(opt))).backward()
        if k == 2:
            members(opt)[0].grad[0, 0] = math.inf
        before, position = copy.deepcopy(tensors_of(opt)), opt.iteration
        scaler.step(opt)
        scaler.update()
        assert opt.iteration == position + (k != 2)
        if k == 2:
            assert all(torch.equal(t, before[key]) for key, t in tensors_of(opt).items())


@on_gpus
def test_equal_runs_give_equal_bits():
    def run():
        case = BY_NAME["adamw-ams"]
        opt = case.ours(parameters(drawn([(9000,), (7,)], torch.float32)), backend="triton")
        for k in range(3):
            for p, g in zip(members(opt), drawn([(9000,), (7,)], torch.float32, k), strict=True):
                p.grad = g
            opt.step()
        return opt

    assert_identical(run(), run())
