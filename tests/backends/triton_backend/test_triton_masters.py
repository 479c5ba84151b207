"""Float32 masters of bfloat16 parameters on the device, beside float32 models and NumPy's bits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from graph_helpers import Run, nothing_waits, scaled
from internals import plan_of
from native_helpers import BY_NAME, KERNELS, unaligned
from triton_helpers import (
    DEVICE,
    INTERPRETED,
    MARKS,
    RUNS,
    SLOW,
    choose_triton,
    in_both_ways,
    named,
    on_gpus,
    take_way,
)

from clr_optim import CycleEnd, Ema
from clr_optim import masters as on_host

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)

REST = "clr_rest"

if RUNS:
    import triton
    import triton.language as tl

    from clr_optim.kernels.triton.masters import join, split

    @triton.jit
    def _join(uppers, rests, masters, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(masters + at, join(tl.load(uppers + at), tl.load(rests + at)))

    @triton.jit
    def _split(masters, uppers, rests, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        param, rest = split(tl.load(masters + at))
        tl.store(uppers + at, param)
        tl.store(rests + at, rest)


# ---- bits


def launched(kernel, *tensors):
    """Launch a kernel on tensors of one size: in the interpreter, one program."""
    block = len(tensors[0]) if INTERPRETED else 1024
    on_device = [torch.from_numpy(tensor).to(DEVICE) for tensor in tensors]
    kernel[(len(tensors[0]) // block,)](*on_device, BLOCK=block)
    return [tensor.cpu().numpy() for tensor in on_device]


def joined(params, rests):
    masters = np.zeros(len(params), np.float32)
    return launched(_join, params.view(np.int16), rests, masters)[2]


def parted(masters):
    halves = [np.zeros(len(masters), np.int16) for _ in range(2)]
    return launched(_split, masters, *halves)[1:]


PARAMS = np.arange(1 << 16, dtype=np.uint16)
RESTS = [0, 1, -1, 2, 0x7FFF, -0x8000, 0x4000, -0x4001, 12345, -12345]
# The fake device takes each program by itself.
SOME = RESTS[:6] if SLOW and not INTERPRETED else [*RESTS, *range(-30_000, 30_000, 1009)]


@pytest.mark.parametrize("rest", SOME)
def test_every_parameter_with_a_rest(rest):
    """No pair makes NaN of a number, and each master that has a pair keeps it."""
    rests = np.full(1 << 16, rest, np.int16)
    found = joined(PARAMS, rests)
    rounded = (PARAMS.astype(np.uint32) << 16).view(np.float32)
    is_nan = np.isnan(rounded)
    assert np.isnan(found[is_nan]).all()
    magnitude = PARAMS & 0x7FFF
    is_stale = (magnitude == 0) & (rest < 0) | (magnitude == 0x7F80) & (rest > 0)
    assert (found[is_stale] == rounded[is_stale]).all()
    assert (np.signbit(found) == np.signbit(rounded))[~is_nan].all()
    exact = ~is_nan & ~is_stale
    bits = (PARAMS.astype(np.int64) << 16) + rest
    assert (found.view(np.uint32)[exact] == bits[exact]).all()
    params, rests_again = parted(found)
    assert (params.view(np.uint16)[exact] == PARAMS[exact]).all()
    assert (rests_again[exact] == rest).all()


def test_masters_are_rounded_to_nearest_and_come_back():
    """Subnormals, ties, the largest numbers, infinities, NaN, and random bits."""
    ends = np.array([0, 1, 2, 0x3FFF, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF], np.uint32)
    uppers = [0, 1, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]
    known = [(u << 16) | ends for each in uppers for u in (each, each | 0x8000)]
    drawn = np.random.default_rng(3).integers(0, 1 << 32, 1 << 15, dtype=np.uint32)
    bits = np.concatenate([*known, drawn])[: 1 << 15].astype(np.uint32)
    masters = bits.view(np.float32)
    params, rests = parted(masters)
    is_nan = np.isnan(masters)
    assert (params[is_nan] == 0x7FC0).all()
    assert (rests[is_nan] == 0).all()
    again = joined(params.view(np.uint16), rests)
    assert np.isnan(again[is_nan]).all()
    assert (again.view(np.uint32) == bits)[~is_nan].all()
    # To nearest, ties away from zero, in exact arithmetic.
    finite = np.isfinite(masters)
    bits, exact = bits[finite], masters[finite].astype(np.float64)
    rounded = params.view(np.uint16)[finite].astype(np.int64)
    down = (bits & 0xFFFF0000).view(np.float32).astype(np.float64)
    unit = np.spacing(down.astype(np.float32)).astype(np.float64) * 65536  # signed as the number
    is_up = abs(exact - down) >= abs(unit) / 2
    assert (rounded == (bits >> 16) + is_up).all()


# ---- steps


class Masters(Run):
    """A run of bfloat16 parameters with masters."""

    def __init__(self, case, **options):
        super().__init__(case, dtype=torch.bfloat16, master_weights=True, **options)

    def masters(self):
        states = [self.opt.state.get(p, {}) for p in self.params]
        return [
            on_host.join(p.detach(), state[REST]) if REST in state else p.detach().float()
            for p, state in zip(self.params, states, strict=True)
        ]

    def states(self):
        return [
            {name: value for name, value in self.opt.state.get(p, {}).items() if name != REST}
            for p in self.params
        ]


class Twin(Run):
    """The float32 model with the same first parameters and gradients."""

    def __init__(self, case, **options):
        super().__init__(case, **options)
        self.take([p.detach().bfloat16() for p in self.params])

    def take(self, values):
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)

    def draw(self, number):
        return [grad.bfloat16().float() for grad in super().draw(number)]

    def masters(self):
        return [p.detach() for p in self.params]

    states = Masters.states


def assert_masters(ours, twin):
    """Compare masters and state bit for bit: a zero's sign counts, and NaN equals NaN."""
    assert ours.opt.iteration == twin.opt.iteration
    for master, wanted in zip(ours.masters(), twin.masters(), strict=True):
        same = master.view(torch.int32) == wanted.view(torch.int32)
        assert (same | (master.isnan() & wanted.isnan())).all()
    for p, state, wanted in zip(ours.params, ours.states(), twin.states(), strict=True):
        if state and REST not in ours.opt.state[p]:
            continue  # torch's constructor has made the state of Adagrad, in bfloat16
        assert list(state) == list(wanted)
        for name, value in state.items():
            assert value.dtype == wanted[name].dtype
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0, equal_nan=True)


def both(name, **options):
    return Masters(BY_NAME[name], **options), Twin(BY_NAME[name], **options)


@pytest.mark.parametrize("cell", in_both_ways((case,) for case in KERNELS), ids=named)
def test_each_rule_equals_the_float32_model(monkeypatch, cell):
    case, way = cell
    take_way(monkeypatch, way)
    runs = [kind(case, shapes=[(5, 3), (2500,), (), (0,)]) for kind in (Masters, Twin)]
    for k in range(4):
        for run in runs:
            run.eager(k, idle={0: 2, 2: 1}.get(k))
        assert_masters(*runs)
    assert all(p.dtype == ours.dtype == torch.bfloat16 for p in runs[0].params for ours in [
        runs[0].opt.state[p][REST]
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["sgd-nest-wd", "adam"])
def test_unaligned_parameters(name):
    runs = both(name)
    for run in runs:
        old = run.opt.param_groups[0]["params"]
        run.params[:] = [torch.nn.Parameter(unaligned(p.detach())) for p in run.params]
        old[:] = run.params
    for k in range(3):
        for run in runs:
            run.eager(k)
        assert_masters(*runs)


def test_numbers_at_the_ends_of_the_format():
    """Subnormals, the largest numbers, infinities and NaN; steps across them."""
    ends = [
        0.0,
        -0.0,
        1e-40,
        -1e-45,
        3.3895e38,
        -3.39e38,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    runs = both("sgd", shapes=[(9,)])
    for run in runs:
        with torch.no_grad():
            run.params[0].copy_(torch.tensor(ends).bfloat16())
    for k in range(4):
        for run in runs:
            run.eager(k)
        assert_masters(*runs)


@pytest.mark.parametrize("way", ["one-launch", "two-launches"])
@pytest.mark.parametrize(
    "average", [Ema(0.9), Ema(0.5, 2, dtype=torch.float32), CycleEnd()], ids=str
)
def test_averages_move_toward_the_masters(monkeypatch, average, way):
    take_way(monkeypatch, way)
    runs = both("adam", average=average, step_size_up=1)
    for k in range(5):
        for run in runs:
            run.eager(k, idle=k % 3)
        assert_masters(*runs)
    assert all(state["clr_average"].dtype == torch.float32 for state in runs[0].states())


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.5}, {"skip_above": 40.0}, {"policy": "triangular2", "step_size_up": 2}],
    ids=str,
)
def test_clipping_gate_and_another_policy(options):
    runs = both("adam-wd", shapes=[(5, 3), (900,)], **options)
    for k in range(5):
        for run in runs:
            for p, grad in zip(run.params, run.draw(k), strict=True):
                p.grad = grad * (64.0 if k == 2 else 1.0)
            run.opt.step()
        assert_masters(*runs)
    assert runs[0].opt.skipped == runs[1].opt.skipped == ("skip_above" in options)


def test_a_grad_scaler_that_overflows():
    runs = both("adam")
    for k, overflow in enumerate([False, True, False]):
        for run in runs:
            scaled(run, k, 4.0, overflow)
            run.opt.step()
        assert_masters(*runs)
    assert runs[0].opt.iteration == 2


def test_a_graph_and_eager_steps_in_turn():
    ours, twin = both("adam", average=Ema(0.9))
    ours.eager(0)
    graph = ours.capture()
    for k in range(1, 6):
        if k == 3:
            for p, grad in zip(ours.params, ours.draw(k), strict=True):
                p.grad = grad
            with nothing_waits():
                ours.opt.step()
        else:
            ours.replay(graph, k)
    for k in range(6):
        twin.eager(k)
    assert_masters(ours, twin)


def test_saved_and_loaded():
    ours, twin = both("rmsprop-mom-cent")
    for k in range(6):
        if k == 3:
            saved = copy.deepcopy(ours.opt.state_dict())
            older, ours = ours, Masters(BY_NAME["rmsprop-mom-cent"])
            for p, q in zip(ours.params, older.params, strict=True):
                p.data.copy_(q.detach())
            ours.opt.load_state_dict(saved)
        for run in (ours, twin):
            run.eager(k)
        assert_masters(ours, twin)


def test_other_code_writes_the_parameters():
    """Zeroed, masked and clamped parameters keep a master within half a unit of them."""
    ours, twin = both("adam")
    writes = [
        torch.Tensor.zero_,
        lambda p: p.mul_(torch.arange(p.numel(), device=p.device).view(p.shape) % 2),
        lambda p: p.clamp_(-0.5, 0.5),
        torch.Tensor.neg_,
        lambda p: p.mul_(float("inf")),
    ]
    for k, write in enumerate(writes):
        for run in (ours, twin):
            run.eager(k)
        with torch.no_grad():
            for p in ours.params:
                write(p)
        for p, master in zip(ours.params, ours.masters(), strict=True):
            assert torch.equal(master.isnan(), p.isnan())
            assert torch.equal(master.signbit() | master.isnan(), p.signbit() | p.isnan())
        twin.take(ours.masters())
        for run in (ours, twin):
            run.eager(k + 10)
        assert_masters(ours, twin)


# ---- GPUs only


@on_gpus
def test_native_code_repeats_the_launches():
    ours, twin = both("adam", step_size_up=2)
    ordinary = []
    for k in range(12):
        launches = plan_of(ours.opt).native.launches
        for run in (ours, twin):
            run.eager(k)
        ordinary.append(launches is not None and plan_of(ours.opt).native.launches is launches)
        assert_masters(ours, twin)
    assert sum(ordinary) >= 8
