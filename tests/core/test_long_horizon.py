"""Positions past 2**31 and 2**53, counters that stall at 2**24, runs of many steps."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import tracemalloc

import pytest
import torch
from exact_formulas import BASE, FORMULAS, MAX
from native_helpers import KERNELS, assert_alike, drawn, like, members, parameters, twins, wrapped

from clr_optim import schedule
from clr_optim.bench import long_run
from clr_optim.cli import main
from clr_optim.rules import RULES

FAR = [edge + near for edge in (2**24, 2**31, 2**32, 2**53, 2**62) for near in (-2, -1, 0, 1, 2)]


@pytest.mark.parametrize("name", FORMULAS)
def test_the_schedule_far_along(name):
    of, formula = FORMULAS[name]
    for step in FAR:
        assert of(step, BASE, MAX) == pytest.approx(formula(step), rel=1e-15, abs=0), step


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("edge", [2**24, 2**31, 2**32, 2**53])
def test_a_step_far_along(name, backend, edge):
    """The rate that a kernel uses follows from the distance that a weight has moved."""
    of, formula = FORMULAS[name]
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    weight.grad = -torch.ones_like(weight)
    opt = wrapped(torch.optim.SGD([weight], lr=MAX), policy=of, base_lr=BASE, max_lr=MAX,
                  backend=backend, step_size_up=2000)  # fmt: skip
    opt.set_iteration(edge - 3)
    for step in range(edge - 3, edge + 3):
        with torch.no_grad():
            weight.zero_()
        assert opt.iteration == opt.param_groups[0]["clr_step"] == step
        assert opt.get_last_lr() == [opt.param_groups[0]["lr"]]
        opt.step()
        assert weight.tolist() == pytest.approx([formula(step)] * 3, rel=1e-15, abs=0)
    again = wrapped(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=MAX),
                    policy=of, step_size_up=2000)  # fmt: skip
    again.load_state_dict(opt.state_dict())
    assert again.iteration == edge + 3
    assert again.get_last_lr() == opt.get_last_lr()


COUNTING = [case for case in KERNELS if RULES[case.cls].has_step]


def at_step(pair, step):
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["step"].fill_(step)


@pytest.mark.parametrize("case", COUNTING, ids=lambda case: case.name)
def test_torchs_own_counter_stalls_where_it_does_in_torch(case):
    """The float32 counter stalls at 2**24. The cycle goes on."""
    pair = twins(case)
    pair.run(2)
    at_step(pair, 2**24 - 2)
    for expected in (-1, 0, 0, 0):
        pair.run(1)
        for opt in pair.both():
            assert {opt.state[p]["step"].item() for p in members(opt)} == {2**24 + expected}
    assert pair.ours.iteration == 6


@pytest.mark.parametrize("case", COUNTING, ids=lambda case: case.name)
def test_a_counter_of_float64_goes_on(case):
    torch.set_default_dtype(torch.float64)
    try:
        pair = twins(case)
        pair.run(2)
        at_step(pair, 2**24 - 2)
        pair.run(4)
    finally:
        torch.set_default_dtype(torch.float32)
    for opt in pair.both():
        assert {opt.state[p]["step"].item() for p in members(opt)} == {2**24 + 2}


def test_a_long_first_moment_far_along():
    """At the stalled counter bias corrections are 1, as in torch."""
    case = COUNTING[0]
    pair = twins(case)
    pair.run(1)
    pair.ours.set_iteration(2**40)
    at_step(pair, 2**24)
    for _ in range(5):
        pair.draw()
        pair.step()
    assert_alike(*pair.both())
    assert pair.ours.iteration == 2**40 + 5


# ---- many steps


def test_the_formulas_of_the_long_run():
    own = schedule.triangular(step_size_up=long_run._UP)
    bounds = long_run._BASE, long_run._MAX
    for step in (0, 1, 1999, 2000, 2001, 3999, 4000, 10**7 + 17):
        assert long_run.rate(step) == pytest.approx(own(step, *bounds), rel=1e-15)
    rates = [own(step, *bounds) for step in range(9_123)]
    assert long_run.way(9_123) == pytest.approx(math.fsum(rates), rel=1e-14)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_long_run(backend, tmp_path):
    """20,000 steps in another process: the rate does not drift, and memory does not grow."""
    path = tmp_path / "long.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clr_optim.bench.long_run", "--steps", "20000"),
            *("--rows", "4", "--backend", backend, "--json", str(path)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["iteration"] == results["steps"] == 20_000
    assert results["largest_error_of_rate"] <= 1e-15
    assert results["error_of_sum_of_rates"] <= 1e-12
    assert [row["until"] for row in results["rows"]] == [5_000, 10_000, 15_000, 20_000]
    assert results["grown_kib"] is None or results["grown_kib"] <= 1024


def _traced_memory() -> int:
    """Return the bytes of all traced objects, without those that only Python's caches hold.

    The cache of attributes holds the name of each lookup. torch looks up ``__torch_function__`` by
    a new string each time, so the cache grows for thousands of steps.
    """
    gc.collect()
    if hasattr(sys, "_clear_internal_caches"):  # from Python 3.13 on
        sys._clear_internal_caches()
    else:
        sys._clear_type_cache()
    return tracemalloc.get_traced_memory()[0]


def test_python_objects_do_not_pile_up():
    """After many steps as many gradients, plans and states are alive as after few."""
    opt = KERNELS[2].ours(parameters(drawn([(3,), (4,)], torch.float32)), max_grad_norm=1.0)

    def some(steps):
        for k in range(steps):
            for p in members(opt):
                p.grad = like(torch.ones(p.shape), p) if (k + p.numel()) % 5 else None
            opt.step()

    some(100)
    tracemalloc.start()
    try:
        some(500)
        before = _traced_memory()
        some(3000)
        after = _traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before <= 4096  # one object per step would be 100 times as much


def test_the_command_of_the_long_run(tmp_path, capsys):
    path = tmp_path / "long.json"
    assert main(["bench", "long", "--steps", "2000", "--rows", "2", "--json", str(path)]) == 0
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 2
    assert "2,000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "long", "--steps", "2001"])
    assert "--steps 2001 must be a positive multiple" in capsys.readouterr().err
