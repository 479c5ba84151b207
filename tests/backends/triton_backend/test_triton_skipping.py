"""``skip_above`` on a GPU: the device decides as the host would, and no step waits for it."""

from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import DEVICE, Run, assert_together, nothing_waits, scaled
from internals import take_the_general_way
from native_helpers import BY_NAME, KERNELS
from triton_helpers import INTERPRETED, MARKS, choose_triton

from clr_optim import CyclicalOptimizer, Spike
from clr_optim.gate import Gate

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:skip_above=")]

SHAPES = [(5, 3), (40,)]
SPIKE = Spike(sigmas=8.0, window=8)


def spoil(run: Run, number: int, bad: str) -> None:
    """Set bad gradients."""
    for param, grad in zip(run.params, run.draw(number), strict=True):
        param.grad = grad * (1e4 if bad == "spike" else 1.0)
    if bad != "spike":
        run.params[1].grad[7] = float(bad)


def try_a_bad_step(run: Run, number: int, bad: str) -> None:
    spoil(run, number, bad)
    run.opt.step()


def assert_never_was(run: Run, plain: Run, steps: int, seed: int, *, amp: bool = False) -> None:
    """Run both with the same gradients, and one with bad tries between its steps."""
    chance = random.Random(seed)
    skipped = 0
    for number in range(steps):
        while number > 12 and chance.random() < 0.4:
            bad = chance.choice(["nan", "inf", "spike"])
            if amp:
                scaled(run, number, 2.0 ** chance.randrange(9), overflow=bad != "spike")
                for param in run.params if bad == "spike" else ():
                    param.grad *= 1e4
            else:
                spoil(run, number, bad)
            with nothing_waits():
                run.opt.step()
            skipped += bad == "spike" or not amp
        if amp:
            scaled(run, number, 2.0 ** chance.randrange(9), overflow=False)
            scaled(plain, number, 1.0, overflow=False)
            run.opt.step()
            plain.opt.step()
        else:
            run.eager(number)
            plain.eager(number)
    assert skipped > 1
    assert run.opt.skipped == skipped
    assert_same_tensors(run, plain)
    assert run.opt.iteration == plain.opt.iteration == steps
    assert run.opt.get_last_lr() == plain.opt.get_last_lr()


def assert_same_tensors(run: Run, plain: Run) -> None:
    for param, other in zip(run.params, plain.params, strict=True):
        assert torch.equal(param, other)
        ours, twins = run.opt.state.get(param, {}), plain.opt.state.get(other, {})
        assert ours.keys() == twins.keys()
        for key, value in ours.items():
            equal = torch.equal(value, twins[key]) if torch.is_tensor(value) else False
            assert equal or value == twins[key], key


@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_skipped_steps_never_were_and_nothing_waits(case, amp):
    clip = 0.5 if amp else None
    run = Run(case, shapes=SHAPES, skip_above=500.0 if amp else SPIKE, max_grad_norm=clip)
    assert_never_was(run, Run(case, shapes=SHAPES, max_grad_norm=clip), 30, 3, amp=amp)


@pytest.mark.parametrize("skip_above", [500.0, SPIKE], ids=["number", "spike"])
def test_five_hundred_tries(skip_above):
    run = Run(BY_NAME["adam-wd"], shapes=[(3,), (8,)], skip_above=skip_above, max_grad_norm=1.0)
    assert_never_was(run, Run(BY_NAME["adam-wd"], shapes=[(3,), (8,)], max_grad_norm=1.0), 300, 4)


@pytest.mark.parametrize("bad", ["nan", "spike"])
def test_a_first_step_that_is_skipped_creates_no_state(bad):
    run = Run(BY_NAME["adam-wd"], shapes=SHAPES, skip_above=500.0)
    plain = Run(BY_NAME["adam-wd"], shapes=SHAPES)
    try_a_bad_step(run, 0, bad)
    assert not run.opt.state
    assert run.opt.iteration == 0
    for number in range(3):
        run.eager(number)
        plain.eager(number)
    assert_same_tensors(run, plain)
    assert run.opt.skipped == 1


def test_a_cycle_end_hook_runs_for_steps_that_happen():
    run = Run(BY_NAME["sgd-mom"], shapes=SHAPES, skip_above=500.0)
    ended: list[int] = []
    run.opt.register_cycle_end_hook(lambda opt: ended.append(opt.iteration))
    for number in range(14):
        if number % 3 == 0:
            try_a_bad_step(run, number, "spike")
        run.eager(number)
    assert ended == [6, 12]
    assert run.opt.skipped == 5


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("skip_above", [500.0, SPIKE], ids=["number", "spike"])
def test_a_graph_skips(skip_above, clip):
    options = {"shapes": SHAPES, "max_grad_norm": clip}
    run = Run(BY_NAME["adam-wd"], skip_above=skip_above, **options)
    plain = Run(BY_NAME["adam-wd"], **options)
    run.eager(0)
    plain.eager(0)
    graph = run.capture()
    chance = random.Random(6)
    skipped = 0
    for number in range(1, 60):
        while number > 10 and chance.random() < 0.3:
            for static, grad in zip(run.static, run.draw(number), strict=True):
                static.copy_(grad * 1e4)
            if chance.random() < 0.5:
                run.static[1][3] = float(chance.choice(["nan", "inf"]))
            graph.replay()
            skipped += 1
        if number % 20 == 0:  # eager steps and questions between replays
            assert run.opt.skipped == skipped
            run.eager(number)
        else:
            run.replay(graph, number)
        plain.eager(number)
    assert skipped > 5
    assert run.opt.iteration == plain.opt.iteration == 60
    assert run.opt.skipped == skipped
    assert_same_tensors(run, plain)


def test_a_graph_goes_on_from_the_statistics_of_a_checkpoint():
    run, whole = (Run(BY_NAME["adam-wd"], shapes=SHAPES, skip_above=SPIKE) for _ in range(2))
    for number in range(12):
        run.eager(number)
        whole.eager(number)
    saved = copy.deepcopy(run.opt.state_dict())
    values = [p.detach().clone() for p in run.params]
    graph = run.capture()
    run.replay(graph, 50)
    run.opt.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(run.params, values, strict=True):
            param.copy_(value)
    assert run.opt.state_dict()["param_groups"] == saved["param_groups"]
    run.eager(12)
    whole.eager(12)
    graph = run.capture()
    for number in (13, 14):
        run.replay(graph, number)
        whole.eager(number)
    assert_together(run, whole)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_needs_a_step_after_a_load():
    run = Run(BY_NAME["sgd"], shapes=SHAPES, skip_above=SPIKE)
    run.eager(0)
    run.opt.load_state_dict(run.opt.state_dict())
    with pytest.raises(RuntimeError, match="cannot be captured"):
        run.capture()
    run.eager(1)
    run.capture()


def test_what_no_kernel_serves_is_skipped_together_with_the_rest(monkeypatch):
    choose_triton(monkeypatch)
    runs = []
    for skip_above in (100.0, None):
        values = torch.ones(3), torch.ones(2, dtype=torch.complex64)
        params = [torch.nn.Parameter(value.to(DEVICE)) for value in values]
        inner = torch.optim.Adam(params, lr=0.1, foreach=False)
        opt = CyclicalOptimizer(inner, skip_above=skip_above)
        for k in range(6):
            if k % 2 and skip_above:
                params[0].grad = torch.ones_like(params[0])
                params[1].grad = torch.full_like(params[1], 1e4)
                opt.step()
            for p in params:
                p.grad = torch.ones_like(p) * (k + 1)
            opt.step()
        runs.append((opt, params))
    (ours, mine), (_, twins) = runs
    assert "triton: 1 parameter" in ours.explain()
    assert ours.skipped == 3
    assert all(map(torch.equal, mine, twins))


def test_an_interrupt_between_gate_and_update_leaves_no_norm(monkeypatch):
    run, plain = (Run(BY_NAME["adam-wd"], shapes=SHAPES, skip_above=SPIKE) for _ in range(2))
    for number in range(4):
        run.eager(number)
        plain.eager(number)
    assert run.opt.skipped == 0  # the host knows the position
    backend = run.opt._shared.serving.fused
    with monkeypatch.context() as patch:

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        take_the_general_way(patch)
        patch.setattr(type(backend), "_step_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.eager(4)
    run.eager(4)
    plain.eager(4)
    assert_together(run, plain)


# ---- the formula


@pytest.mark.parametrize(
    "skip_above", [2.0, math.inf, Spike(4.0, 8), Spike(2.0, 4, warmup=2), Spike()], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_device_computes_what_the_host_computes(skip_above, dtype):
    from clr_optim.backends.triton.clock import fill_gate

    chance = np.random.default_rng(7)
    steps = 150 if INTERPRETED else 2000
    norms = chance.lognormal(0.0, 0.3, steps)
    norms[chance.random(steps) < 0.05] *= 20.0
    norms[steps // 2 : steps // 2 + 20] = 50.0
    for value in (math.nan, math.inf, 0.0, 1e200):
        norms[chance.random(steps) < 0.03] = value
    host = Gate(skip_above)
    one = torch.ones((), device=DEVICE)
    gate = torch.zeros(7, dtype=torch.float64, device=DEVICE)
    norm = torch.zeros((), dtype=dtype, device=DEVICE)
    limits = torch.tensor([math.inf, *host.limits], dtype=torch.float64, device=DEVICE)
    for value in norms:
        overflows = bool(chance.random() < 0.05)
        sums = torch.tensor([value], dtype=torch.float64, device=DEVICE).square()
        found_inf = torch.tensor(float(overflows), device=DEVICE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fill_gate(sums, 1, limits, one, found_inf, norm, gate, clips=True, skips=True)
        closes = overflows or host.closes(norm.item())
        assert bool(gate[1]) is closes
        assert tuple(gate[2:].tolist()) == host.statistics
